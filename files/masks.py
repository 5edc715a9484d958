"""What the pixels of a mask mean: the classes, their values and colours, as classes.txt describes them."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from files.images import PHOTOMETRIC
from files.pictures import NAMES, Palette, voc_palette
from files.whole import read_lines
from utils import IGNORE_INDEX, UserError

MAX_CLASSES = 255  # a label is a byte, of which IGNORE_INDEX is one value
IGNORE = "ignore"  # the name that is no class
VOC_CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
]
VOC_COLORS = [tuple(color) for color in voc_palette()]
COLOR_MODES = ("RGB", "RGBA")  # Pillow's, of masks that go by colours


class Labels:
    """The classes of a data set, and which pixels of its mask files are which.

    Args:
        classes, palette: name and colour of each class.
        values: the class of each value in a mask of grey, palette or id pixels; `IGNORE_INDEX` for what is
            not learned. None stands for the classes' own numbers. 255 is ignored unless it is a class.
        colors: the class of each colour (r, g, b) in an RGB mask.
        source: the file that says so, for messages.
        others_ignored: any other value is ignored, too, instead of being an error.
    """

    def __init__(
        self,
        classes: Sequence[str],
        palette: Palette,
        values: dict[int, int] | None = None,
        colors: dict[tuple[int, int, int], int] | None = None,
        source: str | None = None,
        others_ignored: bool = False,
    ):
        self.classes, self.palette, self.source = classes, palette, source
        self.others_ignored = others_ignored
        values = {i: i for i in range(len(classes))} if values is None else values
        self.ignored_by_default = IGNORE_INDEX not in values  # not because somebody wrote it
        self.values = {IGNORE_INDEX: IGNORE_INDEX, **values}
        # Colours as the numbers that their bytes in memory are.
        self.colors = {r | g << 8 | b << 16: label for (r, g, b), label in (colors or {}).items()}
        self.tables: dict[int, np.ndarray] = {}  # of all values or colours below a bound

    def read(self, picture: Image.Image, path: str) -> np.ndarray:
        """The labels, uint8 (H, W), of a mask that `images.open_image` has opened from `path`.

        Masks of one byte a pixel (grey, palette or bits) and of 16 or 32 bits go by the pixels' values, RGB
        and RGBA masks by the colours. Raises UserError for a pixel that is no class and not ignored, or a
        mask of another kind."""
        if picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == 0:
            hint = "programs disagree on the values of such: save it as a PNG"
            raise UserError(f"{path}: a mask in a TIFF whose 0 is white; {hint}")
        if picture.mode in COLOR_MODES:
            self.check_colors(path)
            # Pillow has four bytes for each pixel in memory; the last is alpha, or nothing.
            packed = np.frombuffer(picture.tobytes("raw", picture.mode.ljust(4, "X")), "<u4")
            colors = packed.reshape(picture.height, -1) & 0xFFFFFF
            if picture.mode == "RGBA":
                check_transparency(colors, np.asarray(picture.getchannel(3)), 1 << 24, path)
            return self.look_up(colors, self.colors, 1 << 24, path)
        if picture.mode in ("LA", "PA"):
            picture, alpha = picture.getchannel(0), picture.getchannel(1)
            check_transparency(np.asarray(picture), np.asarray(alpha), 256, path)
        if picture.mode == "P" and (table := self.named_in(picture, path)) is not None:
            return table[np.asarray(picture)]
        if picture.mode == "P" and self.colors and self.goes_by_color(picture, path):
            return self.read(picture.convert("RGBA" if picture.has_transparency_data else "RGB"), path)
        if picture.mode == "P" and not self.colors and self.goes_by_grey(picture, path):
            return self.read(picture.convert("L"), path)
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise UserError(f"{path}: a mask of Pillow's mode {picture.mode}; use grey, palette or RGB PNGs")
        values = np.asarray(picture)
        if values.dtype == bool:
            values = values * np.uint8(self.white(values, path))
        return self.look_up(values, self.values, 256 if values.dtype == np.uint8 else 1 << 16, path)

    def white(self, bits: np.ndarray, path: str) -> int:
        """The value of white in a mask of 1 bit, 1 or 255: what makes PNGs smaller turns grey masks that have
        0 and 255 alone into such. Raises UserError if it can be either."""
        if 1 not in self.values:
            return 1 if self.ignored_by_default else 255
        if bits.any() and (len(self.classes) > 2 or not self.ignored_by_default):
            found = "a mask of 1 bit, of which white can be the value 1 or 255"
            raise UserError(f"{path}: {found}; save it with 8 bits")
        return 1

    def meaning(self) -> dict[str, int]:
        """The label of each value and each colour, such as `value 7` and `colour 0 0 128`."""
        values = {key_name(value, 256): label for value, label in self.values.items()}
        return values | {key_name(color, 1 << 24): label for color, label in self.colors.items()}

    def named_in(self, picture: Image.Image, path: str) -> np.ndarray | None:
        """The label of each value of a palette mask that says what they are, as predictions do: these are
        numbers of classes, and perhaps not what classes.txt says of other masks. None of another mask. Raises
        UserError if it has a class that is none here, or something else than it says."""
        try:
            names, colors = json.loads(picture.info.get(NAMES, ""))
            ours = {*map(type, names)} == {str} and np.shape(colors) == (len(names), 3)
            palette = np.reshape(picture.getpalette("RGB"), (-1, 3)).tolist()
        except (TypeError, ValueError):
            return None
        if not ours:  # a text of another program
            return None
        used = [i for _, i in picture.getcolors()]
        named = {i: names[i] for i in used if i < len(names)}
        if palette[: len(names)] != colors:  # what makes PNGs smaller numbers it anew, and keeps the text
            if not all(i < len(palette) and colors.count(palette[i]) == 1 for i in used):
                found = "its palette has not the colours that the text in it gives to the classes"
                raise UserError(f"{path}: {found}: use the file as --predict has written it")
            named = {i: names[colors.index(palette[i])] for i in used}
        for i, name in named.items():
            if name not in self.classes:
                found = f"it says that {i} is {name!r}, which {self.source or 'this data set'} does not name"
                raise UserError(f"{path}: {found}: name it so, or save its values as grey")
        labels = {i: self.classes.index(name) for i, name in named.items()}
        for i in used:
            if i not in named and self.values.get(i) != IGNORE_INDEX:  # painted in later
                if all(self.values.get(i) == label for i, label in labels.items()):
                    return None
                found = f"{path}: {i} is none of the classes that it names in its text"
                raise UserError(f"{found}, and {self.source or 'this data set'} numbers those in another way")
        table = np.full(256, IGNORE_INDEX, np.uint8)
        table[[*labels]] = [*labels.values()]
        return table

    def goes_by_color(self, picture: Image.Image, path: str) -> bool:
        """Whether the colours of a palette mask tell the classes, and not the values of its pixels.

        They do if all colours that occur are those of classes, or ignored, but stand at other indices than
        the classes' values: what makes PNGs smaller turns RGB masks into such. A palette of grey levels or
        VOC's means nothing. Raises UserError if the palette is neither that nor the classes' colours."""
        palette = np.reshape(picture.getpalette("RGB"), (-1, 3)).tolist()
        colors = {i: tuple(palette[i]) for _, i in picture.getcolors() if i < len(palette)}
        labels = {i: self.colors.get(r | g << 8 | b << 16) for i, (r, g, b) in colors.items()}
        colored = {*self.colors.values()} - {IGNORE_INDEX}

        def agrees(index: int) -> bool:
            value = self.values.get(index)
            if value is None or value in colored:
                return value is not None and labels[index] == value
            return labels[index] in (None, IGNORE_INDEX)

        if all(map(agrees, colors)):
            return False
        if None not in labels.values():
            return True
        if all(color in ((i, i, i), VOC_COLORS[i]) for i, color in colors.items()):
            return False
        if all(r == g == b for r, g, b in colors.values()):
            hint = "save it as grey, without a palette"
            raise UserError(f"{path}: a palette of greys that are not the values of its pixels; {hint}")
        index = next(i for i in colors if labels[i] is None)
        color = " ".join(map(str, colors[index]))
        source = self.source or "VOC, as no labelmap.txt names others,"
        found = f"{path}: its palette has the colour {color} at {index}, which {source} gives to no class"
        raise UserError(f"{found}; give the classes the masks' colours, or none to go by the pixels' values")

    def goes_by_grey(self, picture: Image.Image, path: str) -> bool:
        """Whether the greys of a palette mask tell the classes, and not the values of its pixels.

        They do if a value is no class, but all greys up to it are: what saves a grey mask as a GIF, or makes
        its PNG smaller, numbers the levels that occur. Raises UserError if both are."""
        indices = [i for _, i in picture.getcolors()]
        palette = np.reshape(picture.getpalette("RGB"), (-1, 3))
        levels = palette[: max(indices) + 1, 0].tolist()
        if max(indices) >= len(levels) or (palette != palette[:, :1]).any() or len({*levels}) < len(levels):
            return False
        if not all(level in self.values for level in levels):
            return False
        if not all(index in self.values for index in indices):
            return True
        differ = [i for i in indices if self.values[i] != self.values[levels[i]]]
        if differ and (levels != [0, 255] or len(self.classes) > 2 or not self.ignored_by_default):
            found = f"{differ[0]} in its palette is grey {levels[differ[0]]}, and either can be meant"
            raise UserError(f"{path}: {found}; save its numbers, or the greys, as grey, without a palette")
        return False

    def look_up(self, pixels: np.ndarray, known: dict[int, int], bound: int, path: str) -> np.ndarray:
        """The label of each pixel; `bound` is above all of them, save in masks of 32 bits."""
        if bound == 1 << 16 and not 0 <= pixels.min() <= pixels.max() < bound:
            found, positions = np.unique(pixels, return_inverse=True)
            table = np.array([known.get(value, IGNORE_INDEX) for value in found.tolist()], np.uint8)
            labels = table[positions].reshape(pixels.shape)
        else:
            if bound not in self.tables:
                keys = [key for key in known if 0 <= key < bound]
                table = np.full(bound, IGNORE_INDEX, np.uint8)
                table[keys] = [known[key] for key in keys]
                self.tables[bound] = table  # only now: other threads may look for it
            labels = self.tables[bound].take(pixels)
        strange = labels == IGNORE_INDEX
        if not self.others_ignored and strange.any():
            for key, label in known.items():
                if label == IGNORE_INDEX:
                    strange &= pixels != key
            if strange.any():
                raise UserError(self.describe(pixels, strange, bound, path))
        return labels

    def describe(self, pixels: np.ndarray, strange: np.ndarray, bound: int, path: str) -> str:
        """What is wrong with the first strange pixel, and the line that would name it."""
        y, x = (int(i[0]) for i in np.nonzero(strange))
        value, count = int(pixels[y, x]), int((pixels == pixels[y, x]).sum())
        what = key_name(value, bound)
        line = what.replace("colour ", "").replace("value", "=")
        if bound == 1 << 24 and are_mixtures(found := np.unique(pixels[strange]), [*self.colors]):
            what = f"{len(found)} colours of no class, such as {line} at x {x}, y {y}"
            mend = "smoothing (antialiasing) or resizing mixes colours so: export masks without it"
            return f"{path}: {what}; {mend}"
        if self.source:
            named = f"`NAME {line}` for its class, or " if value >= 0 else ""
            mend = f"{self.source} names no such: write {named}`{IGNORE} {line}`"
        else:
            mend = f"the classes are 0 to {len(self.classes) - 1}, and 255 to ignore"
        return f"{path}: {what} at x {x}, y {y}, {count} pixels of it; {mend}"

    def check_colors(self, path: str) -> None:
        """Raises UserError if the colours of this RGB mask cannot tell the classes apart."""
        if self.colors and sum(label != IGNORE_INDEX for label in self.colors.values()) == len(self.classes):
            return
        if not self.source:
            raise UserError(f"{path}: a mask of colours; the masks of this data set have one byte a pixel")
        raise UserError(
            f"{path}: a mask of colours, by which {self.source} must tell all classes apart: "
            "give each a colour of its own, `NAME R G B`"
        )


def key_name(key: int, bound: int) -> str:
    """A value of masks, or a colour, which are below 1 << 24."""
    return f"colour {key & 255} {key >> 8 & 255} {key >> 16}" if bound == 1 << 24 else f"value {key}"


def are_mixtures(colors: np.ndarray, known: Sequence[int]) -> bool:
    """Whether these are many colours, packed in numbers, and most lie on a line through two known ones."""
    if len(colors) <= 10:
        return False
    points, first = (
        np.stack([c & 255, c >> 8 & 255, c >> 16], -1).astype(float)
        for c in (colors[:: -(-len(colors) // 20)].astype(int), np.array(known)[:, None])  # 20 will do
    )
    along, to = first.transpose(1, 0, 2) - first, points[:, None, None] - first  # [point,] first, second
    share = (to * along).sum(-1, keepdims=True) / np.maximum(1, (along**2).sum(-1, keepdims=True))
    distance = np.abs(to - share * along).max(-1)
    return bool((distance <= 2).any((1, 2)).mean() > 0.5)


def check_transparency(pixels: np.ndarray, alpha: np.ndarray, bound: int, path: str) -> None:
    """Raises UserError if a value or colour, below `bound`, means two things in these pixels: where it is
    seen, and where it is transparent."""
    hidden = alpha == 0
    if not hidden.any():
        return
    seen = np.zeros(bound, bool)  # sorting the colours would take seconds
    seen[pixels[~hidden]] = True
    if (both := pixels[hidden][seen[pixels[hidden]]]).size:
        what = key_name(both[0], bound)
        raise UserError(f"{path}: the {what} is transparent in places; save the mask without alpha")


def read_classes(path: str) -> Labels:
    """Read classes.txt: one class a line, `name` or `name r g b`, and then perhaps `= v [v ...]`.

    The colours tell the classes apart in RGB masks, the values in others. A class without values is the next
    number, from 0, that `ignore` does not name. `ignore = v [v ...]` and `ignore r g b` are not learned.
    Raises UserError if the file is missing, a line is malformed, or two lines contradict each other."""
    lines = [(n, *split_line(path, n, line)) for n, line in read_lines(path, "it names the classes")]
    ignored = {value for _, name, _, given in lines if name == IGNORE for value in given}
    free = iter(number for number in range(len(lines) + len(ignored)) if number not in ignored)
    names, palette, values, colors = [], voc_palette(), {}, {}
    distinct, explicit = True, None
    for number, name, color, given in lines:
        label = IGNORE_INDEX if name == IGNORE else len(names)
        if name != IGNORE:
            if name in names or len(names) == MAX_CLASSES:
                raise UserError(f"{path}:{number}: {name!r}: at most {MAX_CLASSES} different names")
            if explicit and not given:
                raise UserError(f"{path}:{number}: {name!r} needs values, too, as {explicit!r} has: `= V`")
            explicit = explicit or (given and name)
            palette[label] = color or palette[label]
            names.append(name)
            given = given or [next(free)]
        for value in given:
            if values.setdefault(value, label) != label:
                other = IGNORE if values[value] == IGNORE_INDEX else names[values[value]]
                raise UserError(f"{path}:{number}: {name!r}: the value {value} is {other!r} already")
        if color:
            distinct &= colors.setdefault(tuple(color), label) == label
    if not names:
        raise UserError(f"{path} names no class")
    if len(names) == 1:
        hint = "name the background, too, in a line such as `background = 0`"
        raise UserError(f"{path} names one class, {names[0]!r}, and nothing to tell it from: {hint}")
    if not explicit:
        check_numbering(path, names, bool(colors))
    return Labels(names, palette[: len(names)], values, colors if distinct else {}, path)


def check_numbering(path: str, names: list[str], colored: bool) -> None:
    """Raises UserError if all names have numbers, which are probably those of pixels in masks."""
    patterns = [r"(?P<name>.*\S)\s+(?P<number>\d+)"]
    if not colored:  # an export's classes may be called anything
        patterns += [r"(?P<name>.*\S)\s*\((?P<number>\d+)\)", r"(?P<number>\d+)[_-](?P<name>[^\W\d_].*)"]
    for pattern in patterns:
        found = [re.fullmatch(pattern, name) for name in names]
        if not all(found) or len({match["name"] for match in found}) < len(names):
            continue
        first, last = (pick(int(match["number"]) for match in found) for pick in (min, max))
        if pattern.endswith(".*)") and (first > 1 or last - first != len(names) - 1):
            continue  # years, say
        line = f"{found[0]['name']} = {found[0]['number']}"
        raise UserError(f"{path}: all names have numbers; for those of pixels in masks, write `{line}`")


def split_line(path: str, number: int, line: str) -> tuple[str, list[int], list[int]]:
    """Name, colour (empty if none) and values (empty if none) of a line of classes.txt. Raises UserError if
    it is no such line."""
    left, equals, right = line.partition("=")
    words, color, values = left.split(), [], right.split()
    if len(words) >= 4 and all(word.isdecimal() for word in words[-3:]):
        words, color = words[:-3], [int(word) for word in words[-3:]]
    name, mistake = " ".join(words), None
    name = IGNORE if name.lower() == IGNORE else name
    if name == "__ignore__" and not color and not equals:  # of labelme's labels.txt
        return IGNORE, [], [IGNORE_INDEX]
    digits = r"-?\d{1,10}" if name == IGNORE else r"\d{1,10}"  # -9999 and the like in maps
    if equals and not (values and all(re.fullmatch(digits, value) for value in values)):
        mistake = "expected pixel values after `=`, such as `= 255` or `= 7 8`"
        if right.strip().startswith("-"):
            mistake = f"the values of classes are from 0; less is for what is not learned: `{IGNORE} = -1`"
    elif not name or name.startswith(("#", "//", ";", "%")):
        mistake = "a line begins with the name of a class"
    elif max(color, default=0) > 255:
        mistake = "a colour is three numbers of 0 to 255"
    elif not color and not equals and re.search(r"(?i)^id\W+(name|class|label)\b|\br\W+g\W+b$|:$", name):
        mistake = "leave out headings: a line is a class, `name`, `name r g b` or `name = value`"
    elif not color and re.search(r"#[0-9a-fA-F]{6}$|\(\d+, *\d+, *\d+\)$", name):
        mistake = "a colour is three numbers: `name 128 64 128`"
    elif re.search(r"[,;:]\s*\d+$", name):
        mistake = "leave a space between name and numbers: `name r g b`, `name = value`"
    elif re.match(r"\d+([\s,;:]|[.)]\s)\s*\S", name):
        mistake = "the name comes first: `name`, or `name = value`"
    elif name == IGNORE and not color and not equals:
        mistake = f"say what is ignored: `{IGNORE} = 0`, or `{IGNORE} r g b`"
    if mistake:
        raise UserError(f"{path}:{number}: {line.strip()!r}: {mistake}")
    return name, color, [int(value) for value in values]


def describe_pixels(pictures: Iterable[Image.Image]) -> str:
    """The values or colours that masks hold, the commonest first, with their shares, as lines of classes.txt
    whose names are to be filled in."""
    counts, by_value, by_color, palette_of = Counter(), Counter(), Counter(), {}
    for picture in pictures:
        if picture.mode in COLOR_MODES:
            found = picture.convert("RGB").getcolors(1 << 24)
            counts.update({f"NAME {r} {g} {b}": count for count, (r, g, b) in found})
        elif picture.mode == "P":
            palette = np.reshape(picture.getpalette("RGB"), (-1, 3)).tolist()
            for count, i in picture.getcolors():
                color = "NAME {} {} {}".format(*(palette[i] if i < len(palette) else (0, 0, 0)))
                by_value[f"NAME = {i}"] += count
                by_color[color] += count
                palette_of.setdefault(i, set()).add(color)
        else:
            values = np.asarray(picture.getchannel(0) if picture.mode in ("LA", "PA") else picture)
            found = zip(*np.unique(values.astype(int), return_counts=True), strict=True)
            counts.update({f"{'NAME' if v >= 0 else IGNORE} = {v}": int(count) for v, count in found})
    # A number that is one colour in one palette and another in the next means nothing.
    counts += by_color if any(len(colors) > 1 for colors in palette_of.values()) else by_value
    if len(counts) > 1000:
        return f"{len(counts)} different ones, so that they look like photos and not like masks"
    total = max(1, sum(counts.values()))
    shown = [f"`{line}` ({count / total:.1%})" for line, count in counts.most_common(30)]
    more = f" and {len(counts) - 30} more" if len(counts) > 30 else ""
    return f"{', '.join(shown)}{more}"

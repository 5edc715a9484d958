"""What a data set holds and what is wrong with it: before training, and in full for --check."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from datasets import DATASETS, SegmentationDataset
from files.images import (
    AS_STORED,
    UNCLEAR,
    Header,
    Reading,
    lacks_end,
    open_image,
    read_header,
    sample_header,
)
from files.masks import COLOR_MODES
from files.pictures import sample_row, sample_sheet, save_image
from files.pixels import decode, is_flat, value_range
from files.ranges import Values, lost_values, narrow_note, needed_range, needs_range, range_fault, span
from files.report import Card, data_name, files_folder, save_page, save_preview
from utils import IGNORE_INDEX, UserError, ahead, percent, progress

ROWS_LIMIT = 40  # of the picture
CARDS_LIMIT = 3000  # of a split, on the page
MASKS_LIMIT, IMAGES_LIMIT = 200, 50  # that are read before training


class Contents(NamedTuple):
    """What the files of a sample hold.

    `size` is the height and width of the image, `pixels` the number of pixels of each label, int64 (256,),
    `digest` a hash of the image file, `header` what its header tells. `values` are the lowest and the highest
    of an image that is not of 8 bits, and has no range to be read by; `flat`: what it is by the range that
    was given, see `is_flat`. `cut`: it is a JPEG that lacks its end, but no pixel. What `scan` did not read
    is None.
    """

    size: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    digest: bytes | None = None
    header: Header | None = None
    values: tuple[float, float] | None = None
    flat: bool = False
    cut: bool = False


def scan(
    dataset: SegmentationDataset,
    depth: str,
    title: str,
    indices: Sequence[int] | None = None,
    use: Callable[[int, Tensor, Tensor], None] = lambda index, image, mask: None,
) -> Iterator[tuple[int, Contents | UserError]]:
    """Look at the files of all samples, or of these; yields each index with what they hold, or the error.

    Args:
        depth: "headers" for these alone, "masks" for their pixels alone, "values" for the range of the images
            alone, "all" to decode everything.
        title: stands beside the progress bar.
        use: is called with each sample that was decoded, in a thread.

    Raises:
        Stopped: if a stop signal has come.
    """

    def read(index: int) -> Contents | UserError:
        try:
            if depth == "masks":
                return Contents(pixels=count(dataset.read_mask(index)))
            if depth == "headers":
                header = sample_header(*dataset.pairs[index], dataset.reading)
                return Contents(header.size[::-1], header=header)
            path, reading, values, flat = dataset.pairs[index][0], dataset.reading, None, False
            header = read_header(path, reading)
            if header.kind != "uint8" and not reading.value_range:
                values = value_range(path, header, reading)
                if header.kind != "uint16":  # so that all else can be told, too
                    reading = reading._replace(value_range=(values[0], max(values[1], values[0] + 1)))
            if depth == "values":
                flat = values is None and is_flat(decode(path, header, reading), header.kind, reading)
                return Contents(header=header, values=values, flat=flat)
            image, mask = dataset.read(index, reading)
            use(index, image, mask)
            if values is None and header.kind != "uint8":
                flat = is_flat(Image.fromarray(image.permute(1, 2, 0).numpy()), header.kind, reading)
            with open(path, "rb") as file:
                data = file.read()
            digest = hashlib.blake2b(data, digest_size=16).digest()
            pixels = count(mask.numpy())
            return Contents(tuple(mask.shape), pixels, digest, header, values, flat, lacks_end(data))
        except UserError as error:
            return error

    def count(mask: np.ndarray) -> np.ndarray:
        return np.bincount(mask.ravel(), minlength=256)

    indices = range(len(dataset)) if indices is None else indices
    with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
        yield from zip(indices, progress(ahead(pool, read, indices), title, len(indices)), strict=True)


def drop_bad(dataset: SegmentationDataset, decode: bool = False) -> list[str]:
    """Leave out the samples that cannot be used, and return what is wrong with each. Sets `dataset.sizes` and
    `dataset.headers`.

    Reads the headers of the files, their formats and sizes; with `decode` every pixel. Raises Stopped if a
    stop signal has come."""
    sizes, headers, faults = np.zeros((len(dataset), 2), np.int32), {}, {}
    for index, found in scan(dataset, "all" if decode else "headers", "reading images"):
        if isinstance(found, UserError):
            faults[index] = str(found)
        else:
            sizes[index], headers[index] = found.size, found.header
    kept = [index for index in range(len(dataset)) if index not in faults]
    dataset.pairs, dataset.sizes = [dataset.pairs[index] for index in kept], sizes[kept]
    dataset.headers = [headers[index] for index in kept]
    return list(faults.values())


def prepare(dataset: SegmentationDataset, split: str, skip_bad: bool, resumes: bool = False) -> None:
    """Look at a data set before it is trained on or evaluated, and print what is strange about it. Raises
    UserError if a sample cannot be used, unless `skip_bad` leaves it out, or they need a range of values,
    unless the run `resumes` and cannot change it; or as `unseen_classes`."""
    faults = drop_bad(dataset, decode=skip_bad)
    if faults and (not skip_bad or not len(dataset)):
        hint = "" if skip_bad else "; --skip_bad leaves such samples out"
        raise UserError(f"{faults[0]} ({len(faults)} of the {split} samples cannot be used{hint})")
    if faults:
        print(f"left out {len(faults)} of the {split} samples, the first because of: {faults[0]}")
    if dataset.has_masks and (unseen := unseen_classes(dataset, split)):
        print(f"of these classes the {split} masks that were looked at have no pixel: {', '.join(unseen)}")
    if several := sum(header.frames > 1 for header in dataset.headers):
        print(f"{several} of the {split} images have several frames or pages: the first is used")
    if dataset.has_masks and (unclear := sum(header.unclear for header in dataset.headers)):
        print(f"{unclear} of the {split} {UNCLEAR.format('the masks')}: --check shows one")
    if dataset.reading.value_range:
        if fault := flat_fault(dataset, *find_flat(dataset)):
            print(fault)
    elif fault := range_fault(values := read_values(dataset)):
        if (split == "train" and not resumes) or {*values} != {"uint16"}:
            raise UserError(fault)
        print(fault)
    elif note := narrow_note(values):
        print(note)


def read_values(dataset: SegmentationDataset) -> Values:
    """What the images hold that may need --value_range, see `range_fault`. Of those of 16 bits a quarter of
    `IMAGES_LIMIT` are looked at, and up to all of it until it is clear that they do not. Raises UserError if
    an image cannot be read; Stopped if a stop signal has come."""
    kinds = [header.kind for header in dataset.headers]
    others = [index for index, kind in enumerate(kinds) if kind not in ("uint8", "uint16")]
    deep = spread([index for index, kind in enumerate(kinds) if kind == "uint16"])
    values: Values = {}
    for indices in (others, deep):
        for _, found in scan(dataset, "values", "reading values", indices):
            if isinstance(found, UserError):
                raise found
            values.setdefault(found.header.kind, []).append(found.values)
            enough = indices is deep and len(values["uint16"]) >= IMAGES_LIMIT // 4
            if enough and not needs_range(values["uint16"], len(deep)):
                break
    return values


def find_flat(dataset: SegmentationDataset) -> tuple[list[int], int]:
    """Which of up to `IMAGES_LIMIT` images of more than 8 bits are flat, see `is_flat`, and how many were
    looked at. Raises as `read_values`."""
    deep, flat = spread([i for i, header in enumerate(dataset.headers) if header.kind != "uint8"]), []
    for index, found in scan(dataset, "values", "reading values", deep):
        if isinstance(found, UserError):
            raise found
        flat += [index] if found.flat else []
    return flat, len(deep)


def flat_fault(dataset: SegmentationDataset, flat: Sequence[int], deep: int) -> str | None:
    """What is wrong with --value_range if most of `deep` images are these, which it leaves flat, or None."""
    if 2 * len(flat) <= deep:
        return None
    path, (low, high) = dataset.pairs[flat[0]][0], dataset.reading.value_range
    found = value_range(path, read_header(path, dataset.reading), dataset.reading)
    if low <= found[0] and found[1] <= high and found[1] - found[0] > (high - low) / 8:
        return None  # black, but for a few values within the range
    hint = f"{len(flat)} of {deep} images are nearly black, white or of one grey for the network"
    return "{} by --value_range {:.6g} {:.6g}: {} has values from {:.6g} to {:.6g}".format(
        hint, low, high, path, *found
    )


def spread(indices: Sequence[int]) -> list[int]:
    """Up to `IMAGES_LIMIT` of them, evenly spaced."""
    places = np.linspace(0, len(indices) - 1, min(len(indices), IMAGES_LIMIT)).astype(int)
    return [indices[place] for place in places]


def count_labels(dataset: SegmentationDataset, indices: Sequence[int], title: str) -> np.ndarray:
    """int64 (2, 256): of each label its pixels in the masks of these samples, and the labelled pixels of all
    masks that contain it. Raises UserError if a mask cannot be read, or a pixel of it is no class; Stopped if
    a stop signal has come."""
    counts = np.zeros((2, 256), np.int64)
    for _, found in scan(dataset, "masks", title, indices):
        if isinstance(found, UserError):
            raise found
        counts[0] += found.pixels
        counts[1, found.pixels > 0] += found.pixels[:IGNORE_INDEX].sum()
    return counts


def median_frequency(counts: np.ndarray, num_classes: int) -> list[float]:
    """Weights that balance the classes (Eigen & Fergus 2015, https://arxiv.org/abs/1411.4734, section 6.3.2):
    the median of all frequencies over that of the class. The frequency is the class's share of the pixels of
    the images that contain it; a class without pixels has weight 1.

    Takes the result of `count_labels`.
    """
    pixels, pixels_of_images = counts[:, :num_classes]
    seen = pixels > 0
    frequency = pixels[seen] / pixels_of_images[seen]
    weights = np.ones(num_classes)
    weights[seen] = np.median(frequency) / frequency
    return weights.tolist()


def unseen_classes(dataset: SegmentationDataset, split: str) -> list[str]:
    """The classes that none of up to `MASKS_LIMIT` masks contains, evenly spaced. Raises UserError if a mask
    cannot be used, or as `check_ignored` and, where all were looked at, `check_learnable`."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, min(MASKS_LIMIT, len(dataset))).astype(int)).tolist()
    pixels = count_labels(dataset, indices, "looking at masks")[0]
    check_ignored(dataset, pixels)
    if len(indices) == len(dataset):
        check_learnable(dataset, split, pixels)
    return [name for name, number in zip(dataset.classes, pixels, strict=False) if not number]


def check_learnable(dataset: SegmentationDataset, split: str, pixels: np.ndarray) -> None:
    """Given the number of pixels of each label in all masks: Raises UserError if the split is to train on,
    and they show fewer than two classes. The loss would be 0, and each prediction right."""
    found = [name for name, number in zip(dataset.classes, pixels, strict=False) if number]
    if split == "train" and pixels.any() and len(found) < 2:  # no pixel: no mask could be read
        shown = f"of all classes {found[0]!r} alone" if found else "none of the classes"
        reason = "all else is ignored, and there is nothing to learn"
        raise UserError(f"the masks to train on show {shown}: {reason}; look at what classes.txt ignores")


def check_ignored(dataset: SegmentationDataset, pixels: np.ndarray) -> None:
    """Given the number of pixels of each label: Raises UserError if the masks hold nothing but the first
    class and 255, and nobody wrote that 255 is ignored: then it is probably a class."""
    first, *others = dataset.classes
    labels = dataset.labels
    if not others or pixels[1 : len(dataset.classes)].any() or not pixels[IGNORE_INDEX]:
        return
    by_color = IGNORE_INDEX in labels.colors.values()
    if by_color and open_image(dataset.pairs[0][1], load=False).mode in COLOR_MODES:
        return
    if labels.ignored_by_default:
        hint = f"if it is {others[0]!r}, write `{others[0]} = 255` in {labels.source}"
        hint = hint if labels.source else "these are not the data set's masks"
        found = f"only {first!r} and 255" if pixels[0] else "only 255"
        raise UserError(f"the masks hold {found}, and 255 is ignored: {hint}")


class Split:
    """All that one look at every file of a split tells."""

    def __init__(self, name: str, dataset: SegmentationDataset, folder: str):
        """Writes previews of its samples to the folder, evenly spaced if they are many."""
        self.name, self.dataset = name, dataset
        self.sizes: list[tuple[int, int]] = []  # height and width of the samples that can be used
        self.hashes: dict[int, bytes] = {}  # of the image files, by index
        self.pixels, self.images = np.zeros(256, np.int64), np.zeros(256, np.int64)  # of each label
        self.best = np.full(256, -1)  # the sample with the largest share of each label
        self.faults: list[str] = []
        self.cards: list[Card] = []
        self.values: Values = {}  # of images of more than 8 bits, without a range for them
        self.flat: list[int] = []  # the samples whose images are, by the range that was given
        self.unclear: list[int] = []  # the samples whose masks are, see `files.images.is_unclear`
        self.cut = self.frames = 0  # images that lack their end, or have several frames
        shares, count, deep = np.zeros(256), len(dataset) if dataset.has_masks else 0, 0
        shown = set(np.linspace(0, count - 1, min(count, CARDS_LIMIT)).astype(int).tolist())

        def use(index: int, image: Tensor, mask: Tensor) -> None:
            if index in shown:
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                save_preview(f"{folder}/{name}-{index}", picture, [mask.numpy()], dataset.palette)

        for index, found in scan(dataset, "all", f"decoding {name}", use=use):
            if isinstance(found, UserError):
                self.faults.append(str(found))
                continue
            self.sizes.append(found.size)
            self.hashes[index] = found.digest
            self.cut, self.frames = self.cut + found.cut, self.frames + (found.header.frames > 1)
            if found.header.unclear and dataset.pairs[index][1]:
                self.unclear.append(index)
            if found.values:
                self.values.setdefault(found.header.kind, []).append(found.values)
            deep += found.header.kind != "uint8"
            self.flat += [index] if found.flat else []
            self.pixels += found.pixels
            self.images += found.pixels > 0
            share = found.pixels / found.pixels.sum()
            self.best[share > shares] = index
            shares = np.maximum(shares, share)
            if index in shown:
                labels = np.flatnonzero(found.pixels)
                cells = np.stack([labels, labels, found.pixels[labels]], 1).ravel().tolist()
                stem, size = f"{folder}/{name}-{index}", found.size[::-1]
                self.cards.append(Card(dataset.names[index], stem, size, cells, split=name))
        if fault := flat_fault(dataset, self.flat, deep):
            self.faults.append(fault)
        try:
            if dataset.has_masks:
                check_ignored(dataset, self.pixels)
                check_learnable(dataset, name, self.pixels)
        except UserError as error:
            self.faults.append(str(error))

    def describe(self) -> str:
        """Counts and sizes, in a line."""
        masks = sum(mask is not None for _, mask in self.dataset.pairs)
        line = f"{self.name}: {len(self.dataset)} images, {masks or 'no'} masks"
        if self.sizes:
            ordered = sorted(self.sizes, key=np.prod)
            sizes = (f"{w}x{h}" for h, w in (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
            line += ", sizes from {} by {} (median) to {}".format(*sizes)
        for kind, values in self.values.items():
            line += "\n{}: {} images of {}, {:.6g} to {:.6g}".format(
                self.name, len(values), kind, *span(values)
            )
        if note := narrow_note(self.values):
            line += f"\n{self.name}: {note}"
        if self.cut:
            line += f"\n{self.name}: {self.cut} JPEGs lack their end, but no pixel: they are used"
        if self.frames:
            line += f"\n{self.name}: {self.frames} images have several frames or pages: the first is used"
        return line


def check(name: str, root: str, splits: Sequence[str], reading: Reading = AS_STORED) -> int:
    """Print what these splits of one of `DATASETS` hold, and what is wrong with them.

    Returns:
        the number of faults.
    """
    parts, faults = [], []
    title = data_name(name, root)
    page = f"data/check/{title}.html"
    for split in splits:
        try:
            dataset = DATASETS[name](root, split)
            dataset.reading = reading
            parts.append(Split(split, dataset, files_folder(page)))
        except UserError as error:
            faults.append(str(error))
    if parts:
        faults += report(parts, f"data/check/{title}.png")
    faults = list(dict.fromkeys(faults))  # once, if several splits have it
    if masked := [part for part in parts if part.dataset.has_masks]:
        save_data(page, title, masked, faults, doubles(parts))
        print(f"all about it, to look at in a browser, is in {page}")
    kinds: dict[str, list[str]] = {}  # what is to be done about it is told once
    for fault in faults:
        kinds.setdefault(fault.partition("; ")[2] or fault, []).append(fault)
    for first, *others in kinds.values():
        more = f" ({len(others)} other files are faulty in this way)" if others else ""
        print(f"main.py: error: {first}{more}", file=sys.stderr)
    print(f"faults: {len(faults)}" if faults else "no fault was found")
    return len(faults)


def report(parts: Sequence[Split], path: str) -> list[str]:
    """Print what the splits hold, draw samples that show every class to `path`, and return the faults."""
    values: Values = {}
    for part in parts:
        print(part.describe())
        for kind, found in part.values.items():
            values.setdefault(kind, []).extend(found)
    values = next((v for v in (values, *(part.values for part in parts)) if lost_values(v)), {})
    if found := needed_range(values):
        for part in parts:  # so that there is something to see
            part.dataset.reading = part.dataset.reading._replace(value_range=found)
    masked = [part for part in parts if part.dataset.has_masks and part.pixels.any()]
    if masked:
        print(class_table(masked))
        draw(masked, path)
        print(f"samples that show the classes are in {path}")
        if unclear := sum(len(part.unclear) for part in masked):
            print(f"{unclear} {UNCLEAR.format('the masks')}: look at the last row of {path}")
    for line in doubles(parts):
        print(line)
    fault = range_fault(values)
    return [*([fault] if fault else []), *(fault for part in parts for fault in part.faults)]


def doubles(parts: Sequence[Split]) -> list[str]:
    """A line for each split that has images of one before it, an image several times, or one mask of several
    images."""
    lines = []
    for part in parts:
        seen: dict[bytes, int] = {}
        copies = [index for index, digest in part.hashes.items() if seen.setdefault(digest, index) != index]
        if copies:
            example = part.dataset.pairs[copies[0]][0]
            count = f"{len(copies)} of the {part.name} images"
            lines.append(f"{count} are copies of others, or listed twice: {example} is one")
        uses = Counter(mask for _, mask in {*part.dataset.pairs} if mask)
        if shared := [mask for _, mask in part.dataset.pairs if uses[mask] > 1]:
            count = f"{len(shared)} of the {part.name} images"
            lines.append(f"{count} share a mask with others: {shared[0]} is one")
    for first, part in combinations(parts, 2):
        known = set(first.hashes.values())
        if common := [index for index, digest in part.hashes.items() if digest in known]:
            example = part.dataset.pairs[common[0]][0]
            count = f"{len(common)} of the {part.name} images"
            lines.append(f"{count} are {first.name} images, too: {example} is one")
    return lines


def save_data(
    path: str, title: str, parts: Sequence[Split], faults: Sequence[str], notes: Sequence[str]
) -> None:
    """Write the page of a data set, with its faults and other notes. Raises UserError if it cannot be
    written."""
    dataset, columns = parts[0].dataset, []
    cards, images = [card for part in parts for card in part.cards], sum(len(part.dataset) for part in parts)
    number = len(dataset.classes)
    for part in parts:
        shares = (part.pixels[:number] / max(1, part.pixels.sum())).tolist()
        hint = f"of all pixels of {part.name}, also of what is ignored"
        columns.append({"name": f"{part.name} pixels", "values": shares, "hint": hint})
        counts = part.images[:number].tolist()
        columns.append({"name": f"{part.name} images", "values": counts, "count": True})
    pixels = sum(part.pixels for part in parts)
    ignored = pixels[IGNORE_INDEX] / max(1, pixels.sum())
    figures = [(f"Images, {part.name}", f"{len(part.dataset):,}") for part in parts]
    figures += [("Classes", f"{number:,}"), ("Ignored pixels", f"{percent(ignored)} %")]
    about = [part.describe() for part in parts]
    about += [f"{len(cards):,} of the {images:,} images are on this page"] if len(cards) < images else []
    page = {
        "title": title,
        "subtitle": "; ".join(about),
        "figures": [*figures, ("Faults", f"{len(faults):,}")],
        "about": [],
        "notes": [*faults, *notes] or ["no fault was found"],
        "columns": columns,
        "views": ["image", "mask"],
        "orders": ["of the list", "by name", "most pixels", "most ignored", "smallest first"],
    }
    save_page(path, page, dataset.classes, dataset.palette, cards)


def class_table(parts: Sequence[Split]) -> str:
    """A line for each class and for what is ignored: its share of the pixels and its images in each split."""
    classes = parts[0].dataset.classes
    width = max(map(len, [*classes, "(ignored)"]))
    lines = [f"{'class':{width}}" + "".join(f"  {part.name + ' pixels':>12}  images" for part in parts)]
    for label, name in [*enumerate(classes), (IGNORE_INDEX, "(ignored)")]:
        line = f"{name:{width}}"
        for part in parts:
            share = percent(part.pixels[label] / max(1, part.pixels.sum()))
            line += f"  {share + ' %':>12}  {part.images[label]:6}"
        unseen = [part.name for part in parts if not part.images[label] and label != IGNORE_INDEX]
        lines.append(f"{line}  nowhere in {' and '.join(unseen)}" if unseen else line)
    return "\n".join(lines)


def draw(parts: Sequence[Split], path: str) -> None:
    """Rows of image, mask and overlay; for each class that no row has shown the sample with most of it, then
    the first whose turn is unclear."""
    rows, shown = [], set()

    def add(dataset: SegmentationDataset, index: int) -> None:
        image, mask = (tensor.numpy() for tensor in dataset.read(index))
        rows.append(sample_row(Image.fromarray(image.transpose(1, 2, 0)), mask, mask, dataset.palette))
        # What is smaller than this cannot be seen.
        shown.update(np.flatnonzero(np.bincount(mask.ravel()) > 0.005 * mask.size).tolist())

    for part in parts:
        dataset = part.dataset
        for label, index in enumerate(part.best[: len(dataset.classes)].tolist()):
            if index < 0 or label in shown or len(rows) == ROWS_LIMIT:
                continue
            shown.add(label)
            add(dataset, index)
    for part in [part for part in parts if part.unclear][:1]:
        add(part.dataset, part.unclear[0])
    legend = sorted(shown - {IGNORE_INDEX})
    save_image(path, sample_sheet(rows, legend, parts[0].dataset.classes, parts[0].dataset.palette))

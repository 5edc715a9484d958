"""What annotation tools export: how it is recognised, what a reader returns, and the formats that hold masks.

A reader lists the images without opening them. `Export.draw` makes the labels of one image and can run in
another process. COCO is read by files/coco.py, labelme and YOLO by files/polygons.py.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from glob import glob, has_magic
from mmap import ACCESS_READ, mmap
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np

from files.images import open_image, upright
from files.lists import SPLIT_FOLDERS, images_below
from files.masks import VOC_CLASSES, Labels
from files.pictures import voc_palette
from files.whole import read_csv, read_lines
from utils import IGNORE_INDEX, UserError

COCO, LABELME, YOLO = "COCO JSON", "labelme", "YOLO segmentation"
CVAT, VOC, ROBOFLOW = "CVAT segmentation mask", "VOC segmentation", "Roboflow masks"
BACKGROUND = "background"
VOC_BORDER = (224, 224, 192)  # the colour of VOC's 255
EMPTY = "objects without a pixel in their image"
FARTHEST = 1e5  # pixels: a point beyond that is a mistake


class Notes(dict):
    """What the user is to know about an export: reason -> [how many times, the first example]."""

    def add(self, reason: str, example: str, count: int = 1) -> None:
        if count:
            self.setdefault(reason, [0, example])[0] += count

    def merge(self, other: "Notes") -> None:
        for reason, (count, example) in other.items():
            self.add(reason, example, count)


class Sample(NamedTuple):
    """An image of an export: its path, its split (None if the export has none), the width and height that the
    export tells, and what `Export.draw` needs to know about it."""

    image: str
    split: str | None
    size: tuple[int, int] | None
    content: Any


class Export(NamedTuple):
    """`draw(content, labels, size, notes)` returns the mask, uint8 (H, W). `labels` has the label of each of
    the `classes`, and `size` is the width and height at which coordinates are drawn. `palette` has colours of
    the classes where the export has its own."""

    classes: list[str]
    samples: list[Sample]
    draw: Callable[[Any, Sequence[int], tuple[int, int], Notes], np.ndarray]
    notes: Notes
    palette: list[tuple[int, int, int]] | None = None


# ----------------------------------------------------------------------------------------------------------
# which format


def recognize(path: str) -> tuple[str, list[str]] | None:
    """The format of an export and the files to begin with; None if it is no known one."""
    ending = os.path.splitext(path)[1].lower()
    if os.path.isfile(path):
        kind = {".json": COCO, ".yaml": YOLO, ".yml": YOLO}.get(ending)
        return (kind, [path]) if kind else None
    if os.path.isdir(os.path.join(path, "SegmentationClass")):
        return CVAT if os.path.exists(os.path.join(path, "labelmap.txt")) else VOC, [path]
    if files := [file for file in find(path, "_classes.csv", "*/_classes.csv") if is_value_table(file)]:
        return ROBOFLOW, files
    yaml = find(path, "data.yaml", "*.yaml", "*.yml")
    if files := [file for file in yaml if names_classes(file)]:
        return YOLO, files
    keys = (b'"images"', b'"annotations"', b'"categories"')
    roboflow = ["_annotations.coco.json", "*/_annotations.coco.json"]
    for patterns in (["annotations/instances_*.json"], roboflow, ["annotations/*.json"], ["*.json"]):
        if files := [file for file in find(path, *patterns) if sum(mentions(file, *keys)) >= 2]:
            return COCO, files
    files = find(path, "**/*.json")
    if any(any(mentions(file, b'"shapes"')) for file in files):
        return LABELME, files
    return None


LOOKED_FOR = (
    "a COCO JSON (annotations/instances_*.json, _annotations.coco.json, *.json), SegmentationClass/, "
    "_classes.csv with `Pixel Value, Class`, data.yaml with `names`, labelme's JSON files"
)


def find(folder: str, *patterns: str) -> list[str]:
    """The files in a folder that match, sorted, pattern by pattern."""
    found = []
    for pattern in patterns:
        if has_magic(pattern):
            found += sorted(glob(pattern, root_dir=folder, recursive=True))
        elif os.path.exists(os.path.join(folder, pattern)):
            found.append(pattern)
    names = dict.fromkeys(name for name in found if not os.path.basename(name).startswith("."))
    return [os.path.join(folder, name) for name in names]


def mentions(path: str, *words: bytes) -> list[bool]:
    """Which of these words a file contains."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return [False] * len(words)
        with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return [data.find(word) >= 0 for word in words]


def names_classes(path: str) -> bool:
    """Whether a YAML file is YOLO's: other programs have class_names, or names below something else."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return re.search(r"""^["']?names["']?\s*:""", file.read(), re.MULTILINE) is not None


def is_value_table(path: str) -> bool:
    """Whether it is a table of pixel values; exports for classification have another of that name."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().strip().lower().startswith("pixel value")


def split_in(name: str) -> str | None:
    """The split that a file's or a folder's name ends in, as `instances_train2017` does, or contains."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_FOLDERS[word] for word in reversed(words) if word in SPLIT_FOLDERS), None)


def class_name(name: str) -> str:
    """A class' name in Unicode's form NFC; labelme calls the background _background_."""
    name = normalize("NFC", name).strip()
    return BACKGROUND if name == "_background_" else name


def load_json(path: str, hook: Callable[[dict], Any] | None = None) -> Any:
    """Raises UserError if a file cannot be read, or is cut."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_hook=hook)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut or no JSON ({error}): export it again") from error


# ----------------------------------------------------------------------------------------------------------
# what several formats need


def find_image(name: str, folders: list[str], notes: Notes, within: str | None = None) -> str | None:
    """The path of an image in the first of these folders that has it, which moves to the front; with `within`
    none that is not below that folder. If none has it with the folders in its name, it is looked for without
    them, and noted."""
    name = name.replace("\\", "/")
    for form in dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name), os.path.basename(name))):
        for folder in folders:
            path = os.path.join(folder, form)
            if os.path.isfile(path) and (within is None or is_below(path, within)):
                folders.remove(folder)
                folders.insert(0, folder)
                moved = "/" in name and "/" not in form
                reason = "images are not in the folders that the export names: taken by their file names"
                notes.add(reason, name, moved)
                reason = "images have absolute paths in the export: taken from there"
                notes.add(reason, name, os.path.isabs(form) and within is None)
                short = os.path.normpath(path)  # not of a link's `..`
                is_same = os.path.exists(short) and os.path.samefile(short, path)
                return short if is_same else os.path.realpath(path)
    return None


def is_below(path: str, folder: str) -> bool:
    """Whether a path is that of a folder, or of something in it, be it a link."""
    both = (
        [os.path.join(real(p), "") for p in (path, folder)] for real in (os.path.abspath, os.path.realpath)
    )
    return any(inner.startswith(outer) for inner, outer in both)


def known_size(width: Any, height: Any, where: str) -> tuple[int, int] | None:
    """The width and height that a file tells, or None. Raises UserError if they are no sizes."""
    if width is None and height is None:
        return None
    try:
        size = int(width), int(height)
    except (TypeError, ValueError):
        size = 0, 0
    if min(size) < 1:
        raise UserError(f"{where}: width {width!r} and height {height!r} are no size of an image")
    return size


def usable(points: np.ndarray, count: int, size: tuple[int, int], notes: Notes) -> bool:
    """Whether x, y, x, y, ... make a polygon of `count` points; notes why not, or that it is clipped."""
    if count < 3:
        notes.add("polygons of fewer than three points: left out", "")
        return False
    if not np.abs(points).max() < FARTHEST:
        notes.add("polygons with points that are no numbers or far away: left out", "")
        return False
    xy = points.reshape(-1, 2)
    if xy.min() < -1 or (xy > np.array(size) + 1).any():
        notes.add("polygons that leave their image: clipped", "")
    return True


def example(names: Iterable[str]) -> tuple[str, int]:
    """The first of the names, and how many there are."""
    names = sorted(names)
    return (names[0] if names else ""), len(names)


def note_twins(names: list[str], notes: Notes) -> None:
    """Two classes of an export that have the same name become one."""
    reason = "classes have the name of another: one class of both"
    notes.add(reason, *example({name for name in names if names.count(name) > 1}))


# ----------------------------------------------------------------------------------------------------------
# masks: VOC's layout, Roboflow


class MaskFile(NamedTuple):
    path: str
    labels: Labels


def draw_mask_file(
    content: MaskFile, labels: Sequence[int], size: tuple[int, int], notes: Notes
) -> np.ndarray:
    """The mask in a file, its pixels renumbered."""
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[: len(labels)] = labels
    return table[content.labels.read(upright(open_image(content.path, is_mask=True)), content.path)]


def read_voc(export: str, files: list[str], images: str | None) -> Export:
    """VOC's folders, of VOC, CVAT (labelmap.txt), Lightly (class_id_to_name.json) or labelme2voc
    (class_names.txt). Raises UserError if the images are missing."""
    classes, palette, values = voc_classes(export)
    colors = dict(zip(map(tuple, palette), range(len(classes)), strict=True))
    colors = colors if len(colors) == len(classes) else {}
    source = os.path.join(export, "labelmap.txt")
    source = source if os.path.exists(source) else None
    labels = Labels(classes, palette, values, {VOC_BORDER: IGNORE_INDEX, **colors}, source)
    masks, notes, samples = images_below(os.path.join(export, "SegmentationClass")), Notes(), []
    folder = images or os.path.join(export, "JPEGImages")
    if not os.path.isdir(folder):
        hint = "--images DIR names the folder of their images"
        raise UserError(f"{folder} is not there, the export has masks alone: {hint}")
    photos = images_below(folder)
    splits = voc_splits(export, notes) or dict.fromkeys(masks)
    for name, split in splits.items():
        if name not in photos:
            notes.add(f"images are not in {folder}: left out", name)
        elif name in masks:
            content = MaskFile(os.path.join(export, "SegmentationClass", masks[name]), labels)
            samples.append(Sample(os.path.join(folder, photos[name]), split, None, content))
    notes.add("images have no mask in SegmentationClass: left out", *example(photos.keys() - masks.keys()))
    if classes is VOC_CLASSES:
        hint = "taken for VOC's 21; labelmap.txt names others"
        notes.add(f"masks without a file that names their classes: {hint}", *example(masks))
    notes.add(
        "masks are in no list of ImageSets/Segmentation: left out", *example(masks.keys() - splits.keys())
    )
    return Export(classes, samples, draw_mask_file, notes, palette)


def voc_classes(export: str) -> tuple[list[str], list[tuple[int, int, int]], dict[int, int] | None]:
    """Names, colours and perhaps pixel values of the classes, the background first where there is one. Raises
    UserError if a line of labelmap.txt is no such line."""
    path = os.path.join(export, "labelmap.txt")
    if os.path.exists(path):
        lines = []
        for number, line in read_lines(path, "it names the classes and their colours"):
            if line.lstrip().startswith("#"):
                continue
            name, _, rest = line.partition(":")
            color = rest.partition(":")[0].strip()
            if not re.fullmatch(r"(\d{1,3},\s*\d{1,3},\s*\d{1,3})?", color):
                raise UserError(f"{path}:{number}: {line!r}: expected `name:r,g,b:parts:actions`")
            color = tuple(map(int, color.split(","))) if color else None
            if color and max(color) > 255:
                raise UserError(f"{path}:{number}: {line!r}: a colour is three numbers of 0 to 255")
            lines.append((class_name(name), color))
        if BACKGROUND not in (name for name, _ in lines):
            lines.insert(0, (BACKGROUND, (0, 0, 0)))
        if len(lines) > IGNORE_INDEX:
            raise UserError(f"{path} names {len(lines)} classes: a mask of bytes can show {IGNORE_INDEX}")
        colors = voc_palette(256)
        ignored = [i for i, line in enumerate(lines) if line == ("ignored", VOC_BORDER)]  # Datumaro's
        order = [i for i in range(len(lines)) if i not in ignored]
        order.sort(key=lambda i: lines[i][0] != BACKGROUND)
        names = [lines[i][0] for i in order]
        palette = [lines[i][1] or tuple(colors[i % 256]) for i in order]
        values = {value: label for label, value in enumerate(order)}
        return names, palette, values | dict.fromkeys(ignored, IGNORE_INDEX)
    for path in find(export, "class_id_to_name.json", "class_names.txt"):
        if path.endswith(".json"):
            table = load_json(path)
        else:
            lines = [line.strip() for _, line in read_lines(path, "it names the classes")]
            table = dict(enumerate(lines[lines[0] == "__ignore__" :]))  # that is no value
        try:
            table = {int(value): class_name(str(name)) for value, name in table.items()}
            items = sorted((name != BACKGROUND, value, name) for value, name in table.items())
        except (AttributeError, ValueError) as error:
            raise UserError(f"{path}: expected a class name for each pixel value") from error
        names = [name for _, _, name in items]
        palette = [tuple(color) for color in voc_palette(256)][: len(names)]
        return names, palette, {value: label for label, (_, value, _) in enumerate(items)}
    return VOC_CLASSES, [tuple(color) for color in voc_palette(len(VOC_CLASSES))], None


def voc_splits(export: str, notes: Notes) -> dict[str, str | None]:
    """The split of each name in ImageSets/Segmentation/*.txt; trainval.txt tells nothing beside the two."""
    files = find(export, "ImageSets/Segmentation/*.txt")
    known = {path: split_in(os.path.basename(path)[:-4]) for path in files}
    if {"train", "val"} <= set(known.values()):
        files = [path for path in files if known[path]]
    splits: dict[str, str | None] = {}
    for path in files:
        if os.path.getsize(path):
            for _, line in read_lines(path, "it names the images"):
                name = normalize("NFC", line.strip().strip('"'))
                if known[path] and splits.get(name, known[path]) not in (None, known[path]):
                    notes.add("images are in two lists of ImageSets/Segmentation: left in the first", name)
                splits.setdefault(name, known[path])
    return splits


def read_roboflow(export: str, files: list[str], images: str | None) -> Export:
    """Roboflow's "Semantic Segmentation Masks": x.jpg, x_mask.png and _classes.csv in each split's folder.
    Raises UserError if a table is malformed, or `images` is given: they are in the export."""
    if images:
        raise UserError(f"{export} has its images beside the masks: leave out --images {images}")
    tables: dict[str, dict[int, str]] = {}
    for path in files:
        rows = read_csv(path)[1:]
        if not any(rows):
            raise UserError(f"{path} names no class")
        try:
            tables[path] = {int(row[0]): class_name(row[1]) for row in rows if row}
        except (ValueError, IndexError) as error:
            raise UserError(f"{path}: expected lines of a pixel value and a class ({error})") from error
    names = list(dict.fromkeys(name for table in tables.values() for name in table.values()))
    names.sort(key=lambda name: name.lower() != BACKGROUND)
    notes, samples = Notes(), []
    for path, table in tables.items():
        folder = os.path.dirname(path)
        values = {value: names.index(name) for value, name in table.items()}
        note_twins(list(table.values()), notes)
        labels = Labels(names, voc_palette(256), values, source=path)
        found = images_below(folder)
        for name, file in found.items():
            if name.endswith("_mask") and name.removesuffix("_mask") in found:
                continue
            if f"{name}_mask" not in found:
                notes.add("images have no _mask.png beside them: left out", os.path.join(folder, file))
                continue
            content = MaskFile(os.path.join(folder, found[f"{name}_mask"]), labels)
            split = split_in(os.path.basename(os.path.abspath(folder)))
            samples.append(Sample(os.path.join(folder, file), split, None, content))
    names[:1] = [BACKGROUND if names[0].lower() == BACKGROUND else names[0]]
    return Export(names, samples, draw_mask_file, notes)

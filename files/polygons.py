"""Exports of shapes that Pillow draws: labelme's JSON files and YOLO's polygons."""

import base64
import io
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from files.exports import (
    BACKGROUND,
    EMPTY,
    FARTHEST,
    Export,
    Notes,
    Sample,
    class_name,
    example,
    find_image,
    is_below,
    known_size,
    load_json,
    note_twins,
    usable,
)
from files.images import image_endings
from files.lists import SPLIT_FOLDERS, images_below, is_image_name, split_of
from files.whole import read_lines
from utils import IGNORE_INDEX, UserError


def read_labelme(export: str, files: list[str], images: str | None) -> Export:
    """labelme's JSON files beside their images; labels.txt gives the classes their order. Raises UserError if
    a file is cut, or has a label that labels.txt lacks."""
    notes, found, seen = Notes(), [], set()
    for path in files:
        data = load_json(path)
        if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
            notes.add("JSON files are not labelme's: left out", path)
            continue
        name = str(data.get("imagePath") or "").replace("\\", "/")
        beside = [os.path.splitext(os.path.basename(path))[0] + ending for ending in sorted(image_endings())]
        where = [os.path.dirname(path)]
        if images:
            where = [os.path.join(images, os.path.relpath(where[0], export)), images, *where]
        image = name and find_image(name, where, notes, images)
        if not image:
            image = next(filter(None, (find_image(other, where, notes, images) for other in beside)), None)
            reason = "images have another name in their JSON files: taken by the names of these"
            notes.add(reason, f"{name} of {path}", bool(name and image))
        if not image:
            place = f"in {images}" if images else "beside their JSON files"
            notes.add(f"images are not {place}: left out", f"{name} of {path}")
            continue
        size = known_size(data.get("imageWidth"), data.get("imageHeight"), path)
        shapes = [labelme_shape(path, shape) for shape in data["shapes"]]
        seen |= {label for label, *_ in shapes}
        found.append((path, image, size, shapes))
    names, classes = labelme_labels(export, seen)
    samples = []
    for path, image, size, shapes in found:
        if strange := {label for label, *_ in shapes} - names.keys():
            raise UserError(f"{path}: the label {min(strange)!r} is not in {export}/labels.txt")
        relative = os.path.relpath(path, export).replace(os.sep, "/")
        content = [(names[label], *rest) for label, *rest in shapes]
        samples.append(Sample(image, split_of(relative), size, content))
    used = {os.path.abspath(image) for _, image, _, _ in found}
    folders = {os.path.dirname(image) for image in used}
    photos = {os.path.join(f, n) for f in folders for n in os.listdir(f) if is_image_name(n)}
    notes.add("images have no JSON file, nobody has labelled them: left out", *example(photos - used))
    return Export(classes, samples, draw_labelme, notes)


def labelme_shape(path: str, shape: Any) -> tuple[str, str, list, str | None]:
    """Label, type, points and mask of a shape. Raises UserError if it has no label or points."""
    try:
        points = [(float(x), float(y)) for x, y in shape["points"]]
        if shape["label"] is None:
            raise TypeError("the label is null")
        label, kind = class_name(str(shape["label"])), shape.get("shape_type") or "polygon"
        return label, kind, points, shape.get("mask")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a shape has no label or no points ({error!r})") from error


def labelme_labels(export: str, seen: set[str]) -> tuple[dict[str, int | None], list[str]]:
    """The class number of each label, None for what is ignored, and the classes: by labels.txt, else by the
    alphabet."""
    path = os.path.join(export, "labels.txt")
    names = sorted(seen)
    if os.path.exists(path):
        names = [class_name(line) for _, line in read_lines(path, "it names the labels")]
    special = {"__ignore__": None, BACKGROUND: 0}
    others = [name for name in dict.fromkeys(names) if name not in special]
    return special | {name: i for i, name in enumerate(others, 1)}, [BACKGROUND, *others]


def draw_labelme(shapes: list, labels: Sequence[int], size: tuple[int, int], notes: Notes) -> np.ndarray:
    """(class, type, points, mask) as labelme's own shape_to_mask draws them, the later on top."""
    canvas = Image.new("L", size)
    draw = ImageDraw.Draw(canvas)
    for number, kind, points, mask in shapes:
        label = IGNORE_INDEX if number is None else int(labels[number])
        paint = {"fill": label, "outline": label}
        expected = {"circle": 2, "rectangle": 2, "line": 2, "point": 1, "mask": 2, "oriented_rectangle": 4}
        if kind == "rectangle" and len(points) == 4:
            kind = "polygon"
        if kind == "polygon":
            if usable(np.array(points, float).ravel(), len(points), size, notes):
                draw.polygon(points, **paint)
        elif len(points) != expected.get(kind, len(points)) or not np.abs(points).max(initial=0) < FARTHEST:
            notes.add(f"shapes of the type {kind} with strange points: left out", "")
        elif kind == "circle":
            (x, y), edge = points
            r = math.dist((x, y), edge)
            draw.ellipse((x - r, y - r, x + r, y + r), **paint)
        elif kind == "point":
            (x, y) = points[0]
            draw.ellipse((x - 5, y - 5, x + 5, y + 5), **paint)
        elif kind == "rectangle":
            draw.rectangle((*np.min(points, 0).tolist(), *np.max(points, 0).tolist()), **paint)
        elif kind in ("line", "linestrip") and len(points) > 1:
            draw.line(points, fill=label, width=10, joint="curve" if kind == "linestrip" else None)
        elif kind == "oriented_rectangle":
            draw.polygon(points, **paint)
        elif kind == "mask" and mask:
            corner = tuple(int(value) for value in points[0])
            canvas.paste(label, (*corner, *np.add(corner, stencil(mask).size)), stencil(mask))
        else:
            notes.add(f"shapes of the type {kind}: left out", "")
    return np.array(canvas)


def stencil(mask: str) -> Image.Image:
    """The 1-bit picture in a base64 PNG. Raises UserError if it is none."""
    try:
        values = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask))))
        return Image.fromarray(np.where(values > 0, 255, 0).astype(np.uint8))
    except Exception as error:  # what a decoder raises depends on the damage
        raise UserError(f"a shape's mask is no PNG in base64 ({error})") from error


def read_yolo(export: str, files: list[str], images: str | None) -> Export:
    """Ultralytics' data.yaml with images/ and labels/, a polygon a line. Raises UserError if it names no
    classes, it is of keypoints, or `images` is given: the file names them."""
    path, notes, samples = files[0], Notes(), []
    if images:
        raise UserError(f"{path} names the folders of the images: leave out --images {images}")
    notes.add("other YAML files name classes, too: left out", *example(files[1:]))
    data = load_yaml(path)
    names = {str(key): class_name(str(name)) for key, name in data["names"].items()}
    classes = [BACKGROUND, *dict.fromkeys(name for name in names.values() if name != BACKGROUND)]
    numbers = {key: classes.index(name) for key, name in names.items()}
    note_twins([classes[number] for number in numbers.values()], notes)
    own = os.path.dirname(path) or "."
    roots = [own, os.path.join(own, str(data.get("path") or ""))]
    for key, place in yolo_folders(own, data, notes):
        for image in yolo_images(place, roots, notes):
            folder, name = os.path.split(image)
            folder = re.sub(r"^(.*[/\\]|)images(?=[/\\]|$)", r"\1labels", folder)
            content = (os.path.join(folder, os.path.splitext(name)[0] + ".txt"), numbers)
            samples.append(Sample(image, SPLIT_FOLDERS[key], None, content))
    return Export(classes, samples, draw_yolo, notes)


def load_yaml(path: str) -> dict:
    """A data.yaml, its `names` as a dict. Raises UserError if it is none."""
    try:
        import yaml
    except ImportError as error:
        raise UserError(f"{path} needs a package: pip install pyyaml") from error
    try:
        with open(path, encoding="utf-8-sig") as file:
            data = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    names = data.get("names") if isinstance(data, dict) else None
    names = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path} has no `names` of classes: it is no data set of YOLO's")
    if "kpt_shape" in data:
        raise UserError(f"{path} has `kpt_shape`: its labels are keypoints, and not polygons")
    if words := [name for name in names.values() if isinstance(name, bool)]:
        raise UserError(f"{path}: YAML reads a name as {words[0]}: put yes, no, on and off in quotes")
    return {**data, "names": names}


def yolo_folders(own: str, data: dict, notes: Notes) -> list[tuple[str, str]]:
    """The folders of images, or lists of them, that a data.yaml in the folder `own` names, each with its key.

    For train/images beside it Roboflow writes `../train/images`, where another export may lie. Of absolute
    paths see `relocate`."""
    path = str(data.get("path") or "").replace("\\", "/")
    given = os.path.join(own, path)
    notes.add("paths of data.yaml are not there: its own folder taken", path, not os.path.isdir(given))
    given = given if os.path.isdir(given) else own
    entries = []
    for key in ("train", "val", "valid", "test"):
        for entry in data[key] if isinstance(data.get(key), list) else [data.get(key)]:
            entries += [(key, str(entry).replace("\\", "/").rstrip("/"))] if entry else []
    named = {entry: entry if is_absolute(entry) else os.path.join(given, entry) for _, entry in entries}
    moved = relocate([named[entry] for entry in named if is_absolute(entry) or is_absolute(path)], own)
    root = given if is_below(given, own) else own
    beside = {
        e: os.path.join(root, e[3:]) for e in named if re.fullmatch(r"\.\./(train|valid|test)/images", e)
    }
    beside = beside if any(map(os.path.exists, beside.values())) else {}
    found = []
    for key, entry in entries:
        path = beside.get(entry) or moved.get(named[entry]) or named[entry]
        if not os.path.exists(path) and entry not in beside:  # dataset/train, of a file in dataset
            path = os.path.join(given, entry.partition("/")[2] or entry)
        if not os.path.exists(path):
            notes.add("folders of data.yaml are not there: left out", entry)
            continue
        twice = os.path.exists(named[entry]) and not os.path.samefile(named[entry], path)
        notes.add("folders of data.yaml are also beside it: taken from there", entry, twice)
        reason = "folders that data.yaml names are outside of its own: taken from there"
        notes.add(reason, path, not is_below(path, own))
        found.append((key, path))
    return found


def is_absolute(path: str) -> bool:
    """Whether a path is absolute, be it one of Windows."""
    return os.path.isabs(path) or re.match("[A-Za-z]:/", path) is not None


def relocate(paths: list[str], own: str) -> dict[str, str]:
    """What these absolute paths stand for in the folder `own`, if they are those of another machine, or of a
    folder that it is a copy of: then all of them are in it, and none is named as such."""
    if any(is_below(path, own) for path in paths):
        return {}
    found = {}
    for path in paths:
        ends = (path.split("/", n)[-1] for n in range(1, path.count("/") + 1))
        found[path] = next(filter(os.path.exists, (os.path.join(own, end) for end in ends)), None)
    is_copy = None not in found.values() and len({*found.values()}) == len(found)
    return {path: here for path, here in found.items() if here and (is_copy or not os.path.exists(path))}


def yolo_images(path: str, roots: list[str], notes: Notes) -> list[str]:
    """The images in a folder, or those of a list, whose names are relative to its own folder or to one of
    `roots`, that of data.yaml and the one that it names."""
    if os.path.isdir(path):
        return [os.path.join(path, name) for _, name in sorted(images_below(path).items())]
    names = [line.strip().replace("\\", "/") for _, line in read_lines(path, "it names the images")]
    moved = relocate([name for name in names if is_absolute(name)], roots[0])
    found, where = [], [os.path.dirname(path), *roots]
    for name in names:
        twice = name in moved and os.path.exists(name)
        notes.add(f"images of {path} are also beside data.yaml: taken from there", name, twice)
        inner = name.partition("/")[2]
        image = moved.get(name) or find_image(name, where, notes) or find_image(inner, where, notes)
        if image:
            found.append(image)
        else:
            notes.add(f"images of {path} are not there: left out", name)
    return found


def draw_yolo(content: tuple, labels: Sequence[int], size: tuple[int, int], notes: Notes) -> np.ndarray:
    """The lines `class x y x y ...` of a label file, in 0..1, as Pillow draws polygons, larger areas first.
    Raises UserError if a line is malformed, or of a class that data.yaml does not name."""
    path, numbers = content
    canvas, polygons = Image.new("L", size), []
    if not os.path.exists(path):
        notes.add("images without a label file: background alone", path)
        return np.array(canvas)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [line.split() for line in file]
    for row, (key, *words) in enumerate((words for words in lines if words), 1):
        try:
            points = np.array(words, float)
        except ValueError as error:
            raise UserError(f"{path}:{row}: {error}") from error
        if key.removesuffix(".0") not in numbers:
            raise UserError(f"{path}:{row}: data.yaml does not name the class {key}")
        if len(points) == 4:
            notes.add("boxes, no polygons: left out", path)
            continue
        if len(points) % 2:
            raise UserError(f"{path}:{row}: a polygon has an odd number of coordinates, {len(points)}")
        if not usable(points * np.resize(size, len(points)), len(points) // 2, size, notes):
            continue
        points = (points.reshape(-1, 2) * size).ravel().tolist()
        single = Image.new("1", size)
        ImageDraw.Draw(single).polygon(points, fill=1, outline=1)
        area = np.count_nonzero(single)
        notes.add(EMPTY, path, area == 0)
        polygons.append((area, int(labels[numbers[key.removesuffix(".0")]]), points))
    draw = ImageDraw.Draw(canvas)
    for _, label, points in sorted(polygons, key=lambda item: -item[0]):
        draw.polygon(points, fill=label, outline=label)
    return np.array(canvas)

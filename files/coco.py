"""COCO JSON, as COCO itself, CVAT, Label Studio and Roboflow write it."""

import os
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from files.exports import (
    BACKGROUND,
    EMPTY,
    Export,
    Notes,
    Sample,
    class_name,
    example,
    find,
    find_image,
    known_size,
    load_json,
    note_twins,
    split_in,
    usable,
)
from utils import IGNORE_INDEX, UserError


class CocoImage(NamedTuple):
    id: Any
    file_name: str
    width: Any
    height: Any


class CocoObject(NamedTuple):
    image_id: Any
    category_id: Any
    crowd: bool
    segmentation: Any  # [array of x, y, x, y, ... of a polygon], a dict that is RLE, or None


def compact(item: dict) -> Any:
    """Called for each object of a COCO JSON as it is parsed: Python's own numbers would take gigabytes."""
    if "image_id" in item and "category_id" in item:
        shape = item.get("segmentation")
        if isinstance(shape, list):
            if shape and not isinstance(shape[0], list):
                shape = [shape]  # a single polygon, without the list around it
            shape = [to_numbers(polygon) for polygon in shape]
        # Datumaro, which adds `attributes`, writes iscrowd with every RLE: brush masks, but no crowds.
        crowd = bool(item.get("iscrowd")) and "attributes" not in item
        return CocoObject(item["image_id"], item["category_id"], crowd, shape)
    if "file_name" in item and "id" in item:
        return CocoImage(item["id"], str(item["file_name"]), item.get("width"), item.get("height"))
    return item


def to_numbers(polygon: Any) -> array:
    """Of what is no list of numbers none: a polygon of no points is told as it is drawn."""
    try:
        return array("d", polygon)
    except TypeError:
        return array("d")


def read_coco(export: str, files: list[str], images: str | None) -> Export:
    """https://cocodataset.org/#format-data, and how tools lay it out. Raises UserError if a file is cut, or
    ids contradict each other."""
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise UserError("COCO's polygons and RLE need a package: pip install pycocotools") from error
    classes, samples, notes, listed = [BACKGROUND], [], Notes(), {}
    for path in files:
        data, entries = load_coco(path)
        numbers = coco_categories(path, data, classes, notes)
        listed[path] = set(numbers.values())
        objects: dict[Any, list] = {}
        ids = {str(key): key for key in entries}  # some tools write the ids of annotations as text
        for item in data["annotations"]:
            if isinstance(item, dict) and "segments_info" in item:
                raise UserError(f"{path} is of COCO's panoptic kind: export instances or semantic masks")
            if not isinstance(item, CocoObject) or item.category_id not in numbers:
                what = getattr(item, "category_id", item)
                raise UserError(f"{path}: an annotation is of the category {what!r}, which is not listed")
            image_id = item.image_id if item.image_id in entries else ids.get(str(item.image_id))
            if image_id is None:
                notes.add("annotations of images that are not listed: left out", f"image {item.image_id}")
                continue
            found = objects.setdefault(image_id, [])
            if item.segmentation:
                found.append((numbers[item.category_id], item.crowd, item.segmentation))
            else:
                reason = "annotations without a polygon or RLE, as boxes are: left out"
                notes.add(reason, entries[image_id].file_name)
        stem = os.path.basename(path).removesuffix(".json").removeprefix("instances_")
        split = split_in(stem) or split_in(os.path.basename(os.path.dirname(os.path.abspath(path))))
        where = image_folders(path, stem, images)
        for image in entries.values():
            found = find_image(image.file_name, where, notes, images)
            if not found:
                notes.add(f"images of {path} are not there: left out", image.file_name)
                continue
            if image.id not in objects:
                notes.add("images have no annotation: background alone", image.file_name)
            size = known_size(image.width, image.height, f"{path}: {image.file_name}")
            samples.append(Sample(found, split, size, objects.get(image.id, [])))
        if entries and not samples:
            first, looked = next(iter(entries.values())).file_name, ", ".join(where[:4])
            raise UserError(
                f"{path}: {first} is in none of {looked}: --images DIR names the folder of images"
            )
    for number, name in enumerate(classes[1:], 1):
        if lacking := [path for path in files if number not in listed[path]]:
            reason = "classes are missing from the categories of a file: background in its images"
            notes.add(reason, f"{name}, which {lacking[0]} does not list")
    if export not in files:  # it is a folder
        others = set(find(os.path.dirname(files[0]), "*.json")) - set(files)
        notes.add("other JSON files are beside these: left out", *example(others))
    return Export(classes, samples, draw_coco, notes)


def load_coco(path: str) -> tuple[dict, dict[Any, CocoImage]]:
    """What a COCO JSON holds, and its images by their ids. Raises UserError if that is no COCO JSON."""
    if os.path.getsize(path) > 1 << 24:
        print(f"reading {path} ({os.path.getsize(path) >> 20} MB)", flush=True)
    data = load_json(path, compact)
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or key not in data:
            raise UserError(f"{path} has no {key!r}: a COCO JSON has images, annotations, categories")
    entries: dict[Any, CocoImage] = {}
    for image in data["images"]:
        if not isinstance(image, CocoImage):
            raise UserError(f"{path}: an image has no id or no file_name")
        if image.id in entries:
            raise UserError(f"{path}: two images have the id {image.id}: {image.file_name} is one")
        entries[image.id] = image
    return data, entries


def coco_categories(path: str, data: dict, classes: list[str], notes: Notes) -> dict[Any, int]:
    """The number of each category's class; new ones are appended to `classes`. Raises UserError if two have
    one id."""
    categories = data["categories"]
    used = {item.category_id for item in data["annotations"] if isinstance(item, CocoObject)}
    numbers = {}
    for item in categories:
        if not isinstance(item, dict) or not {"id", "name"} <= item.keys():
            raise UserError(f"{path}: a category has no id or no name")
        if item["id"] in numbers:
            raise UserError(f"{path}: two categories have the id {item['id']}: {item['name']!r} is one")
        # Roboflow begins with a category that stands for all others.
        groups = {other.get("supercategory") for other in categories if other is not item}
        if item["id"] == 0 and item["id"] not in used and groups == {item["name"]}:
            notes.add("categories that only group the others: left out", str(item["name"]))
            numbers[0] = 0
            continue
        name = class_name(str(item["name"]))
        if name not in classes:
            classes.append(name)
        numbers[item["id"]] = classes.index(name)
    note_twins([classes[number] for number in numbers.values() if number], notes)
    return numbers


def image_folders(path: str, stem: str, images: str | None) -> list[str]:
    """Where the images of a COCO JSON may lie."""
    folder = os.path.dirname(path) or "."
    is_inner = os.path.basename(os.path.abspath(folder)) == "annotations"
    parents = [images] if images else [os.path.join(folder, os.pardir), folder][not is_inner :]
    names = ["", *filter(None, (stem, split_in(stem)))]
    names += [] if images else [os.path.join("images", name) for name in names]
    return [os.path.normpath(os.path.join(parent, name)) for parent in parents for name in names]


def draw_coco(objects: list, labels: Sequence[int], size: tuple[int, int], notes: Notes) -> np.ndarray:
    """(class, crowd, segmentation) by COCO's rule for polygons, the larger areas first."""
    from pycocotools import mask as coco

    width, height = size
    shapes = []
    for number, crowd, shape in objects:
        crowd = crowd and labels[number] > 0
        label = IGNORE_INDEX if crowd else labels[number]
        if isinstance(shape, dict):
            shape = coco_rle(shape, width, height)
        else:
            polygons = [
                p for p in shape if usable(np.asarray(p), len(p) // 2 if len(p) % 2 == 0 else 0, size, notes)
            ]
            if not polygons:
                continue
            shape = coco.merge(coco.frPyObjects(polygons, height, width))
        area = int(coco.area(shape))
        notes.add(EMPTY, "", area == 0)
        notes.add("objects are iscrowd: ignored", "", crowd)
        shapes.append((area, label, shape))
    mask = np.zeros((height, width), np.uint8, order="F")  # as RLE goes: down, then right
    for _, label, shape in sorted(shapes, key=lambda item: -item[0]):
        np.copyto(mask, label, where=coco.decode(shape).view(bool))
    return np.ascontiguousarray(mask)


def run_lengths(text: str) -> list[int]:
    """The counts that a string of COCO's compressed RLE stands for: of each character five bits, the lowest
    first, and whether more follow; from the fourth on, the difference to the one before the last."""
    runs, value, shift = [], 0, 0
    for code in text.encode():
        code -= 48
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code >> 4 & 1) << shift  # the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def coco_rle(shape: dict, width: int, height: int) -> dict:
    """RLE as pycocotools takes it. Raises UserError if it is of another size than the image."""
    from pycocotools import mask as coco

    counts = shape.get("counts")
    if list(shape.get("size") or ()) != [height, width]:
        raise UserError(
            f"an RLE has the size {shape.get('size')}, but the image is {height} high, {width} wide"
        )
    try:
        runs = counts if isinstance(counts, list) else run_lengths(counts)
        if sum(runs) != width * height or min(runs) < 0:  # pycocotools would leave pixels as memory was
            raise ValueError("its counts do not add up to the image")
        return coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"an RLE is damaged: {error}") from error

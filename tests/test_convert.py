"""--convert: exports as the tools write them, their masks against a slow reference, and what is refused."""

import base64
import io
import json
import math
import os
import shutil
import subprocess
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import NETWORK, SHARED, SMALL, needs_shared, one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import commands.convert
from commands.convert import convert
from datasets import ListSegmentation, VOCSegmentation
from files.coco import run_lengths
from files.exports import split_in
from files.lists import every_fifth
from files.masks import VOC_CLASSES
from files.pictures import voc_palette
from utils import UserError

SIZE = (70, 50)
MAIN = Path(__file__).parents[1] / "main.py"


def photo(path: Path, size=SIZE, orientation: int | None = None) -> Path:
    """A picture that no other is equal to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.fromarray(pixels).resize(size).save(path, exif=exif)
    return path


def star(rng, x: float, y: float, radius: float) -> list[float]:
    """A polygon around a point, as x, y, x, y, ..."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radii = radius * rng.uniform(0.4, 1, 9)
    return np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], 1).round(2).ravel().tolist()


def paint(mask: np.ndarray, where: np.ndarray, label: int) -> None:
    for y, x in zip(*np.nonzero(where), strict=True):
        mask[y, x] = label


def drawn(method: str, *args, size=SIZE, **options) -> np.ndarray:
    """What a method of Pillow's draws on an empty picture, bool (H, W)."""
    image = Image.new("1", size)
    getattr(ImageDraw.Draw(image), method)(*args, fill=1, **options)
    return np.array(image)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# The makers write an export and return {path of the image: labels}, and perhaps flags to read it with.


def coco_part(path: Path, folder: Path, prefix: str, seed: int, placeholder=False, datumaro=False) -> dict:
    """A COCO JSON of four images: overlapping polygons, one of two pieces, RLE of both kinds, a crowd; of
    datumaro's a mask that is no crowd, but written as one."""
    from pycocotools import mask as coco
    from pycocotools.coco import COCO

    rng, images, annotations = np.random.default_rng(seed), [], []
    categories = [
        {"id": 3, "name": "cat", "supercategory": "pets"},
        {"id": 7, "name": "dog", "supercategory": "pets"},
    ]
    if placeholder:
        categories.insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    for number in range(4):
        name = f"img {seed}{number}.jpg"
        photo(folder / name)
        images.append({"id": 40 + number, "file_name": prefix + name, "width": SIZE[0], "height": SIZE[1]})
        for k in range(5):
            pieces = [star(rng, *rng.uniform((0, 0), SIZE), rng.uniform(5, 30)) for _ in range(1 + k % 2)]
            shape = pieces
            if k == 2:
                shape = coco.merge(coco.frPyObjects(pieces, SIZE[1], SIZE[0]))
                shape = {"size": shape["size"], "counts": shape["counts"].decode()}
            if k == 3:
                lengths = [600, 150, 1000, 30, 70 * 50 - 1780]
                shape = {"size": [SIZE[1], SIZE[0]], "counts": lengths}
            category = int(rng.choice([3, 7]))
            annotations.append({"id": len(annotations) + 1, "image_id": 40 + number, "category_id": category})
            annotations[-1] |= {
                "segmentation": shape,
                "iscrowd": int(k == 3),
                "area": 1,
                "bbox": [0, 0, 1, 1],
            }
            annotations[-1] |= {"attributes": {"occluded": False}} if datumaro else {}
    write(
        path, json.dumps({"info": {}, "images": images, "annotations": annotations, "categories": categories})
    )
    tool, expected = COCO(path), {}
    for image in images:
        mask = np.zeros(SIZE[::-1], np.uint8)
        found = [(tool.annToMask(a), a) for a in annotations if a["image_id"] == image["id"]]
        for where, a in sorted(found, key=lambda item: -int(item[0].sum())):
            paint(mask, where, 255 if a["iscrowd"] and not datumaro else {3: 1, 7: 2}[a["category_id"]])
        expected[str(folder / image["file_name"].removeprefix(prefix))] = mask
    return expected


def make_coco(root: Path):
    pytest.importorskip("pycocotools")
    first = coco_part(root / "annotations/instances_train2017.json", root / "train2017", "", 1)
    write(root / "annotations/captions_train2017.json", '{"images": [], "annotations": []}')
    return first | coco_part(root / "annotations/instances_val2017.json", root / "val2017", "", 2)


def make_cvat_coco(root: Path):
    pytest.importorskip("pycocotools")
    path = root / "annotations/instances_default.json"
    return coco_part(path, root / "images/default", "", 3, datumaro=True)


def make_label_studio_coco(root: Path):
    pytest.importorskip("pycocotools")
    return coco_part(root / "result.json", root / "images", "images\\", 4)


def make_roboflow_coco(root: Path):
    pytest.importorskip("pycocotools")
    write(root / "README.roboflow.txt", "")
    parts = [("train", 5), ("valid", 6), ("test", 7)]
    made = [coco_part(root / f"{p}/_annotations.coco.json", root / p, "", n, True) for p, n in parts]
    return {path: mask for part in made for path, mask in part.items()}


def random_masks(root: Path, names, classes: int = 3) -> dict:
    rng, masks = np.random.default_rng(0), {}
    for name in names:
        blocks = rng.integers(0, classes, (5, 7)).astype(np.uint8)
        masks[str(photo(root / name))] = np.kron(blocks, np.ones((10, 10), np.uint8))
    return masks


def make_cvat_masks(root: Path):
    masks = random_masks(root.parent / "photos", ["a.jpg", "b c.png", "sub/d.jpg"])
    colors = np.array([(0, 0, 0), (10, 10, 128), (250, 50, 83)], np.uint8)
    text = "# label:color_rgb:parts:actions\ncat:10,10,128::\nbackground:0,0,0::\ndog:250,50,83:body:\n"
    write(root / "labelmap.txt", text)
    names = [os.path.splitext(os.path.relpath(path, root.parent / "photos"))[0] for path in masks]
    lines = [f'"{name}"' if " " in name else name for name in names]
    write(root / "ImageSets/Segmentation/default.txt", "".join(f"{line}\n" for line in lines))
    for name, mask in zip(names, masks.values(), strict=True):
        path = root / f"SegmentationClass/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors[mask]).save(path)
    return masks, ["--images", root.parent / "photos"]


def make_voc(root: Path):
    masks = random_masks(root / "JPEGImages", [f"2007_{i}.jpg" for i in range(5)], 21)
    for path, mask in masks.items():
        mask[3:5] = 255
        picture = Image.fromarray(mask)
        picture.putpalette(np.array(voc_palette(), np.uint8).tobytes())
        (root / "SegmentationClass").mkdir(exist_ok=True)
        picture.save(root / f"SegmentationClass/{Path(path).stem}.png")
    for name, numbers in (("train", (0, 1, 2)), ("val", (3, 4)), ("trainval", range(5))):
        write(root / f"ImageSets/Segmentation/{name}.txt", "".join(f"2007_{i}\n" for i in numbers))
    return masks


def make_lightly(root: Path):
    masks = random_masks(root / "JPEGImages", [f"{i}.jpg" for i in range(4)])
    write(root / "class_id_to_name.json", json.dumps({"7": "cat", "0": "background", "9": "dog"}))
    for path, mask in masks.items():
        (root / "SegmentationClass").mkdir(exist_ok=True)
        picture = Image.fromarray(np.array([0, 7, 9], np.uint8)[mask])
        picture.save(root / f"SegmentationClass/{Path(path).stem}.png")
    return masks


def make_labelme2voc(root: Path):
    masks = random_masks(root / "JPEGImages", [f"{i}.jpg" for i in range(4)])
    write(root / "class_names.txt", "_background_\ncat\ndog")
    for path, mask in masks.items():
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask[3:5] = 255
        Image.fromarray(mask).save(root / f"SegmentationClass/{Path(path).stem}.png")
    return masks


def make_roboflow_masks(root: Path):
    masks = random_masks(root, [f"{part}/{n}.rf.4f.jpg" for part in ("train", "valid", "test") for n in "ab"])
    for part in ("train", "valid", "test"):
        write(root / part / "_classes.csv", "Pixel Value, Class\n0, cat\n2, background\n5, dog\n")
    for path, mask in masks.items():
        Image.fromarray(np.array([2, 0, 5], np.uint8)[mask]).save(f"{path[:-4]}_mask.png")
    return masks


def make_labelme(root: Path):
    """All types of shapes, some leaving the image, with and without a group; the later on top."""
    write(root / "labels.txt", "__ignore__\n_background_\ncat\ndog\n")
    labels, expected = {"__ignore__": 255, "_background_": 0, "cat": 1, "dog": 2}, {}
    for number in range(5):
        rng, shapes, mask = np.random.default_rng(number), [], np.zeros(SIZE[::-1], np.uint8)
        path = photo(root / f"photo {number}.jpg")
        stamp = rng.random((9, 12)) < 0.6
        data = io.BytesIO()
        Image.fromarray(stamp).save(data, "PNG")
        (x, y), (px, py) = rng.uniform((0, 0), SIZE, (2, 2)).round(3).tolist()
        r, left, top = math.dist((x, y), (px, py)) / 3, 20 + number, 8
        polygon = np.reshape(star(rng, x, y, 40), (-1, 2)).tolist()
        line = [(int(a), int(b)) for a, b in rng.uniform((0, 0), SIZE, (4, 2))]
        stamped = np.zeros_like(mask, bool)
        stamped[top : top + 9, left : left + 12] = stamp
        flat = [tuple(point) for point in polygon]
        box = (min(x, px), min(y, py), max(x, px), max(y, py))
        for label, kind, points, where in (
            ("cat", "polygon", polygon, drawn("polygon", flat, outline=1)),
            ("dog", "rectangle", [[x, y], [px, py]], drawn("rectangle", box, outline=1)),
            (
                "_background_",
                "circle",
                [[x, y], [x + r, y]],
                drawn("ellipse", (x - r, y - r, x + r, y + r), outline=1),
            ),
            ("cat", "linestrip", line, drawn("line", line, width=10, joint="curve")),
            ("dog", "point", [[px, py]], drawn("ellipse", (px - 5, py - 5, px + 5, py + 5), outline=1)),
            ("__ignore__", "mask", [[left, top], [left + 11, top + 8]], stamped),
            ("cat", "line", line[:2], drawn("line", line[:2], width=10)),
        ):
            shape = {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}
            shape["mask"] = base64.b64encode(data.getvalue()).decode() if kind == "mask" else None
            shapes.append(shape)
            paint(mask, where, labels[label])
        about = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": path.name, "imageData": None}
        write(path.with_suffix(".json"), json.dumps(about | {"imageHeight": SIZE[1], "imageWidth": SIZE[0]}))
        expected[str(path)] = mask
    return expected


def make_yolo(root: Path):
    pytest.importorskip("yaml")
    write(
        root / "data.yaml",
        "path: ../datasets/x\ntrain: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n",
    )
    expected = {}
    for number in range(6):
        rng, lines, shapes = np.random.default_rng(number), [], []
        folder = root / ("train" if number < 4 else "valid")
        path = photo(folder / f"images/{number}.jpg")
        for k in range(4):
            points = np.reshape(star(rng, *rng.uniform((0, 0), SIZE), rng.uniform(5, 40)), (-1, 2))
            points = (points / SIZE).clip(0, 1).round(6)
            lines.append(" ".join(map(str, [k % 2, *points.ravel().tolist()])))
            shapes.append((drawn("polygon", (points * SIZE).ravel().tolist(), outline=1), 1 + k % 2))
        write(folder / f"labels/{number}.txt", "\n".join(lines))
        mask = np.zeros(SIZE[::-1], np.uint8)
        for where, label in sorted(shapes, key=lambda shape: -int(shape[0].sum())):
            paint(mask, where, label)
        expected[str(path)] = mask
    return expected


def test_keypoints_of_yolo_are_no_polygons(tmp_path):
    """Their lines, a box and x, y, visibility of each point, would be drawn."""
    make_yolo(tmp_path)
    with open(tmp_path / "data.yaml", "a") as file:
        file.write("kpt_shape: [17, 3]\n")
    with pytest.raises(UserError, match="data.yaml has `kpt_shape`"):
        convert(str(tmp_path), str(tmp_path / "set"))


def make_cvat_yolo(root: Path):
    """As CVAT lays it out: a list of the images, one part, class numbers as keys."""
    expected = make_yolo(root)
    write(root / "data.yaml", "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n")
    moved = {}
    for path, mask in expected.items():
        path, folder = Path(path), Path(path).parents[1]
        for kind, ending in (("images", "jpg"), ("labels", "txt")):
            target = root / kind / "train" / f"{path.stem}.{ending}"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder / kind / f"{path.stem}.{ending}", target)
        moved[str(root / f"images/train/{path.name}")] = mask
    write(root / "train.txt", "".join(f"data/images/train/{Path(path).name}\n" for path in moved))
    return moved


MAKERS = {
    name.removeprefix("make_"): make
    for name, make in list(globals().items())
    if name.startswith("make_") and make.__module__ == __name__
}
SPLIT_BY_THE_EXPORT = {"coco", "roboflow_coco", "voc", "roboflow_masks", "yolo"}


def make_export(kind: str, root: Path) -> tuple[dict, list]:
    made = MAKERS[kind](root)
    return made if isinstance(made, tuple) else (made, [])


def masks_of(root: Path) -> dict:
    """{path of the image: labels} of a data set, and the splits, as it is read for training."""
    found = {}
    for split in ("train", "val", "test"):
        if (root / f"list/{split}.txt").exists():
            dataset = ListSegmentation(str(root), split)
            for i, (image, _) in enumerate(dataset.pairs):
                found[os.path.realpath(image)] = (split, dataset.read(i)[1].numpy())
    return found


@pytest.mark.parametrize("kind", MAKERS)
def test_masks_are_those_of_a_slow_reference(kind, tmp_path, cli):
    expected, flags = make_export(kind, tmp_path / "export")
    status, out, err = cli("--convert", tmp_path / "export", "--data_root", tmp_path / "new/set", *flags)
    assert (status, err) == (0, ""), err
    found = masks_of(tmp_path / "new/set")
    assert found.keys() == {os.path.realpath(path) for path in expected}
    for path, mask in expected.items():
        split, made = found[os.path.realpath(path)]
        np.testing.assert_array_equal(made, mask, err_msg=path)
        if kind in SPLIT_BY_THE_EXPORT and kind != "voc":
            assert split in {"valid": "val"}.get(Path(path).relative_to(tmp_path / "export").parts[0], path)
    assert {split for split, _ in found.values()} >= {"train", "val"}
    assert ("a hash of its path" in out) == (kind not in SPLIT_BY_THE_EXPORT)
    classes = [line.rsplit(" ", 3)[0] for line in (tmp_path / "new/set/classes.txt").read_text().splitlines()]
    assert classes == (VOC_CLASSES if kind == "voc" else ["background", "cat", "dog"])
    status, out, err = cli("--check", "--dataset", "custom", "--data_root", tmp_path / "new/set")
    assert status == 0 and "no fault was found" in out, err


@pytest.mark.parametrize("kind", ["coco", "labelme"])
def test_a_converted_export_trains_and_evaluates(kind, tmp_path, cli):
    _, flags = make_export(kind, tmp_path / "export")
    assert cli("--convert", "export", "--data_root", "set", *flags)[0] == 0
    about = ["--exp", "x", "--dataset", "custom", "--data_root", "set"]
    status, _, err = cli("--train", *about, *SMALL, *NETWORK, "--batch_size", 2, "--epochs", 1)
    assert status == 0, err
    status, out, _ = cli(*about, "--backbone", "tiny")
    assert status == 0 and "Mean IoU" in out


@pytest.mark.parametrize(
    ("text", "classes", "table"),
    [
        ("__ignore__\n_background_\ncat\ndog\n", ["background", "cat", "dog"], [0, 1, 2]),
        ("cat\n_background_\ndog\n", ["background", "cat", "dog"], [1, 0, 2]),
        (None, VOC_CLASSES, [0, 1, 2]),
    ],
)
def test_classes_of_vocs_layout(text, classes, table, tmp_path, capsys):
    """class_names.txt can be the labels.txt that labelme2voc takes; without any file they are VOC's."""
    expected = make_labelme2voc(tmp_path / "export")
    (tmp_path / "export/class_names.txt").unlink()
    if text:
        write(tmp_path / "export/class_names.txt", text)
    convert(str(tmp_path / "export"), str(tmp_path / "set"))
    note = "4 masks without a file that names their classes: taken for VOC's 21; labelmap.txt names others"
    assert (note in capsys.readouterr().out) == (text is None)
    assert ListSegmentation(str(tmp_path / "set"), "train").classes == classes
    table = np.array([*table, *[255] * 253], np.uint8)
    for path, (_, mask) in masks_of(tmp_path / "set").items():
        np.testing.assert_array_equal(mask, table[expected[path]])


def test_known_answer_of_coco(tmp_path, capsys):
    """A ring by RLE, a square in its hole, boxes that overlap it, a crowd; the smaller lie on top."""
    pytest.importorskip("pycocotools")
    photo(tmp_path / "e/a.png", (8, 6))
    photo(tmp_path / "e/b.png", (8, 6))
    ring = np.zeros((6, 8), int)
    ring[1:6, 1:7] = 1
    ring[2:5, 2:6] = 0
    column_major = ring.ravel(order="F")
    edges = [0, *(np.flatnonzero(np.diff(column_major)) + 1).tolist(), ring.size]
    square = [3, 3, 5, 3, 5, 4, 3, 4]
    two = [[0, 0, 3, 0, 3, 2, 0, 2], [6, 0, 8, 0, 8, 1, 6, 1]]
    objects = [(1, two, 0), (1, [square], 0)]
    objects += [(2, {"size": [6, 8], "counts": np.diff(edges).tolist()}, 0)]
    objects += [(1, [[0, 5, 2, 5, 2, 6, 0, 6]], 1)]
    anns = [
        {"id": i, "image_id": 1, "category_id": c, "segmentation": s, "iscrowd": k}
        for i, (c, s, k) in enumerate(objects)
    ]
    images = [{"id": i, "file_name": f"{n}.png", "width": 8, "height": 6} for i, n in ((1, "a"), (2, "b"))]
    categories = [{"id": 1, "name": "box"}, {"id": 2, "name": "ring"}]
    write(
        tmp_path / "e/x.json", json.dumps({"images": images, "annotations": anns, "categories": categories})
    )
    convert(str(tmp_path / "e"), str(tmp_path / "set"))
    assert f"1 objects are iscrowd: ignored (the first: {tmp_path}/e/a.png)" in capsys.readouterr().out
    found = masks_of(tmp_path / "set")
    i = 255
    assert found[str(tmp_path / "e/a.png")][1].tolist() == [
        [1, 1, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 2, 2, 2, 2, 0],
        [0, 2, 0, 0, 0, 0, 2, 0],
        [0, 2, 0, 1, 1, 0, 2, 0],
        [0, 2, 0, 0, 0, 0, 2, 0],
        [i, i, 2, 2, 2, 2, 2, 0],
    ]
    assert not found[str(tmp_path / "e/b.png")][1].any()


@pytest.mark.parametrize("orientation", [None, 3, 5, 6, 7, 8])
def test_coordinates_are_of_the_upright_or_of_the_stored_image(orientation, tmp_path):
    stored = photo(tmp_path / "e/a.jpg", (40, 30), orientation)
    photo(tmp_path / "e/b.jpg", (40, 30), orientation)
    turned = orientation and orientation >= 5
    upright_size = (30, 40) if turned else (40, 30)
    for name, (width, height) in (("a", (40, 30)), ("b", upright_size)):
        shape = {"label": "x", "points": [[2, 3], [9, 20]], "shape_type": "rectangle"}
        about = {"shapes": [shape], "imagePath": f"{name}.jpg", "imageWidth": width, "imageHeight": height}
        write(tmp_path / f"e/{name}.json", json.dumps(about))
    convert(str(tmp_path / "e"), str(tmp_path / "set"))
    found = {Path(path).stem: mask for path, (_, mask) in masks_of(tmp_path / "set").items()}
    as_stored = Image.fromarray(drawn("rectangle", (2, 3, 9, 20), size=(40, 30)).astype(np.uint8))
    if turned:  # the labels of the stored image, turned as a viewer turns it
        as_stored.getexif()[274] = orientation
        with io.BytesIO() as data:
            as_stored.save(data, "PNG", exif=as_stored.getexif())
            from PIL import ImageOps

            expected = np.array(ImageOps.exif_transpose(Image.open(data)))
        np.testing.assert_array_equal(found["a"], expected)
    else:
        np.testing.assert_array_equal(found["a"], np.array(as_stored))
    np.testing.assert_array_equal(found["b"], drawn("rectangle", (2, 3, 9, 20), size=upright_size))
    assert stored.exists()


@pytest.mark.parametrize("orientation", [1, 3])
def test_turned_images_of_which_the_size_tells_nothing(orientation, tmp_path, capsys):
    for name in "ab":
        photo(tmp_path / f"e/{name}.jpg", (40, 30), orientation)
        shape = {"label": "x", "points": [[2, 3], [9, 20]], "shape_type": "rectangle"}
        about = {"shapes": [shape], "imagePath": f"{name}.jpg", "imageWidth": 40, "imageHeight": 30}
        write(tmp_path / f"e/{name}.json", json.dumps(about))
    convert(str(tmp_path / "e"), str(tmp_path / "set"))
    line = "2 images are turned by EXIF, and their size does not tell whether their labels go by the upright"
    assert (line in capsys.readouterr().out) == (orientation == 3)


def test_an_export_of_yolo_beside_another(tmp_path, capsys):
    """Roboflow's `../train/images` stands for the folder beside data.yaml, not for the neighbour's."""
    expected = make_yolo(tmp_path / "both/one")
    make_yolo(tmp_path / "both")
    convert(str(tmp_path / "both/one"), str(tmp_path / "set"))
    assert masks_of(tmp_path / "set").keys() == expected.keys()
    note = "2 folders of data.yaml are also beside it: taken from there"
    assert f"{note} (the first: ../train/images)" in capsys.readouterr().out
    os.renames(tmp_path / "both/one/data.yaml", tmp_path / "both/config/data.yaml")
    convert(str(tmp_path / "both/config"), str(tmp_path / "as it says"))
    assert {Path(path).parents[2].name for path in masks_of(tmp_path / "as it says")} == {"both"}


def test_an_export_of_yolo_without_val_beside_another(tmp_path, capsys):
    """The neighbour's val is not its own."""
    expected = make_yolo(tmp_path / "both/one")
    make_yolo(tmp_path / "both")
    shutil.rmtree(tmp_path / "both/one/valid")
    convert(str(tmp_path / "both/one"), str(tmp_path / "set"))
    assert masks_of(tmp_path / "set").keys() == {path for path in expected if "train" in path}
    note = "1 folders of data.yaml are not there: left out (the first: ../valid/images)"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["path", "entries", "list"])
def test_a_copy_of_an_export_of_yolo(kind, tmp_path, capsys):
    """Absolute paths are those of the folder that it was copied from; what is elsewhere alone is told."""
    expected = make_cvat_yolo(tmp_path / "old")
    old = tmp_path / "old"
    text = {"path": f"path: {old}\ntrain: train.txt", "entries": f"train: {old}/images/train"}
    text["list"] = f"path: .\ntrain: {old}/train.txt"
    write(old / "data.yaml", f"names: [cat, dog]\n{text[kind]}\n")
    if kind == "list":
        write(old / "train.txt", "".join(f"{path}\n" for path in expected))
    shutil.copytree(old, tmp_path / "new")
    convert(str(tmp_path / "new"), str(tmp_path / "set"))
    assert masks_of(tmp_path / "set").keys() == {path.replace("/old/", "/new/") for path in expected}
    out = capsys.readouterr().out
    assert ("1 folders of data.yaml are also beside it: taken from there" in out) and "outside" not in out
    for name in os.listdir(tmp_path / "new"):
        if name != "data.yaml":
            os.rename(tmp_path / "new" / name, tmp_path / f"{name}.gone")
    convert(str(tmp_path / "new"), str(tmp_path / "set of old"))
    assert masks_of(tmp_path / "set of old").keys() == expected.keys()
    assert "folders that data.yaml names are outside of its own: taken from there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "train", "val"),
    [
        ("train: ../a/images/train\nval: images/val", ["a/train"], ["b/val"]),
        ("path: ..\ntrain: a/images/train\nval: b/images/val", ["a/train"], ["b/val"]),
        ("train: [images/train, ../a/images/train]\nval: images/val", ["a/train", "b/train"], ["b/val"]),
        (
            "train: [ROOT/a/images/train, ROOT/b/images/train]\nval: images/val",
            ["a/train", "b/train"],
            ["b/val"],
        ),
        ("train: relative.txt\nval: images/val", ["a/train"], ["b/val"]),
        ("train: absolute.txt\nval: images/val", ["a/train", "b/train"], ["b/val"]),
        ("train: own.txt\nval: ROOT/b/images/val", ["b/train"], ["b/val"]),
        ("train: images\\train\\\nval: ./images/val/\ntest: test/", ["b/train"], ["b/val"]),
        ("train: C:/x/images/train\nval: ../a/images/val", ["b/train"], ["a/val"]),
    ],
)
def test_a_data_yaml_that_names_other_folders(text, train, val, tmp_path, capsys):
    """They are as they are written, though the same lie beside it."""
    pytest.importorskip("yaml")
    for name, label in (("a", 0), ("b", 1)):
        for split in ("train", "val"):
            for number in range(2):
                photo(tmp_path / f"{name}/images/{split}/{number}{name}.jpg")
                write(tmp_path / f"{name}/labels/{split}/{number}{name}.txt", f"{label} 0 0 1 0 1 1")
    (tmp_path / "b/test").mkdir()
    (tmp_path / "b/test").rmdir()
    paths = sorted(tmp_path.rglob("images/train/*.jpg"))
    write(tmp_path / "b/absolute.txt", "".join(f"{path}\n" for path in paths))
    write(tmp_path / "b/own.txt", "".join(f"{path}\n" for path in paths[2:]))
    write(tmp_path / "b/relative.txt", "".join(f"../a/images/train/{path.name}\n" for path in paths[:2]))
    write(tmp_path / "b/data.yaml", f"names: [cat, dog]\n{text}\n".replace("ROOT", str(tmp_path)))
    convert(str(tmp_path / "b"), str(tmp_path / "set"))
    found = {"train": set(), "val": set()}
    for path, (split, mask) in masks_of(tmp_path / "set").items():
        name, _, folder = os.path.relpath(path, tmp_path).split("/")[:3]
        found[split].add(f"{name}/{folder}")
        assert mask.max() == {"a": 1, "b": 2}[name]
    assert found == {"train": set(train), "val": set(val)}
    assert "also beside" not in capsys.readouterr().out


def test_a_list_of_names_relative_to_the_path_of_data_yaml(tmp_path):
    expected = make_cvat_yolo(tmp_path / "e/data")
    os.rename(tmp_path / "e/data/data.yaml", tmp_path / "e/data.yaml")
    write(tmp_path / "e/data.yaml", "names: [cat, dog]\npath: data\ntrain: lists/train.txt\n")
    names = "".join(f"images/train/{Path(path).name}\n" for path in expected)
    write(tmp_path / "e/data/lists/train.txt", names)
    convert(str(tmp_path / "e"), str(tmp_path / "set"))
    assert masks_of(tmp_path / "set").keys() == expected.keys()


def test_names_that_yaml_takes_for_something_else(tmp_path):
    make_yolo(tmp_path)
    write(tmp_path / "data.yaml", "train: train/images\nval: valid/images\nnames: [no, yes]\n")
    with pytest.raises(UserError, match="YAML reads a name as False: put yes, no, on and off in quotes"):
        convert(str(tmp_path), str(tmp_path / "set"))


def test_a_yaml_file_of_another_kind(tmp_path, cli):
    """`names:` begins a line of YOLO's alone."""
    expected = make_labelme(tmp_path / "export")
    write(tmp_path / "export/config.yaml", "model: deeplab\nclass_names: [cat]\ninfo:\n  names: [x]\n")
    status, out, err = cli("--convert", "export", "--data_root", "set")
    assert status == 0 and "export: labelme, 5 images" in out, err
    assert len(masks_of(tmp_path / "set")) == len(expected)


def test_one_folder_for_train_and_val(tmp_path, cli):
    """As in data.yaml of small examples; without `val` a hash splits."""
    pytest.importorskip("yaml")
    for name in "abcde":
        photo(tmp_path / f"e/images/{name}.jpg", (20, 10))
        write(tmp_path / f"e/labels/{name}.txt", "0 0 0 1 0 1 1")
    write(tmp_path / "e/data.yaml", "train: images\nval: images\nnames: [x]\n")
    status, _, err = cli("--convert", "e", "--data_root", "set")
    assert status == 1 and one_line(err) and not (tmp_path / "set").exists()
    assert "a.jpg is in train and in val of the export: name other images for one of them" in err
    write(tmp_path / "e/data.yaml", "train: images\nval: 2024\ntest: [7]\nnames: [x]\n")
    assert cli("--convert", "e", "--data_root", "set")[0] == 0


def test_classes_that_are_chosen(tmp_path, cli):
    expected = make_labelme(tmp_path / "export")
    for others, rest in (("background", 0), ("ignore", 255)):
        root = tmp_path / others
        status, *_ = cli("--convert", "export", "--data_root", root, "--classes", "dog", "--others", others)
        assert status == 0
        table = np.arange(256, dtype=np.uint8)
        table[[1, 2]] = rest, 1
        found = masks_of(root)
        for path, mask in expected.items():
            np.testing.assert_array_equal(found[path][1], table[mask])
        assert [line.split()[0] for line in (root / "classes.txt").read_text().splitlines()] == [
            "background",
            "dog",
        ]
    status, _, err = cli("--convert", "export", "--data_root", "none", "--classes", "cow")
    assert status == 1 and "the export has no 'cow', but background, cat, dog" in err and one_line(err)


def test_pascal_takes_vocs_classes_in_vocs_order(tmp_path, cli):
    """COCO's categories have other numbers and names; a training image needs 1,000 pixels of VOC's."""
    pytest.importorskip("pycocotools")
    names = {5: "airplane", 2: "bicycle", 16: "bird", 9: "boat", 44: "bottle", 6: "bus", 3: "car", 17: "cat"}
    names |= {
        62: "chair",
        21: "cow",
        67: "dining table",
        18: "dog",
        19: "horse",
        4: "motorcycle",
        1: "person",
    }
    names |= {64: "potted plant", 20: "sheep", 63: "couch", 7: "train", 72: "tv", 52: "banana"}
    order = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
    categories = [{"id": n, "name": names[n]} for n in sorted(names)]
    for split in ("train", "val"):
        images, anns = [], []
        for number, category in enumerate([*order, 52, 1]):
            side = 31 if number == len(order) + 1 else 32  # of the last it has 961 pixels
            photo(tmp_path / f"coco/{split}2017/{number:02}.jpg", (40, 40))
            images.append({"id": number, "file_name": f"{number:02}.jpg", "width": 40, "height": 40})
            box = [0, 0, side, 0, side, side, 0, side]
            anns.append(
                {
                    "id": number,
                    "image_id": number,
                    "category_id": category,
                    "segmentation": [box],
                    "iscrowd": 0,
                }
            )
        path = tmp_path / f"coco/annotations/instances_{split}2017.json"
        write(path, json.dumps({"images": images, "annotations": anns, "categories": categories}))
    status, out, _ = cli("--convert", "coco", "--data_root", "set", "--classes", "pascal")
    assert status == 0 and "2 training images with fewer than 1000 pixels of VOC's classes: left out" in out
    found = masks_of(tmp_path / "set")
    train = {Path(p).stem: mask for p, (split, mask) in found.items() if split == "train"}
    assert sorted(train) == [f"{i:02}" for i in range(20)]
    assert [int(train[f"{i:02}"][5, 5]) for i in range(20)] == list(range(1, 21))
    assert sum(split == "val" for split, _ in found.values()) == 22
    assert ListSegmentation("set", "train").classes == VOC_CLASSES


def test_ignored_of_datumaro(tmp_path):
    """In the colour of VOC's borders: no class."""
    expected, _ = make_export("cvat_masks", tmp_path / "export")
    labelmap = tmp_path / "export/labelmap.txt"
    for path, mask in expected.items():
        name = os.path.splitext(os.path.relpath(path, tmp_path / "photos"))[0]
        file = tmp_path / f"export/SegmentationClass/{name}.png"
        picture = np.array(Image.open(file))
        picture[3:5], mask[3:5] = (224, 224, 192), 255
        Image.fromarray(picture).save(file)
    with open(labelmap, "a") as file:
        file.write("ignored:224,224,192::\n")
    convert(str(tmp_path / "export"), str(tmp_path / "set"), str(tmp_path / "photos"))
    assert "ignored" not in ListSegmentation(str(tmp_path / "set"), "train").classes
    for path, (_, mask) in masks_of(tmp_path / "set").items():
        np.testing.assert_array_equal(mask, expected[path])
    with open(labelmap, "a") as file:
        file.writelines(f"c{i}:1,{i},1::\n" for i in range(256))
    with pytest.raises(UserError, match="labelmap.txt names 2.. classes: a mask of bytes can show 255"):
        convert(str(tmp_path / "export"), str(tmp_path / "other"), str(tmp_path / "photos"), ["cat"])


@pytest.mark.parametrize("kind", ["text ids", "flat polygons", "_background_", "one bad polygon"])
def test_coco_as_other_tools_write_it(kind, tmp_path, capsys):
    expected, _ = make_export("cvat_coco", tmp_path / "export")
    path = tmp_path / "export/annotations/instances_default.json"
    data = json.loads(path.read_text())
    if kind == "_background_":  # of labelme's: a hole in others
        data["categories"].insert(0, {"id": 0, "name": "_background_", "supercategory": None})
        for item in data["annotations"]:
            item["category_id"] = 0 if item["category_id"] == 7 else 3
        expected = {key: np.where(mask == 2, 0, mask) for key, mask in expected.items()}
    for item in data["annotations"]:
        shape = item["segmentation"]
        if kind == "text ids":
            item["image_id"] = str(item["image_id"])
        elif kind == "flat polygons" and isinstance(shape, list) and len(shape) == 1:
            item["segmentation"] = shape[0]
        elif kind == "one bad polygon" and isinstance(shape, list):
            shape.append([1, None, 3, 4, 5, 6])
    path.write_text(json.dumps(data))
    convert(str(tmp_path / "export"), str(tmp_path / "set"))
    found = masks_of(tmp_path / "set")
    assert len(found) == 4
    for image, (_, mask) in found.items():
        np.testing.assert_array_equal(mask, expected[image])
    out = capsys.readouterr().out
    assert "annotations without a polygon" not in out
    assert ("12 polygons of fewer than three points: left out" in out) == (kind == "one bad polygon")
    if kind == "_background_":
        assert ListSegmentation(str(tmp_path / "set"), "train").classes == ["background", "cat", "dog"]


def test_split_is_the_last_that_a_name_has():
    names = {"crack_test_2024_train": "train", "instances_val2017": "val", "test-dev": "test", "latest": None}
    assert {name: split_in(name) for name in names} == names


def spoiled_coco(root: Path, kind: str) -> None:
    make_cvat_coco(root)
    path = root / "annotations/instances_default.json"
    data = json.loads(path.read_text())
    images, annotations, categories = data["images"], data["annotations"], data["categories"]
    if kind == "cut":
        return path.write_text(path.read_text()[:-700])
    if kind == "image ids":
        images[1]["id"] = images[0]["id"]
    elif kind == "category ids":
        categories[1]["id"] = 3
    elif kind == "unknown category":
        annotations[3]["category_id"] = 99
    elif kind == "one file":
        images[1]["file_name"] = images[0]["file_name"]
    elif kind == "no images":
        os.rename(root / "images", root / "elsewhere")
    elif kind == "size":
        images[2] |= {"width": 71}
    elif kind == "rle size":
        annotations[-3]["segmentation"]["size"] = [70, 50]
    elif kind == "rle counts":
        annotations[3]["segmentation"]["counts"] = [3, 4]
    elif kind.startswith("rle "):  # compressed; pycocotools takes them all, with pixels as memory was
        coco = pytest.importorskip("pycocotools.mask")
        whole = coco.encode(np.eye(50, 70, dtype=np.uint8, order="F"))["counts"].decode()
        text = {"rle of 0 bytes": "", "rle cut": whole[: len(whole) // 2], "rle of text": "abc"}[kind]
        annotations[3]["segmentation"] = {"size": [50, 70], "counts": text}
    elif kind == "boxes":
        for item in annotations:
            item["segmentation"] = []
    elif kind == "damaged":
        (root / "images/default" / images[0]["file_name"]).write_text("<html>")
    elif kind == "panoptic":
        data["annotations"] = [{"image_id": 40, "file_name": "40.png", "segments_info": []}]
    elif kind == "no categories":
        del data["categories"]
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "instances_default.json is cut or no JSON"),
        ("image ids", "two images have the id 40: img 31.jpg is one"),
        ("category ids", "two categories have the id 3: 'dog' is one"),
        ("unknown category", "an annotation is of the category 99, which is not listed"),
        ("one file", "img 30.jpg is 2 times in the export"),
        ("no images", "img 30.jpg is in none of"),
        ("size", "img 32.jpg is 70x50, but in the export it is 71x50"),
        ("rle size", "an RLE has the size [70, 50], but the image is 50 high, 70 wide"),
        ("rle counts", "img 30.jpg: an RLE is damaged: its counts do not add up"),
        ("rle of 0 bytes", "img 30.jpg: an RLE is damaged: its counts do not add up"),
        ("rle cut", "img 30.jpg: an RLE is damaged: its counts do not add up"),
        ("rle of text", "img 30.jpg: an RLE is damaged: its counts do not add up"),
        ("boxes", "no object of cat, dog is in the export; 20 annotations without a polygon or RLE"),
        ("damaged", "img 30.jpg: cannot identify"),
        ("no categories", "has no 'categories'"),
        ("panoptic", "is of COCO's panoptic kind: export instances or semantic masks"),
    ],
)
def test_a_coco_json_that_is_not_as_it_should_be(kind, message, tmp_path, cli):
    pytest.importorskip("pycocotools")
    spoiled_coco(tmp_path / "export", kind)
    status, _, err = cli("--convert", "export", "--data_root", "set")
    assert status == 1 and message in err and one_line(err)
    assert not (tmp_path / "set").exists()
    if kind in ("size", "damaged", "rle size", "rle counts"):
        status, out, _ = cli("--convert", "export", "--data_root", "set", "--skip_bad")
        assert (
            status == 0
            and "1 images that cannot be used: left out" in out
            and len(masks_of(tmp_path / "set")) == 3
        )
    if kind == "no images":
        assert cli("--convert", "export", "--data_root", "set", "--images", "export/elsewhere")[0] == 0


@given(st.data())
def test_compressed_rle_beside_pycocotools(data):
    coco = pytest.importorskip("pycocotools.mask")
    height, width = data.draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    edges = data.draw(st.lists(st.integers(0, height * width), max_size=9).map(sorted))
    runs = np.diff([0, *edges, height * width]).tolist()
    rle = coco.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    assert run_lengths(rle["counts"].decode()) == runs


def test_what_is_left_out_is_counted(tmp_path, cli):
    pytest.importorskip("pycocotools")
    make_cvat_coco(tmp_path / "export")
    path = tmp_path / "export/annotations/instances_default.json"
    data = json.loads(path.read_text())
    items, images = data["annotations"], data["images"]
    items[0]["segmentation"] = [[1, 1, 5, 5]]
    items[1]["segmentation"] = [[-20, -20, 30, -20, 30, 30]]
    items[4]["segmentation"] = [[-20, -20, -30, -20, -30, -30]]
    items[5]["segmentation"] = [[math.nan, 1, 2, 3, 4, 5], [1e9, 1, 2, 3, 4, 5]]
    items[6]["segmentation"] = []
    items[9]["image_id"] = 999
    data["categories"].append({"id": 9, "name": "cow"})
    images.append({"id": 77, "file_name": "gone.jpg", "width": 5, "height": 5})
    path.write_text(json.dumps(data))
    status, out, err = cli("--convert", "export", "--data_root", "set")
    assert status == 0, err
    for line in (
        "1 polygons of fewer than three points: left out (the first: export/images/default/img 30.jpg)",
        "2 polygons with points that are no numbers or far away: left out",
        "1 objects without a pixel in their image",
        "1 annotations without a polygon or RLE, as boxes are: left out (the first: img 31.jpg)",
        "1 annotations of images that are not listed: left out (the first: image 999)",
        "are not there: left out (the first: gone.jpg)",
    ):
        assert line in out
    assert "clipped" in out
    cow = next(line for line in out.splitlines() if line.startswith("cow"))
    assert cow.split() == ["cow", "0.00", "%", "0", "nowhere"]


def test_what_becomes_background_is_noted(tmp_path, cli):
    """Images that nobody has annotated, and classes that one of two files of COCO does not know."""
    make_coco(tmp_path / "export")
    for split in ("train", "val"):
        path = tmp_path / f"export/annotations/instances_{split}2017.json"
        data = json.loads(path.read_text())
        if split == "val":
            data["categories"] = [item for item in data["categories"] if item["name"] == "dog"]
            data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 7]
        else:
            data["annotations"] = [a for a in data["annotations"] if a["image_id"] not in (41, 43)]
            data["annotations"][0]["image_id"] = 43
            data["annotations"][0]["segmentation"] = []
        path.write_text(json.dumps(data))
    status, out, err = cli("--convert", "export", "--data_root", "set")
    assert status == 0, err
    for line in (
        "1 other JSON files are beside these: left out (the first: export/annotations/captions_train2017",
        "1 images have no annotation: background alone (the first: img 11.jpg)",
        "1 annotations without a polygon or RLE, as boxes are: left out (the first: img 13.jpg)",
        "1 classes are missing from the categories of a file: background in its images (the first: cat, "
        "which export/annotations/instances_val2017.json does not list)",
    ):
        assert line in out


def test_images_that_are_elsewhere_are_noted(tmp_path, cli):
    """Their names alone are the same: they may be others."""
    note = "images are not in the folders that the export names: taken by their file names"
    pytest.importorskip("pycocotools")
    coco_part(tmp_path / "coco/x.json", tmp_path / "coco/images", "cam1/", 5)
    make_cvat_yolo(tmp_path / "yolo")
    make_labelme(tmp_path / "labelme")
    for path in [*(tmp_path / "yolo/images/train").iterdir(), *(tmp_path / "yolo/labels/train").iterdir()]:
        path.rename(tmp_path / "yolo" / path.name)
    path = tmp_path / "labelme/photo 3.json"
    path.write_text(path.read_text().replace("photo 3.jpg", "../raw/photo 3.jpg"))
    for kind, first in (
        ("coco", "4 {} (the first: cam1/img 50.jpg)"),
        ("yolo", "6 {} (the first: data/images/train/0.jpg)"),
        ("labelme", "1 {} (the first: ../raw/photo 3.jpg)\n"),
    ):
        status, out, err = cli("--convert", kind, "--data_root", f"{kind} set")
        assert status == 0 and first.format(note) in out, err
    path.write_text(path.read_text().replace("../raw/photo 3.jpg", "before.jpg"))
    status, out, err = cli("--convert", "labelme", "--data_root", "another set")
    note = "images have another name in their JSON files: taken by the names of these"
    assert f"1 {note} (the first: before.jpg of labelme/photo 3.json)" in out, err


def test_what_is_left_out_or_guessed_is_noted(tmp_path, cli):
    make_labelme2voc(tmp_path / "voc")
    photo(tmp_path / "voc/JPEGImages/new.jpg")
    make_yolo(tmp_path / "yolo")
    write(tmp_path / "yolo/other.yaml", "names: [x]")
    for kind, notes in {
        "voc": ["1 images have no mask in SegmentationClass: left out (the first: new)"],
        "yolo": [
            "1 other YAML files name classes, too: left out (the first: yolo/other.yaml)",
            "1 paths of data.yaml are not there: its own folder taken (the first: ../datasets/x)",
        ],
    }.items():
        status, out, err = cli("--convert", kind, "--data_root", f"{kind} set")
        assert status == 0 and all(note in out for note in notes), err + out


@pytest.mark.parametrize("kind", ["yolo", "roboflow_masks"])
def test_images_of_an_export_that_names_them_itself(kind, tmp_path, cli):
    make_export(kind, tmp_path / "export")
    status, _, err = cli("--convert", "export", "--data_root", "set", "--images", "export/train")
    assert status == 1 and one_line(err) and "leave out --images" in err and not (tmp_path / "set").exists()


def test_two_classes_of_one_name_are_noted(tmp_path, cli):
    make_label_studio_coco(tmp_path / "coco")
    make_yolo(tmp_path / "yolo")
    make_roboflow_masks(tmp_path / "masks")
    tables = [f"masks/{part}/_classes.csv" for part in ("train", "valid")]
    for path in (tmp_path / name for name in ("coco/result.json", "yolo/data.yaml", *tables)):
        path.write_text(path.read_text().replace("dog", "cat"))
    for kind, count in (("coco", 1), ("yolo", 1), ("masks", 2)):
        status, out, err = cli("--convert", kind, "--data_root", f"{kind} set")
        note = f"{count} classes have the name of another: one class of both (the first: cat)"
        assert status == 0 and note in out, err + out


def test_exports_that_are_refused(tmp_path, cli):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "looked for a COCO JSON"), ("nowhere", "nowhere is not there")):
        status, _, err = cli("--convert", name, "--data_root", "set")
        assert status == 1 and message in err and one_line(err)
    make_labelme(tmp_path / "export")
    for name in ("masks", "list"):
        (tmp_path / "set" / name).mkdir(parents=True)
        status, _, err = cli("--convert", "export", "--data_root", "set")
        assert status == 1 and f"set has {name} already: --data_root names a new folder" in err
        (tmp_path / "set" / name).rmdir()
    path = tmp_path / "export/photo 3.json"
    whole = path.read_text()
    for text, message in (
        (whole[:300], "photo 3.json is cut or no JSON"),
        (whole.replace('"dog"', '"frog"'), "photo 3.json: the label 'frog' is not in export/labels.txt"),
        (whole.replace('"mask": "iVBO', '"mask": "iVBA'), "photo 3.jpg: a shape's mask is no PNG in base64"),
    ):
        path.write_text(text)
        status, _, err = cli("--convert", "export", "--data_root", "set")
        assert status == 1 and message in err and one_line(err)
        assert not (tmp_path / "set").exists() or not os.listdir(tmp_path / "set")
    for flags in (["--classes", "x"], ["--images", "x"], ["--others", "ignore"], ["--train_list", "x"]):
        assert cli("--check", *flags)[0] == 2
    assert cli("--convert", "export")[0] == 2


def test_masks_without_images(tmp_path, cli):
    make_cvat_masks(tmp_path / "export")
    status, _, err = cli("--convert", "export", "--data_root", "set")
    assert status == 1 and "--images DIR names the folder of their images" in err
    (tmp_path / "photos/a.jpg").unlink()
    status, out, _ = cli("--convert", "export", "--data_root", "set", "--images", "photos")
    assert status == 0 and "1 images are not in photos: left out (the first: a)" in out
    write(tmp_path / "export/labelmap.txt", "background:0,0,0::\nx:300,0,0::\n")
    status, _, err = cli("--convert", "export", "--data_root", "other", "--images", "photos")
    assert status == 1 and one_line(err) and "labelmap.txt:2: 'x:300,0,0::': a colour is three" in err


def test_a_conversion_that_was_cut_begins_anew(tmp_path, monkeypatch):
    expected, _ = make_export("labelme", tmp_path / "export")
    export, root = str(tmp_path / "export"), tmp_path / "set"

    def kill(*args):
        raise KeyboardInterrupt

    for name in ("write_lists", "move"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(commands.convert, name, kill)
            convert(export, str(root))
        assert not root.exists()
    with (
        monkeypatch.context() as patch,
        pytest.raises(KeyboardInterrupt),
    ):  # as a kill does, which tidies nothing
        patch.setattr(commands.convert.shutil, "rmtree", lambda *args, **options: None)
        patch.setattr(commands.convert, "MADE", ("masks", "classes.txt", "gone"))
        patch.setattr(
            commands.convert.os, "replace", lambda *paths: kill() if "gone" in paths[0] else os.rename(*paths)
        )
        convert(export, str(root))
    assert sorted(os.listdir(root)) == [".converting", "classes.txt", "masks"]
    convert(export, str(root))
    assert sorted(os.listdir(root)) == ["classes.txt", "list", "masks"]
    assert len(masks_of(root)) == len(expected)
    with pytest.raises(UserError, match="set has masks already"):
        convert(export, str(root))
    (root / ".converting").mkdir()  # of a kill when all was moved
    with pytest.raises(UserError, match="set has masks already"):
        convert(export, str(root))
    own = tmp_path / "own/masks/mine.png"  # of somebody's own, beside what a kill before that has left
    own.parent.mkdir(parents=True)
    own.touch()
    (tmp_path / "own/.converting/masks").mkdir(parents=True)
    with pytest.raises(UserError, match="own has masks already"):
        convert(export, str(tmp_path / "own"))
    assert own.exists() and len(masks_of(root)) == len(expected)


@pytest.mark.parametrize("kind", ["coco", "cvat_coco", "cvat_masks", "roboflow_masks", "labelme", "yolo"])
def test_an_export_given_as_a_data_set_is_named(kind, tmp_path, cli):
    make_export(kind, tmp_path / "export")
    status, _, err = cli("--check", "--dataset", "custom", "--data_root", "export")
    assert status == 1 and "export looks like an export, " in err
    assert "`python main.py --convert export --data_root NEW` makes a data set of it" in err


def test_ade20k_is_read_as_it_is(tmp_path):
    masks = random_masks(tmp_path / "images", ["training/a.jpg", "training/b.jpg", "validation/c.jpg"])
    for path, mask in masks.items():
        target = Path(path.replace("/images/", "/annotations/")).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(target)
    write(tmp_path / "classes.txt", "ignore = 0\nwall\nbuilding\n")
    write(tmp_path / "labels/objects.txt", "no pictures")
    dataset = ListSegmentation(str(tmp_path), "train")
    assert len(dataset) == 2 and len(ListSegmentation(str(tmp_path), "val")) == 1
    table = np.array([255, 0, 1], np.uint8)
    for i, (image, _) in enumerate(dataset.pairs):
        np.testing.assert_array_equal(dataset.read(i)[1].numpy(), table[masks[image]])
    (tmp_path / "labels/a.png").write_bytes(b"")
    with pytest.raises(UserError, match="has annotations and labels: rename the one of masks to masks"):
        ListSegmentation(str(tmp_path), "train")


def test_train_list_reads_vocs_own_masks(tmp_path):
    masks = make_voc(tmp_path / "VOC2012")
    dataset = VOCSegmentation(str(tmp_path), "train", train_list="trainval")
    assert [os.path.basename(image) for image, _ in dataset.pairs] == [f"2007_{i}.jpg" for i in range(5)]
    for i, (image, _) in enumerate(dataset.pairs):
        np.testing.assert_array_equal(dataset.read(i)[1].numpy(), masks[image])
    assert len(VOCSegmentation(str(tmp_path), "train", train_list="train")) == 3
    with pytest.raises(
        UserError, match="ImageSets/Segmentation/mine.txt.*--train_list names one that is there"
    ):
        VOCSegmentation(str(tmp_path), "train", train_list="mine")


def test_two_conversions_to_one_folder(tmp_path, monkeypatch):
    """The second would have deleted the masks of the first."""
    expected, _ = make_export("labelme", tmp_path / "export")
    code = (
        "import sys; from commands.convert import convert; from utils import UserError\n"
        "try: convert(*sys.argv[1:])\nexcept UserError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "export"), str(tmp_path / "set")]
    write_lists, printed = commands.convert.write_lists, []

    def second(*args):
        printed.append(subprocess.run(command, cwd=MAIN.parent, capture_output=True, text=True).stdout)
        write_lists(*args)

    monkeypatch.setattr(commands.convert, "write_lists", second)
    convert(str(tmp_path / "export"), str(tmp_path / "set"))
    assert f"another process makes a data set at {tmp_path / 'set'}" in printed[0]
    assert len(masks_of(tmp_path / "set")) == len(expected)
    assert sorted(os.listdir(tmp_path / "set")) == ["classes.txt", "list", "masks"]


def labelme_file(path: Path, label: str) -> None:
    photo(path.with_suffix(".jpg"))
    shape = {"label": label, "points": [[1, 1], [30, 30]], "shape_type": "rectangle"}
    write(path, json.dumps({"shapes": [shape], "imagePath": f"{path.stem}.jpg"}))


@pytest.mark.parametrize("images", [None, "photos"])
def test_val_stays_when_other_folders_come(images, tmp_path):
    """Their images may have the same base names; the hash is of the path in the export or in --images."""
    names, found = [f"cam{k}/{i:02}" for k in (1, 2) for i in range(20)], []
    for export, count in (("first", 20), ("elsewhere/second", 40)):
        for name in names[:count]:
            labelme_file(tmp_path / export / f"{name}.json", "cat")
            if images:
                path = tmp_path / export / f"{name}.json"
                path.write_text(path.read_text().replace(f"{path.stem}.jpg", f"{name}.jpg"))
                (tmp_path / images / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(path.with_suffix(".jpg"), tmp_path / images / f"{name}.jpg")
        convert(str(tmp_path / export), str(tmp_path / f"{export} set"), images and str(tmp_path / images))
        val = [path for path, (split, _) in masks_of(tmp_path / f"{export} set").items() if split == "val"]
        found.append({"/".join(Path(path).with_suffix("").parts[-2:]) for path in val})
    assert found == [every_fifth(names[:20]), every_fifth(names)] and all(found)


def test_augmented_copies_of_a_photo_are_in_one_split(tmp_path):
    """Roboflow's; a hash of each copy would put some in val, whose photo is trained on."""
    for number in range(40):
        for copy in ("0a1b", "77fe"):
            labelme_file(tmp_path / f"export/IMG_{number}_jpg.rf.{number}{copy}.json", "cat")
    convert(str(tmp_path / "export"), str(tmp_path / "set"))
    parts = {"train": set(), "val": set()}
    for path, (split, _) in masks_of(tmp_path / "set").items():
        parts[split].add(Path(path).name.partition(".")[0])
    assert len(parts["val"]) > 2 and not parts["train"] & parts["val"]
    few = [f"IMG_{number}_jpg.rf.{copy}" for number in (0, 1, 2) for copy in "ab"]
    assert not every_fifth(few)  # then the first photo is val
    for name in few:
        labelme_file(tmp_path / f"few/{name}.json", "cat")
    convert(str(tmp_path / "few"), str(tmp_path / "set of few"))
    splits = {Path(path).name: split for path, (split, _) in masks_of(tmp_path / "set of few").items()}
    assert [name for name in sorted(splits) if splits[name] == "val"] == [
        "IMG_0_jpg.rf.a.jpg",
        "IMG_0_jpg.rf.b.jpg",
    ]


@pytest.mark.parametrize("kind", ["labelme", "coco"])
def test_images_are_the_named_folders_own(kind, tmp_path, capsys):
    """Paths that lead out of --images do not bring the images back that it replaces."""
    expected = make_export(kind, tmp_path / "export")[0]
    for path in expected:  # links, as of a store of files
        new = photo(tmp_path / "store" / os.path.basename(path))
        (tmp_path / "new").mkdir(exist_ok=True)
        (tmp_path / "new" / new.name).symlink_to(new)
    for file in (tmp_path / "export").rglob("*.json"):
        data = json.loads(file.read_text())
        if kind == "labelme":
            data["imagePath"] = f"../export/{data['imagePath']}"
        for image in data.get("images", ()):
            folder = "train2017" if "train" in file.name else "val2017"
            image["file_name"] = str(tmp_path / "export" / folder / image["file_name"])
        write(file, json.dumps(data))
    convert(str(tmp_path / "export"), str(tmp_path / "old set"))
    assert masks_of(tmp_path / "old set").keys() == expected.keys()
    capsys.readouterr()
    convert(str(tmp_path / "export"), str(tmp_path / "set"), str(tmp_path / "new"))
    assert {os.path.dirname(path) for path in masks_of(tmp_path / "set")} == {str(tmp_path / "store")}
    note = f"{len(expected)} images are not in the folders that the export names: taken by their file names"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("absolute", [False, True])
def test_paths_that_lead_into_the_named_folder(absolute, tmp_path, capsys):
    """../images/cam/0.jpg is that image of --images, and not another 0.jpg in it."""
    for number in range(3):
        labelme_file(tmp_path / f"json/{number}.json", "cat")
        os.remove(tmp_path / f"json/{number}.jpg")
        image = photo(tmp_path / f"images/cam/{number}.jpg")
        photo(tmp_path / f"images/{number}.jpg")
        data = json.loads((tmp_path / f"json/{number}.json").read_text())
        data["imagePath"] = str(image) if absolute else f"../images/cam/{number}.jpg"
        write(tmp_path / f"json/{number}.json", json.dumps(data))
    convert(str(tmp_path / "json"), str(tmp_path / "set"), str(tmp_path / "images"))
    assert {os.path.dirname(path) for path in masks_of(tmp_path / "set")} == {str(tmp_path / "images/cam")}
    assert "by their file names" not in capsys.readouterr().out
    convert(str(tmp_path / "json"), str(tmp_path / "other"))
    assert ("3 images have absolute paths in the export" in capsys.readouterr().out) == absolute


def test_labelme_with_images_in_the_same_folders(tmp_path):
    """json/train/0.json and images/train/0.jpg."""
    for name in ("train/0", "train/1", "val/0"):
        labelme_file(tmp_path / f"json/{name}.json", "cat")
        os.renames(tmp_path / f"json/{name}.jpg", tmp_path / f"images/{name}.jpg")
        photo(tmp_path / f"images/{os.path.basename(name)}.jpg")  # others
    convert(str(tmp_path / "json"), str(tmp_path / "set"), str(tmp_path / "images"))
    found = {
        os.path.relpath(path, tmp_path): split for path, (split, _) in masks_of(tmp_path / "set").items()
    }
    assert found == {f"images/{name}.jpg": name.split("/")[0] for name in ("train/0", "train/1", "val/0")}


def test_labelme_folder_that_is_a_link(tmp_path):
    """`..` is then the folder beside what it links to."""
    for name in "abc":
        labelme_file(tmp_path / f"disk/json/{name}.json", "cat")
        os.renames(tmp_path / f"disk/json/{name}.jpg", tmp_path / f"disk/images/{name}.jpg")
        text = (tmp_path / f"disk/json/{name}.json").read_text()
        write(tmp_path / f"disk/json/{name}.json", text.replace(f"{name}.jpg", f"../images/{name}.jpg"))
        photo(tmp_path / f"home/images/{name}.jpg")  # another picture
    (tmp_path / "home/json").symlink_to(tmp_path / "disk/json")
    for root in ("set", "set without the others"):
        convert(str(tmp_path / "home/json"), str(tmp_path / root))
        assert {os.path.dirname(path) for path in masks_of(tmp_path / root)} == {
            str(tmp_path / "disk/images")
        }
        shutil.rmtree(tmp_path / "home/images", ignore_errors=True)


def test_names_in_two_forms_of_unicode_are_one_class(tmp_path):
    for i, form in enumerate(("NFC", "NFD", "NFD")):
        labelme_file(tmp_path / f"export/{i}.json", unicodedata.normalize(form, "fenêtre"))
    name = unicodedata.normalize("NFD", "fenêtre")
    for root, wanted in (("set", None), ("chosen", [name])):
        convert(str(tmp_path / "export"), str(tmp_path / root), wanted=wanted)
        assert ListSegmentation(str(tmp_path / root), "train").classes == ["background", "fenêtre"]
        assert all(mask.any() for _, mask in masks_of(tmp_path / root).values())


def test_label_that_is_null(tmp_path):
    labelme_file(tmp_path / "export/0.json", None)
    with pytest.raises(UserError, match="0.json: a shape has no label or no points .*the label is null"):
        convert(str(tmp_path / "export"), str(tmp_path / "set"))


def test_val_stays_when_the_images_are_named(tmp_path):
    """An export with its images, and a later one without them."""
    found = []
    for root in ("first", "second"):
        for number in range(20):
            labelme_file(tmp_path / f"{root}/annotations/{number}.json", "cat")
            path = tmp_path / f"{root}/annotations/{number}"
            write(
                path.with_suffix(".json"),
                path.with_suffix(".json").read_text().replace(f"{number}.jpg", f"../images/{number}.jpg"),
            )
            os.renames(path.with_suffix(".jpg"), tmp_path / f"{root}/images/{number}.jpg")
    shutil.rmtree(tmp_path / "second/images")
    for root, images in (("first", None), ("second", str(tmp_path / "first/images"))):
        convert(str(tmp_path / root), str(tmp_path / f"{root} set"), images)
        masks = masks_of(tmp_path / f"{root} set")
        found.append({Path(path).stem for path, (split, _) in masks.items() if split == "val"})
    assert found[0] == found[1] == every_fifth(map(str, range(20)))


def test_labelme_at_any_depth(tmp_path):
    """Other JSON files, which come first, do not hide it."""
    for name in ("z/0", "z/day/1", "z/day/cam/lane/night/2"):
        labelme_file(tmp_path / f"export/{name}.json", "cat")
    for name in "abcd":
        write(tmp_path / f"export/{name}.json", "{}")
    convert(str(tmp_path / "export"), str(tmp_path / "set"))
    assert sorted(Path(path).stem for path in masks_of(tmp_path / "set")) == ["0", "1", "2"]


def test_classes_that_are_alike(tmp_path, capsys):
    for i, label in enumerate(("Car", "car", "bus")):
        labelme_file(tmp_path / f"case/{i}.json", label)
    convert(str(tmp_path / "case"), str(tmp_path / "my set"))
    out = capsys.readouterr().out
    assert "1 classes differ from others in upper and lower case alone (the first: car)" in out
    assert f"--data_root '{tmp_path}/my set'" in out  # as a shell takes it
    for i, label in enumerate(("a:1", "a,1")):
        labelme_file(tmp_path / f"alike/{i}.json", label)
    with pytest.raises(UserError, match="classes.txt would have 'a 1' for both 'a,1' and 'a:1'"):
        convert(str(tmp_path / "alike"), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_an_image_in_two_lists_is_noted(tmp_path, capsys):
    make_export("voc", tmp_path / "export")
    folder = tmp_path / "export/ImageSets/Segmentation"
    name = (folder / "train.txt").read_text().split()[0]
    with open(folder / "val.txt", "a") as file:
        file.write(f"{name}\n")
    convert(str(tmp_path / "export"), str(tmp_path / "set"))
    found = f"1 images are in two lists of ImageSets/Segmentation: left in the first (the first: {name})"
    assert found in capsys.readouterr().out


def test_names_that_classes_txt_could_not_hold(tmp_path, capsys):
    for number, name in enumerate(("2 wheeler", "a=b", "ignore", "Ignore", "lane: 2", "# x", "ok 3", "% y")):
        photo(tmp_path / f"e/{number}.jpg")
        shape = {"label": name, "points": [[1, 1], [30, 30]], "shape_type": "rectangle"}
        write(tmp_path / f"e/{number}.json", json.dumps({"shapes": [shape], "imagePath": f"{number}.jpg"}))
    convert(str(tmp_path / "e"), str(tmp_path / "set"))
    note = "7 classes are renamed, as classes.txt cannot hold their names (the first: '# x', now 'class # x')"
    assert note in capsys.readouterr().out
    names = ListSegmentation(str(tmp_path / "set"), "train").classes
    assert names == [
        "background",
        "class # x",
        "class % y",
        "class 2 wheeler",
        "class Ignore",
        "a-b",
        "class ignore",
        "lane 2",
        "ok 3",
    ]
    assert len(masks_of(tmp_path / "set")) == 8


def test_converting_imports_no_torch(tmp_path):
    make_labelme(tmp_path / "export")
    code = f"""
import runpy, sys
sys.argv = ["main.py", "--convert", "export", "--data_root", "set"]
try:
    runpy.run_path({str(MAIN)!r}, run_name="__main__")
except SystemExit as stop:
    print("status", stop.code, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.endswith("status 0 False\n"), run.stderr


@needs_shared
@pytest.mark.parametrize("kind", ["coco", "cvat", "roboflow", "labelme"])
def test_camvid_there_and_back(kind, tmp_path):
    """Real street scenes in each form: the masks come back as they were, but what is void is background."""
    source, root = SHARED / "camvid", tmp_path / "export"
    labels = ListSegmentation(str(source), "val")
    names, expected, images, annotations = ["background", *labels.classes], {}, [], []
    palette = np.array([(0, 0, 0), *labels.palette], np.uint8)
    for i in range(0, 100, 20):
        path = Path(labels.pairs[i][0])
        mask = labels.read(i)[1].numpy() + np.uint8(1)  # 255 becomes 0
        folder = root / ("train" if i < 60 else "valid") if kind == "roboflow" else root / "JPEGImages"
        folder.mkdir(parents=True, exist_ok=True)
        image = folder / path.name
        image.write_bytes(path.read_bytes())
        expected[str(image)] = mask
        present = np.unique(mask[mask > 0]).tolist()
        if kind == "roboflow":
            Image.fromarray(mask).save(image.with_name(f"{image.stem}_mask.png"))
            rows = "".join(f"{value}, {name}\n" for value, name in enumerate(names))
            write(folder / "_classes.csv", f"Pixel Value, Class\n{rows}")
        elif kind == "cvat":
            (root / "SegmentationClass").mkdir(exist_ok=True)
            Image.fromarray(palette[mask]).save(root / f"SegmentationClass/{image.stem}.png")
        elif kind == "labelme":
            shapes = []
            for label in present:
                data = io.BytesIO()
                Image.fromarray(mask == label).save(data, "PNG")
                text = base64.b64encode(data.getvalue()).decode()
                points = [[0, 0], [mask.shape[1] - 1, mask.shape[0] - 1]]
                shapes.append({"label": names[label], "shape_type": "mask", "points": points, "mask": text})
            about = {"shapes": shapes, "imagePath": image.name, "imageWidth": 480, "imageHeight": 360}
            write(image.with_suffix(".json"), json.dumps(about))
            write(
                root / "labels.txt",
                "".join(f"{name}\n" for name in ["__ignore__", "_background_", *names[1:]]),
            )
        else:
            rle = pytest.importorskip("pycocotools.mask")
            images.append({"id": i, "file_name": image.name, "width": 480, "height": 360})
            for label in present:
                shape = rle.encode(np.asfortranarray(mask == label).astype(np.uint8, order="F"))
                shape["counts"] = shape["counts"].decode()
                annotations.append({"id": len(annotations), "image_id": i, "category_id": label})
                annotations[-1] |= {"segmentation": shape, "iscrowd": 0}
    if kind == "cvat":
        lines = [
            f"{name}:{','.join(map(str, color))}::\n" for name, color in zip(names, palette, strict=True)
        ]
        write(root / "labelmap.txt", "".join(lines))
        write(
            root / "ImageSets/Segmentation/default.txt", "".join(f"{Path(path).stem}\n" for path in expected)
        )
    if kind == "coco":
        categories = [{"id": i, "name": name} for i, name in enumerate(names) if i]
        data = {"images": images, "annotations": annotations, "categories": categories}
        write(root / "JPEGImages/all.json", json.dumps(data))
        root = root / "JPEGImages"
    convert(str(root), str(tmp_path / "set"))
    found = masks_of(tmp_path / "set")
    assert found.keys() == expected.keys()
    for path, mask in expected.items():
        np.testing.assert_array_equal(found[path][1], mask)
    assert ListSegmentation(str(tmp_path / "set"), "train").classes == names

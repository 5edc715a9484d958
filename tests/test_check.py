"""--check: what a data set holds, and every fault of it, before it is trained on."""

import re
import shutil

import numpy as np
import pytest
from conftest import SHARED, bomb, damage, make_list_dataset, needs_shared, one_line
from PIL import ExifTags, Image

from commands.check import Split, count_labels, drop_bad, median_frequency, report, scan
from datasets import ListSegmentation
from utils import UserError

CHECK = ["--check", "--dataset", "custom", "--data_root"]


def test_shapes(cli, tmp_path):
    status, out, err = cli("--check", "--dataset", "shapes")
    assert (status, err) == (0, "") and "no fault was found" in out
    assert "train: 240 images, 240 masks, sizes from 160x128 by 160x128 (median) to 160x128\n" in out
    assert "val: 60 images" in out and "images are train images" not in out
    table = {line.split()[0]: line.split() for line in out.splitlines() if "%" in line}
    assert list(table) == ["background", "circle", "square", "triangle", "cross", "(ignored)"]
    shares = [float(row[1]) for row in table.values()]
    assert (
        abs(sum(shares) - 100) < 0.1 and table["background"][3] == "240" and table["(ignored)"][1] == "0.00"
    )
    picture = Image.open(tmp_path / "data/check/shapes.png")
    assert picture.width == 972 and picture.height > 2 * 260
    # Every class is seen in the middle column, the mask in colours.
    colors = {color for _, color in picture.crop((324, 0, 644, picture.height - 30)).getcolors(1 << 20)}
    assert {(0, 0, 0), (220, 50, 50), (60, 90, 230), (60, 180, 75), (240, 190, 40)} <= colors


def test_counts_and_shares(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", classes=("a", "b", "c", "nowhere"))
    small = Image.open(root / "images/train0.jpg").resize((40, 30))
    small.save(root / "images/train0.jpg")
    Image.fromarray(np.full((30, 40), 255, np.uint8)).save(root / "masks/train0.png")
    shutil.copy(root / "images/train1.jpg", root / "images/val2.jpg")
    status, out, _ = cli(*CHECK, root)
    assert status == 0 and "sizes from 40x30 by 80x60 (median) to 80x60" in out
    assert f"1 of the val images are train images, too: {root}/images/val2.jpg is one" in out
    pixels = np.zeros(256, int)
    for i in range(6):
        pixels += np.bincount(np.array(Image.open(root / f"masks/train{i}.png")).ravel(), minlength=256)
    row = {line.split()[0]: line for line in out.splitlines() if "%" in line}
    for name, label in (("a", 0), ("b", 1), ("c", 2), ("(ignored)", 255)):
        assert row[name].split()[1] == f"{100 * pixels[label] / pixels.sum():.2f}"
    assert [int(row[name].split()[3]) for name in ("a", "b", "c", "nowhere", "(ignored)")] == [5, 2, 3, 0, 1]
    assert row["nowhere"].endswith("nowhere in train and val") and "nowhere in" not in row["a"]
    assert "saved" not in out and sorted(p.name for p in tmp_path.iterdir()) == ["data", "set"]


def test_every_fault_is_told(cli, tmp_path):
    """And what can be used is described all the same."""
    root = make_list_dataset(tmp_path / "set")
    before = sorted(path for path in root.rglob("*"))
    (root / "images/train0.jpg").write_bytes((root / "images/train0.jpg").read_bytes()[:300])
    bomb(root / "images/train1.jpg")
    Image.new("L", (80, 61)).save(root / "masks/train2.png")
    Image.new("L", (80, 60), 9).save(root / "masks/train3.png")
    (root / "masks/val0.png").unlink()
    status, out, err = cli(*CHECK, root)
    faults = err.splitlines()
    assert status == 1 and len(faults) == 5 and all(line.startswith("main.py: error: ") for line in faults)
    for line, name in zip(faults, ["train0", "train1", "train2", "train3", "val0"], strict=True):
        assert name in line
    assert "faults: 5" in out and "train: 6 images" in out and (tmp_path / "data/check/set.png").exists()
    assert sorted(path for path in root.rglob("*")) == [p for p in before if p.name != "val0.png"]

    (root / "list/val.txt").unlink()
    status, out, err = cli(*CHECK, root)
    assert status == 1 and "val.txt" in err.splitlines()[0] and "train: 6 images" in out

    # What is wrong with both parts is told once.
    status, out, err = cli(*CHECK, make_list_dataset(tmp_path / "other", classes=("a = 0", "b")))
    assert status == 1 and one_line(err) and "faults: 1\n" in out


@pytest.mark.parametrize("folder", ["set", "a: set", "a; set", "set (1 other)"])
def test_faults_are_counted_by_file(cli, tmp_path, folder):
    """Four masks of one flaw are four faults, whatever is in their paths."""
    root = make_list_dataset(tmp_path / folder)
    for i in range(4):
        mask = np.array(Image.open(root / f"masks/train{i}.png"))
        mask[0, 0] = 7
        Image.fromarray(mask).save(root / f"masks/train{i}.png")
    damage("cut", root / "images/val1.jpg")
    status, out, err = cli(*CHECK, root)
    assert status == 1 and "faults: 5\n" in out
    assert f"{root}/masks/train0.png: value 7 at x 0, y 0" in err and "val1.jpg" in err
    # Each fault has a line, or the line of its like counts it.
    lines = err.splitlines()
    assert all(line.startswith("main.py: error: ") for line in lines)
    assert len(lines) + sum(map(int, re.findall(r" \((\d+) other files", err))) == 5


def test_images_that_are_there_twice(cli, tmp_path):
    """In a list by mistake, perhaps with two masks that contradict each other."""
    root = make_list_dataset(tmp_path / "set")
    with open(root / "list/train.txt", "a") as file:
        file.write("/images/train0.jpg /masks/train1.png\n/images/train0.jpg /masks/train0.png\n")
    shutil.copy(root / "images/val0.jpg", root / "images/val2.jpg")
    status, out, _ = cli(*CHECK, root)
    assert status == 0 and f"2 of the train images are copies of others, or listed twice: {root}" in out
    assert f"1 of the val images are copies of others, or listed twice: {root}/images/val2.jpg" in out


def test_mask_of_several_images_is_told(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set")
    with open(root / "list/train.txt", "a") as file:
        file.write("/images/train0.jpg /masks/train0.png\n")  # listed twice, which is another thing
    assert "share a mask" not in cli(*CHECK, root)[1]
    (root / "list/val.txt").write_text("".join(f"/images/val{i}.jpg /masks/val1.png\n" for i in range(3)))
    status, out, _ = cli(*CHECK, root)
    assert status == 0 and "of the train images share" not in out
    assert f"3 of the val images share a mask with others: {root}/masks/val1.png is one\n" in out


def test_images_in_two_splits_are_counted_by_image(cli, tmp_path):
    """Copies of one training image are as many images; the same file in both lists is one, too."""
    root = make_list_dataset(tmp_path / "set")
    assert "images are train images" not in cli(*CHECK, root)[1]
    for i in range(3):
        shutil.copy(root / "images/train2.jpg", root / f"images/val{i}.jpg")
    status, out, _ = cli(*CHECK, root)
    assert status == 0 and f"3 of the val images are train images, too: {root}/images/val0.jpg is one" in out
    shutil.copy(root / "images/train2.jpg", root / "images/train3.jpg")  # copies among those to train on
    lines = (root / "list/val.txt").read_text()
    (root / "list/val.txt").write_text(lines + "/images/train0.jpg /masks/train0.png\n")
    (root / "list/test.txt").write_text("/images/train1.jpg\n/images/val0.jpg\n/images/new.jpg\n")
    Image.new("RGB", (80, 60), (1, 2, 3)).save(root / "images/new.jpg")
    status, out, _ = cli(*CHECK, root, "--split", "test")
    assert status == 0 and "4 of the val images are train images" in out
    assert "2 of the test images are train images" in out and "1 of the test images are val images" in out


def test_counts_of_images_and_pixels_are_exact(tmp_path):
    """What one scan tells, beside a slow count: of headers, of masks, of everything, of some samples."""
    root = make_list_dataset(tmp_path / "set", train=5, size=(31, 17))
    Image.new("L", (31, 17), 255).save(root / "masks/train2.png")
    mask = np.array(Image.open(root / "masks/train0.png"))
    mask[:5] = 255
    Image.fromarray(mask).save(root / "masks/train0.png")
    damage("cut", root / "images/train4.jpg")
    dataset = ListSegmentation(str(root), "train")
    masks = [np.array(Image.open(root / f"masks/train{i}.png")) for i in range(5)]
    found = dict(scan(dataset, "all", ""))
    assert list(found) == list(range(5)) and isinstance(found.pop(4), UserError)
    for i, contents in found.items():
        assert contents.size == (17, 31) and contents.pixels.sum() == 17 * 31
        assert all(contents.pixels[label] == (masks[i] == label).sum() for label in range(256))
    assert len({contents.digest for contents in found.values()}) == 4
    only_masks = dict(scan(dataset, "masks", "", [1, 4]))  # the image of the last is not looked at
    assert list(only_masks) == [1, 4] and only_masks[1].size is None
    assert np.array_equal(only_masks[1].pixels, found[1].pixels)
    headers = scan(dataset, "headers", "", range(4))
    assert all(contents[:3] == ((17, 31), None, None) for _, contents in headers)

    counts = count_labels(dataset, [0, 1, 2], "")
    labelled = [(mask != 255).sum() for mask in masks]
    for label in range(255):
        assert counts[0, label] == sum((mask == label).sum() for mask in masks[:3])
        assert counts[1, label] == sum(
            n for mask, n in zip(masks[:3], labelled, strict=False) if label in mask
        )
    assert counts[0, 255] == (17 + 5) * 31
    # Frequencies 0.5, 0.25 and 0.125: their median over each.
    counts = np.zeros((2, 256), int)
    counts[:, :4] = [[50, 10, 5, 0], [100, 40, 40, 0]]
    assert median_frequency(counts, 4) == pytest.approx([0.5, 1, 2, 1])
    (fault,) = drop_bad(dataset, decode=True)
    assert f"{root}/images/train4.jpg" in fault
    assert len(dataset) == 4 and dataset.sizes.tolist() == 4 * [[17, 31]]


def test_test_part(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set")
    assert "test:" not in cli(*CHECK, root)[1]
    (root / "list/test.txt").write_text("/images/val0.jpg\n")
    status, out, _ = cli(*CHECK, root, "--split", "test")
    assert status == 0 and "test: 1 images, no masks" in out and "val: 3 images, 3 masks" in out


def test_objects_that_are_ignored_are_a_fault(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", classes=("background", "thing"))
    for path in (root / "masks").iterdir():
        Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    status, _, err = cli(*CHECK, root)
    assert status == 1 and "write `thing = 255` in" in err and err.count("\n") == 1
    (root / "classes.txt").write_text("background\nthing = 255\n")
    assert cli(*CHECK, root)[0] == 0


def test_sets_that_are_not_there(cli, tmp_path):
    for flags, message in (
        (["--check"], "download pascal"),
        (["--check", "--dataset", "cityscapes"], "leftImg8bit_trainvaltest.zip"),
        ([*CHECK, "none"], "there is no folder none: --data_root"),
    ):
        status, out, err = cli(*flags)
        assert status == 1 and message in err and "fault" in out and not (tmp_path / "data/check").exists()


@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
def test_images_whose_turn_the_masks_do_not_show(cli, tmp_path, orientation):
    """Of a square image that EXIF turns, and of one that it mirrors, the mask's size tells nothing."""
    root = make_list_dataset(tmp_path / "set", size=(64, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in ("train1", "val0"):
        Image.open(root / f"images/{name}.jpg").save(root / f"images/{name}.jpg", exif=exif)
    Image.new("RGB", (40, 20)).save(root / "images/train2.jpg", exif=exif)  # 6: the size tells
    Image.new("L", (20, 40) if orientation == 6 else (40, 20)).save(root / "masks/train2.png")
    status, out, _ = cli(*CHECK, root)
    turned = {1: 0, 2: 3, 3: 3, 6: 2}[orientation]
    line = f"{turned} images are turned by EXIF, and their size does not tell whether the masks go by the"
    assert status == 0 and (line in out) == (turned > 0) and ("EXIF" in out) == (turned > 0)
    dataset = ListSegmentation(str(root), "train")
    drop_bad(dataset)
    assert sum(header.unclear for header in dataset.headers) == turned - (turned > 0)


def test_picture_shows_an_image_whose_turn_is_unclear(tmp_path):
    root = make_list_dataset(tmp_path / "set", size=(64, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    Image.new("RGB", (64, 64), (250, 0, 250)).save(root / "images/train1.jpg", exif=exif)
    mask = np.zeros((64, 64), np.uint8)
    mask[:16], mask[16:20], mask[20:24] = 255, 1, 2  # others show more of each class
    Image.fromarray(mask).save(root / "masks/train1.png")
    parts = [Split("train", ListSegmentation(str(root), "train"), str(tmp_path / "page"))]
    report(parts, str(tmp_path / "x.png"))
    pixels = np.array(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    assert (np.abs(pixels - [250, 0, 250]).max(-1) < 12).sum() > 1000


@needs_shared
def test_camvid(cli, tmp_path):
    status, out, err = cli(*CHECK, SHARED / "camvid")
    assert (status, err) == (0, "") and "train: 367 images, 367 masks, sizes from 480x360" in out
    assert len(re.findall(r"^\w+ +[\d.]+ % +\d+ +[\d.]+ % +\d+$", out, re.MULTILINE)) == 11
    assert Image.open(tmp_path / "data/check/camvid.png").width == 972


def test_masks_that_nobody_could_read_are_one_kind_of_fault(cli, tmp_path):
    """They are not said to show nothing."""
    root = make_list_dataset(tmp_path / "set")
    for path in (root / "images").glob("train*"):
        path.write_bytes(b"")
    status, out, err = cli(*CHECK, root)
    assert status == 1 and err.count("cannot read") == 6 and "nothing to learn" not in err


def test_bands_that_nobody_chose_are_told_once(cli, tmp_path):
    """With how to choose; there is nothing to count, and a table of zeros says nothing."""
    tifffile, root = pytest.importorskip("tifffile"), tmp_path / "set"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(20):
        values = np.full((9, 8, 4), 10 * i, np.uint8)
        tifffile.imwrite(root / f"images/{i}.tif", values, photometric="rgb", extrasamples=["unspecified"])
        Image.fromarray(np.tile(np.uint8([0, 1]), (9, 4))).save(root / f"masks/{i}.png")
    (root / "classes.txt").write_text("a\nb\n")
    status, out, err = cli(*CHECK, root)
    assert status == 1 and one_line(err) and "4 bands; say which are red, green and blue by --bands" in err
    assert "(19 other files are faulty in this way)" in err
    assert "faults: 20\n" in out and "0.00 %" not in out
    status, out, err = cli(*CHECK, root, "--bands", 4, 1, 2)
    assert status == 0 and err == "" and "50.00 %" in out

"""Which files are samples: lists, folders that are paired by name, and sets of many files."""

import shutil
import sys

import numpy as np
import pytest
from conftest import one_line, spoil
from PIL import Image

from datasets import ListSegmentation, SegmentationDataset, Shapes
from files.images import header_sizes
from files.lists import Pairs, common_suffix, find_samples
from files.masks import Labels
from utils import UserError


def make_folders(root, names, suffix="", ending="jpg"):
    """Images and masks of these names."""
    for i, name in enumerate(names):
        image, mask = root / f"images/{name}.{ending}", root / f"masks/{name}{suffix}.png"
        for path in (image, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i % 3, 10)).save(image)
        Image.fromarray(np.arange(10 * (20 + i % 3), dtype=np.uint8).reshape(10, -1) % 2).save(mask)
    (root / "classes.txt").write_text("a\nb\n")
    return str(root)


def samples(root, split):
    pairs = find_samples(root, split)
    return [pairs.names(i) for i in range(len(pairs))]


NAMES = [f"img{i:03}" for i in range(50)]


@pytest.mark.parametrize("suffix", ["", "_mask", "_L", "_label", "-seg"])
def test_folders_are_paired_by_name(tmp_path, suffix):
    root = make_folders(tmp_path, NAMES, suffix)
    (tmp_path / "images/.DS_Store").touch()
    (tmp_path / "images/Thumbs.db").touch()
    val, train = samples(root, "val"), samples(root, "train")
    assert len(val) + len(train) == 50 and not set(val) & set(train) and 4 <= len(val) <= 16
    assert all(mask == image.replace("images", "masks")[:-4] + f"{suffix}.png" for image, mask in val + train)
    assert len(ListSegmentation(root, "val")) == len(val)


def test_split_by_name_stays_when_images_come(tmp_path):
    val = set(samples(make_folders(tmp_path, NAMES[:30]), "val"))
    # The same on every machine: these names are in val for good.
    numbers = sorted(int(image[10:13]) for image, _ in val)
    assert numbers == [0, 6, 10, 12, 20, 21, 22, 26, 28]
    more = set(samples(make_folders(tmp_path, [*NAMES, "aaa", "zzz"]), "val"))
    assert val == {pair for pair in more if pair[0][7:13] in NAMES[:30]}


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_names_that_are_not_utf_8(tmp_path):
    root = make_folders(tmp_path, ["a\udcff", "b\udce4", "c"])
    found = samples(root, "train") + samples(root, "val")
    assert sorted(image for image, _ in found) == ["images/a\udcff.jpg", "images/b\udce4.jpg", "images/c.jpg"]


def test_folders_of_splits(tmp_path):
    names = ["train/a/1", "train/b/1", "val/1", "test/1"]
    root = make_folders(tmp_path, names, "_gt", "png")
    assert samples(root, "train") == [
        (f"images/train/{x}/1.png", f"masks/train/{x}/1_gt.png") for x in ("a", "b")
    ]
    assert samples(root, "val") == [("images/val/1.png", "masks/val/1_gt.png")]
    assert samples(root, "test") == [("images/test/1.png", "masks/test/1_gt.png")]
    shutil.rmtree(tmp_path / "masks/test")
    assert samples(root, "test") == [("images/test/1.png", None)]


@pytest.mark.parametrize(("train", "val"), [("training", "validation"), ("Train", "Val"), ("train", "valid")])
def test_folders_of_splits_by_their_other_names(tmp_path, train, val):
    """They are the user's own split, which a hash of the names must not mix; links to other disks count."""
    root = make_folders(tmp_path, [f"{train}/1", f"{val}/1", f"{val}/2"], "", "png")
    (tmp_path / "images" / val).rename(tmp_path / "elsewhere")
    (tmp_path / "images" / val).symlink_to(tmp_path / "elsewhere")
    assert samples(root, "train") == [(f"images/{train}/1.png", f"masks/{train}/1.png")]
    assert samples(root, "val") == [(f"images/{val}/{i}.png", f"masks/{val}/{i}.png") for i in (1, 2)]
    shutil.rmtree(tmp_path / "images" / train)
    shutil.rmtree(tmp_path / "masks" / train)
    with pytest.raises(UserError, match="no images of the train part .2 in all."):
        find_samples(root, "train")


def test_folders_that_do_not_match(tmp_path):
    root = make_folders(tmp_path, NAMES[:12], "_mask")
    for damage, message in (
        ("masks/img001_mask.png", "images/img001.jpg: no mask of that name in"),
        ("images/img003.jpg", "masks/img003_mask.png: no image of that name in"),
    ):
        content = (tmp_path / damage).read_bytes()
        (tmp_path / damage).unlink()
        with pytest.raises(UserError, match=message):
            for split in ("train", "val"):
                find_samples(root, split)
        (tmp_path / damage).write_bytes(content)
    shutil.copy(tmp_path / "masks/img002_mask.png", tmp_path / "masks/img002.png")
    with pytest.raises(UserError, match=r"has img002\w*.png and img002\w*.png: which of them is meant"):
        find_samples(root, "train")
    (tmp_path / "masks/img002.png").unlink()
    shutil.copy(tmp_path / "images/img001.jpg", tmp_path / "images/img001.png")
    with pytest.raises(UserError, match=r"has img001.\w+ and img001.\w+: which of them is meant"):
        find_samples(root, "train")


def test_folders_without_a_part(tmp_path):
    root = make_folders(tmp_path, ["img000"])
    with pytest.raises(UserError, match="no images of the train part .1 in all.: put some in images/train"):
        find_samples(root, "train")
    with pytest.raises(UserError, match="no images of the test part"):
        find_samples(root, "test")
    with pytest.raises(UserError, match="has neither list/val.txt nor the folders images and masks"):
        find_samples(str(tmp_path / "images"), "val")


def test_suffix():
    images = {f"a{i}": "" for i in range(9)} | {"a": ""}
    assert common_suffix(images, {f"a{i}_x": "" for i in range(9)}) == "_x"
    assert common_suffix(images, dict.fromkeys(images)) == "" == common_suffix(images, {"b": ""})


def test_folders_without_classes_say_what_they_hold(cli, tmp_path):
    make_folders(tmp_path / "set", NAMES)
    (tmp_path / "set/classes.txt").unlink()
    for path in (tmp_path / "set/masks").iterdir():
        Image.fromarray(np.array([[0] * 20 + [255] * 5] * 10, np.uint8)).resize((20, 10), 0).save(path)
    status, _, err = cli("--train", "--exp", "x", "--dataset", "custom", "--data_root", "set", "--scratch")
    assert status == 1 and one_line(err) and "classes.txt is missing: a class a line" in err
    assert "`NAME = 0` (80.0%), `NAME = 255` (20.0%)" in err


def test_test_part_of_own_data(cli, smallest, tmp_path):
    """With masks it is evaluated as val is, images alone are predicted; nothing of both."""
    spoil("none", tmp_path / "x.pth")
    flags = ["--checkpoint", "x.pth", *smallest, "--split", "test"]
    status, _, err = cli(*flags)
    assert status == 1 and one_line(err) and "test.txt" in err
    lines = (tmp_path / "set/list/val.txt").read_text()
    (tmp_path / "set/list/test.txt").write_text(lines)
    status, out, _ = cli(*flags)
    assert status == 0 and "Mean IoU: " in out and (tmp_path / "data/test/x/metrics.json").exists()
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "set/list/test.txt").write_text("".join(f"/images/val{i}.jpg\n" for i in range(3)))
    status, out, _ = cli(*flags)
    assert status == 0 and "without masks there is nothing to compare with" in out
    written = sorted(path.name for path in (tmp_path / "data/test/x").iterdir())
    assert written == [f"val{i}.png" for i in range(3)]
    (tmp_path / "set/list/test.txt").write_text(lines + "/images/val0.jpg\n")
    status, _, err = cli(*flags)
    assert status == 1 and one_line(err)
    assert "3 of the 4 test images have a mask; all must have one, or none" in err
    with pytest.raises(UserError, match="shapes has no test part"):
        Shapes(str(tmp_path), "test")


def test_many_headers_are_read_by_processes_alike(tmp_path):
    root = make_folders(tmp_path, NAMES)
    (tmp_path / "images/img007.jpg").write_bytes(b"")
    few = [(f"images/{name}.jpg", f"masks/{name}.png") for name in NAMES]
    expected = list(header_sizes(Pairs(root, few)))
    assert list(header_sizes(Pairs(root, few * 201))) == expected * 201
    dataset = SegmentationDataset(Pairs(root, few * 201), Labels("ab", [[0, 0, 0]] * 2))
    faults = dataset.drop_bad()
    assert len(faults) == 201 and "img007.jpg" in faults[0] and len(dataset) == 49 * 201 == len(dataset.sizes)
    assert sum(map(len, dataset.eval_batches(4))) == 49 * 201


def test_memory_of_many_samples():
    """A million samples with names of usual lengths take some 100 bytes each."""
    count = 20_000
    names = ((f"/JPEGImages/2007_{i:06}.jpg", f"/SegmentationClassAug/2007_{i:06}.png") for i in range(count))
    pairs = Pairs("data/VOCdevkit/VOC2012", names)
    assert pairs.names(1234) == ("/JPEGImages/2007_001234.jpg", "/SegmentationClassAug/2007_001234.png")
    dataset = SegmentationDataset(pairs, Labels("ab", [[0, 0, 0]] * 2))
    dataset.sizes = np.full((count, 2), 500, np.int32)
    held = len(pairs.buffer) + sys.getsizeof(pairs.ends) + dataset.sizes.nbytes
    assert held / count < 120


def test_names_outside_of_ascii(tmp_path):
    pairs = Pairs("", [("日本/ä.jpg", "m\udcff.png"), ("b", None)])
    assert [pairs[0], pairs[1]] == [("日本/ä.jpg", "m\udcff.png"), ("b", None)]
    assert pairs.masked == 1 and list(pairs.take([1])) == [("b", None)]
    with pytest.raises(IndexError):
        pairs[2]

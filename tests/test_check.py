"""--check: what a data set holds, and every fault of it, before it is trained on."""

import re
import shutil

import numpy as np
from conftest import SHARED, bomb, make_list_dataset, needs_shared, one_line
from PIL import Image

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
    assert status == 1 and one_line(err) and "faults: 1" in out


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


@needs_shared
def test_camvid(cli, tmp_path):
    status, out, err = cli(*CHECK, SHARED / "camvid")
    assert (status, err) == (0, "") and "train: 367 images, 367 masks, sizes from 480x360" in out
    assert len(re.findall(r"^\w+ +[\d.]+ % +\d+ +[\d.]+ % +\d+$", out, re.MULTILINE)) == 11
    assert Image.open(tmp_path / "data/check/camvid.png").width == 972

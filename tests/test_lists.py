"""Which files are samples: lists, folders that are paired by name, and the names of their results."""

import os
import shutil
import sys

import numpy as np
import pytest
from conftest import make_list_dataset, one_line, spoil
from PIL import Image

from commands.check import drop_bad, prepare
from datasets import ListSegmentation, SegmentationDataset, Shapes
from files.lists import common_suffix, find_samples, images_below, unique_names
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
    """The pairs of a split, relative to the root."""
    pairs = find_samples(root, split)
    return [(os.path.relpath(image, root), mask and os.path.relpath(mask, root)) for image, mask in pairs]


NAMES = [f"img{i:03}" for i in range(50)]


@pytest.mark.parametrize("suffix", ["", "_mask", "_L", "_label", "-seg"])
def test_folders_are_paired_by_name(tmp_path, suffix):
    root = make_folders(tmp_path, NAMES, suffix)
    (tmp_path / "images/.DS_Store").touch()
    (tmp_path / "images/Thumbs.db").touch()
    (tmp_path / "images/.ipynb_checkpoints").mkdir()
    shutil.copy(tmp_path / "images/img001.jpg", tmp_path / "images/.ipynb_checkpoints/img001-checkpoint.jpg")
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


def test_images_beside_the_folders_of_splits_are_told(tmp_path, capsys):
    root = make_folders(tmp_path, ["train/1", "val/1", "loose", "more/2"], "", "png")
    assert samples(root, "train") == [("images/train/1.png", "masks/train/1.png")]
    found = "2 images are in no folder of a split, loose.png is one: left out"
    assert capsys.readouterr().out == f"{root}/images: {found}\n"


@pytest.mark.parametrize(
    ("train", "val"), [("training", "validation"), ("Train", "Val"), ("train2017", "val2017")]
)
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


def test_folders_without_such_a_split(tmp_path):
    root = make_folders(tmp_path, ["img000"])
    with pytest.raises(UserError, match="no images of the train part .1 in all.: put some in images/train"):
        find_samples(root, "train")
    with pytest.raises(UserError, match="no images of the test part"):
        find_samples(root, "test")
    with pytest.raises(UserError, match="has neither list/val.txt nor the folders images and masks"):
        find_samples(str(tmp_path / "images"), "val")


def test_splits_of_voc(tmp_path, capsys):
    """The lists in ImageSets are the user's own split; without them, a line says what takes their place."""
    root = make_folders(tmp_path, NAMES[:5])
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("img003\nimg001\n\n")
    (lists / "val.txt").write_text("img000\nimg007\n")
    found = [(f"images/{name}.jpg", f"masks/{name}.png") for name in ("img001", "img003")]
    assert samples(root, "train") == found and capsys.readouterr().out == ""
    with pytest.raises(UserError, match="val.txt: no image img007 in"):
        find_samples(root, "val")
    (lists / "val.txt").unlink()  # a hash of all names would put some of those to train on in val
    with pytest.raises(UserError, match="cannot read .*val.txt .*it names those of val"):
        find_samples(root, "val")
    shutil.rmtree(tmp_path / "ImageSets")
    find_samples(root, "train")
    assert "a hash of its name puts every fifth image in val" in capsys.readouterr().out


def test_names_in_two_forms_of_unicode(tmp_path):
    """An accent is a character of its own in one of the two names: macOS' archives have such."""
    composed, decomposed = "\u00e4", "a\u0308"
    for image, mask in ((composed, decomposed), (decomposed, composed)):
        folder = tmp_path / str(len(image))
        root = make_folders(folder, [f"val/{image}"], "_m", "png")
        (folder / f"masks/val/{image}_m.png").rename(folder / f"masks/val/{mask}_m.png")
        (found,) = find_samples(root, "val")
        assert found == (f"{root}/images/val/{image}.png", f"{root}/masks/val/{mask}_m.png")
        (folder / "list").mkdir()
        (folder / "list/val.txt").write_text(
            f"images/val/{mask}.png masks/val/{image}_m.png\n", encoding="utf-8"
        )
        assert find_samples(root, "val") == [found] and all(map(os.path.exists, found))


def test_suffix():
    images = {f"a{i}": "" for i in range(9)} | {"a": ""}
    assert common_suffix(images, {f"a{i}_x": "" for i in range(9)}) == "_x"
    assert common_suffix(images, dict.fromkeys(images)) == "" == common_suffix(images, {"b": ""})
    frames = {f"frame_{i}": "" for i in range(1, 31)}
    assert common_suffix(frames, dict.fromkeys(["frame_30", "frame_10", "frame_20"])) == ""
    both = [f"a{i}{end}" for i in range(9) for end in ("x", "_car", "_road")]
    assert (
        common_suffix(images, dict.fromkeys(both))
        == "_car"
        == common_suffix(images, dict.fromkeys(both[::-1]))
    )


@pytest.mark.parametrize("first", ["", "_car"])
def test_two_masks_of_an_image_beside_lists_of_voc(tmp_path, first):
    """The lists leave out the second, and nothing tells which is meant."""
    root = make_folders(tmp_path, NAMES[:5], first)
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("\n".join(NAMES[:3]))
    shutil.copy(tmp_path / f"masks/img003{first}.png", tmp_path / "masks/more.png")  # of no image
    assert len(samples(root, "train")) == 3
    shutil.copy(tmp_path / f"masks/img001{first}.png", tmp_path / f"masks/img001_0005{first}.png")  # a frame
    assert len(samples(root, "train")) == 3
    shutil.copy(tmp_path / f"masks/img001{first}.png", tmp_path / "masks/img001_road.png")
    with pytest.raises(UserError, match=f"has img001{first}.png and img001_road.png: which of them is meant"):
        samples(root, "train")


def test_every_tenth_frame_has_a_mask(tmp_path):
    root = make_folders(tmp_path, [f"val/frame_{i}" for i in range(1, 31)])
    for i in range(1, 31):
        if i % 10:
            (tmp_path / f"masks/val/frame_{i}.png").unlink()
    with pytest.raises(UserError, match="frame_1.jpg: no mask of that name in .* .27 such images"):
        samples(root, "val")


def test_links_that_lead_back(tmp_path):
    """To the folder itself, to one above, to each other; a second link to one folder counts."""
    make_folders(tmp_path, ["train/1", "val/2"])
    images = tmp_path / "images"
    for link, folder in (("again", images), ("val/up", tmp_path), ("test", images / "val")):
        (images / link).symlink_to(folder)
    assert {*images_below(str(images))} == {"train/1", "val/2", "test/2"}
    (images / "train/other").symlink_to(images / "val")
    (images / "val/other").symlink_to(images / "train")
    found = {"train/1", "train/other/2", "val/2", "val/other/1", "test/2", "test/other/1"}
    assert {*images_below(str(images))} == found


@pytest.mark.parametrize(
    "line",
    [
        "images\\val0.jpg masks\\val0.png",
        '"images/val0.jpg" "masks/val0.png"',
        "{0}/images/val0.jpg {0}/masks/val0.png",
    ],
)
def test_paths_of_lists_that_are_none(tmp_path, line):
    root = make_list_dataset(tmp_path / "set")
    path = root / "list/val.txt"
    path.write_text(f"{line.format(root)}\n" * 3)
    with pytest.raises(UserError, match=f"val.txt:1: there is no .*: paths are relative to {root}, with / "):
        find_samples(str(root), "val")
    path.write_text("images/val0.jpg\tmasks/val0.png\t\n\timages/val1.jpg masks/val1.png\n")
    assert [mask for _, mask in samples(str(root), "val")] == ["masks/val0.png", "masks/val1.png"]


def test_folders_without_classes_say_what_they_hold(cli, tmp_path):
    make_folders(tmp_path / "set", NAMES)
    (tmp_path / "set/classes.txt").unlink()
    for path in (tmp_path / "set/masks").iterdir():
        Image.fromarray(np.array([[0] * 20 + [255] * 5] * 10, np.uint8)).resize((20, 10), 0).save(path)
    status, _, err = cli("--train", "--exp", "x", "--dataset", "custom", "--data_root", "set", "--scratch")
    assert status == 1 and one_line(err) and "classes.txt is missing: a class a line" in err
    assert "`NAME = 0` (80.0%), `NAME = 255` (20.0%)" in err


def test_test_split_of_own_data(cli, smallest, tmp_path):
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
    assert written == ["metrics.json", *(f"val{i}.png" for i in range(3))]
    (tmp_path / "set/list/test.txt").write_text(lines + "/images/val0.jpg\n")
    status, _, err = cli(*flags)
    assert status == 1 and one_line(err)
    assert "3 of the 4 test images have a mask; all must have one, or none" in err
    with pytest.raises(UserError, match="shapes has no test part"):
        Shapes(str(tmp_path), "test")


def test_samples_that_cannot_be_used_are_left_out_in_order(tmp_path):
    """By threads: each sample keeps its own size, and each fault comes once, in the order of the list."""
    names = [f"{i:03}" for i in range(40)]
    root = make_folders(tmp_path, names)
    for name in ("007", "021"):
        (tmp_path / f"images/{name}.jpg").write_bytes(b"")
    pairs = [(f"{root}/images/{name}.jpg", f"{root}/masks/{name}.png") for name in names] * 3
    dataset = SegmentationDataset(pairs, Labels("ab", [[0, 0, 0]] * 2))
    faults = drop_bad(dataset)
    assert [fault.rpartition("images/")[2][:7] for fault in faults] == ["007.jpg", "021.jpg"] * 3
    kept = [i for i in range(40) if i not in (7, 21)] * 3
    assert dataset.pairs == [pairs[i] for i in kept]
    assert dataset.sizes.tolist() == [[10, 20 + i % 3] for i in kept]
    assert sorted(sum(dataset.eval_batches(4), [])) == list(range(114))


def test_list_of_names_outside_of_ascii(tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "日本").mkdir()
    (tmp_path / "list/val.txt").write_text("日本/ä.jpg\tmasks/ö 1.png\n/b.jpg /b.png\n", encoding="utf-8")
    assert samples(str(tmp_path), "val") == [("日本/ä.jpg", "masks/ö 1.png"), ("b.jpg", "b.png")]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jpg", "x/b.png"], ["a", "b"]),
        (["x/a.jpg", "y/a.jpg", "y/b.jpg"], ["x/a", "y/a", "b"]),
        (["x/a.jpg", "y/A.jpg"], ["x/a", "y/A"]),  # one file for some file systems
        (["1/x/a.jpg", "2/x/a.jpg"], ["1/x/a", "2/x/a"]),
        (["a.jpg", "a.png"], ["a.jpg", "a.png"]),
        (["a.jpg", "./a.jpg", "a.jpg"], ["a.jpg", "a.jpg-1", "a.jpg-2"]),
        (["samples.jpg", "x/samples.jpg"], ["samples.jpg", "x/samples"]),
        (["x/worst.jpg"], ["x/worst"]),
        (["../a.jpg", "../../x/a.jpg"], ["a", "x/a"]),
    ],
)
def test_names_of_results(paths, names):
    assert unique_names(paths, taken=("samples", "worst")) == names


def test_list_whose_first_image_alone_is_gone(cli, smallest, tmp_path):
    """Its folder, too: that is a fault of one sample, and not of how paths are written."""
    lists = tmp_path / "set/list/train.txt"
    lists.write_text(f"/gone/x.jpg /gone/x.png\n{lists.read_text()}")
    status, out, _ = cli("--train", "--exp", "x", *smallest, "--skip_bad", "--epochs", 1)
    assert status == 0 and "6 images to train on" in out
    lists.write_text("\\gone\\x.jpg \\gone\\x.png\n")
    status, _, err = cli("--train", "--exp", "x", *smallest)
    assert status == 1 and "paths are relative to" in err and "with / between folders" in err


def test_byte_that_no_path_has(tmp_path):
    root = make_list_dataset(tmp_path / "set")
    (root / "list/val.txt").write_text("/images/v\0al0.jpg /masks/val0.png\n")
    with pytest.raises(UserError, match="cannot read .*/images/v.al0.jpg: No such file"):
        prepare(ListSegmentation(str(root), "val"), "val", skip_bad=False)

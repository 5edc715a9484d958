"""Prediction: people's own photos, the names of their results, and use from Python."""

import csv
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import NETWORK, SMALL, bomb, make_list_dataset, one_line, spoil
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import deeplab
import main
from commands import predict as prediction
from commands.evaluate import confusion_matrices, metrics
from commands.flags import parse_args
from deeplab import Inference
from files.lists import unique_names
from files.masks import Labels
from files.pictures import voc_palette
from files.pixels import to_rgb
from utils import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that has learnt the training images of a data set of 3 classes, and the data set."""
    folder = tmp_path_factory.mktemp("trained")
    root = make_list_dataset(folder / "set", train=8, val=2)
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK]
    flags += ["--crop_size", 65, "--epochs", 12, "--base_lr", 0.04, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit):
            main.main(parse_args([str(word) for word in flags]))
    return folder / "data/deeplab_tiny_custom_v3_x_epoch12.pth", root


def test_prediction_of_the_training_images(cli, trained, tmp_path):
    """No flag but the checkpoint: the model, the classes and the colours come from it."""
    checkpoint, root = trained
    status, out, _ = cli("--predict", root / "images", "--checkpoint", checkpoint, "--out", "out")
    assert status == 0 and "10 of 10 images" in out
    masks, truths = [], []
    for i in range(8):
        mask = Image.open(tmp_path / f"out/train{i}_mask.png")
        assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        masks.append(torch.from_numpy(np.array(mask)))
        truths.append(torch.from_numpy(np.array(Image.open(root / f"masks/train{i}.png"))))
        overlay = Image.open(tmp_path / f"out/train{i}_overlay.jpg")
        assert overlay.width >= mask.width and overlay.height > mask.height  # the legend is below
    confusions = confusion_matrices(torch.stack(masks), torch.stack(truths), 3)
    assert metrics(confusions.sum(0))["mean_iou"] > 0.6


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# What turns an upright image as EXIF's orientations mean it, back to how it is stored.
UNDONE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
FORMATS = {
    "rgb.jpg": lambda im: (im, {}),
    "rgb.png": lambda im: (im, {}),
    "rgb.webp": lambda im: (im, {"lossless": True}),
    "rgb.bmp": lambda im: (im, {}),
    "rgb.tiff": lambda im: (im, {}),
    "grey.png": lambda im: (im.convert("L"), {}),
    "grey_alpha.png": lambda im: (im.convert("LA"), {}),
    "alpha.png": lambda im: (im.convert("RGBA"), {}),
    "palette.png": lambda im: (im.quantize(16), {}),
    "bits.png": lambda im: (im.convert("1"), {}),
    "grey16.png": lambda im: (Image.fromarray(np.array(im.convert("L")).astype(np.uint16) * 257), {}),
    "grey16.tiff": lambda im: (Image.fromarray(np.array(im.convert("L")).astype(np.uint16) * 257), {}),
    "cmyk.jpg": lambda im: (im.convert("CMYK"), {}),
    **{f"turned{n}.jpg": lambda im, n=n: (im, {"exif": exif(n)}) for n in range(2, 9)},
    "turned.png": lambda im: (im, {"exif": exif(6)}),
}


def test_formats_and_orientations(cli, trained, tmp_path):
    """A mask has the size at which its image is shown; grey and transparent ones are seen in their true
    brightness, turned ones upright."""
    image = Image.new("RGB", (50, 37), (128, 128, 128))
    image.paste((250, 250, 250), (10, 8, 40, 20))
    (tmp_path / "in").mkdir()
    for name, make in FORMATS.items():
        picture, options = make(image)
        picture.save(tmp_path / "in" / f"{name.replace('.', '_')}.{name.split('.')[1]}", **options)
    for name in ("notes.txt", "._rgb.jpg"):  # macOS leaves such things on other systems' disks
        (tmp_path / "in" / name).write_text("no image")
    status, out, _ = cli("--predict", "in", "--checkpoint", trained[0], "--out", "out")
    assert status == 0 and f"{len(FORMATS)} of {len(FORMATS)} images" in out
    for name in FORMATS:
        path = tmp_path / "in" / f"{name.replace('.', '_')}.{name.split('.')[1]}"
        turned = name in ("turned.png", *(f"turned{n}.jpg" for n in (5, 6, 7, 8)))
        assert Image.open(tmp_path / f"out/{path.stem}_mask.png").size == ((37, 50) if turned else (50, 37))
        upright = to_rgb(Image.open(path))
        if orientation := 6 if name == "turned.png" else int(name[6]) if name.startswith("turned") else 0:
            upright = upright.transpose(UNDONE[orientation])
        pixels = np.asarray(upright).astype(int)
        if name != "bits.png":  # which is dithered
            assert abs(pixels[15, 20] - 250).max() <= 6 and abs(pixels[[2, 30], 20] - 128).max() <= 6, name


def rows_in(folder):
    """The rows of predictions.csv, whose files are relative to the working folder here."""
    _, *rows = csv.reader((folder / "predictions.csv").read_text().splitlines())
    assert all(os.path.isabs(file) for file, *_ in rows)
    return [[os.path.relpath(file), *others] for file, *others in rows]


def masks_below(folder):
    """The masks that a prediction has written, by name, with their sizes."""
    found = folder.rglob("*_mask.png")
    return {str(path.relative_to(folder)).removesuffix("_mask.png"): Image.open(path).size for path in found}


def test_images_of_one_name(cli, trained, tmp_path):
    """The folder is in the name where it tells them apart, the ending where nothing else does."""
    sizes = {"in/a.png": (9, 9), "in/a.bmp": (10, 9), "in/more/a.png": (11, 9), "in/more/b.png": (12, 9)}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "work").mkdir()
    os.chdir(tmp_path / "work")
    paths = [tmp_path / "in", "../in/more"]  # no name leads out of --out
    assert cli("--predict", *paths, "--checkpoint", trained[0], "--out", "out")[0] == 0
    found = {"in/a.png": (9, 9), "a.bmp": (10, 9), "more/a": (11, 9), "b": (12, 9)}
    assert masks_below(tmp_path / "work/out") == found
    assert sorted(os.listdir(tmp_path)) == ["in", "work"] and os.listdir(tmp_path / "work") == ["out"]


def test_many_images_of_one_name(cli, trained, tmp_path):
    """Each is predicted into a file of its own, named by its folder alone."""
    sizes = {}
    for i in range(400):
        folder = tmp_path / f"scenes/scene {i:03} of a long recording"
        folder.mkdir(parents=True)
        sizes[f"{folder.name}/rgb"] = size = (8 + i % 7, 9)
        Image.new("RGB", size, (i % 256, 128, 128)).save(folder / "rgb.png")
    flags = ["--checkpoint", trained[0], "--out", "out", "--eval_batch_size", 64]
    status, out, err = cli("--predict", "scenes/*/rgb.png", *flags)
    assert (status, err) == (0, "") and "400 of 400 images" in out
    assert masks_below(tmp_path / "out") == sizes
    assert len(list((tmp_path / "out").rglob("*_overlay.jpg"))) == 400
    rows = [row[:2] for row in rows_in(tmp_path / "out")]
    assert rows == [[f"scenes/{name}.png", f"{name}_mask.png"] for name in sizes]


folders = st.lists(st.sampled_from(["a", "A", "b", "..", ".", ""]), max_size=4).map("/".join)
files = st.sampled_from(["a.png", "A.png", "a.jpg", "b.png", "a.png.jpg", "a", ".png", "taken.png"])
paths = st.lists(st.builds("{}/{}".format, folders, files) | files, max_size=9)


@given(paths)
def test_names_have_as_few_folders_as_tell_them_apart(paths):
    taken = {"taken", "b/a"}
    names = unique_names(paths, taken)
    assert len(names) == len(paths) and taken.isdisjoint(names)
    assert len({name.lower() for name in names}) == len(names)
    # The parts of a path that can be in a name, with the ending and without it.
    whole = [[p for p in os.path.normpath(path).split("/") if p not in ("", "..")] for path in paths]
    stems = [[*parts[:-1], os.path.splitext(parts[-1])[0]] for parts in whole]

    def ambiguous(kept, i, depth):
        """Whether the last parts of a path are those of another, or another name."""
        end = "/".join(kept[i][-depth:]).lower()
        others = ["/".join(kept[j][-depth:]).lower() for j in range(len(paths)) if j != i]
        return end in {*others, *taken, *(name.lower() for j, name in enumerate(names) if j != i)}

    for i, name in enumerate(names):
        parts = name.split("/")
        assert ".." not in parts and "" not in parts  # never absolute, nor out of the folder
        depth = len(parts)
        if parts == stems[i][-depth:]:
            assert depth == 1 or ambiguous(stems, i, depth - 1)
            continue
        assert ambiguous(stems, i, len(stems[i]))
        if parts == whole[i][-depth:]:
            assert depth == 1 or ambiguous(whole, i, depth - 1)
        else:  # one path several times, say: then a number tells the copies apart
            assert re.fullmatch(re.escape("/".join(whole[i])) + r"-\d+", name)
            assert ambiguous(whole, i, len(whole[i]))


def test_names_of_thousands_of_files():
    """Of one name in as many folders, the folder is enough; of one file, numbers go on counting."""
    count = 4000
    paths = [f"/data/scenes/{i}/left/rgb.png" for i in range(count)]
    assert unique_names(paths) == [f"{i}/left/rgb" for i in range(count)]
    assert len(set(unique_names(count * ["/data/rgb.png"]))) == count


def test_size_that_the_header_did_not_tell(cli, trained, tmp_path, monkeypatch):
    """A file can change between the look at its header and its turn."""
    (tmp_path / "in").mkdir()
    for name, size in (("a", (40, 30)), ("b", (40, 30)), ("c", (30, 40))):
        Image.new("RGB", size).save(tmp_path / f"in/{name}.png")
    monkeypatch.setattr(prediction, "read_sizes", lambda files, reading: [(40, 30)] * len(files))
    assert cli("--predict", "in", "--checkpoint", trained[0], "--out", "out")[0] == 0
    sizes = [Image.open(tmp_path / f"out/{name}_mask.png").size for name in "abc"]
    assert sizes == [(40, 30), (40, 30), (30, 40)]


@pytest.mark.parametrize(("value", "kind"), [(0.5, np.float32), (70_000, np.int32), (-1, np.int32)])
def test_values_of_an_unknown_range_are_refused(cli, trained, tmp_path, value, kind):
    """They became black or white images."""
    Image.fromarray(np.full((9, 9), value, kind)).save(tmp_path / "a.tif")
    status, _, err = cli("--predict", "a.tif", "--checkpoint", trained[0], "--out", "out")
    assert status == 1 and one_line(err) and f"from {value} to {value}: --value_range LOW HIGH" in err


def test_transparency_is_seen_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3000, 20)])
def test_extreme_sizes(cli, trained, tmp_path, size):
    Image.new("RGB", size, (250, 250, 250)).save(tmp_path / "a.png")
    flags = ["--checkpoint", trained[0], "--out", "out", "--max_side", 500]
    assert cli("--predict", "a.png", *flags)[0] == 0
    assert Image.open(tmp_path / "out/a_mask.png").size == size


def test_unreadable_image_is_reported_and_the_others_are_done(cli, trained, tmp_path):
    checkpoint, root = trained
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    paths = ["bad.jpg", root / "images/val0.jpg", "absent.png"]
    status, out, err = cli("--predict", *paths, "--checkpoint", checkpoint, "--out", "out")
    assert status == 1 and "1 of 3 images" in out and (tmp_path / "out/val0_mask.png").exists()
    lines = err.splitlines()
    assert len(lines) == 2 and "bad.jpg" in lines[0] and "absent.png" in lines[1]
    (tmp_path / "empty").mkdir()
    status, _, err = cli("--predict", "empty", "--checkpoint", checkpoint)
    assert status == 1 and "no images in empty" in err
    assert "--checkpoint" in cli("--predict", "empty")[2]


def test_prediction_with_a_published_checkpoint(cli, tmp_path):
    state = deeplab.build("tiny", False).state_dict()
    state = {f"module.{key}": tensor for key, tensor in state.items()}
    torch.save({"epoch": 50, "state_dict": state, "optimizer": {}}, tmp_path / "x.pth")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    flags = ["--predict", "a.png", "--checkpoint", "x.pth", "--out", "out"]
    assert cli(*flags)[0] == 0  # its tensors tell the backbone; a flag that contradicts them is an error
    status, _, err = cli(*flags, "--backbone", "resnet50")
    assert status == 1 and one_line(err) and "--backbone" in err
    mask = Image.open(tmp_path / "out/a_mask.png")
    assert mask.size == (40, 30) and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]


def test_name_that_is_too_long_for_its_results(cli, trained, tmp_path):
    """The others are done."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b" * 250, "c"):
        Image.new("RGB", (9, 9)).save(tmp_path / f"in/{name}.png")
    status, out, err = cli("--predict", "in", "--checkpoint", trained[0], "--out", "out")
    assert status == 1 and "2 of 3 images" in out and one_line(err) and "File name too long" in err
    names = [f"{stem}_{end}" for stem in "ac" for end in ("mask.png", "overlay.jpg")]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "predictions.csv"]


def test_folder_is_not_predicted_into_itself(cli, trained, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/a.png")
    (tmp_path / "link").symlink_to("in")
    for out in ("in", "./in/", "link"):
        status, _, err = cli("--predict", "in", "--checkpoint", trained[0], "--out", out)
        assert status == 1 and one_line(err) and "--out" in err
    assert len(list((tmp_path / "in").iterdir())) == 1
    (tmp_path / "in/out/sub").mkdir(parents=True)
    (tmp_path / "in/out/sub/a_mask.png").touch()
    status, _, err = cli("--predict", "in/**/*.png", "--checkpoint", trained[0], "--out", "in/out")
    assert status == 1 and one_line(err) and "leads into --out" in err


def test_python_use(trained, tmp_path):
    checkpoint, root = trained
    model = deeplab.load(str(checkpoint))
    path = root / "images/train0.jpg"
    image = Image.open(path)
    for other in (str(path), path, np.array(image)):
        assert np.array_equal(model.predict(other), model.predict(image))
    grey = np.array(image.convert("L"))
    assert np.array_equal(model.predict(grey), model.predict(Image.fromarray(grey)))
    with pytest.raises(UserError, match="cannot read absent.jpg"):
        model.predict("absent.jpg")
    assert not model.training and model.classes == ["a", "b", "c"] and len(model.palette) == 3
    labels = model.predict(Image.open(root / "images/train0.jpg"))
    assert labels.dtype == np.uint8 and labels.shape == (60, 80) and labels.max() < 3
    assert deeplab.load(str(checkpoint), output_stride=8).config["output_stride"] == 8


def test_directory_named_like_an_image(cli, smallest, tmp_path):
    spoil("none", tmp_path / "x.pth")
    (tmp_path / "photos/a.jpg").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/b.jpg")
    bomb(tmp_path / "photos/c.png")
    status, out, err = cli("--predict", "photos", "--checkpoint", "x.pth", *smallest)
    assert status == 1 and "1 of 3 images" in out
    assert [line.split()[2:6] for line in err.splitlines() if "cannot" in line] == [
        ["cannot", "read", "photos/a.jpg:", "Is"],
        ["cannot", "read", "photos/c.png:", "Image"],
    ]


def test_prediction_whose_classes_nobody_names(cli, tmp_path):
    spoil("none", tmp_path / "x.pth")
    status, _, err = cli("--predict", "x.jpg", "--checkpoint", "x.pth", "--dataset", "custom")
    assert status == 1 and one_line(err) and "--data_root" in err


def test_patterns_and_a_list_on_standard_input(cli, trained, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/b.jpg", "in/deep/c.png", "in/notes.txt", "in/[d].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name, "PNG")
    flags = ["--checkpoint", trained[0], "--out", "out"]

    def predicted(*paths):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert cli("--predict", *paths, *flags)[0] == 0
        return [row[0] for row in rows_in(tmp_path / "out")]

    assert predicted("in/*.png") == ["in/[d].png", "in/a.png"]
    assert predicted("in/**/*.png", "in/a.png") == ["in/[d].png", "in/a.png", "in/deep/c.png"]
    assert predicted("in/[d].png") == ["in/[d].png"]  # a file's name, though it looks like a pattern
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/b.jpg\r\nin/deep\n\nin/*.jpg")))
    assert predicted("-", "in/a.png") == ["in/b.jpg", "in/deep/c.png", "in/a.png"]
    for paths in (["in/*.gif"], ["in/a.png", "in/*.gif"]):
        status, _, err = cli("--predict", *paths, *flags)
        assert status == 1 and one_line(err) and "no images in in/*.gif" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/a.png\0in/b.jpg\0")))
    assert cli("--predict", "-", *flags)[1].count("2 of 2 images") == 1  # of find -print0
    for stdin in (io.TextIOWrapper(io.BytesIO(b"\n")), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        status, _, err = cli("--predict", "-", *flags)
        assert status == 1 and one_line(err) and "standard input" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"absent\xff.png\n")))
    status, _, err = cli("--predict", "-", *flags)
    assert status == 1 and one_line(err) and "absent" in err
    status, _, err = cli("--predict", "**/*.png", *flags)
    assert status == 1 and one_line(err) and "--out" in err


def test_one_photo_is_predicted_once_however_it_is_spelled(cli, trained, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/a.png")
    (tmp_path / "link.png").symlink_to("in/a.png")
    paths = ["in/a.png", "./in/a.png", tmp_path / "in/a.png", "link.png", "in", "in/*"]
    status, out, _ = cli("--predict", *paths, "--checkpoint", trained[0], "--out", "out")
    assert status == 0 and "1 of 1 images" in out and list(masks_below(tmp_path / "out")) == ["a"]
    assert "5 names were of files that had been named: each is predicted once" in out
    # The first name is the file's, in whichever order the names come, and in a folder or pattern, too.
    (tmp_path / "in/b.png").symlink_to("a.png")
    for number, paths in enumerate((["in"], ["in/*"], ["in/a.png", "link.png"])):
        status, out, _ = cli("--predict", *paths, "--checkpoint", trained[0], "--out", f"out{number}")
        assert status == 0 and list(masks_below(tmp_path / f"out{number}")) == ["a"]
        assert "1 names were of files that had been named" in out
    status, out, _ = cli("--predict", "in/a.png", "--checkpoint", trained[0], "--out", "out3")
    assert status == 0 and "names" not in out


def test_folders_in_a_folder_are_told(cli, trained, tmp_path):
    """But not hidden ones, nor the one of the results."""
    for name in ("deep/a.png", "more/a.png", ".cache/a.png", "b.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").touch()
    flags = ["--checkpoint", trained[0], "--out", "in/out"]
    for _ in range(2):
        status, out, _ = cli("--predict", "in", *flags)
        told = "in: left out 1: 1 .txt; left out 2 folders, which 'in/**/*.jpg' looks into\n"
        assert status == 0 and "1 of 1 images" in out and told in out
    assert "folders" not in cli("--predict", "in/deep", *flags)[1]
    (tmp_path / "in/b.png").unlink()
    status, _, err = cli("--predict", "in", *flags)
    assert status == 1 and one_line(err) and "no images in in: left out 1: 1 .txt; left out 2 folders" in err


def test_results_are_not_predicted_again(cli, trained, tmp_path, monkeypatch):
    """As a shell or find would give them, where the results lie beside the photos."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    flags = ["--checkpoint", trained[0], "--out", "."]
    assert cli("--predict", "a.png", *flags, "--confidence")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("a_mask.png", "a_overlay.jpg", "a_confidence.png"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"a.png\n{name}\n".encode())))
        for paths in (["a.png", name], ["-"]):
            status, _, err = cli("--predict", *paths, *flags)
            assert (
                status == 1 and one_line(err) and f"{name} is what an earlier prediction has written" in err
            )
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert cli("--predict", "a.png", *flags)[0] == 0  # it alone is predicted anew


@pytest.mark.parametrize("name", ["a_mask.png", "a_overlay.jpg", "a_confidence.png"])
def test_files_of_others_are_not_replaced(cli, trained, tmp_path, name):
    """A photo of that name, or what somebody has drawn; it may be one of those to predict."""
    for file in ("a.jpg", name):
        Image.new("RGB", (9, 9), "red").save(tmp_path / file)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for paths in (["a.jpg"], ["a.jpg", name]):
        status, _, err = cli("--predict", *paths, "--checkpoint", trained[0], "--out", ".")
        assert status == 1 and one_line(err) and f"{name} is there, and not in predictions.csv" in err
    after = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    assert after == before


def test_rows_of_earlier_predictions_stay_with_their_masks(cli, trained, tmp_path):
    flags = ["--checkpoint", trained[0], "--out", "out"]
    for name in "abc":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")

    def predicted(*names):
        assert cli("--predict", *names, *flags)[0] == 0
        return [row[:2] for row in rows_in(tmp_path / "out")]

    a, b, c = ([f"{name}.png", f"{name}_mask.png"] for name in "abc")
    assert predicted("a.png", "b.png") == [a, b] and predicted("c.png", "a.png") == [b, c, a]
    (tmp_path / "out/b_mask.png").unlink()
    assert predicted("b.png") == [c, a, b]  # the overlay is replaced
    (tmp_path / "out/b_mask.png").unlink()
    assert predicted("c.png") == [a, c]


def test_a_photo_predicted_anew_has_one_row_and_one_mask(cli, trained, tmp_path):
    """What another model has written of it, under whatever name, is replaced."""
    for name in "xy":
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}/a.png")
    flags = ["--checkpoint", trained[0], "--out", "out"]
    assert cli("--predict", "x", "y", *flags, "--confidence")[0] == 0
    assert cli("--predict", "x/a.png", *flags)[0] == 0
    rows = sorted(row[:2] for row in rows_in(tmp_path / "out"))
    assert rows == [["x/a.png", "x/a_mask.png"], ["y/a.png", "y/a_mask.png"]]
    assert sorted(masks_below(tmp_path / "out")) == ["x/a", "y/a"]
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*_confidence.png"))
    assert found == ["y/a_confidence.png"]


def test_masks_that_are_replaced_are_told(cli, trained, tmp_path):
    """They may be another checkpoint's."""
    (tmp_path / "in").mkdir()
    for name in "abc":
        Image.new("RGB", (9, 9)).save(tmp_path / f"in/{name}.png")
    flags = ["--checkpoint", trained[0], "--out", "out", "--predict"]
    assert "replaces" not in cli(*flags, "in")[1]
    assert (
        "replaces 1 masks in out; 2 others of earlier predictions stay there\n" in cli(*flags, "in/b.png")[1]
    )
    found = Labels(["c", "a", "b"], voc_palette(3)).read(Image.open("out/a_mask.png"), "a_mask.png")
    labels = np.array(Image.open("out/a_mask.png"))  # of a, b, c
    np.testing.assert_array_equal(found, np.array([1, 2, 0])[labels])


def test_masks_of_others_are_not_replaced(cli, trained, tmp_path):
    """Drawn by hand, or of a photo of that name in another working folder, or of other classes."""
    flags = ["--checkpoint", trained[0], "--out", tmp_path / "out"]
    for name in "xy":
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}/a.png")
        os.chdir(tmp_path / name)
        assert cli("--predict", "a.png", *flags)[0] == 0
        assert cli("--predict", tmp_path / name / "a.png", *flags)[0] == 0  # the same photo
    assert sorted(masks_below(tmp_path / "out")) == ["a", "y/a"]
    (tmp_path / "out/predictions.csv").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    status, _, err = cli("--predict", "a.png", *flags)
    assert status == 1 and one_line(err) and "a_mask.png is there, and not in predictions.csv" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_masks_of_a_prediction_that_was_stopped_have_rows(cli, trained, tmp_path, monkeypatch):
    for i in range(40):
        Image.new("RGB", (9 + i, 9)).save(tmp_path / f"{i:02}.png")
    predict_batch, count = prediction.predict_batch, 0

    def stop(*args):
        nonlocal count
        if (count := count + 1) == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict_batch(*args)

    monkeypatch.setattr(prediction, "predict_batch", stop)
    status, _, err = cli("--predict", "*.png", "--checkpoint", trained[0], "--out", "out")
    assert status == 128 + signal.SIGTERM and re.search(
        r"stopped by SIGTERM; \d\d of 40 images are pred", err
    )
    rows = list(csv.reader((tmp_path / "out/predictions.csv").read_text().splitlines()))[1:]
    assert 0 < len(rows) < 40 and all((tmp_path / "out" / mask).exists() for _, mask, *_ in rows)
    assert len(rows) >= 30 - 6  # eval_batch_size 4 are written meanwhile
    # No mask lacks its row, which would be taken for somebody else's by the same command.
    assert {mask for _, mask, *_ in rows} == {path.name for path in (tmp_path / "out").glob("*_mask.png")}
    monkeypatch.setattr(prediction, "predict_batch", predict_batch)
    assert cli("--predict", "*.png", "--checkpoint", trained[0], "--out", "out")[0] == 0


def test_killed_prediction(cli, trained, tmp_path, monkeypatch):
    """It leaves no mask without a row, which could not be predicted again, nor with the shares of another."""
    for name in "abc":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    flags = ["--checkpoint", trained[0], "--out", "out"]
    save_csv, calls = prediction.save_csv, []

    def killed_before_the_second(*args):
        calls.append(args)
        return save_csv(*args) if len(calls) == 1 else None

    def table():
        return sorted(csv.reader((tmp_path / "out/predictions.csv").read_text().splitlines()))

    for files in ("ab", "bc"):
        calls.clear()
        before = table()[:-1] if files == "bc" else []
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "save_csv", killed_before_the_second)
            assert cli("--predict", *(f"{name}.png" for name in files), *flags)[0] == 0
        found = table()
        assert [row[2:] for row in found if row[1][0] in files] == 2 * [["", "", ""]]
        assert [row for row in found if row[1][0] not in files and row[1] != "mask"] == before[:1]
        assert cli("--predict", *(f"{name}.png" for name in files), *flags)[0] == 0
        assert len(table()) == len(found) and all("" not in row for row in table())


def test_image_whose_mask_could_not_be_written_is_predicted_again(cli, trained, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / f"{241 * 'x'}.png")  # too long with _confidence.png alone
    flags = ["--predict", tmp_path, "--checkpoint", trained[0], "--out", "out", "--confidence"]
    for _ in range(2):
        status, _, err = cli(*flags)
        assert status == 1 and one_line(err) and "_confidence.png" in err
    assert len(list((tmp_path / "out").glob("*_overlay.jpg"))) == 1


def test_rows_of_other_columns_are_kept_as_they_were(cli, trained, tmp_path):
    """Also where no mask is replaced, as the image is damaged."""
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    flags = ["--predict", "a.png", "b.png", "--checkpoint", trained[0], "--out", "out"]
    assert cli(*flags)[0] == 0
    table = tmp_path / "out/predictions.csv"
    lines = table.read_text().splitlines()
    edited = "\n".join([f"{lines[0]},note", *(f"{line},good" for line in lines[1:]), ""])
    table.write_text(edited)
    (tmp_path / "a.png").write_bytes(b"damaged")
    status, out, _ = cli(*flags)
    assert status == 1 and "predictions.csv has other columns" in out
    assert (tmp_path / "out/predictions.csv.old1").read_text() == edited
    assert [row.split(",")[1:3] for row in table.read_text().splitlines()[1:]] == [
        ["a_mask.png", ""],
        lines[2].split(",")[1:3],
    ]


@pytest.mark.parametrize("evaluates", [False, True])
def test_two_processes_write_to_one_folder(cli, trained, tmp_path, evaluates):
    """The second would not know the masks of the first, their names, and their rows; of two evaluations with
    other flags some masks of each would stay."""
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    checkpoint = shutil.copy(trained[0], tmp_path / "x.pth")
    folder, names = "out", ["a_mask.png", "a_overlay.jpg", "predictions.csv"]
    flags = ["--predict", "a.png", "--checkpoint", checkpoint, "--out", "out"]
    if evaluates:
        folder, names = "data/val/x", ["metrics.json", "per_image.csv", "report.html", "report_files"]
        names = [*names, "samples.png", "val0.png", "val1.png"]
        flags = ["--dataset", "custom", "--data_root", trained[1], "--checkpoint", checkpoint, "--workers", 0]
    program = "import sys, time; from files.whole import locked_folder\n"
    program += "with locked_folder(sys.argv[1]): print(1, flush=True); time.sleep(99)"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(main.__file__)}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, folder], **options) as other:
        try:
            assert other.stdout.readline()
            status, _, err = cli(*flags)
        finally:
            other.kill()
    assert status == 1 and one_line(err)
    assert f"another process writes its results to {folder}: wait until it has ended" in err
    assert os.listdir(folder) == [".lock"]
    assert cli(*flags)[0] == 0  # the other was killed
    assert sorted(os.listdir(folder)) == names


def test_images_of_one_size_go_together(cli, trained, tmp_path, monkeypatch):
    """In batches, whose results are those of single images, in the order in which they were named."""
    rng, sizes = np.random.default_rng(0), [(40, 30), (30, 40), (40, 30), (40, 30), (30, 40), (40, 30)]
    model, shapes = deeplab.load(str(trained[0])), []
    (tmp_path / "in").mkdir()
    for i, size in enumerate(sizes):
        blocks = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(tmp_path / f"in/{i}.png")
    (tmp_path / "in/2.jpg").write_bytes(b"no picture")
    segment = deeplab.DeepLabv3.segment

    def noted(self, images, *options, **more):
        shapes.append(tuple(images.shape))
        return segment(self, images, *options, **more)

    monkeypatch.setattr(deeplab.DeepLabv3, "segment", noted)
    flags = ["--checkpoint", trained[0], "--out", "out", "--eval_batch_size", 3, "--confidence"]
    status, _, err = cli("--predict", "in", *flags)
    assert status == 1 and one_line(err)
    assert shapes == [(3, 3, 30, 40), (1, 3, 30, 40), (2, 3, 40, 30)]
    rows = rows_in(tmp_path / "out")
    assert (tmp_path / "out/predictions.csv").read_text().startswith("file,mask,a,b,c\n")
    assert [row[0] for row in rows] == [f"in/{i}.png" for i in range(6)]
    for i, size in enumerate(sizes):
        stem = "2.png" if i == 2 else str(i)  # beside 2.jpg
        labels = np.array(Image.open(tmp_path / f"out/{stem}_mask.png"))
        expected = model.predict(tmp_path / f"in/{i}.png")
        assert labels.shape == size[::-1] and (labels == expected).mean() > 0.99
        shares = [(labels == label).mean() for label in range(3)]
        assert rows[i][1] == f"{stem}_mask.png"
        assert np.allclose(np.array(rows[i][2:], float), shares, atol=1e-6)
        grey = np.array(Image.open(tmp_path / f"out/{stem}_confidence.png"))
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / f"in/{i}.png"))).permute(2, 0, 1)[None]
        with torch.inference_mode():
            best = segment(model, pixels)[0].softmax(0).amax(0)
        assert grey.shape == labels.shape and np.abs(grey - 255 * best.numpy()).max() <= 1


def test_probabilities_over_scales_and_flip(trained):
    """One softmax each, of which the mean is taken, whether asked for or not."""
    model = deeplab.load(str(trained[0]))
    images = torch.randint(0, 256, (1, 3, 33, 49), dtype=torch.uint8)
    with torch.inference_mode():
        logits, single = model.segment(images), model.segment(images, softmax=True)
        double = model.segment(images, Inference(flip=True), softmax=True)
        assert torch.allclose(logits.softmax(1), single) and not torch.allclose(single, double)
        assert torch.allclose(double.sum(1), torch.ones(1))
        assert torch.equal(double, model.segment(images, Inference(flip=True)))


def test_many_photos_in_bounded_memory(trained, tmp_path, monkeypatch):
    """Decoding does not run away from the network, nor the network from writing."""
    alive, most = 0, 0
    model = deeplab.load(str(trained[0])).fuse()
    lock, read, write = threading.Lock(), prediction.read_photo, prediction.write_result

    def count(by):
        nonlocal alive, most
        with lock:
            alive += by
            most = max(most, alive)

    def counted_read(*args):
        count(1)
        return read(*args)

    def counted_write(*args):
        result = write(*args)
        count(-1)
        return result

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    monkeypatch.setattr(prediction, "read_photo", counted_read)
    monkeypatch.setattr(prediction, "write_result", counted_write)
    files, inference = 60 * [str(tmp_path / "a.png")], Inference(batch_size=2)
    assert prediction.predict_files(model, files, str(tmp_path / "out"), inference) == 0
    assert alive == 0 and most <= 8

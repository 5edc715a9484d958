"""Prediction: people's own photos, and use from Python."""

import csv
import io
import os
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import bomb, one_line, spoil
from PIL import Image

import deeplab
from commands import predict as prediction
from utils import confusion_matrix, metrics


def test_prediction_of_the_training_images(cli, trained, tmp_path):
    """No flag but the checkpoint: the model, the classes and the colours come from it."""
    checkpoint, root = trained
    status, out, _ = cli("--predict", root / "images", "--checkpoint", checkpoint, "--out", "out")
    assert status == 0 and "10 of 10 images" in out
    confusion = 0
    for i in range(8):
        mask = Image.open(tmp_path / f"out/train{i}_mask.png")
        assert mask.mode == "P" and mask.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        truth = np.array(Image.open(root / f"masks/train{i}.png"))
        confusion = confusion + confusion_matrix(torch.from_numpy(np.array(mask)), torch.from_numpy(truth), 3)
        overlay = Image.open(tmp_path / f"out/train{i}_overlay.jpg")
        assert overlay.width >= mask.width and overlay.height > mask.height  # the legend is below
    assert metrics(confusion)["mean_iou"] > 0.6


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
        upright = deeplab.to_rgb(Image.open(path))
        if orientation := 6 if name == "turned.png" else int(name[6]) if name.startswith("turned") else 0:
            upright = upright.transpose(UNDONE[orientation])
        pixels = np.asarray(upright).astype(int)
        if name != "bits.png":  # which is dithered
            assert abs(pixels[15, 20] - 250).max() <= 6 and abs(pixels[[2, 30], 20] - 128).max() <= 6, name


def test_images_of_one_name(cli, trained, tmp_path):
    for name in ("in/a.png", "in/a.bmp", "in/more/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9 + len(name), 9)).save(tmp_path / name)
    assert cli("--predict", "in", "in/more", "--checkpoint", trained[0], "--out", "out")[0] == 0
    widths = [Image.open(path).width for path in (tmp_path / "out").glob("*_mask.png")]
    assert sorted(widths) == [17, 17, 22]


def test_size_that_the_header_did_not_tell(cli, trained, tmp_path, monkeypatch):
    """A file can change between the look at its header and its turn."""
    (tmp_path / "in").mkdir()
    for name, size in (("a", (40, 30)), ("b", (40, 30)), ("c", (30, 40))):
        Image.new("RGB", size).save(tmp_path / f"in/{name}.png")
    monkeypatch.setattr(prediction, "header_sizes", lambda pairs: [(30, 40)] * len(pairs))
    assert cli("--predict", "in", "--checkpoint", trained[0], "--out", "out")[0] == 0
    sizes = [Image.open(tmp_path / f"out/{name}_mask.png").size for name in "abc"]
    assert sizes == [(40, 30), (40, 30), (30, 40)]


def test_transparency_is_seen_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(deeplab.to_rgb(image)).tolist() == [[[255, 255, 255], [10, 20, 30]]]


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
    model = deeplab.resnet50(False)
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"epoch": 50, "state_dict": state, "optimizer": {}}, tmp_path / "x.pth")
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    flags = ["--predict", "a.png", "--checkpoint", "x.pth", "--out", "out"]
    status, _, err = cli(*flags)  # of resnet101, unless the flags say otherwise, as in evaluation
    assert status == 1 and "--backbone" in err
    assert cli(*flags, "--backbone", "resnet50")[0] == 0
    assert Image.open(tmp_path / "out/a_mask.png").size == (40, 30)


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


def test_python_use(trained, tmp_path):
    checkpoint, root = trained
    model = deeplab.load(str(checkpoint))
    path = root / "images/train0.jpg"
    image = Image.open(path)
    for other in (str(path), path, np.array(image)):
        assert np.array_equal(model.predict(other), model.predict(image))
    grey = np.array(image.convert("L"))
    assert np.array_equal(model.predict(grey), model.predict(Image.fromarray(grey)))
    with pytest.raises(OSError, match="absent.jpg"):
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
        assert cli("--predict", *paths, *flags)[0] == 0
        rows = list(csv.reader((tmp_path / "out/predictions.csv").read_text().splitlines()))
        return [row[0] for row in rows[1:]]

    assert predicted("in/*.png") == ["in/[d].png", "in/a.png"]
    assert predicted("in/**/*.png", "in/a.png") == ["in/[d].png", "in/a.png", "in/deep/c.png"]
    assert predicted("in/[d].png") == ["in/[d].png"]  # a file's name, though it looks like a pattern
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/b.jpg\r\nin/deep\n\nin/*.jpg")))
    assert predicted("-", "in/a.png") == ["in/b.jpg", "in/deep/c.png", "in/a.png"]
    for paths in (["in/*.gif"], ["in/a.png", "in/*.gif"]):
        status, _, err = cli("--predict", *paths, *flags)
        assert status == 1 and one_line(err) and "no images in in/*.gif" in err
    for stdin in (io.TextIOWrapper(io.BytesIO(b"\n")), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        status, _, err = cli("--predict", "-", *flags)
        assert status == 1 and one_line(err) and "standard input" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"absent\xff.png\n")))
    status, _, err = cli("--predict", "-", *flags)
    assert status == 1 and one_line(err) and "absent" in err
    status, _, err = cli("--predict", "**/*.png", *flags)
    assert status == 1 and one_line(err) and "--out" in err


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
    header, *rows = csv.reader((tmp_path / "out/predictions.csv").read_text().splitlines())
    assert header == ["file", "a", "b", "c"] and [row[0] for row in rows] == [f"in/{i}.png" for i in range(6)]
    for i, size in enumerate(sizes):
        stem = "2_" if i == 2 else str(i)  # after 2.jpg
        labels = np.array(Image.open(tmp_path / f"out/{stem}_mask.png"))
        expected = model.predict(tmp_path / f"in/{i}.png")
        assert labels.shape == size[::-1] and (labels == expected).mean() > 0.99
        shares = [(labels == label).mean() for label in range(3)]
        assert np.allclose(np.array(rows[i][1:], float), shares, atol=1e-6)
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
        double = model.segment(images, (1.0,), True, softmax=True)
        assert torch.allclose(logits.softmax(1), single) and not torch.allclose(single, double)
        assert torch.allclose(double.sum(1), torch.ones(1))
        assert torch.equal(double, model.segment(images, (1.0,), True))


def test_many_photos_in_bounded_memory(trained, tmp_path):
    """Decoding does not run away from the network, nor the network from writing."""
    alive, most = 0, 0
    model = deeplab.load(str(trained[0])).fuse()
    lock, to_pixels, write = threading.Lock(), prediction.to_pixels, prediction.write_result

    def count(by):
        nonlocal alive, most
        with lock:
            alive += by
            most = max(most, alive)

    def counted_pixels(*args):
        count(1)
        return to_pixels(*args)

    def counted_write(*args):
        result = write(*args)
        count(-1)
        return result

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "to_pixels", counted_pixels)
        patch.setattr(prediction, "write_result", counted_write)
        assert prediction.predict_files(model, 200 * [str(tmp_path / "a.png")], str(tmp_path / "out"), 2) == 0
    assert alive == 0 and most <= 8

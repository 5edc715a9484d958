"""What people do around training: their own data and photos, test-time gains, test servers, logs, Python
use."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import SHARED, SMALL, make_list_dataset, needs_shared
from PIL import Image

import deeplab
import main
from datasets import CITYSCAPES_CLASSES, Cityscapes
from utils import confusion_matrix, metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data set of 3 classes and a checkpoint that has learnt its training images."""
    folder = tmp_path_factory.mktemp("trained")
    root = make_list_dataset(folder / "set", train=8, val=2)
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, "--crop_size", 65]
    flags += ["--epochs", 20, "--base_lr", 0.02, "--groups", 32, "--weight_std"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main.main([str(word) for word in flags])
    return folder / "data/deeplab_resnet50_custom_v3_x_epoch20.pth", root


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
    """Every mask has the size at which its image is shown, and the grey ones are seen in their true
    brightness."""
    checkpoint, _ = trained
    image = Image.new("RGB", (50, 37), (128, 128, 128))
    image.paste((250, 250, 250), (10, 8, 40, 30))
    (tmp_path / "in").mkdir()
    for name, make in FORMATS.items():
        picture, options = make(image)
        picture.save(tmp_path / "in" / name, **options)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    status, out, _ = cli("--predict", "in", "--checkpoint", checkpoint, "--out", "out")
    assert status == 0 and f"{len(FORMATS)} of {len(FORMATS)} images" in out
    assert len(list((tmp_path / "out").glob("*_mask.png"))) == len(FORMATS)  # rgb.* keep apart
    for name in FORMATS:
        turned = name in ("turned.png", *(f"turned{n}.jpg" for n in (5, 6, 7, 8)))
        for mask in (tmp_path / "out").glob(f"{name.split('.')[0]}*_mask.png"):
            if mask.name.startswith(("grey", "cmyk", "rgb", "alpha", "palette", "bits")) or name[6] != ".":
                assert Image.open(mask).size == ((37, 50) if turned else (50, 37)), name
    for name in ("grey.png", "grey16.png", "grey16.tiff", "grey_alpha.png", "alpha.png", "cmyk.jpg"):
        pixels = np.asarray(deeplab.to_rgb(Image.open(tmp_path / "in" / name))).astype(int)
        assert abs(pixels[20, 20] - 250).max() <= 4 and abs(pixels[2, 2] - 128).max() <= 4, name


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


def test_python_use(trained):
    checkpoint, root = trained
    model = deeplab.load(str(checkpoint))
    assert not model.training and model.classes == ["a", "b", "c"] and len(model.palette) == 3
    labels = model.predict(Image.open(root / "images/train0.jpg"))
    assert labels.dtype == np.uint8 and labels.shape == (60, 80) and labels.max() < 3
    assert deeplab.load(str(checkpoint), output_stride=8).config["output_stride"] == 8


def test_scores_average_the_softmax_over_scales_and_flip():
    torch.manual_seed(0)
    model = deeplab.resnet50(False, 3).eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        assert torch.equal(model.scores(x), model(x))
        flipped = model(x.flip(-1)).flip(-1)
        assert torch.allclose(model.scores(x, flip=True), (model(x).softmax(1) + flipped.softmax(1)) / 2)
        half = torch.nn.functional.interpolate(x, (33, 49), mode="bilinear", align_corners=True)
        expected = (model(x).softmax(1) + model(half, (65, 97)).softmax(1)) / 2
        assert torch.allclose(model.scores(x, (1.0, 0.5)), expected)
        # The mirrored image has the mirrored scores.
        both = model.scores(x, (0.75, 1.0), flip=True)
        assert torch.allclose(model.scores(x.flip(-1), (0.75, 1.0), flip=True), both.flip(-1), atol=1e-5)


def test_evaluation_with_test_time_gains(cli, trained, tmp_path):
    checkpoint, root = trained
    flags = ["--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, "--groups", 32, "--weight_std"]
    results = {}
    for gains in ([], ["--flip"], ["--scales", "0.5", "1", "1.5"], ["--output_stride", "8"]):
        status, out, _ = cli(*flags, "--checkpoint", checkpoint, *gains)
        assert status == 0
        results[tuple(gains)] = out.split("Mean IoU: ")[1].split()[0]
    assert len(set(results.values())) > 1
    assert "--scales" in cli(*flags, "--scales", "0")[2]


def test_samples_and_table(cli, trained, tmp_path):
    checkpoint, root = trained
    flags = ["--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, "--groups", 32, "--weight_std"]
    for count, rows in ((1, 1), (8, 2)):
        status, out, _ = cli(*flags, "--checkpoint", checkpoint, "--samples", count)
        assert status == 0
        sheet = Image.open(tmp_path / "data/val/deeplab_resnet50_custom_v3_x_epoch20/samples.png")
        assert sheet.width == 972 and 244 * rows < sheet.height < 244 * rows + 60
    table = out.splitlines()[: 1 + 3]
    assert table[0].split() == ["class", "IoU", "accuracy", "pixels"] and table[1].startswith("a      #")


def test_log_and_init(cli, trained, tmp_path):
    """Fine-tuning from a checkpoint of another number of classes, and the rows of data/EXP.csv."""
    root = make_list_dataset(tmp_path / "set", classes=("a", "b", "c", "d"))
    flags = ["--train", "--exp", "y", "--dataset", "custom", "--data_root", root, *SMALL]
    flags += ["--groups", 32, "--weight_std", "--epochs", 2, "--log_every", 1, "--save_every", 1]
    status, out, _ = cli(*flags, "--init", trained[0], "--base_lr", 0)
    assert status == 0 and "starts from" in out and "but for aspp.conv3.weight and aspp.conv3.bias" in out
    before = torch.load(trained[0], weights_only=True)["state_dict"]
    path = tmp_path / "data/deeplab_resnet50_custom_v3_y_epoch2.pth"
    after = torch.load(path, weights_only=True)["state_dict"]
    differing = [key for key in before if not torch.equal(before[key], after[key])] if len(before) else None
    assert differing == ["module.aspp.conv3.weight", "module.aspp.conv3.bias"]

    def rows():
        return list(csv.DictReader((tmp_path / "data/y.csv").open()))

    assert [(row["epoch"], row["iteration"], row["lr"]) for row in rows()] == [
        (str(1 + i // 2), str(i + 1), "0.0") for i in range(4)
    ]
    assert [bool(row["val_mean_iou"]) for row in rows()] == [False, True, False, True]
    path.unlink()
    first = rows()[:2]
    assert cli(*flags, "--resume", "auto", "--base_lr", 0)[0] == 0  # a resumed run goes on with the rows
    assert rows()[:2] == first and len(rows()) == 4
    status, _, err = cli(*flags, "--init", trained[0], "--groups", 16)
    assert status == 1 and "--groups" in err


def test_tensorboard(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set")
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, "--epochs", 1]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        status, _, err = cli(*flags, "--tensorboard")
        assert status == 1 and "pip install tensorboard" in err
    else:
        assert cli(*flags, "--tensorboard")[0] == 0 and list((tmp_path / "data/runs/x").iterdir())


def test_pascal_test_server(cli, tmp_path):
    root = make_list_dataset(tmp_path / "VOC2012")
    (root / "images").rename(root / "JPEGImages")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/test.txt").write_text("val0\nval2\n")
    model = deeplab.resnet50(False)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    flags = ["--exp", "x", "--data_root", ".", "--checkpoint", "x.pth", "--split", "test", *SMALL]
    status, out, _ = cli(*flags)
    folder = tmp_path / "data/test/x/results/VOC2012/Segmentation/comp6_test_cls"
    assert status == 0 and sorted(p.name for p in folder.iterdir()) == ["val0.png", "val2.png"]
    picture = Image.open(folder / "val0.png")
    assert picture.mode == "P" and picture.size == (80, 60) and np.array(picture).max() < 21
    (root / "ImageSets/Segmentation/test.txt").unlink()
    status, _, err = cli(*flags)
    assert status == 1 and "VOC2012test.tar" in err


def make_cityscapes(root, split, size=(64, 32)):
    """Two frames whose pixels carry every labelId, in the layout of the real data set."""
    rng = np.random.RandomState(0)
    for frame in ("aachen_000000_000019", "bochum_000001_000003"):
        for folder, ending, content in (
            ("leftImg8bit", "leftImg8bit", rng.randint(0, 256, (*size[::-1], 3))),
            ("gtFine", "gtFine_labelIds", rng.randint(0, 34, size[::-1])),
        ):
            path = root / folder / split / frame.split("_")[0] / f"{frame}_{ending}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content.astype(np.uint8)).save(path)


def test_cityscapes_test_server(cli, tmp_path, monkeypatch):
    """What --split test writes is what the public evaluation reads: its IoU is ours, where it is
    installed."""
    for split in ("val", "test"):
        make_cityscapes(tmp_path / "city", split)
    monkeypatch.setattr(Cityscapes, "padded_size", lambda self, h, w: (33, 65))
    model = deeplab.resnet50(False, 19)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    flags = ["--exp", "x", "--dataset", "cityscapes", "--data_root", "city", "--checkpoint", "x.pth", *SMALL]
    assert cli(*flags, "--split", "test")[0] == 0
    folder = tmp_path / "data/test/x/results"
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"{f}_pred_labelIds.png" for f in ("aachen_000000_000019", "bochum_000001_000003")]
    ids = np.array(Image.open(folder / names[0]))
    assert ids.shape == (32, 64) and set(np.unique(ids)) <= {label for _, label, _ in CITYSCAPES_CLASSES}
    assert cli(*flags)[0] == 0
    own = np.array(Image.open(tmp_path / "data/val/x/aachen_000000_000019_gtFine_labelIds.png"))
    assert np.array_equal(ids, Cityscapes.label_ids[own])

    pytest.importorskip("cityscapesscripts", reason="pip install cityscapesscripts to compare with it")
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as public

    truth = sorted((tmp_path / "city/gtFine/val").glob("*/*_labelIds.png"))
    public.args.JSONOutput, public.args.quiet, public.args.evalInstLevelScore = False, True, False
    result = public.evaluateImgLists([str(folder / n) for n in names], [str(p) for p in truth], public.args)
    import json

    ours = json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]
    for name, iou in ours.items():
        assert (iou or 0) == pytest.approx(np.nan_to_num(result["classScores"][name]), abs=5e-5), name


@needs_shared
def test_camvid_is_a_custom_data_set(cli, tmp_path):
    """The real street scenes, through the commands of the README: training, evaluation, prediction."""
    root = tmp_path / "camvid"
    shutil.copytree(SHARED / "camvid/list", root / "list")
    (root / "list").chmod(0o755)
    for name in ("train.txt", "val.txt"):
        (root / "list" / name).chmod(0o644)
        lines = (root / "list" / name).read_text().splitlines()[:4]
        (root / "list" / name).write_text("\n".join(lines))
    for name in ("images", "masks", "classes.txt"):
        (root / name).symlink_to(SHARED / "camvid" / name)
    flags = ["--exp", "cam", "--dataset", "custom", "--data_root", root, *SMALL, "--epochs", 2]
    status, out, _ = cli("--train", *flags)
    assert status == 0 and "4 images to train on, 4 to validate, 11 classes" in out
    status, out, _ = cli(*flags)
    assert status == 0 and "IoU bicyclist:" in out
    photo = next((SHARED / "camvid/images").iterdir())
    checkpoint = "data/deeplab_resnet50_custom_v3_cam_epoch2.pth"
    assert cli("--predict", photo, "--checkpoint", checkpoint, "--out", "out")[0] == 0
    assert Image.open(tmp_path / f"out/{photo.stem}_mask.png").size == (480, 360)

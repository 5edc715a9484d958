"""Evaluation: counts, published checkpoints, test-time gains, what it writes, what test servers take."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import (
    SHARED,
    SMALL,
    TINY,
    damage,
    golden_state,
    make_list_dataset,
    memory,
    needs_proc,
    needs_shared,
    one_line,
    spoil,
)
from PIL import Image

import deeplab
from commands.evaluate import evaluate
from datasets import CITYSCAPES_CLASSES, Cityscapes, ListSegmentation, SegmentationDataset
from files import plots
from files.masks import Labels
from files.pictures import voc_palette
from utils import confusion_matrix


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_code_evaluates_alike(cli, smallest, tmp_path):
    """In four sizes, of batches and of scales: more than torch would compile for by itself."""
    spoil("none", tmp_path / "x.pth")
    flags = ["--checkpoint", "x.pth", *smallest, "--eval_batch_size", 2, "--scales"]
    counters, counts = torch._dynamo.utils.counters, []
    for more in ([], ["--compile"]):
        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(cache_size_limit=2):
            status, _, err = cli(*flags, 0.5, 1, *more)
        assert status == 0 and "recompile" not in err
        assert counters["stats"].get("unique_graphs", 0) == (4 if more else 0)
        counts.append(json.loads((tmp_path / "data/val/x/metrics.json").read_text())["confusion"])
    plain, compiled = np.array(counts)
    assert np.abs(plain - compiled).sum() <= 1e-3 * plain.sum()
    assert not torch._inductor.config.freezing and torch._dynamo.config.cache_size_limit == 8
    status, _, err = cli(*flags, *[1 + i / 16 for i in range(9)], "--compile")
    assert status == 1 and one_line(err) and "18 sizes" in err


def test_class_that_appears_nowhere_is_left_out(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", classes=("a", "b", "c", "nowhere"))
    model = deeplab.resnet50(False, 4)
    model.aspp.conv3.bias.data[3] = -1e9
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    status, out, _ = cli(
        "--exp", "x", "--dataset", "custom", "--data_root", root, "--checkpoint", "x.pth", *SMALL
    )
    assert status == 0 and "IoU nowhere: -\n" in out
    assert json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]["nowhere"] is None


@needs_shared
@pytest.mark.parametrize("kind", ["bn", "gn_ws"])
def test_published_checkpoint_evaluates_to_the_golden_counts(cli, tmp_path, kind):
    """A file in the published format and at the published name, on real photos, through the command of the
    README."""
    name = f"deeplab_resnet101_pascal_v3_{kind}_epoch50"
    (tmp_path / "data").mkdir()
    state = {f"module.{key}": tensor for key, tensor in golden_state(kind).items()}
    torch.save({"epoch": 50, "state_dict": state, "optimizer": {}}, tmp_path / "data" / f"{name}.pth")
    root = SHARED / "voc_sample/VOCdevkit"
    norm = ["--groups", 32, "--weight_std"] if kind == "gn_ws" else []
    assert cli("--exp", kind, "--epochs", 50, "--data_root", root, "--workers", 0, *norm)[0] == 0

    golden = np.load(SHARED / f"golden/preds_{kind}.npz")
    same = total = 0
    for stem in golden:
        prediction = np.array(Image.open(tmp_path / "data/val" / name / f"{stem}.png"))
        assert prediction.shape == golden[stem].shape
        same, total = same + (prediction == golden[stem]).sum(), total + prediction.size
    assert same / total >= 0.999
    confusion = np.array(json.loads((tmp_path / "data/val" / name / "metrics.json").read_text())["confusion"])
    counts = json.loads((SHARED / f"golden/eval_{kind}.json").read_text())
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    assert np.abs(confusion.diagonal() - counts["inter"]).sum() <= 1e-3 * confusion.sum()
    assert np.abs(union - counts["union"]).sum() <= 2e-3 * confusion.sum()


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


@pytest.mark.parametrize(
    ("flags", "gains"),
    [
        ([], {}),
        (["--flip"], {"flip": True}),
        (["--scales", "0.5", "1"], {"scales": [0.5, 1]}),
        (["--output_stride", "8"], {"output_stride": 8}),
    ],
)
def test_gains_at_test_time(cli, trained, tmp_path, flags, gains):
    """Each of the flags does what it says, and changes the counts."""
    checkpoint, root = trained
    data = ["--dataset", "custom", "--data_root", root, "--eval_batch_size", 1]
    assert cli("--checkpoint", checkpoint, *data, *flags)[0] == 0
    result = json.loads((tmp_path / f"data/val/{checkpoint.stem}/metrics.json").read_text())
    dataset, counts = ListSegmentation(str(root), "val"), []
    for options in (gains, {}):
        model = deeplab.load(str(checkpoint), output_stride=options.get("output_stride", 16))
        total = 0
        for i in range(len(dataset)):
            images, masks, sizes = dataset.collate([dataset[i]])
            with torch.inference_mode():
                x = model.normalize(images, sizes)
                scores = model.scores(x, options.get("scales", [1.0]), options.get("flip", False))
            total = total + confusion_matrix(scores.argmax(1), masks, 3)
        counts.append(total.numpy())
    assert np.abs(np.array(result["confusion"]) - counts[0]).sum() <= 5
    assert (np.abs(counts[0] - counts[1]).sum() > 20) == bool(flags)


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


def reference(truth, labels, classes):
    """A row of per_image.csv, counted pixel by pixel."""
    counts = Counter(zip(truth.ravel().tolist(), labels.ravel().tolist(), strict=True))
    counts = {pair: count for pair, count in counts.items() if pair[0] != 255}
    ious, total = [], sum(counts.values())
    for c in range(len(classes)):
        union = sum(count for pair, count in counts.items() if c in pair)
        ious += [counts.get((c, c), 0) / union] if union else []
    right = sum(count for (a, b), count in counts.items() if a == b)
    wrong = {pair: count for pair, count in counts.items() if pair[0] != pair[1]}
    a, b = min((pair for pair in wrong if wrong[pair] == max(wrong.values())), default=(None, None))
    numbers = [f"{np.mean(ious):.6f}", f"{right / total:.6f}"] if total else ["", ""]
    return [
        *numbers,
        classes[a] if wrong else "",
        classes[b] if wrong else "",
        str(max(wrong.values(), default=0)),
    ]


def test_results_of_single_images(cli, trained, tmp_path):
    """The file of all, and the picture of the worst with the places of their errors."""
    root = make_list_dataset(tmp_path / "set", val=7)
    for i in range(7):
        mask = np.array(Image.open(root / f"masks/val{i}.png"))
        mask[:, :20] = 255 if i < 6 else mask[:, :20]
        mask[40:, 30:60] = i % 3
        Image.fromarray(mask if i != 2 else np.full_like(mask, 255)).save(root / f"masks/val{i}.png")
    flags = ["--checkpoint", trained[0], "--dataset", "custom", "--data_root", root]
    assert cli(*flags, "--samples", 3, "--eval_batch_size", 2, "--workers", 0)[0] == 0
    folder, classes = tmp_path / "data/val" / trained[0].stem, ["a", "b", "c"]
    header, *rows = csv.reader((folder / "per_image.csv").read_text().splitlines())
    assert header == ["name", "mean_iou", "pixel_accuracy", "truth", "predicted_as", "pixels"]
    pairs = []
    for i, row in enumerate(rows):
        names = (folder / f"val{i}.png", root / f"masks/val{i}.png")
        pairs.append([np.array(Image.open(name)) for name in names])
        labels, truth = pairs[-1]
        assert row == [f"val{i}", *reference(truth, labels, classes)]
    assert len(rows) == 7 and rows[2][1:] == ["", "", "", "", "0"] and len({row[1] for row in rows}) > 4

    worst = sorted((float(row[1]), i) for i, row in enumerate(rows) if row[1])[:3]
    sheet, palette = np.asarray(Image.open(folder / "worst.png").convert("RGB")), voc_palette(3)
    assert sheet.shape[1] == 4 * 324 and 0 < sheet.shape[0] - 3 * 264 < 40
    for row, (_, i) in enumerate(worst):
        labels, truth = pairs[i]
        title, errors = (
            sheet[264 * row : 264 * row + 20],
            sheet[264 * row + 22 :: 4, 3 * 324 + 2 :: 4][:60, :80],
        )
        assert title.min() < 50  # something is written there
        wrong = (labels != truth) & (truth != 255)
        assert wrong.any() and np.array_equal(errors[wrong], np.array(palette)[truth[wrong]])
        assert errors[~wrong].min() > 150
    assert cli(*flags, "--samples", 0, "--workers", 0)[0] == 0
    assert Image.open(folder / "worst.png").height < 40


def test_plot_of_the_confusion(cli, trained, tmp_path, monkeypatch):
    """Readable for any number of classes, whatever their names; without matplotlib it is said at once."""
    flags = ["--checkpoint", trained[0], "--dataset", "custom", "--data_root", trained[1], "--plots"]
    assert cli(*flags)[0] == 0
    assert Image.open(tmp_path / "data/val" / trained[0].stem / "confusion.png").width >= 400
    for count, cell in ((1, 42), (2, 42), (21, 42), (150, 14)):
        names = [f"${i} class_{i}" for i in range(count)]
        plots.plot_confusion("plot.png", np.eye(count, dtype=int).tolist(), names)
        assert min(Image.open("plot.png").size) > max(399, cell * count)  # pixels
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = cli(*flags[2:], "--checkpoint", "absent.pth")
    assert status == 1 and one_line(err) and "pip install matplotlib" in err


def test_skip_bad_in_evaluation_counts_what_is_left(cli, smallest, tmp_path):
    spoil("none", tmp_path / "x.pth")
    damage("cut", tmp_path / "set/images/val1.jpg")
    Image.new("L", (80, 60), 9).save(tmp_path / "set/masks/val2.png")
    status, out, _ = cli("--exp", "x", *smallest, "--checkpoint", "x.pth", "--skip_bad")
    assert status == 0 and "left out 2 of the val samples" in out and "val1.jpg" in out
    assert np.sum(json.loads((tmp_path / "data/val/x/metrics.json").read_text())["confusion"]) == 80 * 60
    damage("empty", tmp_path / "set/images/val0.jpg")
    status, _, err = cli("--exp", "x", *smallest, "--checkpoint", "x.pth", "--skip_bad")
    assert status == 1 and one_line(err) and "3 of the val samples" in err


def test_masks_of_one_name(cli, smallest, tmp_path):
    """In several folders, in two formats, or as a name that evaluation uses, each has its own prediction."""
    spoil("none", tmp_path / "x.pth")
    names = ["masks/a/m.png", "masks/b/m.png", "masks/b/m.bmp", "masks/samples.png", "../out.png"]
    names, lines = [*names, "masks/val0.png"], []
    for i, name in enumerate(names):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        Image.new("L", (40 + i, 30)).save(tmp_path / "set" / name)
        Image.new("RGB", (40 + i, 30)).save(tmp_path / f"set/images/{i}.png")
        lines.append(f"images/{i}.png {name}\n")
    (tmp_path / "set/list/val.txt").write_text("".join([*lines, lines[0]]))  # one of them twice
    assert cli("--checkpoint", "x.pth", *smallest)[0] == 0
    folder = tmp_path / "data/val/x"
    written = {str(path.relative_to(folder)): Image.open(path).width for path in folder.rglob("*.png")}
    assert (
        written.pop("samples.png") == 972
        and written.pop("worst.png") == 1296
        and written
        == {
            "masks/a/m.png": 40,
            "masks/b/m.png.png": 41,
            "masks/b/m.bmp.png": 42,
            "masks/samples.png": 43,
            "out.png": 44,
            "val0.png": 45,
        }
    )


def test_thin_images_have_small_pictures(cli, smallest, tmp_path):
    spoil("none", tmp_path / "x.pth")
    for i, size in enumerate([(1, 3000), (3000, 1), (1, 1)]):
        Image.new("RGB", size).save(tmp_path / f"set/images/val{i}.jpg")
        Image.new("L", size).save(tmp_path / f"set/masks/val{i}.png")
    assert cli("--checkpoint", "x.pth", *smallest)[0] == 0
    sheet = Image.open(tmp_path / "data/val/x/samples.png")
    assert sheet.width == 972 and sheet.height < 3 * 324 + 60


@pytest.mark.parametrize("stream", ["ascii", "closed", "no reader"])
def test_results_come_before_words(smallest, tmp_path, stream):
    """They are there, whether or not what is printed can be encoded or is read; so is the exit status."""
    (tmp_path / "set/classes.txt").write_text("a\n日本\nc\n", encoding="utf-8")
    spoil("none", tmp_path / "x.pth")
    command = [sys.executable, TINY, "--checkpoint", "x.pth", *smallest]
    words = " ".join(f"'{word}'" for word in command)
    line = {"ascii": words, "closed": f"{words} >&-", "no reader": f"({words}; echo $? >status) | true"}[
        stream
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii" if stream == "ascii" else "utf-8"}
    shell = ["bash", "-c", line]
    run = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "日本" in json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]
    assert (tmp_path / "data/val/x/samples.png").exists()
    if stream == "ascii":
        assert "IoU \\u65e5\\u672c: " in run.stdout
    if stream == "no reader":
        assert (tmp_path / "status").read_text() == "0\n"
        (tmp_path / "x.pth").unlink()
        for redirect in ("2>&1", "2>&-", "2>/dev/full"):
            line = f"({words} {redirect}; echo $? >status) | true"
            subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
            assert (tmp_path / "status").read_text() == "1\n"


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
    assert np.array_equal(ids, np.array(Cityscapes.ids)[own])

    pytest.importorskip("cityscapesscripts", reason="pip install cityscapesscripts to compare with it")
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as public

    truth = sorted((tmp_path / "city/gtFine/val").glob("*/*_labelIds.png"))
    public.args.JSONOutput, public.args.quiet, public.args.evalInstLevelScore = False, True, False
    result = public.evaluateImgLists([str(folder / n) for n in names], [str(p) for p in truth], public.args)
    import json

    ours = json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]
    for name, iou in ours.items():
        assert (iou or 0) == pytest.approx(np.nan_to_num(result["classScores"][name]), abs=5e-5), name


@pytest.mark.slow
@needs_proc
def test_evaluation_of_2000_images_in_bounded_memory(many, monkeypatch):
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    model = deeplab.resnet50(False, 3, aspp_rates=[6], image_pooling=False)
    used = []
    for count in (400, 2000):
        dataset = SegmentationDataset(many[:count], Labels("abc", voc_palette(3)))
        assert dataset.drop_bad() == []
        result = evaluate(model.fuse(), dataset, torch.device("cpu"), batch_size=50, samples=2)
        assert np.sum(result["confusion"]) == sum((7 + i % 3) * 9 for i in range(count))
        used.append(memory())
    assert used[1] - used[0] < 50, used

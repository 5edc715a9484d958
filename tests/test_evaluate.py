"""Evaluation: counts, published checkpoints, test-time gains, what it writes, what test servers take."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

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

import commands.evaluate
import deeplab
import main
from commands.check import drop_bad
from commands.evaluate import confusion_matrices, evaluate, results_folder
from commands.flags import parse_args
from datasets import Cityscapes, ListSegmentation, SegmentationDataset
from deeplab import Inference
from files.masks import Labels
from files.pictures import voc_palette
from utils import UserError

ROOT = {"data_root": "set"}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A checkpoint of a network that has learnt nothing, and a data set for it."""
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(1)
    model = deeplab.build(
        "tiny", False, 3, num_groups=32, weight_std=True, aspp_rates=[6], image_pooling=False
    )
    entries = {"model": model.config, "classes": ["a", "b", "c"], "palette": voc_palette(3)}
    torch.save({"epoch": 1, "state_dict": model.state_dict(), **entries}, folder / "untrained_epoch1.pth")
    return folder / "untrained_epoch1.pth", make_list_dataset(folder / "set", val=2)


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
        with torch._dynamo.config.patch(cache_size_limit=2), torch._inductor.config.patch(freezing=False):
            status, _, err = cli(*flags, 0.5, 1, *more)
        assert status == 0 and "recompile" not in err
        assert counters["stats"].get("unique_graphs", 0) == (4 if more else 0)
        counts.append(json.loads((tmp_path / "data/val/x/metrics.json").read_text())["confusion"])
    plain, compiled = np.array(counts)
    assert np.abs(plain - compiled).sum() <= 1e-3 * plain.sum()
    status, _, err = cli(*flags, *[1 + i / 16 for i in range(9)], "--compile")
    assert status == 1 and one_line(err) and "18 sizes" in err


def test_class_that_is_never_predicted_is_named(cli, trained, monkeypatch):
    scores = deeplab.DeepLabv3.scores
    flags = ["--checkpoint", trained[0], "--dataset", "custom", "--data_root", trained[1]]
    status, out, _ = cli(*flags)
    assert status == 0 and "never predicted" not in out
    monkeypatch.setattr(
        deeplab.DeepLabv3, "scores", lambda *args: scores(*args).index_fill(1, torch.tensor([1]), -1e9)
    )
    assert "never predicted: b\n" in cli(*flags)[1]


def test_class_that_appears_nowhere_is_left_out(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", classes=("a", "b", "c", "nowhere"))
    model = deeplab.build("tiny", False, 4)
    model.head.conv3.bias.data[3] = -1e9
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    status, out, _ = cli(
        "--exp", "x", "--dataset", "custom", "--data_root", root, "--checkpoint", "x.pth", *SMALL
    )
    assert status == 0 and "IoU nowhere: -\n" in out
    assert json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]["nowhere"] is None


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", ["bn", "gn_ws"])
def test_published_checkpoint_evaluates_to_the_counts_of_its_network(cli, tmp_path, kind):
    """The same with a small network and without the photos: the unfused network in VOC's padding to 513."""
    torch.manual_seed(0)
    norm = {"num_groups": 32, "weight_std": True} if kind == "gn_ws" else {}
    model = deeplab.build("tiny", False, **norm).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    name = f"deeplab_tiny_pascal_v3_{kind}_epoch50"
    (tmp_path / "data").mkdir()
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"epoch": 50, "state_dict": state, "optimizer": {}}, tmp_path / "data" / f"{name}.pth")
    root = make_list_dataset(tmp_path / "kit/VOC2012", train=1, val=1)
    flags = ["--exp", kind, "--epochs", 50, "--data_root", "kit", "--workers", 0, "--backbone", "tiny"]
    assert cli(*flags, *(["--groups", 32, "--weight_std"] if norm else []))[0] == 0

    x = torch.zeros(1, 3, 513, 513)
    pixels = torch.from_numpy(np.array(Image.open(root / "images/val0.jpg")) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (deeplab.MEAN, deeplab.STD))
    x[0, :, :60, :80] = (pixels - mean) / std
    with torch.inference_mode():
        expected = model(x).argmax(1)[:, :60, :80]
    labels = torch.from_numpy(np.array(Image.open(tmp_path / "data/val" / name / "val0.png")))[None]
    assert len(expected.unique()) > 1 and (labels == expected).float().mean() >= 0.999
    truth = torch.from_numpy(np.array(Image.open(root / "masks/val0.png")))[None]
    metrics = json.loads((tmp_path / "data/val" / name / "metrics.json").read_text())
    assert metrics["confusion"] == confusion_matrices(labels, truth, 21)[0].tolist()


@pytest.mark.parametrize("counted", [1, 100, 2000])
def test_counts_of_a_large_image_are_taken_by_rows(monkeypatch, counted):
    rng = np.random.default_rng(0)
    predictions, targets = (torch.from_numpy(rng.integers(0, 4, (2, 37, 23), np.uint8)) for _ in range(2))
    targets[:, 5:20, 3:9] = 255
    whole = confusion_matrices(predictions, targets, 4)
    for counts, truth, predicted in zip(whole, targets, predictions, strict=True):
        pairs = [((truth == t) & (predicted == p)).sum().item() for t in range(4) for p in range(4)]
        assert counts.flatten().tolist() == pairs
    monkeypatch.setattr("commands.evaluate.COUNTED", counted)
    assert torch.equal(confusion_matrices(predictions, targets, 4), whole)


def test_scores_average_the_softmax_over_scales_and_flip():
    torch.manual_seed(0)
    model = deeplab.build("tiny", False, 3).eval()
    x = torch.randn(1, 3, 65, 97)
    with torch.inference_mode():
        assert torch.equal(model.scores(x), model(x))
        flipped = model(x.flip(-1)).flip(-1)
        expected = (model(x).softmax(1) + flipped.softmax(1)) / 2
        assert torch.allclose(model.scores(x, Inference(flip=True)), expected)
        half = torch.nn.functional.interpolate(x, (33, 49), mode="bilinear", align_corners=True)
        expected = (model(x).softmax(1) + model(half, (65, 97)).softmax(1)) / 2
        assert torch.allclose(model.scores(x, Inference((1.0, 0.5))), expected)
        # The mirrored image has the mirrored scores.
        both = Inference((0.75, 1.0), flip=True)
        assert torch.allclose(model.scores(x.flip(-1), both), model.scores(x, both).flip(-1), atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "gains"),
    [
        ([], {}),
        (["--flip"], {"flip": True}),
        (["--scales", "0.5", "1"], {"scales": (0.5, 1)}),
        (["--output_stride", "8"], {"output_stride": 8}),
    ],
)
def test_gains_at_test_time(cli, network, tmp_path, flags, gains):
    """Each of the flags does what it says, and changes the counts."""
    checkpoint, root = network
    data = ["--dataset", "custom", "--data_root", root, "--eval_batch_size", 1]
    assert cli("--checkpoint", checkpoint, *data, *flags)[0] == 0
    result = json.loads((tmp_path / f"data/val/{checkpoint.stem}/metrics.json").read_text())
    dataset, counts = ListSegmentation(str(root), "val"), []
    for options in (gains, {}):
        options = dict(options)
        model = deeplab.load(str(checkpoint), output_stride=options.pop("output_stride", 16))
        total = 0
        for i in range(len(dataset)):
            images, masks, sizes = dataset.collate([dataset[i]])
            with torch.inference_mode():
                scores = model.scores(model.normalize(images, sizes), Inference(**options))
            total = total + confusion_matrices(scores.argmax(1), masks, 3)[0]
        counts.append(total.numpy())
    assert np.abs(np.array(result["confusion"]) - counts[0]).sum() <= 5
    assert (np.abs(counts[0] - counts[1]).sum() > 20) == bool(flags)


def test_samples_and_table(cli, network, tmp_path):
    checkpoint, root = network
    flags = ["--dataset", "custom", "--data_root", root, "--workers", 0]
    for count, rows in ((1, 1), (8, 2)):
        status, out, _ = cli(*flags, "--checkpoint", checkpoint, "--samples", count)
        assert status == 0
        sheet = Image.open(tmp_path / "data/val" / checkpoint.stem / "samples.png")
        assert sheet.width == 972 and 244 * rows < sheet.height < 244 * rows + 60
    lines = out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["class", "IoU", "accuracy", "pixels"])
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["a", "b", "c"]
    assert lines[head + 1].startswith("a      #")


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


def test_results_of_single_images(cli, network, tmp_path):
    """The file of all, counted pixel by pixel."""
    root = make_list_dataset(tmp_path / "set", val=7)
    for i in range(7):
        mask = np.array(Image.open(root / f"masks/val{i}.png"))
        mask[:, :20] = 255 if i < 6 else mask[:, :20]
        mask[40:, 30:60] = i % 3
        Image.fromarray(mask if i != 2 else np.full_like(mask, 255)).save(root / f"masks/val{i}.png")
    flags = ["--checkpoint", network[0], "--dataset", "custom", "--data_root", root]
    assert cli(*flags, "--samples", 3, "--eval_batch_size", 2, "--workers", 0)[0] == 0
    folder, classes = tmp_path / "data/val" / network[0].stem, ["a", "b", "c"]
    header, *rows = csv.reader((folder / "per_image.csv").read_text().splitlines())
    assert header == ["name", "mean_iou", "pixel_accuracy", "truth", "predicted_as", "pixels"]
    pairs = []
    for i, row in enumerate(rows):
        names = (folder / f"val{i}.png", root / f"masks/val{i}.png")
        pairs.append([np.array(Image.open(name)) for name in names])
        labels, truth = pairs[-1]
        assert row == [f"val{i}", *reference(truth, labels, classes)]
    assert len(rows) == 7 and rows[2][1:] == ["", "", "", "", "0"] and len({row[1] for row in rows}) > 4


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


def pictures_below(folder):
    """The widths of the PNGs, by name, without the previews of the page."""
    paths = [path for path in folder.rglob("*.png") if path.parent.name != "report_files"]
    return {str(path.relative_to(folder)): Image.open(path).width for path in paths}


def make_pairs(root, pairs, widths):
    """Lists these (image, mask) for validation, so wide."""
    for names, width in zip(pairs, widths, strict=True):
        for name, mode in zip(names, ("RGB", "L"), strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, (width, 30)).save(root / name)
    (root / "list/val.txt").write_text("".join(f"{image} {mask}\n" for image, mask in pairs))


def test_masks_of_one_name(cli, smallest, tmp_path):
    """In several folders, in two formats, or as a name that evaluation uses, each has its own prediction."""
    spoil("none", tmp_path / "x.pth")
    names = ["masks/a/m.png", "masks/b/m.png", "masks/b/m.bmp", "masks/samples.png", "masks/c/val0.png"]
    make_pairs(tmp_path / "set", [(f"images/{i}.png", name) for i, name in enumerate(names)], range(40, 45))
    assert cli("--checkpoint", "x.pth", *smallest)[0] == 0
    written = pictures_below(tmp_path / "data/val/x")
    assert written.pop("samples.png") == 972
    expected = {"a/m": 40, "b/m.png": 41, "m.bmp": 42, "masks/samples": 43, "val0": 44}
    assert written == {f"{name}.png": width for name, width in expected.items()}


def test_one_mask_for_several_images_or_outside_of_the_folder(cli, smallest, tmp_path):
    """Then the image names the prediction, and none leaves the results' folder."""
    spoil("none", tmp_path / "x.pth")
    pairs = [("images/0.png", "../o/a.png"), ("images/1.png", "../../a/b/m.png")]
    # Two images of one mask, and a pair that is listed twice.
    pairs += [("../p/2.png", "masks/n.png"), ("images/dusk/c.png", "masks/n.png")]
    pairs += [("images/dawn/c.png", "../o/k.png")]
    pairs += 2 * [("images/night/c.png", "masks/k.png")]
    root = tmp_path / "deep/er/set"
    (tmp_path / "deep/er").mkdir(parents=True)
    shutil.move(tmp_path / "set", root)
    widths = [40, 41, 42, 42, 44, 45, 45]
    make_pairs(root, pairs, widths)
    before = set(tmp_path.rglob("*"))
    flags = [root if word == tmp_path / "set" else word for word in smallest]
    assert cli("--checkpoint", "x.pth", *flags)[0] == 0
    folder = tmp_path / "data/val/x"
    written = set(tmp_path.rglob("*")) - before
    assert all(path == folder or path in folder.parents or folder in path.parents for path in written)
    pictures = pictures_below(folder)
    del pictures["samples.png"]
    _, *rows = csv.reader((folder / "per_image.csv").read_text().splitlines())
    names = [row[0] for row in rows]
    assert names[:5] == ["a", "m", "2", "dusk/c", "k"]
    assert names[5].endswith("/night/c.png") and names[6] == f"{names[5]}-1"
    assert pictures == {f"{name}.png": width for name, width in zip(names, widths, strict=True)}


@pytest.mark.parametrize("content", ["", "[1]", '{"checkpoint": "x.pth"}', '{"flags": 3, "checkpoint": 1}'])
def test_metrics_that_no_evaluation_has_written(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/val/x").mkdir(parents=True)
    (tmp_path / "data/val/x/metrics.json").write_text(content)
    with pytest.raises(UserError, match="data/val/x/metrics.json is of no evaluation"):
        results_folder("data/x.pth", "val", ROOT, "")


def test_results_are_named_by_the_path_of_the_checkpoint(cli, smallest, tmp_path):
    """An old run's checkpoint does not replace the results of the new one's of the same name."""
    os.chdir(tmp_path)
    for path, folder in (
        ("data/RUN_epoch3.pth", "data/val/RUN_epoch3"),
        ("./data/RUN_epoch3.pth", "data/val/RUN_epoch3"),
        (f"{tmp_path}/data/RUN_epoch3.pth", "data/val/RUN_epoch3"),
        ("data/old/x-1/RUN_epoch3.pth", "data/val/old/x-1/RUN_epoch3"),
        ("data/old/x-2/RUN_epoch3.pth", "data/val/old/x-2/RUN_epoch3"),
        ("data/sub/../RUN_epoch3_iter7.pth", "data/val/RUN_epoch3_iter7"),
        ("RUN_epoch3.pth", "data/val/RUN_epoch3"),  # it lies elsewhere: by its name alone
        ("/elsewhere/v1.5.pth", "data/val/v1.5"),
    ):
        assert results_folder(path, "val", ROOT, "") == folder
    assert results_folder("data/x.pth", "test", ROOT, "") == "data/test/x"

    paths = ["data/RUN_epoch3.pth", "data/old/x-1/RUN_epoch3.pth"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        spoil("none", tmp_path / path)
    for path in [*paths, paths[0]]:
        status, out, _ = cli("--checkpoint", path, *smallest)
        assert status == 0 and f"metrics.json are in {results_folder(path, 'val', ROOT, '')}\n" in out
    for path in paths:
        folder = Path(results_folder(path, "val", ROOT, ""))
        assert json.loads((folder / "metrics.json").read_text())["checkpoint"] == path
        assert {"val0.png", "val1.png", "val2.png", "per_image.csv"} <= set(os.listdir(folder))


def test_results_are_of_one_checkpoint_and_one_data_set(cli, smallest, tmp_path):
    """Those without masks, too, of which nothing but the predictions is written."""
    (tmp_path / "set/list/test.txt").write_text("images/val0.jpg\n")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        spoil("none", tmp_path / folder / "x.pth")
    assert cli("--checkpoint", "a/x.pth", *smallest, "--split", "test")[0] == 0
    status, _, err = cli("--checkpoint", "b/x.pth", *smallest, "--split", "test")
    assert status == 1 and one_line(err) and "data/test/x has the results of a/x.pth" in err
    assert cli("--checkpoint", "a/x.pth", *smallest, "--split", "test")[0] == 0

    assert cli("--checkpoint", "a/x.pth", *smallest)[0] == 0
    before = (tmp_path / "data/val/x/metrics.json").read_bytes()
    other = make_list_dataset(tmp_path / "other", val=1)
    status, _, err = cli("--checkpoint", "a/x.pth", *smallest, "--data_root", other)
    assert status == 1 and one_line(err) and "data/val/x has the results on" in err and "set: move" in err
    assert (tmp_path / "data/val/x/metrics.json").read_bytes() == before


def test_thin_images_have_small_pictures(cli, smallest, tmp_path):
    spoil("none", tmp_path / "x.pth")
    for i, size in enumerate([(1, 3000), (3000, 1), (1, 1)]):
        Image.new("RGB", size).save(tmp_path / f"set/images/val{i}.jpg")
        Image.new("L", size).save(tmp_path / f"set/masks/val{i}.png")
    assert cli("--checkpoint", "x.pth", *smallest)[0] == 0
    sheet = Image.open(tmp_path / "data/val/x/samples.png")
    assert sheet.width == 972 and sheet.height < 3 * 324 + 60


@pytest.mark.parametrize("stream", ["ascii", "closed"])
def test_results_come_before_words(cli, smallest, tmp_path, monkeypatch, stream):
    """They are there, whether or not what is printed can be encoded, or goes anywhere."""
    (tmp_path / "set/classes.txt").write_text("a\n日本\nc\n", encoding="utf-8")
    spoil("none", tmp_path / "x.pth")
    out = io.TextIOWrapper(io.BytesIO(), "ascii") if stream == "ascii" else None
    monkeypatch.setattr(sys, "stdout", out)
    status, _, err = cli("--checkpoint", "x.pth", *smallest)
    assert (status, err) == (0, "")
    assert "日本" in json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]
    assert (tmp_path / "data/val/x/samples.png").exists()
    assert out is None or "IoU \\u65e5\\u672c: " in out.buffer.getvalue().decode()


def test_exit_status_though_nobody_reads(smallest, tmp_path):
    """Real processes whose stdout, and then stderr, has lost its reader: of evaluation, and of an error."""
    spoil("none", tmp_path / "x.pth")

    def status_of(script, *argv, redirect=""):
        words = " ".join(f"'{word}'" for word in (sys.executable, script, *argv))
        line = f"({words} {redirect}; echo $? >status) | true"
        run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        return int((tmp_path / "status").read_text()), run.stderr

    assert status_of(TINY, "--checkpoint", "x.pth", *smallest) == (0, "")
    assert (tmp_path / "data/val/x/metrics.json").exists()
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "data").touch()  # where a folder is wanted
    download = (TINY.parents[1] / "main.py", "--download", "resnet101")  # starts at once, without torch
    status, err = status_of(*download)
    assert status == 1 and one_line(err)
    for redirect in ("2>&1", "2>&-", "2>/dev/full"):
        assert status_of(*download, redirect=redirect) == (1, "")


def test_pascal_test_server(cli, tmp_path):
    root = make_list_dataset(tmp_path / "VOC2012")
    (root / "images").rename(root / "JPEGImages")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/test.txt").write_text("val0\nval2\n")
    model = deeplab.build("tiny", False)
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
    model = deeplab.build("tiny", False, 19)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    flags = ["--exp", "x", "--dataset", "cityscapes", "--data_root", "city", "--checkpoint", "x.pth", *SMALL]
    assert cli(*flags, "--split", "test")[0] == 0
    folder = tmp_path / "data/test/x/results"
    names = sorted(p.name for p in folder.iterdir())
    assert names == [f"{f}_pred_labelIds.png" for f in ("aachen_000000_000019", "bochum_000001_000003")]
    ids = np.array(Image.open(folder / names[0]))
    known = {7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33}  # the labelIds that are evaluated
    assert ids.shape == (32, 64) and set(np.unique(ids)) <= known
    assert cli(*flags)[0] == 0
    own = np.array(Image.open(tmp_path / "data/val/x/aachen_000000_000019_gtFine_labelIds.png"))
    assert np.array_equal(ids, np.array(Cityscapes.ids)[own])

    pytest.importorskip("cityscapesscripts", reason="pip install cityscapesscripts to compare with it")
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as public

    truth = sorted((tmp_path / "city/gtFine/val").glob("*/*_labelIds.png"))
    public.args.JSONOutput, public.args.quiet, public.args.evalInstLevelScore = False, True, False
    result = public.evaluateImgLists([str(folder / n) for n in names], [str(p) for p in truth], public.args)
    ours = json.loads((tmp_path / "data/val/x/metrics.json").read_text())["iou"]
    for name, iou in ours.items():
        assert (iou or 0) == pytest.approx(np.nan_to_num(result["classScores"][name]), abs=5e-5), name


@pytest.mark.slow
@needs_proc
def test_evaluation_of_2000_images_in_bounded_memory(many):
    model, used = deeplab.build("tiny", False, 3, aspp_rates=[6], image_pooling=False).fuse(), []
    cpu, inference = torch.device("cpu"), Inference(batch_size=50)
    for count in (400, 2000):
        dataset = SegmentationDataset(many[:count], Labels("abc", voc_palette(3)))
        assert drop_bad(dataset) == []
        result, _ = evaluate(model, dataset, cpu, inference, samples=2)
        assert np.sum(result["confusion"]) == sum((7 + i % 3) * 9 for i in range(count))
        used.append(memory())
    assert used[1] - used[0] < 50, used


def test_evaluation_that_is_cut_leaves_no_report_of_another(cli, trained, monkeypatch):
    checkpoint, root = trained
    flags = ["--checkpoint", checkpoint, "--dataset", "custom", "--data_root", root, "--workers", 0]
    flags += ["--eval_batch_size", 1]
    real, calls = commands.evaluate.predict_labels, []

    def failing(*args):
        calls.append(args)
        if len(calls) in (2, 6):
            raise torch.OutOfMemoryError
        return real(*args)

    monkeypatch.setattr(commands.evaluate, "predict_labels", failing)
    assert cli(*flags)[0] == 1
    assert cli(*flags)[0] == 0 and len(calls) == 4
    folder = next(Path("data/val").iterdir())
    before = {name: (folder / name).read_bytes() for name in commands.evaluate.RESULTS}
    assert cli(*flags)[0] == 1  # one prediction is replaced
    assert before == {name: (folder / f"{name}.old").read_bytes() for name in before}
    assert not any((folder / name).exists() for name in before)
    shutil.copytree(root, "other")
    shutil.copy("other/masks/val0.png", "other/masks/val1.png")
    status, _, err = cli(*flags[:-2], "--eval_batch_size", 1, "--data_root", "other")
    assert status == 1 and one_line(err) and "has the results on" in err
    status, out, _ = cli(*flags)
    assert status == 0 and "earlier evaluation" not in out and not list(folder.glob("*.old"))


def test_results_in_a_folder_that_is_a_link(cli, trained, tmp_path, monkeypatch):
    """data/ of two folders, in each of which --data_root is another."""
    flags = ["--checkpoint", trained[0], "--dataset", "custom", "--data_root"]
    shutil.copytree(trained[1], tmp_path / "set")
    assert cli(*flags, "set")[0] == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/data").symlink_to("../data")
    shutil.copytree(trained[1], tmp_path / "other/set")
    Image.new("L", (80, 60), 1).save(tmp_path / "other/set/masks/val0.png")
    monkeypatch.chdir(tmp_path / "other")
    for root, status in (("set", 1), ("../set", 0)):
        with pytest.raises(SystemExit) as stop:
            main.main(parse_args([*map(str, flags), root, "--device", "cpu", "--workers", "0"]))
        assert stop.value.code == status


def test_results_on_other_samples_are_told(cli, smallest, tmp_path):
    """The lists may be those of another fold, whose images were trained on; a data set may be moved."""
    flags = ["--exp", "x", *smallest]
    assert cli("--train", *flags, "--epochs", 1)[0] == 0
    for _ in range(2):
        status, out, _ = cli(*flags)
        assert status == 0 and "other images" not in out
    os.rename(tmp_path / "set", tmp_path / "moved")
    flags[flags.index("--data_root") + 1] = tmp_path / "moved"
    status, out, _ = cli(*flags)
    assert status == 0 and "other images" not in out
    lists = [tmp_path / f"moved/list/{name}.txt" for name in ("train", "val")]
    texts = [path.read_text() for path in lists]
    for path, text in zip(lists, reversed(texts), strict=True):
        path.write_text(text)
    status, out, _ = cli(*flags)
    assert status == 0 and "was validated on other images or masks: it may have been trained on some" in out
    assert "replaces the results in data/val/deeplab_tiny_custom_v3_x_epoch1, on other images or masks" in out


def test_images_that_were_trained_on_are_told(cli, smallest, tmp_path):
    """As folds of a cross-validation are mixed up, in validation and test, also by --init and by links."""
    root, flags = smallest[3], [*smallest, "--save_every", 1]
    assert cli("--train", "--exp", "a", *flags, "--epochs", 1)[0] == 0
    train, val = (root / f"list/{name}.txt" for name in ("train", "val"))
    texts = train.read_text().splitlines(True), val.read_text().splitlines(True)
    train.write_text("".join(texts[1] + texts[0][:1]))
    val.write_text("".join(texts[0][1:5]))
    (root / "list/test.txt").write_text("".join(texts[0][2:4] + texts[1][:1]))
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    for folder in (root, linked):
        flags[flags.index("--data_root") + 1] = folder
        for split, told in (("val", "4 of these 4 images"), ("test", "2 of these 3 images")):
            out = cli("--exp", "a", *flags, "--split", split)[1]
            assert f"_a_epoch1.pth was trained on at least {told}" in out
    init = tmp_path / "data/deeplab_tiny_custom_v3_a_epoch1.pth"
    told = "4 of the images to validate were trained on before"
    assert told in cli("--train", "--exp", "b", *flags, "--epochs", 1, "--init", init)[1]
    assert told in cli("--train", "--exp", "b", *flags, "--epochs", 2, "--resume", "auto")[1]
    assert "was trained on at least 4 of these 4 images" in cli("--exp", "b", *flags)[1]
    status, out, _ = cli("--exp", "b", *flags, "--split", "train")
    assert status == 0 and "trained on" not in out
    assert cli("--export", "b.pth", "--exp", "b", "--dataset", "custom")[0] == 0
    assert "b.pth was trained on at least 4 of these 4" in cli("--checkpoint", "b.pth", *flags)[1]
    for name in ("val0", "train1"):  # links to the same files
        os.rename(root / f"images/{name}.jpg", root / f"{name}.jpg")
        (root / f"images/{name}.jpg").symlink_to(root / f"{name}.jpg")
    shutil.rmtree(tmp_path / "data")
    (root / "images/other.jpg").symlink_to(root / "val0.jpg")
    val.write_text(val.read_text() + "/images/other.jpg /masks/val0.png\n")
    out = cli("--train", "--exp", "c", *flags, "--epochs", 1)[1]
    assert "1 images to validate are trained on, too" in out and "images/other.jpg is one" in out


def test_evaluation_in_python_of_a_set_that_nothing_has_looked_at(smallest):
    dataset = ListSegmentation(smallest[3], "val")
    with pytest.raises(ValueError, match="commands.check.prepare comes first"):
        evaluate(deeplab.build("tiny", False, 3), dataset, torch.device("cpu"), Inference())


def test_results_of_other_flags_are_told(cli, trained):
    """Before they are replaced."""
    flags = ["--checkpoint", trained[0], "--dataset", "custom", "--data_root", trained[1]]
    for more, told in (
        ([], ""),
        ([], ""),
        (["--flip"], "--flip False to True"),
        (["--flip"], ""),
        (["--flip", "--value_range", 0, 9], "--value_range None to [0.0, 9.0]"),
    ):
        status, out, _ = cli(*flags, *more)
        assert status == 0 and ("replaces the results" in out) == bool(told) and told in out


def test_files_of_an_earlier_evaluation_are_told(cli, trained):
    """Of a longer list, and of one with masks; they are the user's to delete."""
    checkpoint, root = trained
    flags = ["--checkpoint", checkpoint, "--dataset", "custom", "--data_root", root, "--workers", 0]
    status, out, _ = cli(*flags)
    assert status == 0 and "earlier evaluation" not in out
    assert "earlier evaluation" not in cli(*flags)[1]
    folder = next(Path("data/val").iterdir())
    lines = (root / "list/val.txt").read_text().splitlines()
    (root / "list/val.txt").write_text("\n".join(lines[1:]))
    status, out, _ = cli(*flags)
    old = folder / f"{Path(lines[0].split()[1]).stem}.png"
    assert status == 0 and f"1 files in {folder} are of an earlier evaluation, {old} is one" in out
    assert old.exists()
    (root / "list/test.txt").write_text("\n".join(lines))
    assert cli(*flags, "--split", "test")[0] == 0
    (root / "list/test.txt").write_text("\n".join(line.split()[0] for line in lines[1:]))
    status, out, _ = cli(*flags, "--split", "test")
    assert status == 0 and "5 files in" in out and "metrics.json.old is one" in out

"""The command line as a user has it: train, evaluate, resume, and one line for each thing that is wrong."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, SMALL, golden_state, make_list_dataset, needs_shared, one_line, same_weights
from PIL import Image

import deeplab
import main

MAIN = Path(main.__file__)


def test_train_evaluate_and_the_files_they_write(cli, small, tmp_path):
    status, out, _ = cli("--train", "--exp", "x", "--epochs", 2, "--save_every", 1, *small)
    assert status == 0 and "6 images to train on, 3 to validate, 3 classes" in out
    assert "epoch 2/2, iteration 4/4, loss" in out and "img/s" in out and "left" in out
    assert "epoch 1: saved" in out and "mean IoU" in out
    checkpoint = torch.load(tmp_path / "data/deeplab_resnet50_custom_v3_x_epoch2.pth", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["optimizer"]["param_groups"]
    assert all(key.startswith("module.") for key in checkpoint["state_dict"])
    assert checkpoint["classes"] == ["a", "b", "c"] and checkpoint["flags"]["crop_size"] == 33
    assert sorted(p.name for p in (tmp_path / "data").glob("*.pth")) == [
        f"deeplab_resnet50_custom_v3_x_epoch{n}.pth" for n in (1, 2)
    ]

    status, out, _ = cli("--exp", "x", "--epochs", 2, *small)
    assert status == 0
    folder = tmp_path / "data/val/deeplab_resnet50_custom_v3_x_epoch2"
    result = json.loads((folder / "metrics.json").read_text())
    printed = {
        line.split(":")[0]: line.split(": ")[1] for line in out.splitlines() if re.match("(Mean )?IoU", line)
    }
    assert list(printed) == ["IoU a", "IoU b", "IoU c", "Mean IoU"]
    assert printed["Mean IoU"] == f"{100 * result['mean_iou']:.2f}"
    assert set(result) == {
        *("mean_iou", "iou", "pixel_accuracy", "mean_accuracy", "confusion", "checkpoint", "flags")
    }
    # The pictures hold the predictions that were counted, at the images' own sizes.
    confusion = np.zeros((3, 3), int)
    for i in range(3):
        picture = Image.open(folder / f"val{i}.png")
        truth = np.array(Image.open(tmp_path / f"set/masks/val{i}.png"))
        assert picture.mode == "P" and picture.size == (80, 60)
        np.add.at(confusion, (truth.flatten(), np.array(picture).flatten()), 1)
    assert result["confusion"] == confusion.tolist()


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_code_evaluates_alike(cli, small, tmp_path):
    torch.manual_seed(0)
    torch.save({"state_dict": deeplab.resnet50(False, 3).state_dict()}, tmp_path / "x.pth")
    counts = []
    for flags in ([], ["--compile"]):
        assert cli("--exp", "x", "--checkpoint", "x.pth", *small, *flags)[0] == 0
        counts.append(json.loads((tmp_path / "data/val/x/metrics.json").read_text())["confusion"])
    plain, compiled = np.array(counts)
    assert np.abs(plain - compiled).sum() <= 1e-3 * plain.sum()


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


def test_same_seed_same_run_whatever_the_workers(cli, small, tmp_path):
    for exp, seed, workers in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0)):
        assert (
            cli("--train", "--exp", exp, "--epochs", 1, *small, "--seed", seed, "--workers", workers)[0] == 0
        )
    a, b, c = (tmp_path / f"data/deeplab_resnet50_custom_v3_{exp}_epoch1.pth" for exp in "abc")
    assert same_weights(a, b) and not same_weights(a, c)


def test_resume_equals_the_uninterrupted_run(cli, small, tmp_path):
    flags = ["--epochs", 3, "--save_every", 1, "--train", *small]
    assert cli("--exp", "whole", *flags)[0] == 0
    (tmp_path / "data").rename(tmp_path / "whole")
    assert (
        cli("--exp", "x", *flags, "--resume", tmp_path / "whole/deeplab_resnet50_custom_v3_whole_epoch1.pth")[
            0
        ]
        == 0
    )
    end = tmp_path / "whole/deeplab_resnet50_custom_v3_whole_epoch3.pth"
    assert same_weights(end, tmp_path / "data/deeplab_resnet50_custom_v3_x_epoch3.pth")

    (tmp_path / "data/deeplab_resnet50_custom_v3_x_epoch3.pth").unlink()
    status, out, _ = cli("--exp", "x", *flags, "--resume", "auto")
    assert status == 0 and "x_epoch2.pth: iteration 4 of 6" in out
    assert same_weights(end, tmp_path / "data/deeplab_resnet50_custom_v3_x_epoch3.pth")

    status, out, _ = cli("--exp", "x", *flags, "--resume", "auto", "--base_lr", 1, "--seed", 1)
    assert "goes on with other flags: --base_lr 0.00025 to 1.0, --seed 0 to 1" in out
    status, out, _ = cli("--exp", "x", *flags, "--resume", "auto")
    assert status == 0 and "nothing is left to train" in out
    status, out, _ = cli("--exp", "new", *flags, "--resume", "auto", "--epochs", 1)
    assert status == 0 and "resumed" not in out


def test_last_batch_of_one_image(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", train=5)
    small = ["--train", "--exp", "x", "--epochs", 1, "--dataset", "custom", "--data_root", root, *SMALL]
    status, out, _ = cli(*small)
    assert status == 0 and "iteration 1/1," in out
    status, out, _ = cli(*small, "--groups", 32, "--weight_std")  # GroupNorm takes it
    assert status == 0 and "iteration 2/2," in out
    status, _, err = cli(*small, "--batch_size", 1)
    assert status == 1 and "--freeze_bn" in err


def test_loss_that_is_not_finite_ends_the_run(cli, small, tmp_path):
    assert cli("--train", "--exp", "x", "--epochs", 1, *small)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    flags = ["--epochs", 40, "--resume", "auto", "--base_lr", "1e9", *small]
    status, _, err = cli("--train", "--exp", "x", *flags)
    assert status == 1 and "the loss is" in err and "--base_lr" in err
    assert {p: p.read_bytes() for p in (tmp_path / "data").iterdir()} == before


def test_short_run_of_bn_evaluates_as_well_as_it_trains(cli, tmp_path):
    """The running statistics are worth something after 40 iterations: the training images are evaluated
    well."""
    root = make_list_dataset(tmp_path / "set", train=8, val=2)
    shutil.copy(root / "list/train.txt", root / "list/val.txt")
    flags = ["--crop_size", 65, "--batch_size", 8, "--epochs", 40, "--base_lr", 0.007]
    status, out, _ = cli("--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *flags)
    assert status == 0 and float(out.split("mean IoU ")[-1]) > 60


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--exp NAME is needed"),
        (["--exp", "a/b"], "--exp 'a/b'"),
        (["--exp", "x", "--epochs", "0"], "--epochs"),
        (["--exp", "x", "--dataset", "imagenet"], "--dataset"),
        (["--exp", "x", "--dataset", "custom"], "needs --data_root"),
        (["--exp", "x", "--seed", "-1"], "--seed"),
        (["--exp", "x", "--resume", "auto"], "--resume and --init go with --train"),
        (["--exp", "x", "--gpu", "99"], "99"),
        (["--exp", "x", "--device", "toaster"], "device toaster cannot be used"),
        (["--exp", "x"], "VOC2012/list/val.txt"),
        (["--exp", "x", "--train"], "--download pascal"),
        (["--exp", "x", "--dataset", "cityscapes"], "leftImg8bit_trainvaltest.zip"),
        (["--exp", "x", "--wrong"], "--wrong"),
    ],
)
def test_wrong_flags_and_missing_data(cli, flags, message):
    status, _, err = cli(*flags)
    assert status != 0 and message in err and one_line(err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--groups", "3"], "--groups 3"),
        (["--groups", "32"], "--scratch"),
        (["--weight_std"], "--scratch"),
        (["--freeze_bn", "--scratch"], "--freeze_bn"),
        (["--freeze_bn", "--groups", "32"], "--freeze_bn"),
        (["--output_stride", "32", "--aspp_rates", "5"], "--aspp_rates"),
        (["--resume", "none.pth"], "none.pth"),
    ],
)
def test_training_flags_without_meaning(cli, small, tmp_path, flags, message):
    small.remove("--scratch")
    status, _, err = cli("--train", "--exp", "x", *small, *flags)
    assert status != 0 and message in err and one_line(err)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_bad_sample_is_named_in_one_line(cli, small, tmp_path, workers, train):
    for i in range(3):
        Image.new("L", (80, 60), 7).save(tmp_path / f"set/masks/val{i}.png")
    for i in range(6):
        (tmp_path / f"set/images/train{i}.jpg").write_bytes(b"no picture")
    model = deeplab.resnet50(False, 3)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    flags = ["--train"] if train else ["--checkpoint", "x.pth"]
    status, _, err = cli("--exp", "x", *small, "--workers", workers, *flags)
    assert status == 1 and one_line(err)
    assert ("images/train" if train else "label 7, but the classes are 0 to 2") in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "x.pth"),
        (b"this is no checkpoint", "x.pth"),
        ({"state_dict": deeplab.ResNet(deeplab.Bottleneck, (1, 1, 1, 1)).state_dict()}, "DeepLabv3"),
        ([1, 2], "state_dict"),
    ],
)
def test_bad_checkpoint(cli, small, tmp_path, content, message):
    if isinstance(content, bytes):
        (tmp_path / "x.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "x.pth")
    status, _, err = cli("--exp", "x", *small, "--checkpoint", "x.pth")
    assert status == 1 and message in err and one_line(err)


def test_checkpoint_of_other_flags(cli, small, tmp_path):
    model = deeplab.resnet50(False, 3, num_groups=32, weight_std=True)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    status, _, err = cli("--exp", "x", *small, "--checkpoint", "x.pth")
    assert status == 1 and "--groups" in err and one_line(err)
    assert cli("--exp", "x", *small, "--checkpoint", "x.pth", "--groups", 32, "--weight_std")[0] == 0


def test_shapes_brings_defaults_that_flags_override(cli):
    args = main.parse_args(["--exp", "x", "--dataset", "shapes", "--epochs", "3"])
    assert (args.backbone, args.scratch, args.groups, args.epochs) == ("resnet50", True, 32, 3)
    assert args.data_root == "data/shapes"
    args = main.parse_args(["--exp", "x", "--dataset", "shapes", "--groups", "0", "--no-weight_std"])
    assert not args.groups and not args.weight_std
    args = main.parse_args(["--exp", "x"])
    assert (args.backbone, args.dataset, args.epochs, args.batch_size) == ("resnet101", "pascal", 30, 16)
    assert (args.base_lr, args.last_mult, args.crop_size, args.workers) == (0.00025, 1.0, 513, 4)
    assert (args.groups, args.scratch, args.freeze_bn, args.weight_std, args.beta) == (None, *[False] * 4)


def test_readme_names_every_flag(cli):
    """The flags of --help and those of the README's tables are the same."""
    out = cli("--help")[1]
    flags = set(re.findall(r"^  (--\w+)", out, re.MULTILINE))
    tables = set(re.findall(r"^\| `(--\w+)` \|", (MAIN.parent / "README.md").read_text(), re.MULTILINE))
    assert flags == tables

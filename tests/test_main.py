"""The command line as a user has it: train, evaluate, and one line for each thing that is wrong."""

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ASPP,
    NETWORK,
    SHARED,
    SMALL,
    TINY,
    make_list_dataset,
    needs_shared,
    one_line,
    same_weights,
    spoil,
)
from PIL import Image

import datasets
import deeplab
import main
from commands import flags as flags_module
from commands import machine
from commands.flags import make_parser, parse_args
from utils import UserError

MAIN = Path(main.__file__)


def test_train_evaluate_and_the_files_they_write(cli, small, tmp_path):
    status, out, _ = cli("--train", "--exp", "x", "--epochs", 2, "--save_every", 1, *small, *ASPP)
    assert status == 0 and "6 images to train on, 3 to validate, 3 classes" in out
    assert "epoch 2/2, iteration 4/4, loss" in out and "img/s" in out and "left" in out
    assert "epoch 1: saved" in out and "mean IoU" in out
    checkpoint = torch.load(tmp_path / "data/deeplab_tiny_custom_v3_x_epoch2.pth", weights_only=True)
    assert checkpoint["epoch"] == 2 and checkpoint["optimizer"]["param_groups"]
    assert all(key.startswith("module.") for key in checkpoint["state_dict"])
    assert checkpoint["classes"] == ["a", "b", "c"] and checkpoint["flags"]["crop_size"] == 33
    assert sorted(p.name for p in (tmp_path / "data").glob("*.pth")) == [
        f"deeplab_tiny_custom_v3_x_epoch{n}.pth" for n in (1, 2)
    ]

    status, out, _ = cli("--exp", "x", "--epochs", 2, *small)
    assert status == 0
    folder = tmp_path / "data/val/deeplab_tiny_custom_v3_x_epoch2"
    result = json.loads((folder / "metrics.json").read_text())
    printed = {
        line.split(":")[0]: line.split(": ")[1] for line in out.splitlines() if re.match("(Mean )?IoU", line)
    }
    assert list(printed) == ["IoU a", "IoU b", "IoU c", "Mean IoU"]
    assert printed["Mean IoU"] == f"{100 * result['mean_iou']:.2f}"
    assert set(result) == {
        *("mean_iou", "iou", "precision", "recall", "f1", "pixel_accuracy", "mean_accuracy"),
        *("confusion", "checkpoint", "model", "flags", "training", "data"),
    }
    # The pictures hold the predictions that were counted, at the images' own sizes.
    confusion = np.zeros((3, 3), int)
    for i in range(3):
        picture = Image.open(folder / f"val{i}.png")
        truth = np.array(Image.open(tmp_path / f"set/masks/val{i}.png"))
        assert picture.mode == "P" and picture.size == (80, 60)
        np.add.at(confusion, (truth.flatten(), np.array(picture).flatten()), 1)
    assert result["confusion"] == confusion.tolist()


def test_same_seed_same_run_whatever_the_workers(cli, small, tmp_path):
    for exp, seed, workers in (("a", 0, 0), ("b", 0, 2), ("c", 1, 0)):
        flags = [
            "--exp",
            exp,
            "--epochs",
            1,
            *small,
            *ASPP,
            "--color_jitter",
            0.4,
            "--seed",
            seed,
            "--workers",
            workers,
        ]
        assert cli("--train", *flags)[0] == 0
    a, b, c = (tmp_path / f"data/deeplab_tiny_custom_v3_{exp}_epoch1.pth" for exp in "abc")
    assert same_weights(a, b) and not same_weights(a, c)


def test_last_batch_of_one_image(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", train=5)
    small = ["--train", "--exp", "x", "--epochs", 1, "--dataset", "custom", "--data_root", root, *SMALL]
    status, out, _ = cli(*small)
    assert status == 0 and "iteration 1/1," in out and "each epoch leaves out 1 images" in out
    status, out, _ = cli(*small, "--groups", 32, "--weight_std")  # GroupNorm takes it
    assert status == 0 and "iteration 2/2," in out and "leaves out" not in out
    status, _, err = cli(*small, "--batch_size", 1)
    assert status == 1 and "--freeze_bn" in err


def test_validation_on_images_that_are_trained_on_is_told(cli, smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 1]
    assert "are trained on" not in cli(*flags)[1]
    lists = tmp_path / "set/list"
    (lists / "val.txt").write_text((lists / "train.txt").read_text().replace("/images", "/./images", 1))
    status, out, _ = cli(*flags)
    images = len((lists / "train.txt").read_text().splitlines())
    assert status == 0 and f"{images} images to validate are trained on, too, " in out


def test_class_weights(cli, small, tmp_path, monkeypatch):
    """Median frequency balancing, against its definition; weights of 1 change nothing."""
    given = []

    class Noting(main.CrossEntropy):
        def __init__(self, class_weights, *options):
            super().__init__(class_weights, *options)
            given.append(class_weights)

    monkeypatch.setattr(main, "CrossEntropy", Noting)
    flags = ["--train", "--exp", "x", "--epochs", 1, *small, *ASPP]
    status, out, _ = cli(*flags, "--class_weights", "auto")
    masks = [np.array(Image.open(tmp_path / f"set/masks/train{i}.png")) for i in range(6)]
    frequency = []
    for label in range(3):
        having = [mask for mask in masks if (mask == label).any()]
        frequency.append(sum((mask == label).sum() for mask in having) / sum(mask.size for mask in having))
    expected = [np.median(frequency) / share for share in frequency]
    assert given.pop().tolist() == pytest.approx(expected)
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip("abc", expected, strict=True))
    assert status == 0 and f"weights of the classes in the loss: {shown}\n" in out
    assert cli(*flags, "--class_weights", 1, 1, 1, "--exp", "ones")[0] == 0
    assert cli(*flags, "--exp", "none")[0] == 0
    assert [weights if weights is None else weights.tolist() for weights in given] == [[1, 1, 1], None]
    paths = [tmp_path / f"data/deeplab_tiny_custom_v3_{exp}_epoch1.pth" for exp in ("x", "ones", "none")]
    assert same_weights(*paths[1:]) and not same_weights(*paths[:2])
    status, _, err = cli(*flags, "--class_weights", 1, 1)
    assert status == 1 and one_line(err) and "2 numbers for 3 classes: a, b, c" in err

    # Counting all masks shows what a look at some of them, before that, can miss.
    monkeypatch.setattr("commands.check.MASKS_LIMIT", 1)
    for i in range(6):
        Image.fromarray(np.full((60, 80), 255 * (i == 3), np.uint8)).save(
            tmp_path / f"set/masks/train{i}.png"
        )
    status, _, err = cli(*flags, "--class_weights", "auto")
    assert status == 1 and one_line(err) and "hold only 'a' and 255" in err and "write `b = 255`" in err


def test_loss_that_is_not_finite_ends_the_run(cli, small, tmp_path):
    small += ASPP
    assert cli("--train", "--exp", "x", "--epochs", 1, *small)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "data").iterdir()}
    flags = ["--epochs", 40, "--resume", "auto", "--base_lr", "1e9", *small]
    status, _, err = cli("--train", "--exp", "x", *flags)
    assert status == 1 and "the loss is" in err and "--base_lr" in err
    assert {p: p.read_bytes() for p in (tmp_path / "data").iterdir()} == before


def test_short_run_of_bn_evaluates_as_well_as_it_trains(cli, tmp_path):
    """The running statistics are worth something after 20 iterations: the training images are evaluated
    well (82, and 9 where the statistics' momentum does not fit the run)."""
    root = make_list_dataset(tmp_path / "set", train=8, val=2, size=(48, 40))
    shutil.copy(root / "list/train.txt", root / "list/val.txt")
    flags = ["--crop_size", 49, "--batch_size", 8, "--epochs", 20, "--base_lr", 0.02, "--save_every", 20]
    data = ["--dataset", "custom", "--data_root", root, *SMALL, *ASPP]
    status, out, _ = cli("--train", "--exp", "x", *data, *flags)
    assert status == 0 and float(out.split("mean IoU ")[-1]) > 60


def test_poly_lr():
    assert main.poly_lr(0.007, 0, 100) == 0.007
    assert main.poly_lr(0.007, 50, 100) == pytest.approx(0.007 * 0.5**0.9)
    assert 0 < main.poly_lr(0.007, 99, 100) < 0.0002


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
    flags = ["--exp", "cam", "--dataset", "custom", "--data_root", root, *SMALL, *ASPP, "--epochs", 2]
    status, out, _ = cli("--train", *flags)
    assert status == 0 and "4 images to train on, 4 to validate, 11 classes" in out
    status, out, _ = cli(*flags)
    assert status == 0 and "IoU bicyclist:" in out
    photo = next((SHARED / "camvid/images").iterdir())
    checkpoint = "data/deeplab_tiny_custom_v3_cam_epoch2.pth"
    assert cli("--predict", photo, "--checkpoint", checkpoint, "--out", "out")[0] == 0
    assert Image.open(tmp_path / f"out/{photo.stem}_mask.png").size == (480, 360)


def test_name_of_the_longest_experiment(cli, smallest, tmp_path):
    name = "é" * 60
    assert cli("--train", "--exp", name, "--epochs", 1, "--save_every_iters", 1, *smallest)[0] == 0
    assert cli("--exp", name, *smallest[:4])[0] == 0


# Processes whose stdout and stderr are closed, or pipes that nobody reads; of one interpreter, as torch takes
# seconds to import.
LISTENERS = """
import io, os, sys, tiny
for number, kinds in enumerate(("ox", "xx", "|o", "||")):
    if not os.fork():
        for name, fd, kind in zip(("stdout", "stderr"), (1, 2), kinds):
            if kind == "x":
                os.close(fd)
                setattr(sys, name, None)  # as Python starts then
            elif kind == "|":
                reader, writer = os.pipe()
                os.dup2(writer, fd)
                os.close(reader), os.close(writer)
        if kinds == "||":
            sys.stdout = io.TextIOWrapper(open(1, "wb", 0), write_through=True)  # as python -u
        os.mkdir(str(number))
        tiny.run(sys.argv[1:], str(number))
sys.exit(any([os.wait()[1] for _ in range(4)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_training_outlives_its_listeners(smallest, tmp_path):
    flags = map(str, ["--train", "--exp", "x", *smallest, "--epochs", 1, "--log_every", 1])
    environment = {**os.environ, "PYTHONPATH": str(TINY.parent), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", LISTENERS, *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert run.returncode == 0 and b"Traceback" not in run.stderr and b"ignored" not in run.stderr
    for number in range(4):
        assert (tmp_path / f"{number}/data/deeplab_tiny_custom_v3_x_epoch1.pth").exists()
    assert run.stdout.count(b"iteration 2/2") == 1  # of the one whose stdout is open


@pytest.mark.parametrize(
    ("flags", "world", "name"),
    [
        ([], 1, "cuda:0"),
        (["--gpu", "2"], 1, "cuda:2"),
        (["--device", "cuda"], 1, "cuda:0"),
        (["--device", "cuda", "--gpu", "2"], 1, "cuda:2"),
        (["--device", "cuda:1"], 1, "cuda:1"),
        ([], 4, "cuda:3"),
        (["--device", "cuda"], 4, "cuda:3"),
    ],
)
def test_device_on_a_machine_with_gpus(monkeypatch, flags, world, name):
    def refuse(*args, device):
        raise RuntimeError(f"asked for {device}")

    for module in (machine, sys.modules["commands.flags"]):
        monkeypatch.setattr(module, "WORLD", world)
    monkeypatch.setattr(machine, "LOCAL_RANK", world - 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(UserError, match=f"asked for {name}$"):
        args = parse_args(["--exp", "x", *flags])
        machine.pick_device(args.device, args.gpu, args.amp)


def test_device_is_named(cli, monkeypatch):
    """Before the work, with what a torch without CUDA leaves unused."""
    assert cli("--exp", "x")[1].startswith(f"on the CPU, {torch.get_num_threads()} threads")
    exists = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/proc/driver/nvidia" or exists(path))
    for version, hint in ((None, "built without CUDA, for the NVIDIA GPU install another"), ("13.0", "")):
        monkeypatch.setattr(torch.version, "cuda", version)
        line = machine.describe_device(torch.device("cpu"), "none")
        assert hint in line and ("CUDA" in line) == bool(hint)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    named = [machine.describe_device(torch.device("cuda:0"), amp) for amp in ("bf16", "none")]
    assert named == ["cuda:0, NVIDIA H100, bf16", "cuda:0, NVIDIA H100, float32"]


def test_gpus_of_torchrun_cannot_be_picked(monkeypatch, capsys):
    monkeypatch.setattr(sys.modules["commands.flags"], "WORLD", 2)
    for flags in (["--device", "cuda:1"], ["--gpu", "1"]):
        with pytest.raises(SystemExit):
            parse_args(["--exp", "x", *flags])
        assert flags[0] in (err := capsys.readouterr().err) and one_line(err)


TENS = [10, 20, 30, 40, 50, 60]


@pytest.mark.parametrize(
    ("flags", "logged", "saved", "validated"),
    [  # in two epochs of 30 iterations
        ([], TENS, [60], [60]),
        (["--log_every", 23], [23, 30, 46, 60], [60], [60]),
        (["--save_every", 1], TENS, [30, 60], [30, 60]),
        (["--save_every", 1, "--save_every_iters", 30], TENS, [30, 60], [30, 60]),
        (["--save_every_iters", 15], sorted([*TENS, 15, 45]), [15, 30, 45, 60], [60]),
        (["--save_every_iters", 25], sorted([*TENS, 25]), [25, 50, 60], [60]),
        (["--save_every_iters", 20], TENS, [20, 40, 60], [60]),
    ],
)
def test_what_is_logged_saved_and_validated(cli, tmp_path, monkeypatch, flags, logged, saved, validated):
    """And the learning rates: the poly schedule, in ASPP times --last_mult."""
    rates, saves, validations = [], [], []

    def step(net, optimizer, *args):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return torch.tensor(float(len(rates)))

    def validate(args, model, dataset, device, hint):
        validations.append(len(rates))
        return 0.5, None

    monkeypatch.setattr(main, "train_step", step)
    monkeypatch.setattr(main, "validate", validate)
    monkeypatch.setattr(main.Training, "save", lambda self, path: saves.append((self.iteration, path)))
    root = make_list_dataset(tmp_path / "set")
    (root / "list/train.txt").write_text((root / "list/train.txt").read_text() * 10)
    data = ["--dataset", "custom", "--data_root", root, *SMALL, *NETWORK, "--batch_size", 2]
    status, _, _ = cli(
        "--train", "--exp", "x", *data, "--epochs", 2, "--base_lr", 0.1, "--last_mult", 10, *flags
    )
    assert status == 0 and validations == validated and [iteration for iteration, _ in saves] == saved
    for iteration, path in saves:
        epoch, within = divmod(iteration, 30)
        end = "" if iteration in validated else f"_iter{iteration}"
        assert path == f"data/deeplab_tiny_custom_v3_x_epoch{epoch}{end}.pth" and (end or not within)
    with open(tmp_path / "data/deeplab_tiny_custom_v3_x.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["iteration"]) for row in rows] == logged
    assert [row["val_mean_iou"] for row in rows] == ["0.5" if i in validated else "" for i in logged]
    # A row's loss is the mean since the row before; its rate is that of the iteration.
    for before, row in zip([0, *logged], rows, strict=False):
        assert float(row["loss"]) == pytest.approx((before + 1 + int(row["iteration"])) / 2)
        assert float(row["lr"]) == rates[int(row["iteration"]) - 1][0]
    expected = [0.1 * (1 - i / 60) ** 0.9 for i in range(60)]
    assert [rate[0] for rate in rates] == pytest.approx(expected)
    assert [rate[1] for rate in rates] == pytest.approx([10 * rate for rate in expected])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--exp NAME is needed"),
        (["--exp", "a/b"], "--exp 'a/b'"),
        (["--exp", "x", "--epochs", "0"], "--epochs"),
        (["--exp", "x", "--dataset", "imagenet"], "--dataset"),
        (["--exp", "x", "--dataset", "custom"], "needs --data_root"),
        (["--exp", "x", "--seed", "-1"], "--seed"),
        (["--exp", "x", "--seed", str(2**64)], "--seed"),
        (["--train", "--exp", ""], "--exp is empty"),
        (["--train", "--exp", "x", "--resume", ""], "--resume is empty: give it a value, or leave it out"),
        (["--train", "--exp", "x", "--dataset", "custom", "--data_root", ""], "--data_root is empty"),
        (["--predict", "x.jpg", "", "--checkpoint", "x.pth"], "--predict is empty"),
        (["--predict", "x.jpg", "--checkpoint", "x.pth", "--out", ""], "--out is empty"),
        (["--exp", "x" * 225], "use at most 120 letters"),
        (["--exp", "x\ny"], "leave out slashes and line ends"),
        (["--train", "--exp", "x", "--split", "train"], "--split is for evaluation"),
        (["--exp", "x", "--resume", "auto"], "--resume and --init go with --train"),
        (["--exp", "x", "--gpu", "99"], "99"),
        (["--exp", "x", "--device", "toaster"], "device toaster cannot be used"),
        (["--exp", "x", "--device", "meta"], "device meta cannot be used: choose cuda, cuda:1, mps or cpu"),
        (["--exp", "x", "--device", "cuda:99"], "device cuda:99 cannot be used (there are"),
        (["--exp", "x", "--device", "cpu", "--gpu", "0"], "leave one of them out"),
        (["--predict", "x.jpg", "--checkpoint", "x.pth", "--compile"], "--compile is for training"),
        (["--exp", "x"], "there is no data/deeplab_*_pascal_v3_x_epoch*.pth"),
        (["--exp", "x", "--backbone", "resnet50", "--epochs", "7"], "resnet50_pascal_v3_x_epoch7.pth"),
        (["--exp", "x", "--train"], "VOC2012/list/train_aug.txt (No such file or directory)"),
        (["--exp", "x", "--train", "--dataset", "cityscapes"], "leftImg8bit_trainvaltest.zip"),
        (["--exp", "x", "--train", "--checkpoint", "x.pth"], "--checkpoint"),
        (["--exp", "x", "--train", "--predict", "x.jpg"], "not allowed with argument"),
        (["--train", "--download", "resnet101"], "not allowed with argument"),
        (["--exp", "x", "--wrong"], "--wrong (all flags: python main.py --help)"),
        (["--exp", "x", "--batch-size", "2"], "--batch-size 2 (did you mean --batch_size?)"),
        (["--exp", "x", "--trian"], "--trian (did you mean --train?)"),
        (["--exp", "x", "--lr", "0.1"], "did you mean --base_lr?"),
        (["--train", "--exp", "x", "--class_weights", "1", "-1"], "--class_weights"),
        (["--train", "--exp", "x", "--class_weights", "1", "auto"], "--class_weights"),
        (["--train", "--check"], "not allowed with argument"),
        (["--check", "--dataset", "custom"], "needs --data_root"),
        (["--exp", "x", "--scales", "1", "0"], "--scales"),
        (["--export", "x.onnx"], "--export needs --checkpoint"),
        (["--export", "x.onnx", "--checkpoint", "x.pth", "--flip"], "leave out --scales and --flip"),
        (["--export", "x.onnx", "--checkpoint", "x.pth", "--amp", "bf16"], "leave out --device, --amp and"),
        (["--predict", "x.jpg", "--checkpoint", "x.pth", "--plots"], "--plots draws a training run"),
        (["--exp", "x", "--checkpoint", "x.pth", "--epochs", "3"], "--epochs picks one of --exp"),
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


def test_evaluation_asks_the_checkpoint_what_it_is(cli, smallest, tmp_path):
    """No flag of the model is needed, nor the number of epochs; given and different, they are an error."""
    data = smallest[:4]
    model = deeplab.build("tiny", False, 3, 32, True, aspp_rates=[6], image_pooling=False)
    about = {"model": model.config, "classes": list("abc"), "palette": [(0, 0, 0)] * 3}
    (tmp_path / "data").mkdir()
    for epoch in (1, 2):
        path = tmp_path / f"data/deeplab_tiny_custom_v3_x_epoch{epoch}.pth"
        torch.save({"epoch": epoch, "state_dict": model.state_dict(), **about}, path)
    for flags, epoch in (([], 2), (["--epochs", 1], 1), (smallest[4:], 2)):
        status, out, _ = cli("--exp", "x", *data, *flags)
        assert status == 0 and f"custom_v3_x_epoch{epoch}\n" in out
    result = json.loads((tmp_path / "data/val/deeplab_tiny_custom_v3_x_epoch2/metrics.json").read_text())
    assert (result["model"]["num_groups"], result["model"]["aspp_rates"]) == (32, [6])
    for flags in (["--groups", 0], ["--aspp_rates", 6, 12], ["--no-weight_std"], ["--beta"]):
        status, _, err = cli("--exp", "x", *data, *flags)
        name = flags[0].replace("no-", "")
        assert status == 1 and one_line(err) and f"was trained with other flags: {name} (checkpoint" in err
    status, _, err = cli("--exp", "x", *data, "--epochs", 3)
    assert status == 1 and one_line(err) and "there is no data/deeplab_*_custom_v3_x_epoch3.pth" in err

    # On two backbones the experiment has two newest checkpoints.
    shutil.copy(path, str(path).replace("tiny", "resnet152"))
    status, _, err = cli("--exp", "x", *data)
    assert status == 1 and one_line(err) and "choose one by --backbone" in err
    assert all(f"data/deeplab_{name}_custom_v3_x_epoch2.pth" in err for name in ("tiny", "resnet152"))
    assert cli("--exp", "x", *data, "--backbone", "tiny")[0] == 0


def test_experiment_of_another_data_set(cli, smallest, tmp_path):
    """Without --dataset it is not found, but named."""
    (tmp_path / "data").mkdir()
    spoil("none", tmp_path / "data/deeplab_tiny_custom_v3_car_epoch1.pth")
    status, _, err = cli("--exp", "car")
    assert status == 1 and one_line(err)
    assert "there is data/deeplab_tiny_custom_v3_car_epoch1.pth: add its --dataset" in err
    shutil.move(
        "data/deeplab_tiny_custom_v3_car_epoch1.pth", "data/deeplab_tiny_custom_v3_car_epoch3_epoch1.pth"
    )
    assert "train it by --train" in cli("--exp", "car")[2]  # that is car_epoch3


def test_data_set_of_other_classes(cli, smallest, tmp_path):
    model = deeplab.build("tiny", False, 3, 32, True, aspp_rates=[6], image_pooling=False)
    about = {"model": model.config, "classes": list("abc"), "palette": [(0, 0, 0)] * 3}
    torch.save({"epoch": 1, "state_dict": model.state_dict(), **about}, tmp_path / "x.pth")
    for classes, message in (("abcd", "3 classes, but --dataset custom has 4"), ("abd", "other names")):
        (tmp_path / "set/classes.txt").write_text("\n".join(classes))
        status, out, err = cli("--checkpoint", "x.pth", *smallest)
        assert message in out + err and status == (len(classes) == 4)


def test_classes_in_another_order(cli, smallest, tmp_path):
    """Each would be taken for another: to resume the run, or to evaluate it, would mean nothing."""
    names, flags = tmp_path / "set/classes.txt", ["--exp", "x", *smallest]
    assert cli("--train", *flags, "--epochs", 1)[0] == 0
    path = "data/deeplab_tiny_custom_v3_x_epoch1.pth"
    starts = [["--train", "--resume", "auto", "--epochs", 1], ["--train", "--init", path, "--epochs", 1]]
    names.write_text("c = 2\na = 0\nb = 1\n")
    for command in (["--checkpoint", path], *starts):
        status, _, err = cli("--exp", "y" if "--init" in command else "x", *smallest, *command)
        assert status == 1 and one_line(err) and f"{path} was trained with the classes in another" in err
    names.write_text("a\nc\nsky\n")  # c is where b was
    for command in (["--checkpoint", path], starts[0]):
        status, _, err = cli(*flags, *command)
        assert status == 1 and one_line(err) and "in another order: a, b, c" in err
    status, out, _ = cli(*flags[:1], "y", *flags[2:], *starts[1])
    assert status == 0 and f"starts from {path} without aspp.conv3.weight and aspp.conv3.bias" in out
    names.write_text("a\nb\nsky\n")
    for command in (["--checkpoint", path], *starts):
        status, out, _ = cli("--exp", "z" if "--init" in command else "x", *smallest, *command)
        assert status == 0 and "other names of the classes: a, b, c" in out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_training_validates_without_compiling_anew(cli, smallest, monkeypatch):
    evaluate, graphs = main.evaluate, []

    def counting(*args, **options):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return evaluate(*args, **options)

    monkeypatch.setattr(main, "evaluate", counting)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = ["--train", "--exp", "x", "--epochs", 4, "--save_every", 1, "--batch_size", 6, "--compile"]
    status, _, err = cli(*flags, *smallest)
    assert status == 0 and "recompil" not in err and len(graphs) == 4
    assert graphs[0] > 0 and len({*graphs, torch._dynamo.utils.counters["stats"]["unique_graphs"]}) == 1


@pytest.mark.parametrize("train", [True, False])
def test_bad_sample_is_named_in_one_line(cli, small, tmp_path, train):
    for i in range(3):
        Image.new("L", (80, 60), 7).save(tmp_path / f"set/masks/val{i}.png")
    for i in range(6):
        (tmp_path / f"set/images/train{i}.jpg").write_bytes(b"no picture")
    torch.save(deeplab.build("tiny", False, 3).state_dict(), tmp_path / "x.pth")
    flags = ["--train"] if train else ["--checkpoint", "x.pth"]
    status, _, err = cli("--exp", "x", *small, *flags)
    assert status == 1 and one_line(err)
    assert ("images/train" if train else "val0.png: value 7 at x 0, y 0") in err


@pytest.mark.parametrize(
    ("command", "flags", "named"),
    [
        ("train", ["--train", "--exp", "x"], ["--batch_size 4", "--crop_size 33", "--accum 1"]),
        ("run_evaluation", ["--exp", "x"], ["--eval_batch_size", "--scales"]),
        ("run_prediction", ["--predict", "x.jpg", "--checkpoint", "x.pth"], ["--max_side", "--scales"]),
    ],
)
def test_out_of_memory_says_what_to_lower(cli, smallest, monkeypatch, command, flags, named):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(main, command, full)
    status, _, err = cli(*flags, *smallest)
    assert status == 1 and one_line(err) and all(flag in err for flag in named)


NO_SHM = "mkdir dev; mount -t tmpfs none dev; for f in null zero urandom; do touch dev/$f; "
NO_SHM += "mount --bind /dev/$f dev/$f; done; mount --move dev /dev"


@pytest.mark.parametrize(
    ("mount", "hints"),
    [
        ("mount -t tmpfs -o size=1m none /dev/shm", ["--workers", "--shm-size"]),
        (NO_SHM, ["processes that load images cannot be started", "--workers 0"]),
    ],
)
def test_too_little_shared_memory(tmp_path, mount, hints):
    """In a mount namespace of its own, whose /dev/shm is smaller than a batch, or not there."""
    root = make_list_dataset(tmp_path / "set")
    command = [sys.executable, TINY, "--train", "--exp", "x", "--dataset", "custom", "--data_root", root]
    command += [*SMALL, *NETWORK, "--workers", 2, "--crop_size", 321]
    words = " ".join(f"'{word}'" for word in command)
    script = f"({mount}) || exit 77; exec {words}"
    try:
        run = subprocess.run(
            ["unshare", "--mount", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if run.returncode == 77 or "unshare failed" in run.stderr:
        pytest.skip("this user cannot mount")
    lines = [line for line in run.stderr.splitlines() if "main.py: error: " in line]
    assert run.returncode == 1 and len(lines) == 1 and all(hint in lines[0] for hint in hints)
    assert "Traceback" not in run.stderr


def test_defaults_of_the_data_sets(cli):
    args = parse_args(["--train", "--exp", "x", "--dataset", "shapes", "--epochs", "3"])
    assert (args.backbone, args.scratch, args.groups, args.epochs) == ("resnet50", True, 32, 3)
    assert args.data_root == "data/shapes"
    args = parse_args(["--train", "--exp", "x", "--dataset", "shapes", "--groups", "0", "--no-weight_std"])
    assert not args.groups and not args.weight_std
    args = parse_args(["--train", "--exp", "x"])
    assert (args.backbone, args.dataset, args.epochs, args.batch_size) == ("resnet101", "pascal", 30, 16)
    assert (args.base_lr, args.last_mult, args.crop_size) == (0.00025, 1.0, 513) and 1 <= args.workers <= 4
    assert (args.groups, args.scratch, args.freeze_bn, args.weight_std, args.beta) == (None, *[False] * 4)
    custom = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", "d", "--batch_size", "8"]
    assert [parse_args(custom + more).base_lr for more in ([], ["--base_lr", "0.1"])] == [0.0035, 0.1]


def test_readme_has_every_flag_with_its_default_and_meaning():
    rows = []
    for action in make_parser()._actions[1:]:
        default = "" if action.default in (None, False) else action.default
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        meaning = action.help.removesuffix(" (default: %(default)s)")  # Python 3.10 adds it
        rows.append(f"| `{action.option_strings[0]}` | {default} | {meaning} |")
    text = (MAIN.parent / "README.md").read_text()
    tables = re.findall(r"(?<=\| Flag \| Default \| Meaning \|\n\|---\|---\|---\|\n)(?:\|.*\n)+", text)
    assert "".join(tables).splitlines() == rows


# What `python main.py FLAGS` does for commands that need no torch, and which modules that has imported.
LIGHT_COMMANDS = """
import runpy, sys
path = sys.argv[1]
for flags in (["--help"], ["--wrong"], ["--exp", "x", "--scales", "0"], ["--download", "gn_ws_imagenet"]):
    sys.argv = ["main.py", *flags]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        print("status", stop.code, flush=True)
print("imported", {"torch", "torchvision", "numpy", "PIL", "matplotlib"} & set(sys.modules))
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought -P")
def test_folder_of_the_script_need_not_be_on_the_path(tmp_path):
    command = [sys.executable, "-P", Path(main.__file__), "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("usage: main.py")


def test_commands_that_need_no_torch_do_not_import_it(tmp_path):
    """It takes seconds."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/R-101-GN-WS.pth.tar").touch()
    command = [sys.executable, "-c", LIGHT_COMMANDS, MAIN]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert re.findall(r"^(?:status|imported) .*", run.stdout, re.MULTILINE) == [
        *("status 0", "status 2", "status 2", "status 0", "imported set()")
    ]
    assert "--aspp_rates" in run.stdout and "R-101-GN-WS.pth.tar is there already" in run.stdout
    assert run.stderr.count("main.py: error: ") == run.stderr.count("\n") == 2


def imports(nodes: list[ast.AST]) -> set[str]:
    """The modules that are imported in these nodes of a syntax tree, and the names that are taken of them."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_go_one_way():
    """main > commands > datasets, deeplab > files > utils, and nowhere in a circle."""
    floor = {"main": 4, "commands": 3, "datasets": 2, "deeplab": 2, "files": 1, "utils": 0}
    folder = MAIN.parent
    paths = [path for name in ("*.py", "commands/*.py", "files/*.py") for path in folder.glob(name)]
    paths = [path for path in paths if path.name != "setup.py"]
    trees = {".".join(p.relative_to(folder).with_suffix("").parts): ast.parse(p.read_text()) for p in paths}
    uses = {name: imports(ast.walk(tree)) for name, tree in trees.items()}
    top = {name: name.partition(".")[0] for name in trees}
    assert set(top.values()) == floor.keys()
    for name, used in uses.items():
        for other in used & trees.keys():
            assert top[other] == top[name] or floor[top[other]] < floor[top[name]], f"{name} imports {other}"
    left = set(trees)
    while ready := {name for name in left if not uses[name] & left}:
        left -= ready
    assert not left, f"{left} import each other"

    assert uses["commands.flags"] & trees.keys() == {"commands.download", "utils"}
    light = {"commands.flags", "commands.download", "files.lists", "files.whole", "utils"}
    for name in light:
        used = imports(trees[name].body)  # when it is imported
        assert not {"torch", "torchvision", "numpy", "PIL"} & used and used & trees.keys() <= light, name

    # The parsed flags stay in two modules.
    for name, tree in trees.items():
        parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation}
        allowed = name in ("main", "commands.flags")
        assert ("argparse" in uses[name]) == allowed and ("args" in parameters) <= allowed, name


def test_flags_name_what_there_is():
    """They stand in commands/flags.py by themselves, as it imports no torch."""
    assert list(flags_module.BACKBONES) == list(deeplab.BACKBONES)
    assert list(flags_module.DATA_ROOTS) == list(datasets.DATASETS)

"""Several processes, parts of a batch, number formats: what they change, and what they must not."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, TINY, children, make_list_dataset, same_weights, torchrun, wait_for
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import deeplab
import main
from commands.flags import parse_args
from utils import UserError

FLAGS = ["--groups", 32, "--weight_std", "--aspp_rates", 6, "--no_image_pooling"]


def steps(accum: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The weights after three steps on batches of 5, the last with few labelled pixels and with weighted
    classes, in float64."""
    torch.manual_seed(0)
    model = nn.Module()
    model.trunk, model.norm, model.aspp = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1)
    model.forward = lambda x: model.aspp(model.norm(model.trunk(x)))
    model.double().train().to(device)
    net = DistributedDataParallel(model) if main.WORLD > 1 else model
    optimizer, scaler = main.make_optimizer(model), torch.amp.GradScaler(enabled=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    images, masks = torch.randn(3, 5, 3, 9, 9).double(), torch.randint(0, 5, (3, 5, 7, 7)).byte()
    masks[2, 1:] = 255
    masks[1, 0, :5] = 255
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1], dtype=torch.float64, device=device)
    for x, y, w in zip(images, masks, (None, None, weights), strict=True):
        x, y = (tensor[main.RANK :: main.WORLD].to(device) for tensor in (x, y))
        loss = main.train_step(net, optimizer, scaler, x, y, accum=accum, weights=w)
        if main.WORLD > 1:
            dist.all_reduce(loss)
    return {key: tensor.cpu() for key, tensor in {**model.state_dict(), "loss": loss}.items()}


def test_step_in_parts_or_in_processes_is_the_step_of_the_whole_batch(tmp_path):
    whole = steps()
    for accum in (2, 4, 9):
        for key, tensor in steps(accum).items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-10, atol=1e-12)
    assert torchrun(tmp_path, Path(__file__), tmp_path / "two.pth").wait() == 0
    for key, tensor in torch.load(tmp_path / "two.pth").items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-10, atol=1e-12)


def test_two_processes_train_and_evaluate(cli, tmp_path, monkeypatch):
    root = make_list_dataset(tmp_path / "set", val=5)
    flags = ["--dataset", "custom", "--data_root", root, *SMALL, *FLAGS, "--eval_batch_size", 2]
    assert torchrun(tmp_path, TINY, "--train", "--exp", "x", "--epochs", 2, *flags).wait() == 0
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert main.__file__ not in err  # no warning of torch about a call
    assert out.count("6 images to train on") == out.count("iteration 4/4") == out.count("saved") == 1
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "deeplab_resnet50_custom_v3_x.csv",
        "deeplab_resnet50_custom_v3_x_epoch2.pth",
    ]

    assert torchrun(tmp_path, TINY, "--exp", "x", "--epochs", 2, *flags).wait() == 0
    assert (tmp_path / "out").read_text().count("Mean IoU:") == 1
    folder = tmp_path / "data/val/deeplab_resnet50_custom_v3_x_epoch2"
    two = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    assert cli("--exp", "x", "--epochs", 2, *flags)[0] == 0
    one = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = {"samples.png", "worst.png", "per_image.csv", "metrics.json"}
    assert {f"val{i}.png" for i in range(5)} | others == set(one)
    two, one = (json.loads(files.pop("metrics.json"))["confusion"] for files in (two, one)), (two, one)
    counts_of_two, counts_of_one = two
    assert counts_of_two == counts_of_one and one[0] == one[1]


def test_processes_that_cannot_find_each_other(smallest, tmp_path):
    """Some clusters set WORLD_SIZE for every job."""
    command = [sys.executable, TINY, "--train", "--exp", "x", "--epochs", 1, *smallest]
    run = partial(subprocess.run, list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    result = run(env={**os.environ, "WORLD_SIZE": "2", "RANK": ""})
    assert result.returncode == 1 and "unset WORLD_SIZE" in result.stderr and "Traceback" not in result.stderr
    assert run(env={**os.environ, "WORLD_SIZE": "", "RANK": ""}).returncode == 0


def test_two_processes_draw_shapes_in_an_empty_folder(tmp_path):
    """One of them wins, and the defaults of shapes are told once."""
    flags = ["--train", "--exp", "x", "--dataset", "shapes", "--epochs", 1, "--batch_size", 120, *FLAGS]
    assert torchrun(tmp_path, TINY, *flags, "--crop_size", 17, "--workers", 0).wait() == 0
    assert (tmp_path / "out").read_text().count("240 images to train on, 60 to validate, 5 classes") == 1
    assert sorted(path.name for path in (tmp_path / "data").iterdir() if path.is_dir()) == ["shapes"]


@pytest.mark.parametrize(
    ("flags", "device", "smallest", "message"),
    [
        (["--groups", "32"], "cpu", 2, "a batch needs an image for each process"),
        (["--freeze_bn", "--accum", "3"], "cpu", 2, "a batch needs an image for each process"),
        ([], "cpu", 4, "BatchNorm cannot train on batches of one image"),
        ([], "cuda", 2, "a batch needs an image for each process"),
        (["--accum", "3"], "cpu", 12, "BatchNorm cannot train on batches of one image"),
        (["--accum", "3"], "cuda", 6, "BatchNorm cannot train on batches of one image"),
    ],
)
def test_smallest_batch_of_two_processes(monkeypatch, flags, device, smallest, message):
    """An image for each process and part; two where BatchNorm has only its own process' images."""
    monkeypatch.setattr(main, "WORLD", 2)
    args = parse_args(["--train", "--exp", "x", "--batch_size", str(smallest), *flags])
    assert main.make_batches(args, torch.device(device), 2 * smallest).per_epoch == 2
    args.batch_size += 1  # the last batch is kept if it is not smaller than that
    assert main.make_batches(args, torch.device(device), 2 * smallest).per_epoch == 1
    assert main.make_batches(args, torch.device(device), 2 * smallest + 1).per_epoch == 2
    for size, length in ((smallest - 1, 100), (smallest, smallest - 1)):
        args.batch_size = size
        with pytest.raises(UserError, match=message):
            main.make_batches(args, torch.device(device), length)


def test_process_that_dies_ends_the_run_with_a_message(tmp_path):
    root = make_list_dataset(tmp_path / "set")
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *FLAGS]
    run = torchrun(tmp_path, TINY, *flags, "--epochs", 10_000, "--log_every", 1)
    wait_for(tmp_path / "out", run)
    os.kill(children(run)[1], signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    err = (tmp_path / "err").read_text()
    assert "main.py: rank 0: error: another process has ended" in err and "Signal 9 (SIGKILL)" in err


def test_class_weights_are_counted_by_all(cli, tmp_path, monkeypatch):
    root = make_list_dataset(tmp_path / "set", train=7)
    flags = ["--dataset", "custom", "--data_root", root, *SMALL, *FLAGS, "--class_weights", "auto"]
    flags = ["--train", "--exp", "x", "--epochs", 1, *flags]
    assert torchrun(tmp_path, TINY, *flags).wait() == 0
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    said = [line for line in cli(*flags)[1].splitlines() if line.startswith("weights of the classes")]
    assert said and said[0] in (tmp_path / "out").read_text()


def test_validation_during_training_has_the_statistics_that_are_saved(cli, tmp_path, monkeypatch):
    """Without SyncBatchNorm each process has its own; those of the first are validated and saved."""
    root = make_list_dataset(tmp_path / "set", train=8, val=5)
    flags = ["--dataset", "custom", "--data_root", root, *SMALL, "--batch_size", 8]
    train = ["--train", "--exp", "x", "--epochs", 3, "--base_lr", 0.02, "--aspp_rates", 6]
    assert torchrun(tmp_path, TINY, *train, *flags).wait() == 0
    said = (tmp_path / "out").read_text().split("epoch3.pth, mean IoU ")[1].split()[0]
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    assert f"Mean IoU: {said}\n" in cli("--exp", "x", *flags[:4])[1]


def test_processes_that_would_not_start_alike(tmp_path):
    """Two machines, one of which lacks the newest checkpoint."""
    root = make_list_dataset(tmp_path / "set")
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *FLAGS]
    flags += ["--save_every", 1]
    for machine, epochs in (("0", 2), ("1", 1)):
        (tmp_path / machine).mkdir()
        command = [sys.executable, TINY, *flags, "--epochs", epochs]
        assert subprocess.run([str(word) for word in command], cwd=tmp_path / machine).returncode == 0
    run = torchrun(tmp_path, Path(__file__), "machines", *flags, "--epochs", 3, "--resume", "auto")
    assert run.wait(timeout=60) != 0
    err = (tmp_path / "err").read_text()
    assert "main.py: rank 0: error: the processes do not start alike (iteration: 4, 2): each machine" in err
    assert err.count("main.py: rank") == 2 and 'main.py", line' not in err


@pytest.mark.parametrize("to_all", [True, False])
def test_stopped_processes_leave_a_checkpoint_to_go_on_from(tmp_path, to_all):
    """After the iteration, though the next look at the loss is far; a signal to one process stops both."""
    root = make_list_dataset(tmp_path / "set", train=12)
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *FLAGS]
    flags += ["--batch_size", 2, "--log_every", 10_000]
    run = torchrun(tmp_path, TINY, *flags, "--epochs", 10_000)
    wait_for(tmp_path / "out", run)
    if to_all:
        run.send_signal(signal.SIGTERM)
    else:
        os.kill(children(run)[1], signal.SIGTERM)
    assert run.wait(timeout=60) != 0
    (checkpoint,) = (tmp_path / "data").glob("*_iter*.pth")
    assert f"stopped by SIGTERM; data/{checkpoint.name} is saved" in (tmp_path / "err").read_text()
    assert torch.load(checkpoint, weights_only=True)["iteration"] > 0


def test_bf16_and_accumulation_train(cli, small, tmp_path):
    for exp, more in (("a", []), ("b", ["--amp", "none"]), ("c", ["--amp", "bf16"]), ("d", ["--accum", 2])):
        status, out, err = cli("--train", "--exp", exp, "--epochs", 1, *small, *FLAGS, *more)
        assert (status, err) == (0, "") and "saved" in out
    a, b, c, d = (tmp_path / f"data/deeplab_resnet50_custom_v3_{exp}_epoch1.pth" for exp in "abcd")
    assert same_weights(a, b) and not same_weights(a, c)
    assert all(tensor.dtype != torch.bfloat16 for tensor in torch.load(c)["state_dict"].values())
    assert cli("--exp", "c", "--epochs", 1, *small, *FLAGS, "--amp", "bf16")[0] == 0
    status, _, err = cli("--train", "--exp", "x", *small, "--amp", "fp16")
    assert status == 1 and "--amp fp16 needs a CUDA device" in err


if __name__ == "__main__" and sys.argv[1] == "machines":
    import tiny

    tiny.run(sys.argv[2:], folder=str(main.RANK))
elif __name__ == "__main__":
    dist.init_process_group("gloo")
    weights = steps(accum=2)
    if main.RANK == 0:
        torch.save(weights, sys.argv[1])
    dist.destroy_process_group()

"""Several processes, parts of a batch, number formats: what they change, and what they must not."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import NETWORK, SMALL, TINY, make_list_dataset, one_line, same_weights, torchrun, wait_for
from processes import end, narrow, start, start_ranks, wait_until
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import main
from commands.flags import parse_args
from commands.losses import CrossEntropy, WithDice
from utils import UserError

STEM = "data/deeplab_tiny_custom_v3_x_epoch"


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch):
    narrow(monkeypatch.setattr)


def text(path: Path) -> str:
    return path.read_text()


def steps(accum: int = 1, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The weights after four steps of different losses on batches of 5, the last with few labelled pixels,
    in float64."""
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
    hard = WithDice(CrossEntropy(None, 0.3, 0.1), 0.5)
    losses = CrossEntropy(), hard, WithDice(CrossEntropy(weights, 0.6), 2.0), CrossEntropy(weights)
    for x, y, criterion in zip(images[[0, 1, 2, 2]], masks[[0, 1, 2, 2]], losses, strict=True):
        x, y = (tensor[main.RANK :: main.WORLD].to(device) for tensor in (x, y))
        loss = main.train_step(net, optimizer, scaler, criterion, x, y, accum=accum)
        if main.WORLD > 1:
            dist.all_reduce(loss)
    return {key: tensor.cpu() for key, tensor in {**model.state_dict(), "loss": loss}.items()}


def steps_of_two(argv: list[str]) -> None:
    dist.init_process_group("gloo")
    weights = [steps(accum) for accum in (1, 2, 3)]
    if main.RANK == 0:
        torch.save(weights, argv[0])
    dist.destroy_process_group()


def test_step_in_parts_or_in_processes_is_the_step_of_the_whole_batch(tmp_path):
    whole = steps()
    ranks = start_ranks([tmp_path, tmp_path], "two.pth", module="test_parallel", function="steps_of_two")
    of_one = [steps(accum) for accum in (2, 4, 9)]
    assert end(*ranks) == [0, 0]
    for weights in of_one + torch.load(tmp_path / "two.pth"):
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, whole[key], rtol=1e-10, atol=1e-12)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def without_date(page: bytes) -> bytes:
    """The page without its date, and the flags, which tests/tiny.py adds one to."""
    changed, count = re.subn(rb'"date":"[^"]*"|"about":\[.*?\]\]', b"", page)
    assert count == 2
    return changed


def test_two_processes_train_and_evaluate(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", val=5)
    flags = ["--exp", "x", "--epochs", 2, "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK]
    flags += ["--eval_batch_size", 2]
    assert end(*start_ranks([tmp_path, tmp_path], "--train", *flags)) == [0, 0]
    out = text(tmp_path / "out0")
    assert text(tmp_path / "err0") == text(tmp_path / "err1") == text(tmp_path / "out1") == ""  # no warning
    assert out.count("6 images to train on") == out.count("iteration 4/4") == out.count("saved") == 1
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "deeplab_tiny_custom_v3_x.csv",
        "deeplab_tiny_custom_v3_x_epoch2.pth",
    ]

    for tile in ([], ["--tile", 33]):
        assert end(*start_ranks([tmp_path, tmp_path], *flags, *tile)) == [0, 0]
        assert text(tmp_path / "out0").count("Mean IoU:") == 1 and text(tmp_path / "out1") == ""
        (metrics,) = (tmp_path / "data").rglob("metrics.json")
        two = files_below(metrics.parent)
        assert cli(*flags, *tile)[0] == 0
        one = files_below(metrics.parent)
        others = {"samples.png", "report.html", "per_image.csv", "metrics.json"}
        previews = {f"report_files/{i}.{ending}" for i in range(5) for ending in ("jpg", "png")}
        assert {f"val{i}.png" for i in range(5)} | others | previews == set(one)
        one, two = ({**files, "report.html": without_date(files["report.html"])} for files in (one, two))
        counts = [json.loads(files.pop("metrics.json"))["confusion"] for files in (one, two)]
        assert counts[0] == counts[1] and one == two


def test_two_processes_lose_patience_together(tmp_path):
    """At a learning rate of 0 no validation is better than the first. Only the first process has the log."""
    root, folders = make_list_dataset(tmp_path / "set", val=5), [tmp_path, tmp_path / "other"]
    flags = [
        "--train",
        "--exp",
        "x",
        "--epochs",
        5,
        "--dataset",
        "custom",
        "--data_root",
        root,
        *SMALL,
        *NETWORK,
    ]
    flags += ["--base_lr", 0, "--save_every", 1, "--patience", 2, "--top_k", 0.5, "--dice", 1]
    for resume in ([], ["--resume", "auto"]):
        assert end(*start_ranks(folders, *flags, *resume)) == [0, 0]
        assert text(tmp_path / "err0") == text(tmp_path / "other/err1") == ""
        out = text(tmp_path / "out0")
        assert out.count("2 validations were no better than that after epoch 1: training stops") == 1
        (tmp_path / "other/data").mkdir(exist_ok=True)
        for path in (tmp_path / "data").glob("*.pth"):  # the other machine has the checkpoints, too
            shutil.copy(path, tmp_path / "other/data")
    assert sorted(path.name for path in (tmp_path / "data").glob("*.pth")) == [
        f"deeplab_tiny_custom_v3_x_epoch{epoch}.pth" for epoch in (1, 2, 3)
    ]


def test_processes_that_cannot_find_each_other(smallest, tmp_path):
    """Some clusters set WORLD_SIZE for every job."""
    flags = ["--train", "--exp", "x", "--epochs", 1, *smallest]
    assert end(start(tmp_path, *flags, environment={"WORLD_SIZE": "2", "RANK": ""})) == [1]
    err = text(tmp_path / "err")
    assert err.startswith("main.py: rank 0: error: WORLD_SIZE asks for 2 processes") and err.count("\n") == 1
    assert "start them by torchrun, or unset WORLD_SIZE for a single one" in err
    assert end(start(tmp_path, *flags, environment={"WORLD_SIZE": "", "RANK": ""})) == [0]


def test_two_processes_draw_shapes_in_an_empty_folder(tmp_path):
    """One of them wins, and the defaults of shapes are told once."""
    flags = ["--train", "--exp", "x", "--dataset", "shapes", "--epochs", 1, "--batch_size", 120, *NETWORK]
    flags += ["--backbone", "tiny", "--crop_size", 17, "--workers", 0, "--eval_batch_size", 60]
    assert end(*start_ranks([tmp_path, tmp_path], *flags)) == [0, 0]
    assert text(tmp_path / "out0").count("240 images to train on, 60 to validate, 5 classes") == 1
    assert text(tmp_path / "out1") == ""
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

    def make_batches(length: int):
        return main.make_batches(args, torch.device(device), length, args.groups)

    assert make_batches(2 * smallest).per_epoch == 2
    args.batch_size += 1  # the last batch is kept if it is not smaller than that
    assert make_batches(2 * smallest).per_epoch == 1
    assert make_batches(2 * smallest + 1).per_epoch == 2
    for size, length in ((smallest - 1, 100), (smallest, smallest - 1)):
        args.batch_size = size
        with pytest.raises(UserError, match=message):
            make_batches(length)


def test_process_that_dies_ends_the_run_with_a_message(smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 10_000, "--log_every", 1]
    ranks = start_ranks([tmp_path, tmp_path], *flags)
    assert wait_until(lambda: "iteration 3/" in text(tmp_path / "out0"), ranks[0])
    ranks[1].kill()
    assert end(*ranks) == [1, -signal.SIGKILL]
    err = text(tmp_path / "err0")
    assert err.startswith("main.py: rank 0: error: another process has ended, see there; --resume auto")
    assert err.count("\n") == 1


def test_class_weights_are_counted_by_all(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set", train=7)
    flags = ["--train", "--exp", "x", "--epochs", 1, "--dataset", "custom", "--data_root", root, *SMALL]
    flags += [*NETWORK, "--class_weights", "auto"]
    assert end(*start_ranks([tmp_path, tmp_path], *flags)) == [0, 0]
    lines = [
        [line for line in out.splitlines() if line.startswith("weights of the classes")]
        for out in (cli(*flags)[1], text(tmp_path / "out0"))
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 1


def test_validation_during_training_has_the_statistics_that_are_saved(cli, tmp_path):
    """Without SyncBatchNorm each process has its own; those of the first are validated and saved."""
    root = make_list_dataset(tmp_path / "set", train=8, val=5)
    flags = ["--exp", "x", "--dataset", "custom", "--data_root", root]
    train = ["--train", *SMALL, "--batch_size", 8, "--epochs", 3, "--base_lr", 0.02, "--aspp_rates", 6]
    assert end(*start_ranks([tmp_path, tmp_path], *train, *flags)) == [0, 0]
    out = text(tmp_path / "out0")
    assert "BatchNorm takes statistics in each process by itself" in out
    mean_iou = out.split("epoch3.pth, mean IoU ")[1].split()[0]
    assert f"Mean IoU: {mean_iou}\n" in cli(*flags)[1]


def test_processes_that_would_not_start_alike(smallest, tmp_path):
    """Two machines, one of which lacks the newest checkpoint."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1]
    machines = [tmp_path / "0", tmp_path / "1"]
    alone = [start(folder, *flags, "--epochs", 2) for folder in machines]
    assert end(*alone) == [0, 0]
    (machines[1] / f"{STEM}2.pth").unlink()
    assert end(*start_ranks(machines, *flags, "--epochs", 3, "--resume", "auto")) == [1, 1]
    errors = [text(folder / f"err{rank}") for rank, folder in enumerate(machines)]
    for rank, err in enumerate(errors):
        expected = f"main.py: rank {rank}: error: the processes do not start alike (iteration: 4, 2): each m"
        assert err.startswith(expected) and err.count("\n") == 1


def test_signal_to_one_process_stops_both(tmp_path):
    """After the iteration, though the next look at the loss is far."""
    root = make_list_dataset(tmp_path / "set", train=12)
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK]
    flags += ["--batch_size", 2, "--log_every", 10_000, "--epochs", 10_000]
    ranks = start_ranks([tmp_path, tmp_path], *flags)
    assert wait_until(lambda: "iteration 6/" in text(tmp_path / "out0"), ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert end(*ranks) == [143, 143]
    (checkpoint,) = (tmp_path / "data").glob("*.pth")
    assert f"stopped by SIGTERM; data/{checkpoint.name} is saved" in text(tmp_path / "err0")
    assert torch.load(checkpoint, weights_only=True)["iteration"] >= 6 and text(tmp_path / "err1") == ""


@pytest.mark.slow
def test_torchrun_passes_on_a_signal(tmp_path):
    """The command of the README, and the signal of a cluster."""
    root = make_list_dataset(tmp_path / "set")
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK]
    run = torchrun(tmp_path, TINY, *flags, "--epochs", 10_000)
    wait_for(tmp_path / "out", run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=120) != 0
    (checkpoint,) = (tmp_path / "data").glob("*.pth")
    assert f"stopped by SIGTERM; data/{checkpoint.name} is saved" in text(tmp_path / "err")


def test_bf16_and_accumulation_train(cli, smallest):
    paths = {}
    for exp, more in (("a", []), ("b", ["--amp", "none"]), ("c", ["--amp", "bf16"]), ("d", ["--accum", 2])):
        status, out, err = cli("--train", "--exp", exp, "--epochs", 1, *smallest, *more)
        assert (status, err) == (0, "") and "saved" in out
        paths[exp] = f"data/deeplab_tiny_custom_v3_{exp}_epoch1.pth"
    assert same_weights(paths["a"], paths["b"]) and not same_weights(paths["a"], paths["c"])
    a, c, d = (torch.load(paths[exp])["state_dict"] for exp in "acd")
    assert all(tensor.dtype == torch.float32 for tensor in c.values())
    for key in a:
        torch.testing.assert_close(a[key], d[key], rtol=1e-3, atol=1e-4)
    assert cli("--exp", "c", "--epochs", 1, *smallest, "--amp", "bf16")[0] == 0
    status, _, err = cli("--train", "--exp", "x", *smallest, "--amp", "fp16")
    assert status == 1 and one_line(err) and "--amp fp16 needs a CUDA device" in err

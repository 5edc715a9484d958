"""Nothing lost: kills, signals, full disks, two runs at once. Nothing let in: strangers' files. And load."""

import csv
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import SMALL, TINY, make_list_dataset, one_line, same_weights
from PIL import Image

import deeplab
import main
from datasets import SegmentationDataset, TrainBatches, open_image
from utils import RunLog, UserError, checkpoint_path, voc_palette

fcntl, resource = pytest.importorskip("fcntl"), pytest.importorskip("resource")  # not on Windows
NETWORK = ["--groups", 32, "--weight_std", "--aspp_rates", 6, "--no_image_pooling"]  # the smallest there is
STEM = "data/deeplab_resnet50_custom_v3_x_epoch"
servers = multiprocessing.get_context("forkserver")  # a process starts without importing torch again
servers.set_forkserver_preload(["tiny"])


@pytest.fixture
def small(small):
    return [*small, *NETWORK]


def start(folder: Path, *flags: object) -> multiprocessing.Process:
    """A real process of main.py, with its one working directory."""
    folder.mkdir(exist_ok=True)
    process = servers.Process(target=tiny.run, args=([str(flag) for flag in flags], str(folder)))
    process.start()
    return process


def wait_until(happened, process) -> bool:
    """Whether it happened before the process ended."""
    while not (found := happened()) and process.is_alive():
        time.sleep(0.002)
    return bool(found)


@pytest.mark.slow
def test_killed_at_20_moments_it_ends_at_the_same_weights(small, tmp_path):
    """Every other kill comes while a checkpoint is being written."""
    flags = ["--train", "--exp", "x", *small, "--epochs", 12, "--save_every", 6, "--save_every_iters", 1]
    flags += ["--resume", "auto", "--samples", 0]
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    process = start(whole, *flags)
    process.join()
    assert process.exitcode == 0
    for kill in range(20):
        process = start(killed, *flags)
        if kill % 2:
            assert wait_until(lambda: list(killed.glob("data/*.tmp")), process)
        else:
            process.join(rng.uniform(0.2, 1.5))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path in killed.glob("data/*.pth"):
            assert deeplab.read_checkpoint(str(path))
    process = start(killed, *flags)
    process.join()
    assert process.exitcode == 0
    assert same_weights(whole / f"{STEM}12.pth", killed / f"{STEM}12.pth")
    # Neither unfinished files nor checkpoints within epochs are left, and the log is that of one run.
    names = {path.name for path in (whole / "data").iterdir()}
    assert names == {path.name for path in (killed / "data").iterdir()} and len(names) == 3
    logs = [(folder / "data/x.csv").read_text() for folder in (whole, killed)]
    rows = [list(csv.DictReader(log.splitlines())) for log in logs]
    assert [[row["iteration"] for row in run] for run in rows] == 2 * [[str(i) for i in range(1, 25)]]
    loss = [[(row["lr"], row["val_mean_iou"] or 0) for row in run] for run in rows]
    assert all(b in (a, (a[0], 0)) for a, b in zip(*loss, strict=True))  # a validation can be cut off


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_saves_and_says_how_to_go_on(small, tmp_path, number, status, workers):
    """The signal goes to all processes of the group, as a terminal or a cluster sends it."""
    flags = ["--train", "--exp", "x", *small, "--epochs", 9999, "--workers", workers, "--log_every", 1]
    command = [sys.executable, TINY, *flags]
    run = subprocess.Popen(
        [str(word) for word in command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "iteration 3/" not in run.stdout.readline():
        assert run.poll() is None
    os.killpg(run.pid, number)
    _, err = run.communicate(timeout=60)
    (checkpoint,) = (tmp_path / "data").glob("*.pth")
    assert run.returncode == status
    assert err.strip() == (
        f"main.py: stopped by {number.name}; saved data/{checkpoint.name}: "
        "the same command with --resume auto goes on from there"
    )
    assert torch.load(checkpoint, weights_only=True)["iteration"] >= 3


def test_stopped_and_resumed_it_ends_at_the_same_weights(cli, small, tmp_path, monkeypatch):
    flags = ["--train", "--exp", "x", "--epochs", 3, *small]
    assert cli(*flags)[0] == 0
    (tmp_path / f"{STEM}3.pth").rename(tmp_path / "whole.pth")

    step, steps = main.train_step, []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(main, "train_step", interrupted)
    status, _, err = cli(*flags)
    assert status == 143 and f"saved {STEM}1_iter3.pth" in err and len(steps) == 3
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and f"resumed from {STEM}1_iter3.pth: iteration 3 of 6" in out
    assert same_weights(tmp_path / "whole.pth", tmp_path / f"{STEM}3.pth")
    assert not list(tmp_path.glob("data/*_iter*"))


def test_second_signal_stops_at_once(cli, small, tmp_path, monkeypatch):
    def interrupted_twice(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(main, "train_step", interrupted_twice)
    begin = time.monotonic()
    status, _, err = cli("--train", "--exp", "x", *small)
    assert status == 130 and "stopped by SIGINT; training goes on from the last checkpoint" in err
    assert time.monotonic() - begin < 30 and not list((tmp_path / "data").glob("*.pth"))


def test_stopped_while_it_validates(cli, small, tmp_path, monkeypatch):
    """The checkpoint is there already, so nothing is waited for."""
    monkeypatch.setattr(main, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *small)
    assert status == 143 and "--resume auto" in err and (tmp_path / f"{STEM}1.pth").exists()


def test_full_disk_leaves_the_checkpoint_before(cli, small, tmp_path):
    flags = ["--train", "--exp", "x", *small, "--save_every", 1, "--resume", "auto"]
    assert cli(*flags, "--epochs", 1)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("data/*.pth")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        status, _, err = cli(*flags, "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and one_line(err) and f"cannot write {STEM}2.pth: File too large" in err
    assert {path: path.read_bytes() for path in tmp_path.glob("data/*.pth*")} == before
    assert cli(*flags, "--epochs", 3)[0] == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_while_the_log_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog("x", 0, False)
    log.file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        log.write({"iteration": 1})


def test_log_that_somebody_edited(tmp_path, monkeypatch):
    """What is no row, or cut short, ends what a resumed run keeps."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    header = ",".join(RunLog.columns) + "\r\n"
    for spoilt in ("", "note,\r\n", "\r\n", "1,2", "1,99,0,0,,1\r\n"):
        Path("data/x.csv").write_text(f"{header}1,1,0.1,0.5,0.25,9\r\n{spoilt}", newline="")
        log = RunLog("x", 2, False)
        log.close()
        assert Path("data/x.csv").read_bytes().decode() == f"{header}1,1,0.1,0.5,0.25,9\r\n"
        assert log.best_epoch == 1


def test_keep_leaves_the_newest_and_the_best(cli, small, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.3, 0.1, 0.5, 0.0])
    monkeypatch.setattr(main, "evaluate", lambda *args: {"mean_iou": next(scores), "samples": None})
    flags = ["--train", "--exp", "x", *small, "--save_every", 1, "--resume", "auto", "--keep", 2]
    for epochs in (4, 5):  # the best is known after resuming, too
        assert cli(*flags, "--epochs", epochs)[0] == 0
        kept = {int(path.stem.split("epoch")[1]) for path in tmp_path.glob("data/*.pth")}
        assert kept == {2, epochs - 1, epochs}
    assert cli("--train", "--exp", "y", *small, "--epochs", 1, "--keep", 1)[0] == 0
    assert len(list(tmp_path.glob("data/*_x_*.pth"))) == 3  # another --exp is left alone


def test_newest_checkpoint_goes_by_number_whatever_the_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Namespace(backbone="resnet50", dataset="custom", exp="x")
    os.mkdir("data")
    order = [(1, None), (1, 7), (1, 10), (2, None), (9, None), (10, None), (10, 55)]
    for age, (epoch, iteration) in enumerate(order):
        path = Path(checkpoint_path(args, epoch, iteration))
        path.touch()
        os.utime(path, (10**9 - age, 10**9 - age))
    for name in ("x_y_epoch99", "x_epoch99.tmp", "xx_epoch99", "x_epoch99_best"):
        Path(f"data/deeplab_resnet50_custom_v3_{name}.pth").touch()
    found = main.saved_checkpoints(args)
    assert [(each.epoch, each.iteration or None) for each in found] == order


def hold(path: str, ready) -> None:
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        ready.set()
        time.sleep(60)


def test_two_runs_of_one_exp(cli, small, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/x.csv").write_text("the other's\n")
    ready = servers.Event()
    other = servers.Process(target=hold, args=(str(tmp_path / "data/x.csv"), ready))
    other.start()
    assert ready.wait(30)
    status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *small)
    assert status == 1 and one_line(err) and "--exp x is being trained by another process" in err
    assert (tmp_path / "data/x.csv").read_text() == "the other's\n"
    other.kill()
    other.join()
    assert cli("--train", "--exp", "x", "--epochs", 1, *small)[0] == 0  # a killed run holds nothing


def test_data_folder_that_cannot_be_written(cli, small, tmp_path):
    (tmp_path / "data").write_text("")
    status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *small)
    assert status == 1 and one_line(err) and "data" in err


def test_out_of_memory_says_what_to_lower(cli, small, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(main, "train", full)
    status, _, err = cli("--train", "--exp", "x", *small)
    assert status == 1 and one_line(err)
    assert all(flag in err for flag in ("--batch_size 4", "--crop_size 33", "--accum 1"))


def test_too_little_shared_memory(tmp_path):
    """In a mount namespace of its own, whose /dev/shm is smaller than a batch."""
    root = make_list_dataset(tmp_path / "set")
    command = [sys.executable, TINY, "--train", "--exp", "x", "--dataset", "custom", "--data_root", root]
    command += [*SMALL, *NETWORK, "--workers", 2, "--crop_size", 513]
    words = " ".join(f"'{word}'" for word in command)
    script = f"mount -t tmpfs -o size=1m none /dev/shm || exit 77; exec {words}"
    try:
        run = subprocess.run(
            ["unshare", "--mount", "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if run.returncode == 77 or "unshare failed" in run.stderr:
        pytest.skip("this user cannot mount")
    lines = [line for line in run.stderr.splitlines() if line.startswith("main.py: error")]
    assert run.returncode == 1 and len(lines) == 1
    assert "--workers" in lines[0] and "--shm-size" in lines[0]


class Program:
    """A pickle that runs a command when it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("flag", ["--checkpoint", "--resume", "--init"])
def test_checkpoint_that_would_run_code(cli, small, tmp_path, flag, legacy):
    target = tmp_path / "it_ran"
    hostile = {"epoch": 1, "state_dict": {"conv1.weight": torch.zeros(1)}, "optimizer": Program(target)}
    torch.save(hostile, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    train = ["--train"] * (flag != "--checkpoint")
    status, _, err = cli("--exp", "x", *small, *train, flag, "x.pth")
    assert status == 1 and one_line(err) and "x.pth is refused" in err
    assert not target.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert target.exists()  # it would have run


def test_plain_pickle_that_would_run_code(cli, small, tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Program(tmp_path / "it_ran")))
    status, _, err = cli("--predict", tmp_path, "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and not (tmp_path / "it_ran").exists()


def spoil(kind: str, path: Path) -> None:
    """Write a checkpoint with this flaw."""
    model = deeplab.resnet50(False, 3, num_groups=32, weight_std=True, aspp_rates=[6], image_pooling=False)
    state = model.state_dict()
    key = "layer4.0.conv2.weight"
    if kind == "nan":
        state[key].view(-1)[7] = torch.nan
    elif kind == "integers":
        state[key] = state[key].int()
    elif kind == "lacks one":
        del state[key]
    elif kind == "one too many":
        state["more"] = torch.zeros(3)
    elif kind == "another shape":
        state[key] = state[key][1:]
    elif kind == "no tensor":
        state[key] = 3
    config = {"model": {"backbone": [1], "num_classes": {}}} if kind == "no model" else {}
    torch.save(
        {"epoch": 1, "state_dict": state, **config},
        path,
        _use_new_zipfile_serialization="legacy" not in kind,
    )
    if "cut" in kind:
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif kind == "text":
        path.write_text("404: Not Found\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")


FLAWS = ["nan", "integers", "lacks one", "one too many", "another shape", "no tensor", "no model", "cut"]


@pytest.mark.parametrize("kind", [*FLAWS, "cut legacy", "text", "empty"])
def test_checkpoint_that_cannot_be_used(cli, small, tmp_path, kind):
    spoil(kind, tmp_path / "x.pth")
    for flags in (
        ["--exp", "x", *small],
        ["--train", "--resume", "x.pth", "--exp", "x", *small],
        ["--predict", "set"],
    ):
        checkpoint = [] if "--train" in flags else ["--checkpoint", "x.pth"]
        status, _, err = cli(*flags, *checkpoint)
        assert status == 1 and one_line(err) and "x.pth" in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_checkpoint_without_a_flaw(cli, small, tmp_path, kind):
    spoil(kind, tmp_path / "x.pth")
    assert cli("--exp", "x", *small, "--checkpoint", "x.pth")[0] == 0


def bomb(path: Path) -> None:
    """A PNG of a few bytes whose header promises 40,000 x 40,000 pixels."""
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))


def damage(kind: str, path: Path) -> None:
    image = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>")
    elif kind == "bomb":
        bomb(path)
    elif kind == "cut":
        path.write_bytes(image[: len(image) // 2])
    elif kind == "other size":
        Image.new("RGB", (10, 10)).save(path)


@pytest.mark.parametrize("kind", ["empty", "text", "bomb", "other size"])
def test_bad_images_end_the_run_before_it_starts(cli, small, tmp_path, kind):
    for name in ("train1.jpg", "train4.jpg"):
        damage(kind, tmp_path / "set/images" / name)
    status, _, err = cli("--train", "--exp", "x", *small)
    assert status == 1 and one_line(err) and not (tmp_path / "data").exists()
    assert "train1.jpg" in err and "2 of the train samples" in err and "--skip_bad" in err


@pytest.mark.parametrize("workers", [0, 2])
def test_image_cut_short_is_named(cli, small, tmp_path, workers):
    """What no header tells ends the run when it is read, or is found at the start with --skip_bad."""
    damage("cut", tmp_path / "set/images/train1.jpg")
    flags = ["--train", "--exp", "x", "--epochs", 1, *small, "--workers", workers]
    status, _, err = cli(*flags)
    assert status == 1 and one_line(err) and "train1.jpg" in err
    status, out, _ = cli(*flags, "--skip_bad")
    assert status == 0 and "left out 1 of the train samples" in out and "5 images to train on" in out


def test_skip_bad_in_evaluation_counts_what_is_left(cli, small, tmp_path):
    spoil("none", tmp_path / "x.pth")
    damage("cut", tmp_path / "set/images/val1.jpg")
    Image.new("L", (80, 60), 9).save(tmp_path / "set/masks/val2.png")
    status, out, _ = cli("--exp", "x", *small, "--checkpoint", "x.pth", "--skip_bad")
    assert status == 0 and "left out 2 of the val samples" in out and "val1.jpg" in out
    assert np.sum(json.loads((tmp_path / "data/val/x/metrics.json").read_text())["confusion"]) == 80 * 60
    damage("empty", tmp_path / "set/images/val0.jpg")
    status, _, err = cli("--exp", "x", *small, "--checkpoint", "x.pth", "--skip_bad")
    assert status == 1 and one_line(err) and "3 of the val samples" in err


def test_directory_named_like_an_image(cli, small, tmp_path):
    spoil("none", tmp_path / "x.pth")
    (tmp_path / "photos/a.jpg").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "photos/b.jpg")
    bomb(tmp_path / "photos/c.png")
    status, out, err = cli("--predict", "photos", "--checkpoint", "x.pth", *small)
    assert status == 1 and "1 of 3 images" in out
    assert [line.split()[2:6] for line in err.splitlines() if "cannot" in line] == [
        ["cannot", "read", "photos/a.jpg:", "Is"],
        ["cannot", "read", "photos/c.png:", "Image"],
    ]


def test_prediction_whose_classes_nobody_names(cli, tmp_path):
    spoil("none", tmp_path / "x.pth")
    status, _, err = cli("--predict", tmp_path, "--checkpoint", "x.pth", "--dataset", "custom")
    assert status == 1 and one_line(err) and "--data_root" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UserError, match=r"a.png: Permission denied"):
        open_image(str(tmp_path / "a.png"))


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[tuple[str, str]]:
    """10,000 tiny images and their masks, of three sizes."""
    folder, rng, pairs = tmp_path_factory.mktemp("many"), np.random.RandomState(0), []
    for i in range(10_000):
        side = 7 + i % 3
        pairs.append((f"{folder}/{i}.ppm", f"{folder}/{i}.pgm"))
        Image.fromarray(rng.randint(0, 256, (side, 9, 3), dtype=np.uint8)).save(pairs[-1][0])
        Image.fromarray(rng.randint(0, 3, (side, 9), dtype=np.uint8)).save(pairs[-1][1])
    return pairs


def memory() -> float:
    """What this process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells memory by /proc")


@pytest.mark.slow
@needs_proc
def test_10000_images_by_any_number_of_workers(many):
    """The same batches, memory that stays, and no file left open."""
    dataset = SegmentationDataset(many, ["a", "b", "c"], voc_palette(3), True, 9)
    hashes, growth = [], {}
    for workers in (0, 2, 8):
        files = len(os.listdir("/proc/self/fd"))
        batches = TrainBatches(len(dataset), 16, 1, 0)
        loader = main.make_loader(dataset, batches, Namespace(workers=workers), torch.device("cpu"))
        total, early = 0, None
        for i, tensors in enumerate(loader):
            for tensor in tensors:
                total = zlib.crc32(tensor.numpy().tobytes(), total)
            early = memory() if i == 100 else early
        growth[workers] = memory() - early
        hashes.append(total)
        del loader, tensors, tensor
        assert len(os.listdir("/proc/self/fd")) < files + 10  # and 625 batches have come
    assert i == 624 and len(set(hashes)) == 1
    assert all(grown < 20 for grown in growth.values()), growth


@pytest.mark.slow
@needs_proc
def test_evaluation_of_2000_images_in_bounded_memory(many, monkeypatch):
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    model = deeplab.resnet50(False, 3, aspp_rates=[6], image_pooling=False)
    args = main.parse_args(["--exp", "x", "--workers", "0", "--eval_batch_size", "50", "--samples", "2"])
    used = []
    for count in (400, 2000):
        dataset = SegmentationDataset(many[:count], ["a", "b", "c"], voc_palette(3), False, 9)
        result = main.evaluate(model, dataset, args, torch.device("cpu"))
        assert np.sum(result["confusion"]) == sum((7 + i % 3) * 9 for i in range(count))
        used.append(memory())
    assert used[1] - used[0] < 50, used

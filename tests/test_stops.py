"""Kills and stop signals at any moment: nothing lost, and a line that says how to continue."""

import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import TINY, children, make_list_dataset, one_line, same_weights, spoil
from processes import end, narrow, start, wait_until
from test_runs import LOG, NAME, STEM, contents, read_log, stop_at_step

import deeplab
import main
from datasets import SegmentationDataset
from files import checkpoints
from files.runs import RunLog, until_stopped
from utils import STOP_SIGNALS, Stopped, end_if_stopped, stop_signals

pytest.importorskip("fcntl")  # not on Windows


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch):
    narrow(monkeypatch.setattr)


def killed_at(argv: list[str]) -> None:
    """main.py, which kills itself at the moment whose number is the last word: within a checkpoint's file, or
    before a step, a row of the log, or what makes a file safe, puts it in its place or deletes it."""
    left, save = int(argv.pop()), torch.save

    def moment() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_in_two(entries, file) -> None:
        data = io.BytesIO()
        save(entries, data)
        file.write(data.getvalue()[:100_000])
        file.flush()
        moment()
        file.write(data.getvalue()[100_000:])

    def after_a_moment(function):
        return lambda *args, **options: (moment(), function(*args, **options))[1]

    torch.save, os.fsync = save_in_two, lambda descriptor: moment()
    for owner, name in ((main, "train_step"), (RunLog, "write"), (os, "replace"), (os, "remove")):
        setattr(owner, name, after_a_moment(getattr(owner, name)))
    processes.run(argv)


def test_killed_at_20_moments_it_ends_at_the_same_weights(smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 12, "--save_every", 6, "--save_every_iters", 1]
    flags += ["--resume", "auto", "--samples", 0]
    whole, killed, rng, unfinished = tmp_path / "whole", tmp_path / "killed", random.Random(0), 0
    child = {"module": "test_stops", "function": "killed_at"}
    assert end(start(whole, *flags, 0, **child)) == [0]
    for _ in range(20):
        process = start(killed, *flags, rng.randint(1, 9), **child)
        assert end(process) == [-signal.SIGKILL]
        unfinished += len(list(killed.glob("data/*.tmp")))
        for path in killed.glob("data/*.pth"):
            assert checkpoints.read(str(path))
    assert unfinished > 5
    assert end(start(killed, *flags, 0, **child)) == [0]
    assert same_weights(whole / f"{STEM}12.pth", killed / f"{STEM}12.pth")
    # Neither unfinished files nor checkpoints within epochs are left, and the log is that of one run.
    names = {path.name for path in (whole / "data").iterdir()}
    left = {path.name for path in (killed / "data").iterdir()} - {"old"}  # what preceded the first checkpoint
    assert names == left and len(names) == 3
    assert not list(killed.glob("data/old/*/*.pth"))
    rows = [read_log(folder / LOG) for folder in (whole, killed)]
    assert [[row["iteration"] for row in run] for run in rows] == 2 * [[str(i) for i in range(1, 25)]]
    numbers = [[(row["lr"], row["loss"], row["val_mean_iou"]) for row in run] for run in rows]
    assert all(b in (a, (*a[:2], "")) for a, b in zip(*numbers, strict=True))  # a validation can be cut off


@pytest.mark.parametrize(
    ("number", "status", "workers"),
    [(signal.SIGINT, 130, 0), (signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 2)],
)
def test_stopped_it_saves_and_says_how_to_continue(smallest, tmp_path, number, status, workers):
    """The signal goes to all processes of the group, as a terminal or a cluster sends it."""
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 9999, "--workers", workers, "--log_every", 1]
    run = start(tmp_path, *flags)
    assert wait_until(lambda: "iteration 3/" in (tmp_path / "out").read_text(), run)
    os.killpg(run.pid, number)
    assert end(run) == [status]
    (checkpoint,) = (tmp_path / "data").glob("*.pth")
    assert (tmp_path / "err").read_text().strip() == (
        f"main.py: stopped by {number.name}; data/{checkpoint.name} is saved: "
        "the same command with --resume auto continues it"
    )
    assert torch.load(checkpoint, weights_only=True)["iteration"] >= 3


def test_stopped_though_its_workers_are_frozen(smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 9999, "--workers", 2, "--log_every", 1]
    run = start(tmp_path, *flags)
    assert wait_until(lambda: "iteration 3/" in (tmp_path / "out").read_text(), run)
    workers = children(run)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    time.sleep(0.5)  # what they had loaded is trained on
    os.kill(run.pid, signal.SIGTERM)
    assert end(run, seconds=60) == [143]
    assert "\n" not in (tmp_path / "err").read_text().strip() and list((tmp_path / "data").glob("*.pth"))


def test_a_long_step_ends_though_its_workers_are_killed(cli, smallest, monkeypatch):
    """Those that do not answer a stop are killed after a while, at which torch would raise in the step."""
    timer, step = threading.Timer, main.train_step

    def long_step(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.01)
        return step(*args, **options)

    monkeypatch.setattr(threading, "Timer", lambda seconds, function: timer(0.1, function))
    monkeypatch.setattr(main, "train_step", long_step)
    status, _, err = cli("--train", "--exp", "x", *smallest, "--epochs", 9, "--workers", 2)
    assert status == 143 and f"{NAME}_epoch0_iter1.pth is saved" in err


def test_stopped_while_it_waits_for_a_batch_it_saves_what_was_trained(cli, smallest, monkeypatch):
    timer, load, step, taken = threading.Timer, SegmentationDataset.__getitem__, main.train_step, []

    def load_slowly(dataset, key):
        time.sleep(60 * key[0])  # all but the first epoch
        return load(dataset, key)

    def last_step(*args, **options):
        taken.append(1)
        if len(taken) == 3:
            timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return step(*args, **options)

    monkeypatch.setattr(threading, "Timer", lambda seconds, function: timer(0.1, function))
    monkeypatch.setattr(SegmentationDataset, "__getitem__", load_slowly)
    monkeypatch.setattr(main, "train_step", last_step)
    flags = ["--train", "--exp", "x", *smallest, "--batch_size", 2, "--epochs", 2, "--save_every", 2]
    status, _, err = cli(*flags, "--workers", 2)
    assert status == 143 and f"{STEM}1_iter3.pth is saved: the same command with --resume auto" in err
    assert torch.load(f"{STEM}1_iter3.pth", weights_only=True)["iteration"] == 3


def test_weights_that_are_not_finite_are_not_saved_while_a_batch_is_waited_for():
    def batches():
        yield 1
        raise Stopped

    model = SimpleNamespace(parameters=lambda: [torch.tensor([1.0, torch.nan])])
    with pytest.raises(Stopped) as stopped:  # to save it, a run would be needed
        list(until_stopped(batches(), None, SimpleNamespace(model=model, iteration=3, saved=0), None))
    assert not stopped.value.args


def test_worker_killed_for_memory_is_a_line(cli, smallest, monkeypatch):
    """In the middle of a step, where torch raises."""

    def long_step(*args, **options):
        multiprocessing.active_children()[0].kill()
        time.sleep(10)

    monkeypatch.setattr(main, "train_step", long_step)
    status, _, err = cli("--train", "--exp", "x", *smallest, "--workers", 2)
    assert status == 1 and one_line(err) and "is killed by signal: Killed): lower --workers" in err


def test_stopped_while_it_validates_with_workers(smallest, tmp_path):
    """The loaders of training and of validation end without a word, as Python does."""
    make_list_dataset(tmp_path / "set", val=300)
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 2, "--save_every", 1, "--workers", 2]
    command = [sys.executable, TINY, *flags, "--eval_batch_size", 1]
    with open(tmp_path / "err", "w") as err:
        run = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=err, start_new_session=True)
    while not (tmp_path / f"{STEM}1.pth").exists():
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 143
    (line,) = (tmp_path / "err").read_text().strip().splitlines()
    assert f"{STEM}1.pth is saved: the same command with --resume auto continues it" in line


def test_stopped_and_resumed_it_ends_at_the_same_weights(cli, smallest, tmp_path, monkeypatch):
    flags = ["--train", "--exp", "x", "--epochs", 3, *smallest]
    assert cli(*flags)[0] == 0
    (tmp_path / f"{STEM}3.pth").rename(tmp_path / "whole.pth")
    stop_at_step(monkeypatch, 3)
    status, _, err = cli(*flags)
    assert status == 143 and f"{STEM}1_iter3.pth is saved" in err
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and f"resumed from {STEM}1_iter3.pth: iteration 3 of 6" in out
    assert same_weights(tmp_path / "whole.pth", tmp_path / f"{STEM}3.pth")
    assert not list(tmp_path.glob("data/*_iter*"))


def with_a_stuck_step(argv: list[str]) -> None:
    """A run whose first step never ends."""

    def step(*args, **kwargs):
        Path("stuck").touch()
        time.sleep(60)

    main.train_step = step
    processes.run(argv)


def test_second_signal_stops_at_once(smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest]
    process = start(tmp_path, *flags, module="test_stops", function="with_a_stuck_step")
    assert wait_until((tmp_path / "stuck").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(0.5)
    assert process.is_alive()  # the first one waits for the step
    os.kill(process.pid, signal.SIGHUP)
    assert end(process) == [-signal.SIGHUP] and not list((tmp_path / "data").glob("*.pth"))


def test_stopped_while_it_validates(cli, smallest, tmp_path, monkeypatch):
    """The checkpoint is there already, so nothing is waited for."""
    scores, calls = deeplab.DeepLabv3.scores, []

    def interrupted(*args):
        calls.append(args)
        signal.raise_signal(signal.SIGHUP)
        return scores(*args)

    monkeypatch.setattr(deeplab.DeepLabv3, "scores", interrupted)
    flags = ["--train", "--exp", "x", "--epochs", 2, "--save_every", 1, "--eval_batch_size", 1]
    status, _, err = cli(*flags, *smallest)
    assert status == 129 and err.strip() == (
        f"main.py: stopped by SIGHUP; {STEM}1.pth is saved: the same command with --resume auto continues it"
    )
    assert len(calls) == 1 and list(contents("data", "*.pth")) == [f"{NAME}_epoch1.pth"]
    monkeypatch.setattr(deeplab.DeepLabv3, "scores", scores)
    status, out, _ = cli(*flags, *smallest, "--resume", "auto")
    assert status == 0 and f"{STEM}1.pth was not validated: --best, --keep and" in out
    assert "was not validated" not in cli(*flags, "--epochs", 3, *smallest, "--resume", "auto")[1]


def test_stop_in_the_last_validation(cli, smallest, monkeypatch):
    """Nothing is left to resume."""
    monkeypatch.setattr(main, "evaluate", lambda *_: signal.raise_signal(signal.SIGTERM) or end_if_stopped())
    status, _, err = cli("--train", "--exp", "x", *smallest, "--epochs", 1)
    assert (status, err.strip()) == (
        143,
        f"main.py: stopped by SIGTERM; {STEM}1.pth is saved: the same command without --train evaluates it",
    )


def once_it_takes_signals(argv: list[str]) -> None:
    """main.py, which makes a file when it begins to take signals."""
    run = main.run

    def begun(args):
        Path("begun").touch()
        return run(args)

    main.run = begun
    processes.run(argv)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "workers"), [("train", 0), ("train", 4), ("evaluate", 0), ("evaluate", 4), ("predict", 0)]
)
def test_signals_at_random_times_are_all_obeyed(smallest, tmp_path, command, workers):
    """To the process alone, from the first moment on, while loaders start their processes, too."""
    spoil("none", tmp_path / "x.pth")
    root, rng, ends = make_list_dataset(tmp_path / "set", val=40), random.Random(0), []
    flags = {
        "train": ["--train", "--exp", "x", "--save_every", 1, "--epochs", 10_000, "--eval_batch_size", 8],
        "evaluate": ["--checkpoint", "x.pth", "--eval_batch_size", 1],
        "predict": ["--checkpoint", "x.pth", "--predict", root / "images"],
    }[command]
    flags = [*flags, *smallest, "--workers", workers, "--samples", 0]
    for number in 5 * STOP_SIGNALS:
        (tmp_path / "begun").unlink(missing_ok=True)
        process = start(tmp_path, *flags, module="test_stops", function="once_it_takes_signals")
        assert wait_until((tmp_path / "begun").exists, process)
        process.join(rng.uniform(0, 0.4))
        with suppress(ProcessLookupError):  # it may have ended
            os.kill(process.pid, number)
        ends += end(process)
        err = (tmp_path / "err").read_text()
        assert ends[-1] == 128 + number or (ends[-1] == 0 and command != "train"), err
        lines = [line for line in err.splitlines() if line]
        if ends[-1]:
            assert len(lines) == 1 and lines[0].startswith(f"main.py: stopped by {number.name}"), err
            assert ("--resume auto" in err) <= (command == "train")
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
    assert sum(status != 0 for status in ends) > 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="sees by /proc how far the imports are")
def test_ctrl_c_during_the_imports(tmp_path):
    run = subprocess.Popen(
        [sys.executable, main.__file__, "--exp", "x"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=30)[1] == "main.py: stopped by SIGINT\n" and run.returncode == 130


def test_signals_that_are_ignored_stay_so():
    """`nohup` has a run outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_ctrl_c_outside_training(cli, smallest, tmp_path, monkeypatch, command):
    spoil("none", tmp_path / "x.pth")
    scores = deeplab.DeepLabv3.scores

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return scores(*args, **options)

    monkeypatch.setattr(deeplab.DeepLabv3, "scores", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it
    flags = ["--eval_batch_size", 1] if command == "evaluate" else ["--predict", "set/images"]
    try:
        status, _, err = cli("--checkpoint", "x.pth", *flags, *smallest)
    finally:
        signal.signal(signal.SIGINT, before)
    told = re.fullmatch(r"main.py: stopped by SIGINT(; \d of 9 images are predicted)?", err.strip())
    assert status == 130 and told and bool(told[1]) == (command == "predict")
    assert not list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize("flags", [["--check"], ["--train", "--exp", "x", "--skip_bad"]])
def test_stop_while_all_files_are_decoded(cli, smallest, tmp_path, monkeypatch, flags):
    """What waits for its turn is not decoded any more."""
    (tmp_path / "set/list/train.txt").write_text(500 * "/images/train0.jpg /masks/train0.png\n")
    read, count = SegmentationDataset.read, []

    def interrupted(dataset, index, *reading):
        count.append(index)
        if len(count) == 50:
            os.kill(os.getpid(), signal.SIGTERM)  # to the main thread, whichever decodes
        return read(dataset, index, *reading)

    monkeypatch.setattr(SegmentationDataset, "read", interrupted)
    assert cli(*flags, *smallest)[0] == 143 and 50 <= len(count) < 100

"""Nothing lost: kills, signals, full disks, two runs at once, edited logs; what --resume and --keep do."""

import csv
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import SMALL, TINY, make_list_dataset, one_line, same_weights, spoil
from PIL import Image

import deeplab
import main
from datasets import SegmentationDataset
from files import plots
from files.runs import Best, Length, Place, Run, RunLog, load_progress
from utils import STOP_SIGNALS, UserError, end_if_stopped, stop_signals

fcntl, resource = pytest.importorskip("fcntl"), pytest.importorskip("resource")  # not on Windows
LOG = "data/deeplab_resnet50_custom_v3_x.csv"
STEM = "data/deeplab_resnet50_custom_v3_x_epoch"
os.environ["PYTHONPATH"] = os.pathsep.join([str(TINY.parent), str(TINY.parents[1])])
servers = multiprocessing.get_context("forkserver")  # a process starts without importing torch again
servers.set_forkserver_preload(["tiny", "test_runs"])


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
def test_killed_at_20_moments_it_ends_at_the_same_weights(smallest, tmp_path):
    """Every other kill comes while a checkpoint is being written."""
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 12, "--save_every", 6, "--save_every_iters", 1]
    flags += ["--resume", "auto", "--samples", 0]
    whole, killed, rng = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    process = start(whole, *flags)
    process.join()
    assert process.exitcode == 0
    for kill in range(20):
        process = start(killed, *flags)
        if kill % 2:
            temporary = f"data/*.{process.pid}.*.tmp"
            assert wait_until(lambda pattern=temporary: list(killed.glob(pattern)), process)
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
    logs = [(folder / LOG).read_text() for folder in (whole, killed)]
    rows = [list(csv.DictReader(log.splitlines())) for log in logs]
    assert [[row["iteration"] for row in run] for run in rows] == 2 * [[str(i) for i in range(1, 25)]]
    loss = [[(row["lr"], row["val_mean_iou"] or 0) for row in run] for run in rows]
    assert all(b in (a, (a[0], 0)) for a, b in zip(*loss, strict=True))  # a validation can be cut off


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_saves_and_says_how_to_go_on(smallest, tmp_path, number, status, workers):
    """The signal goes to all processes of the group, as a terminal or a cluster sends it."""
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 9999, "--workers", workers, "--log_every", 1]
    command = [sys.executable, TINY, *flags]
    run = subprocess.Popen(
        [str(word) for word in command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs the tests may ignore it
    )
    while "iteration 3/" not in run.stdout.readline():
        assert run.poll() is None
    os.killpg(run.pid, number)
    _, err = run.communicate(timeout=60)
    (checkpoint,) = (tmp_path / "data").glob("*.pth")
    assert run.returncode == status
    assert err.strip() == (
        f"main.py: stopped by {number.name}; data/{checkpoint.name} is saved: "
        "the same command with --resume auto goes on from there"
    )
    assert torch.load(checkpoint, weights_only=True)["iteration"] >= 3


def test_stopped_and_resumed_it_ends_at_the_same_weights(cli, smallest, tmp_path, monkeypatch):
    flags = ["--train", "--exp", "x", "--epochs", 3, *smallest]
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
    assert status == 143 and f"{STEM}1_iter3.pth is saved" in err and len(steps) == 3
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and f"resumed from {STEM}1_iter3.pth: iteration 3 of 6" in out
    assert same_weights(tmp_path / "whole.pth", tmp_path / f"{STEM}3.pth")
    assert not list(tmp_path.glob("data/*_iter*"))


def stuck(argv: list[str], folder: str) -> None:
    """A run whose first step never ends."""

    def step(*args, **kwargs):
        Path("stuck").touch()
        time.sleep(60)

    main.train_step = step
    tiny.run(argv, folder)


def test_second_signal_stops_at_once(smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest]
    process = servers.Process(target=stuck, args=([str(flag) for flag in flags], str(tmp_path)))
    process.start()
    assert wait_until((tmp_path / "stuck").exists, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(1)
    assert process.is_alive()  # the first one waits for the step
    os.kill(process.pid, signal.SIGHUP)
    process.join(10)
    assert process.exitcode == -signal.SIGHUP and not list((tmp_path / "data").glob("*.pth"))


def test_stopped_while_it_validates(cli, smallest, tmp_path, monkeypatch):
    """The checkpoint is there already, so nothing is waited for."""
    scores = deeplab.DeepLabv3.scores

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGHUP)
        return scores(*args)

    monkeypatch.setattr(deeplab.DeepLabv3, "scores", interrupted)
    flags = ["--train", "--exp", "x", "--epochs", 2, "--save_every", 1, "--eval_batch_size", 1]
    status, _, err = cli(*flags, *smallest)
    assert status == 129 and err.strip() == (
        f"main.py: stopped by SIGHUP; {STEM}1.pth is saved: "
        "the same command with --resume auto goes on from there"
    )
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("data/*.pth")] == [f"{STEM}1.pth"]


def signalled(argv: list[str], folder: str, errors: str) -> None:
    """tiny.py with its stderr in a file; it says when it begins to take signals."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")  # of more workers than processors
    multiprocessing.set_start_method("fork", force=True)  # as a process of its own has it
    run = main.run

    def begun(args):
        Path(errors + ".begun").touch()
        return run(args)

    main.run = begun
    tiny.run(argv, folder)


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
        "predict": ["--checkpoint", "x.pth", "--predict", *[root / "images"] * 40],
    }[command]
    flags = [*flags, *smallest, "--workers", workers, "--samples", 0]
    for number in 5 * STOP_SIGNALS:
        errors = tmp_path / "errors"
        for path in (errors, tmp_path / "errors.begun"):
            path.unlink(missing_ok=True)
        argv = [str(flag) for flag in flags]
        process = servers.Process(target=signalled, args=(argv, str(tmp_path), str(errors)))
        process.start()
        assert wait_until((tmp_path / "errors.begun").exists, process)
        process.join(rng.uniform(0, 0.8))
        os.kill(process.pid, number)
        process.join(30)
        said = errors.read_text()
        ends.append(process.exitcode)
        assert process.exitcode == 128 + number or (process.exitcode == 0 and command != "train"), said
        lines = [line for line in said.splitlines() if line]
        if process.exitcode:
            assert len(lines) == 1 and lines[0].startswith(f"main.py: stopped by {number.name}"), said
            assert ("--resume auto" in said) <= (command == "train")
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
    assert sum(end != 0 for end in ends) > 5


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
    with stop_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
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
    status, _, err = cli("--checkpoint", "x.pth", *flags, *smallest)
    signal.signal(signal.SIGINT, before)
    assert (status, err.strip()) == (130, "main.py: stopped by SIGINT")
    assert not list(tmp_path.glob("data/val/*/metrics.json"))


def test_resume_equals_the_uninterrupted_run(cli, smallest, tmp_path):
    flags = ["--epochs", 3, "--save_every", 1, "--train", *smallest]
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


def test_optimizer_state_as_the_original_wrote_it(cli, smallest, tmp_path):
    """torch of 2018 had fewer options of SGD, and named parameters by their addresses."""
    flags = ["--train", "--exp", "x", *smallest]
    assert cli(*flags, "--epochs", 2, "--save_every", 1)[0] == 0
    (tmp_path / f"{STEM}2.pth").rename(tmp_path / "whole.pth")
    first = torch.load(tmp_path / f"{STEM}1.pth", weights_only=True)
    state, groups = first["optimizer"]["state"], first["optimizer"]["param_groups"]
    address = {number: 140_000_000_000_000 + 72 * number for number in state}
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 1e-4, "nesterov": False}
    published = {
        "state": {address[number]: {"momentum_buffer": s["momentum_buffer"]} for number, s in state.items()},
        "param_groups": [{**options, "params": [address[n] for n in group["params"]]} for group in groups],
    }
    entries = {"epoch": 1, "state_dict": first["state_dict"], "optimizer": published}
    torch.save(entries, tmp_path / f"{STEM}1.pth", _use_new_zipfile_serialization=False)
    status, out, _ = cli(*flags, "--epochs", 2, "--resume", tmp_path / f"{STEM}1.pth")
    assert status == 0 and "iteration 2 of 4" in out
    assert same_weights(tmp_path / f"{STEM}2.pth", tmp_path / "whole.pth")


def two_groups(memory_format: torch.memory_format) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.trunk, model.aspp = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3)
    model.forward = lambda x: model.aspp(model.trunk(x))
    return model.to(memory_format=memory_format)


def take_step(model, optimizer, scaler, seed: int, scale: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    generator = torch.Generator().manual_seed(seed)
    images = scale * torch.randn(2, 3, 9, 9, generator=generator)
    masks = torch.randint(0, 5, (2, 5, 5), generator=generator).byte()
    images, masks = images.to(model.trunk.weight), masks.to(model.trunk.weight.device)
    main.train_step(model, optimizer, scaler, images, masks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ],
)
def test_momentum_takes_the_memory_layout_of_its_parameter(saved, loaded, fused):
    """GroupNorm runs are contiguous on the CPU and channels_last on GPUs, and go on anywhere; so does a state
    that was saved by the other kind of SGD."""
    models, optimizers, scaler = [], [], torch.amp.GradScaler(enabled=False)
    for layout in (saved, loaded):
        models.append(two_groups(layout))
        optimizers.append(main.make_optimizer(models[-1], fused=fused if layout is loaded else not fused))
    for seed in (0, 1):
        take_step(models[0], optimizers[0], scaler, seed)
    checkpoint = {"optimizer": optimizers[0].state_dict(), "epoch": 2, "iteration": 2}
    models[1].load_state_dict(models[0].state_dict())
    assert load_progress(checkpoint, "x.pth", optimizers[1], scaler, Length(2, 1), {}) == Place(
        2, 2, resumed="x.pth"
    )
    assert all(group["fused"] is fused for group in optimizers[1].param_groups)
    for model, optimizer in zip(models, optimizers, strict=True):
        take_step(model, optimizer, scaler, 2)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)
        buffers = optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"]
        torch.testing.assert_close(*buffers)
        assert buffers[1].stride() == b.stride()


def test_momentum_of_another_shape_is_refused(cli, smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest]
    assert cli(*flags, "--epochs", 1)[0] == 0
    checkpoint = torch.load(tmp_path / f"{STEM}1.pth", weights_only=True)
    state = checkpoint["optimizer"]["state"]
    state[0]["momentum_buffer"] = state[0]["momentum_buffer"][:1]
    torch.save(checkpoint, tmp_path / f"{STEM}1.pth")
    status, _, err = cli(*flags, "--epochs", 2, "--resume", "auto")
    assert status == 1 and one_line(err) and "cannot be resumed, only evaluated: the momentum" in err


def test_step_that_the_loss_scaler_skips():
    """An overflow in the first step leaves weights and momentum as they were; the next one is the first."""
    results = []
    for scales in ((1e38, 1.0), (1.0,)):
        model, scaler = two_groups(torch.contiguous_format), torch.amp.GradScaler("cpu", init_scale=256.0)
        before = [p.clone() for p in model.parameters()]
        optimizer = main.make_optimizer(model, fused=not scaler.is_enabled())
        for scale in scales:
            take_step(model, optimizer, scaler, 0, scale)
            if scale > 1:
                assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
                assert not any("momentum_buffer" in state for state in optimizer.state.values())
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        results.append([*model.parameters(), *momenta])
    assert all(torch.allclose(p, q, rtol=1e-5) for p, q in zip(*results, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(before, results[0][:4], strict=True))


def test_full_disk_leaves_the_checkpoint_before(cli, smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto"]
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
    log = RunLog(Run("resnet50", "custom", "x"), Place(), False)
    log.file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        log.write({"epoch": 1, "iteration": 1})


ROWS = [b"1,1,0.1,0.5,,9", b"1,2,0.1,0.25,0.75,9", b"2,3,0.05,0.125,,9"]
HEADER = ",".join(RunLog.columns).encode()
PLAIN = b"\r\n".join([HEADER, *ROWS, b""])


@pytest.mark.parametrize(
    ("data", "edited", "kept"),
    [
        (b"", False, 0),
        (PLAIN, False, 3),
        (PLAIN[:-1], False, 3),
        (PLAIN[:-2], False, 3),
        (PLAIN[:-5], False, 2),  # cut by a kill
        (PLAIN + b"3,4,0.0", False, 3),
        (PLAIN.replace(b"\r\n", b"\n"), True, 3),
        (b"\xef\xbb\xbf" + PLAIN, True, 3),
        (PLAIN.translate(bytes.maketrans(b",.", b";,")), True, 3),  # as a German Excel has it
        (PLAIN.replace(b"1,1,", b'"1","1",'), True, 3),
        (PLAIN.replace(b"2,3,", b"\xe4\xdf note\r\n2,3,"), True, 3),  # Latin-1
        (PLAIN.replace(b"1,2,", b"# good, so far\r\n\r\n1,2,"), True, 3),
        (b"my notes\r\n" + PLAIN, True, 3),
        (PLAIN.replace(b"\r\n", b",\r\n"), True, 3),  # a column more
        (PLAIN.replace(b"1,2,", b'"a quote that nobody closes\r\n1,2,'), True, 3),
        (PLAIN + b'"' + 200_000 * b"x" + b"\r\n", True, 3),
        (b"\r\n".join([HEADER, *ROWS[::-1], b""]), True, 3),
        (PLAIN.replace(b"0.5", b"n/a"), True, 2),
        (PLAIN.replace(b"\r", b"\0"), True, 3),
        (b"quite another file\n" * 9, True, 0),
        (bytes(range(256)), True, 0),
    ],
)
def test_log_that_somebody_edited(tmp_path, monkeypatch, capsys, data, edited, kept):
    """Rows are taken over from what editors and spreadsheets make of the log; what they made stays beside."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path(LOG).write_bytes(data)
    run = Run("resnet50", "custom", "x")
    RunLog(run, Place(2, 3), False).close()
    rows = [ROWS[0], *ROWS[2:]] if b"n/a" in data or b"quite" in data else ROWS
    rows = ROWS[1:] if b"n/a" in data else rows[:kept]
    assert Path(LOG).read_bytes() == b"\r\n".join([HEADER, *rows, b""])
    backup = Path(f"{LOG}.bak1")
    assert backup.exists() == edited and (not edited or backup.read_bytes() == data)
    assert (f"rows are taken over, the file is {LOG}.bak1" in capsys.readouterr().out) == edited
    log = RunLog(run, Place(2, 2), False)  # a run that goes on from iteration 2
    assert log.best == (Best(1, 0.75) if kept > 1 else None)
    log.close()
    assert len(Path(LOG).read_bytes().splitlines()) == 1 + len([row for row in rows if row[2:3] != b"3"])


def test_log_says_each_thing_once_to_tensorboard(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == ("data/runs/deeplab_resnet50_custom_v3_x", 1)

        def add_scalar(self, name, value, iteration):
            written.append((name, value, iteration))

        def flush(self):
            pass

        close = flush

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    log = RunLog(Run("resnet50", "custom", "x"), Place(), True)
    row = {"epoch": 1, "iteration": 7, "lr": 0.1, "loss": 2.0, "images_per_second": 3.0}
    log.write(row)
    log.write({**row, "val_mean_iou": 0.5})
    log.close()
    names = ["lr", "loss", "images_per_second", "val_mean_iou"]
    assert written == list(zip(names, [0.1, 2.0, 3.0, 0.5], [7] * 4, strict=True))


def test_new_run_moves_the_earlier_one_aside(cli, smallest, tmp_path):
    """Stopped in its first epoch, it is the one to go on from, not the three epochs before it."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto"]
    assert "no checkpoint to resume from: starts anew" in cli(*flags, "--epochs", 3)[1]
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    for number in (1, 2):
        status, out, _ = cli(*flags[:-2], "--epochs", 3, "--seed", number)
        assert status == 0 and f"moved what an earlier run of --exp x left to data/old/x-{number}\n" in out
        moved = {path.name: path.read_bytes() for path in (tmp_path / f"data/old/x-{number}").iterdir()}
        assert moved == before
        before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()}
        assert len(before) == 4

    # Going back to an earlier checkpoint keeps the later ones aside, too.
    status, out, _ = cli(*flags[:-1], f"{STEM}1.pth", "--epochs", 2)
    assert status == 0 and f"moved the checkpoints of --exp x beyond {STEM}1.pth to data/old/x-3\n" in out
    assert {path.name: path.read_bytes() for path in (tmp_path / "data/old/x-3").iterdir()} == {
        name: content for name, content in before.items() if "epoch1" not in name
    }
    shutil.copy(tmp_path / f"{STEM}1.pth", tmp_path / "copy.pth")
    status, out, _ = cli(*flags[:-1], "copy.pth", "--epochs", 2)
    assert status == 0 and "moved the checkpoints of --exp x beyond copy.pth to data/old/x-4\n" in out


def test_list_that_grew(cli, smallest, tmp_path):
    """The run goes on at the same share of its schedule, and no epoch that is done is written again."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--epochs", 6]
    assert cli(*flags[:-1], 4)[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.pth")}
    lines = (tmp_path / "set/list/train.txt").read_text()
    (tmp_path / "set/list/train.txt").write_text(lines + lines)
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and "an epoch is 12 images in 3 iterations, not 6 images in 2 iterations" in out
    assert "iteration 12 of 18" in out and len(before) == 4
    after = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.pth")}
    assert len(after) == 6 and before.items() <= after.items() and not (tmp_path / "data/old").exists()


def test_list_that_shrank(cli, smallest, tmp_path, monkeypatch):
    """The checkpoint that the run goes on from stays until there is a newer one, though its numbers lie
    beyond the place, and does not pass for the newest then."""
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 3, "--batch_size", 2]
    step, steps = main.train_step, []

    def interrupted(*args):
        steps.append(args)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(main, "train_step", interrupted)
    assert cli(*flags)[0] == 143
    lines = (tmp_path / "set/list/train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "set/list/train.txt").write_text("".join(lines[:2]))

    def pruned(run, newest, *_):
        assert [each.path for each in run.saved()] == [f"{STEM}2_iter8.pth", newest]
        prune(run, newest, None, None)

    prune = Run.prune
    monkeypatch.setattr(Run, "prune", pruned)
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and "iter8.pth: iteration 2 of 3" in out and not (tmp_path / "data/old").exists()
    assert [path.name for path in tmp_path.glob("data/*.pth")] == [Path(f"{STEM}3.pth").name]


def test_stop_in_the_last_validation(cli, smallest, tmp_path, monkeypatch):
    """Nothing is left to resume."""
    monkeypatch.setattr(
        main, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGTERM) or end_if_stopped()
    )
    status, _, err = cli("--train", "--exp", "x", *smallest, "--epochs", 1)
    assert (status, err.strip()) == (
        143,
        f"main.py: stopped by SIGTERM; {STEM}1.pth is saved: the same command without --train evaluates it",
    )


@pytest.mark.parametrize("flags", [["--check"], ["--train", "--exp", "x", "--skip_bad"]])
def test_stop_while_all_files_are_decoded(cli, smallest, tmp_path, monkeypatch, flags):
    """What waits for its turn is not decoded any more."""
    (tmp_path / "set/list/train.txt").write_text(500 * "/images/train0.jpg /masks/train0.png\n")
    read, count = SegmentationDataset.read, []

    def interrupted(dataset, index):
        count.append(index)
        if len(count) == 50:
            signal.raise_signal(signal.SIGTERM)
        return read(dataset, index)

    monkeypatch.setattr(SegmentationDataset, "read", interrupted)
    assert cli(*flags, *smallest)[0] == 143 and len(count) < 100


def test_place_within_an_epoch_of_another_length():
    def place(epoch, iteration, per_epoch_before, per_epoch):
        off = torch.amp.GradScaler(enabled=False)
        optimizer = main.make_optimizer(two_groups(torch.contiguous_format))
        checkpoint = {"epoch": epoch, "iteration": iteration, "per_epoch": per_epoch_before, "images": 9}
        checkpoint["optimizer"] = optimizer.state_dict()
        return load_progress(checkpoint, "x.pth", optimizer, off, Length(9, per_epoch), {})[:2]

    assert place(5, 50, 10, 20) == (5, 100)
    assert place(4, 45, 10, 20) == (4, 90)
    assert place(4, 45, 10, 10) == (4, 45)
    assert place(4, 45, 10, 3) == (4, 13)
    assert place(4, 40, 10, 3) == (4, 12)
    for per_epoch in range(1, 40):
        for iteration in range(40, 50):
            assert 4 * per_epoch <= place(4, iteration, 10, per_epoch)[1] < 5 * per_epoch


def test_best_epoch_outlives_the_log(cli, smallest, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.3, 0.1, 0.5])
    monkeypatch.setattr(main, "evaluate", lambda *_, **__: {"mean_iou": next(scores), "samples": None})
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--keep", 2]
    assert cli(*flags, "--epochs", 3)[0] == 0
    (tmp_path / LOG).unlink()
    assert cli(*flags, "--epochs", 5)[0] == 0
    assert {int(path.stem.split("epoch")[1]) for path in tmp_path.glob("data/*.pth")} == {2, 4, 5}


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
        return list(csv.DictReader((tmp_path / LOG.replace("_x", "_y")).open()))

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
        assert cli(*flags, "--tensorboard")[0] == 0
        assert list((tmp_path / "data/runs/deeplab_resnet50_custom_v3_x").iterdir())


def test_plot_of_a_run(cli, smallest, tmp_path, monkeypatch):
    """Drawn at each validation, of all rows: those before a stop, too."""
    drawn, draw = [], plots.plot_run

    def counted(path, rows):
        drawn.append((path, len(rows)))
        draw(path, rows)

    monkeypatch.setattr(plots, "plot_run", counted)
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--plots"]
    assert cli(*flags, "--epochs", 2)[0] == 0
    assert cli(*flags, "--epochs", 3, "--resume", "auto")[0] == 0
    assert drawn == [("data/deeplab_resnet50_custom_v3_x.png", count) for count in (1, 2, 3)]
    assert Image.open(drawn[0][0]).size == (800, 800)


def test_keep_leaves_the_newest_and_the_best(cli, smallest, tmp_path, monkeypatch):
    scores = iter([0.2, 0.9, 0.3, 0.1, 0.5, 0.0])
    monkeypatch.setattr(main, "evaluate", lambda *_, **__: {"mean_iou": next(scores), "samples": None})
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--keep", 2]
    for epochs in (4, 5):  # the best is known after resuming, too
        assert cli(*flags, "--epochs", epochs)[0] == 0
        kept = {int(path.stem.split("epoch")[1]) for path in tmp_path.glob("data/*.pth")}
        assert kept == {2, epochs - 1, epochs}
    assert cli("--train", "--exp", "y", *smallest, "--epochs", 1, "--keep", 1)[0] == 0
    assert len(list(tmp_path.glob("data/*_x_*.pth"))) == 3  # another --exp is left alone


def test_newest_checkpoint_goes_by_number_whatever_the_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("resnet50", "custom", "x")
    os.mkdir("data")
    order = [(1, None), (1, 7), (1, 10), (2, None), (9, None), (10, None), (10, 55)]
    for age, (epoch, iteration) in enumerate(order):
        path = Path(run.checkpoint(epoch, iteration or 0))
        path.touch()
        os.utime(path, (10**9 - age, 10**9 - age))
    for name in ("x_y_epoch99", "x_epoch99.tmp", "xx_epoch99", "x_epoch99_best"):
        Path(f"data/deeplab_resnet50_custom_v3_{name}.pth").touch()
    found = run.saved()
    assert [(each.epoch, each.iteration or None) for each in found] == order


def test_names_that_look_like_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    run = Run("resnet50", "custom", "a_epoch0")
    for epoch in (2, 10):
        Path(run.checkpoint(epoch)).touch()
    assert [each.epoch for each in run.saved()] == [2, 10]
    os.remove(run.checkpoint(10))
    run.prune(run.checkpoint(10), 1, None)  # somebody has moved the newest, meanwhile
    assert [each.epoch for each in run.saved()] == []


def hold(path: str, ready) -> None:
    with open(path, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        ready.set()
        time.sleep(60)


def test_two_runs_of_one_exp(cli, smallest, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / LOG).write_text("the other's\n")
    ready = servers.Event()
    other = servers.Process(target=hold, args=(str(tmp_path / LOG), ready))
    other.start()
    assert ready.wait(30)
    status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *smallest)
    assert status == 1 and one_line(err) and "--exp x is being trained by another process" in err
    assert (tmp_path / LOG).read_text() == "the other's\n"
    other.kill()
    other.join()
    assert cli("--train", "--exp", "x", "--epochs", 1, *smallest)[0] == 0  # a killed run holds nothing


def test_data_folder_that_cannot_be_written(cli, smallest, tmp_path):
    (tmp_path / "data").write_text("")
    status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *smallest)
    assert (status, err) == (1, "main.py: error: data: File exists\n")

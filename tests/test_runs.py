"""What --resume, --init and --keep do; full disks, two runs at once, edited logs."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NETWORK, SMALL, make_list_dataset, one_line, same_weights
from PIL import Image
from processes import narrow
from torch import nn

import deeplab
import main
from files import checkpoints, runs
from files.images import AS_STORED
from files.masks import Labels
from files.runs import COLUMNS, Run, RunLog, find_checkpoint
from files.training import Best, Resumed, Training
from utils import Stopped, UserError

resource = pytest.importorskip("resource")  # not on Windows
NAME = "deeplab_tiny_custom_v3_x"
LOG, STEM = f"data/{NAME}.csv", f"data/{NAME}_epoch"
OFF = torch.amp.GradScaler(enabled=False)
LABELS = Labels("ab", [[0, 0, 0], [255, 0, 0]])


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch):
    narrow(monkeypatch.setattr)


def read_log(path: str | Path = LOG) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: str | Path, pattern: str = "*") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob(pattern) if path.is_file()}


def epochs_left(folder: str = "data") -> list[int]:
    return sorted(int(path.stem.split("_epoch")[1]) for path in Path(folder).glob("*.pth"))


def stop_at_step(monkeypatch, number: int) -> None:
    """Let SIGTERM come in this step of the next run."""
    step, steps = main.train_step, []

    def interrupted(*args, **kwargs):
        steps.append(args)
        if len(steps) == number:
            signal.raise_signal(signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(main, "train_step", interrupted)


class Killed(BaseException):
    """Ends a run without saving or tidying up anything, as a kill does."""


def kill_at_step(monkeypatch, number: int) -> None:
    step, steps = main.train_step, []

    def killed(*args, **kwargs):
        steps.append(args)
        if len(steps) == number:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(main, "train_step", killed)


def set_scores(monkeypatch, *scores: float) -> None:
    """The mean IoU of the validations that come."""
    left, confusion = iter(scores), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    validation = lambda *_: ({"mean_iou": next(left), "confusion": confusion}, None)  # noqa: E731
    monkeypatch.setattr(main, "evaluate", validation)


# ----------------------------------------------------------------------------------------------------------
# resuming: the state


def test_resume_equals_the_uninterrupted_run(cli, smallest, tmp_path):
    flags = ["--epochs", 3, "--save_every", 1, "--train", *smallest, "--exp"]
    assert cli(*flags, "whole")[0] == 0
    (tmp_path / "data").rename(tmp_path / "whole")
    stem = "whole/deeplab_tiny_custom_v3_whole"
    assert cli(*flags, "x", "--resume", f"{stem}_epoch1.pth")[0] == 0
    assert same_weights(f"{stem}_epoch3.pth", f"{STEM}3.pth")
    rows = [read_log(path) for path in (f"{stem}.csv", LOG)]  # the rows up to there come along
    assert [[(row["iteration"], row["loss"], row["val_mean_iou"]) for row in log] for log in rows] == 2 * [
        [(row["iteration"], row["loss"], row["val_mean_iou"]) for row in rows[0]]
    ]

    Path(f"{STEM}3.pth").unlink()
    status, out, _ = cli(*flags, "x", "--resume", "auto")
    assert status == 0 and "x_epoch2.pth: iteration 4 of 6" in out
    assert same_weights(f"{stem}_epoch3.pth", f"{STEM}3.pth")

    status, out, _ = cli(*flags, "x", "--resume", "auto", "--base_lr", 1, "--seed", 1)
    assert "continues with other flags: --base_lr " in out and " to 1.0, --seed 0 to 1" in out
    assert status == 0 and "nothing is left to train" in out
    status, out, _ = cli(*flags, "new", "--resume", "auto", "--epochs", 1)
    assert status == 0 and "no checkpoint to resume from: a new run begins" in out and "resumed" not in out


def test_optimizer_state_as_the_original_wrote_it(cli, smallest, tmp_path):
    """torch of 2018 had fewer options of SGD, and named parameters by their addresses."""
    flags = ["--train", "--exp", "x", *smallest]
    assert cli(*flags, "--epochs", 2, "--save_every", 1)[0] == 0
    Path(f"{STEM}2.pth").rename("whole.pth")
    first = torch.load(f"{STEM}1.pth", weights_only=True)
    state, groups = first["optimizer"]["state"], first["optimizer"]["param_groups"]
    address = {number: 140_000_000_000_000 + 72 * number for number in state}
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 1e-4, "nesterov": False}
    published = {
        "state": {address[number]: {"momentum_buffer": s["momentum_buffer"]} for number, s in state.items()},
        "param_groups": [{**options, "params": [address[n] for n in group["params"]]} for group in groups],
    }
    # The tiny backbone is none that a published file could be of, so that it has to name its model.
    entries = {"epoch": 1, "state_dict": first["state_dict"], "optimizer": published, "model": first["model"]}
    torch.save(entries, f"{STEM}1.pth", _use_new_zipfile_serialization=False)
    status, out, _ = cli(*flags, "--epochs", 2, "--resume", f"{STEM}1.pth")
    assert status == 0 and "iteration 2 of 4" in out
    assert same_weights(f"{STEM}2.pth", "whole.pth")


def two_groups(memory_format: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.trunk, model.aspp = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    model.forward = lambda x: model.aspp(model.trunk(x))
    return model.to(memory_format=memory_format)


def take_step(model, optimizer, scaler, seed: int, scale: float = 1.0) -> None:
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    generator = torch.Generator().manual_seed(seed)
    images = scale * torch.randn(2, 3, 9, 9, generator=generator)
    masks = torch.randint(0, 5, (2, 5, 5), generator=generator).byte()
    images, masks = images.to(model.trunk.weight), masks.to(model.trunk.weight.device)
    main.train_step(model, optimizer, scaler, main.CrossEntropy(), images, masks)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ],
)
def test_momentum_takes_the_memory_layout_of_its_parameter(saved, loaded, fused):
    """GroupNorm runs are contiguous on the CPU and channels_last on GPUs, and continue anywhere; so does a
    state that was saved by the other kind of SGD."""
    models, optimizers = [], []
    for layout in (saved, loaded):
        models.append(two_groups(layout))
        optimizers.append(main.make_optimizer(models[-1], fused=fused if layout is loaded else not fused))
    for seed in (0, 1):
        take_step(models[0], optimizers[0], OFF, seed)
    models[1].load_state_dict(models[0].state_dict())
    Training(models[1], optimizers[1], OFF, 2, 1, {}, LABELS, "", "").load_momentum(
        optimizers[0].state_dict()
    )
    assert all(group["fused"] is fused for group in optimizers[1].param_groups)
    for model, optimizer in zip(models, optimizers, strict=True):
        take_step(model, optimizer, OFF, 2)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)
        buffers = optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"]
        torch.testing.assert_close(*buffers)
        assert buffers[1].stride() == b.stride()


def test_momentum_of_another_shape_is_refused(cli, smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest]
    assert cli(*flags, "--epochs", 1)[0] == 0
    checkpoint = torch.load(f"{STEM}1.pth", weights_only=True)
    state = checkpoint["optimizer"]["state"]
    state[0]["momentum_buffer"] = state[0]["momentum_buffer"][:1]
    torch.save(checkpoint, f"{STEM}1.pth")
    status, _, err = cli(*flags, "--epochs", 2, "--resume", "auto")
    assert status == 1 and one_line(err) and "cannot be resumed, only evaluated: the momentum" in err


def with_norms() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.trunk, model.aspp = nn.Conv2d(3, 4, 3), nn.Module()
    model.bn, model.aspp.conv, model.aspp.bn = nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    model.forward = lambda x: model.aspp.bn(model.aspp.conv(model.bn(model.trunk(x))))
    return model


def test_momentum_of_what_is_trained_with_and_without_frozen_norms():
    def begin(frozen: bool) -> Training:
        model = with_norms()
        for norm in (model.bn, model.aspp.bn):
            norm.requires_grad_(not frozen)
        return Training(model, main.make_optimizer(model), OFF, 2, 1, {}, LABELS, "", "")

    def momentum(training: Training) -> dict[str, torch.Tensor]:
        named, state = training.model.named_parameters(), training.optimizer.state
        return {name: state[p]["momentum_buffer"] for name, p in named if p in state}

    trained, frozen, thawed = begin(False), begin(True), begin(False)
    take_step(trained.model, trained.optimizer, OFF, 0)
    before = momentum(trained)
    frozen.load_momentum(trained.optimizer.state_dict())
    convs = {name for name in before if "bn" not in name}
    assert momentum(frozen).keys() == convs and len(convs) == 4 and len(before) == 8
    assert all(torch.equal(momentum(frozen)[name], before[name]) for name in convs)
    take_step(frozen.model, frozen.optimizer, OFF, 1)
    thawed.load_momentum(frozen.optimizer.state_dict())
    for name, buffer in momentum(frozen).items():
        assert torch.equal(momentum(thawed)[name], buffer)
    take_step(thawed.model, thawed.optimizer, OFF, 2)  # of the norms it begins anew
    assert momentum(thawed).keys() == before.keys()


def test_freeze_bn_comes_and_goes_on_resume(cli, small, monkeypatch):
    """The second stage of VOC, and back."""
    flags = ["--train", "--exp", "x", *small, "--aspp_rates", 6, "--save_every", 1, "--base_lr", 1e-6]
    load_momentum, loaded = Training.load_momentum, []

    def counted(training, state):
        load_momentum(training, state)
        named = dict(training.model.named_parameters())
        loaded.append({name for name in named if training.optimizer.state.get(named[name])})

    monkeypatch.setattr(Training, "load_momentum", counted)
    assert cli(*flags, "--epochs", 1)[0] == 0
    for epochs, more in ((2, ["--freeze_bn"]), (3, ["--freeze_bn"]), (4, [])):
        status, out, err = cli(*flags, "--epochs", epochs, "--resume", "auto", *more)
        assert (status, err) == (0, "") and ("--freeze_bn" in out) == (epochs != 3)
    states = [torch.load(f"{STEM}{epoch}.pth", weights_only=True)["state_dict"] for epoch in (1, 2, 3, 4)]
    norms = {key for key in states[0] if "bn" in key or "downsample.1" in key}
    others = states[0].keys() - norms
    for key in norms:
        assert torch.equal(states[0][key], states[2][key])
    assert not torch.equal(states[2]["module.bn1.weight"], states[3]["module.bn1.weight"])
    for before, after in zip(states, states[1:], strict=False):
        assert not any(torch.equal(before[key], after[key]) for key in others)
    assert loaded[0] == loaded[1] and len(loaded[0]) == len(others)


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


def test_place_within_an_epoch_of_another_length(monkeypatch):
    monkeypatch.setattr(checkpoints, "load_weights", lambda *_: None)
    model = two_groups(torch.contiguous_format)
    model.classes, model.reading, model.config = ["a"], AS_STORED, {"output_stride": 16}
    optimizer = main.make_optimizer(model)

    def place(epoch: int, iteration: int, per_epoch_before: int, per_epoch: int) -> tuple[int, int]:
        entries = {"epoch": epoch, "iteration": iteration, "per_epoch": per_epoch_before, "images": 9}
        entries["optimizer"] = optimizer.state_dict()
        monkeypatch.setattr(checkpoints, "read", lambda path: entries)
        training = Training(model, optimizer, OFF, 9, per_epoch, {}, LABELS, "", "")
        training.resume("x.pth")
        assert training.resumed == Resumed("x.pth", iteration, per_epoch_before)
        return training.epoch, training.iteration

    assert place(5, 50, 10, 20) == (5, 100)
    assert place(4, 45, 10, 20) == (4, 90)
    assert place(4, 45, 10, 10) == (4, 45)
    assert place(4, 45, 10, 3) == (4, 13)
    assert place(4, 40, 10, 3) == (4, 12)
    for per_epoch in range(1, 40):
        for iteration in range(40, 50):
            assert 4 * per_epoch <= place(4, iteration, 10, per_epoch)[1] < 5 * per_epoch


@pytest.mark.parametrize("change", ["images", "masks", "other images of these names", "--flip"])
def test_validations_that_do_not_compare_begin_anew(cli, smallest, tmp_path, monkeypatch, change):
    """On other images, or done in another way: the best before is neither waited for, nor taken."""
    found = iter([0.9, 0.8, 0.3, 0.2])
    details = SimpleNamespace(sample_sheet=None)
    result = {"confusion": np.eye(3, dtype=int).tolist()}
    monkeypatch.setattr(main, "evaluate", lambda *_: ({**result, "mean_iou": next(found)}, details))
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto"]
    assert cli(*flags, "--epochs", 1)[0] == 0
    flags += ["--overlap", 0.5]  # which means nothing without --tile
    assert "do not count" not in cli(*flags, "--epochs", 2)[1]
    lists = tmp_path / "set/list/val.txt"
    if change == "images":
        lists.write_text("\n".join(lists.read_text().splitlines()[1:]))
    elif change == "masks":
        Image.fromarray(np.full((60, 80), 2, np.uint8)).save(tmp_path / "set/masks/val1.png")
    elif change != "--flip":
        for i in range(3):
            Image.new("RGB", (80, 60), "red").save(tmp_path / f"set/images/val{i}.jpg", quality=99)
    status, out, _ = cli(*flags, "--epochs", 4, *(["--flip"] if change == "--flip" else []))
    assert status == 0 and "the mean IoUs before do not count any more" in out
    assert ("--flip False to True" in out) == (change == "--flip")
    assert "epoch 3 had the best validation, mean IoU 30.00" in out and "was not validated" not in out
    assert find_checkpoint("tiny", "custom", "x", None, best=True) == f"{STEM}3.pth"


def test_keep_leaves_the_best_of_validations_that_do_not_compare(cli, smallest, monkeypatch, capsys):
    validations(monkeypatch, [0.9, 0.2, 0.3, 0.2, 0.1])
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--keep", 1]
    assert cli(*flags, "--epochs", 2)[0] == 0
    status, out, _ = cli(*flags, "--epochs", 4, "--flip")
    assert status == 0 and out.count("the mean IoUs before do not count any more") == 1
    assert "--keep leaves the best of them, that of epoch 1" in out
    find_checkpoint("tiny", "custom", "x", None, best=True)
    assert (
        "2 validations on other images, masks or in another way: --best passes them over"
        in capsys.readouterr().out
    )
    os.remove(LOG)
    assert cli(*flags, "--epochs", 5, "--flip")[0] == 0  # also when it is resumed once more, without the log
    assert [saved.epoch for saved in Run("tiny", "custom", "x").saved()] == [1, 3, 5]


def test_validations_in_a_log_without_what_tells_them_are_those_of_the_checkpoint(cli, smallest, monkeypatch):
    validations(monkeypatch, [0.9, 0.2, 0.3])
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--keep", 1]
    assert cli(*flags, "--epochs", 1)[0] == 0
    rows = [line.rsplit(",", 1)[0] for line in Path(LOG).read_text().splitlines()]  # of an earlier version
    Path(LOG).write_text("\n".join([*rows, ""]))
    status, out, _ = cli(*flags, "--epochs", 3, "--flip")
    assert status == 0 and "the mean IoUs before do not count any more" in out
    assert [saved.epoch for saved in Run("tiny", "custom", "x").saved()] == [1, 3]
    assert find_checkpoint("tiny", "custom", "x", None, best=True) == f"{STEM}3.pth"


def test_resumed_run_tells_what_it_began_with(cli, smallest):
    flags = ["--train", *smallest, "--save_every", 1, "--exp"]
    assert cli(*flags, "a", "--epochs", 1)[0] == 0
    init, flags = f"data/{NAME[:-1]}a_epoch1.pth", [*flags, "x"]
    assert cli(*flags, "--epochs", 1, "--init", init)[0] == 0
    assert cli(*flags, "--epochs", 2, "--resume", "auto")[0] == 0
    told = torch.load(f"{STEM}2.pth", weights_only=True)["flags"]
    assert told["init"] == init and told["epochs"] == 2


def test_first_validation_that_does_not_compare_is_told(cli, smallest, monkeypatch):
    """Its checkpoint was saved before it: the log alone has it."""
    validations(monkeypatch, [0.9, 0.2])
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--log_every", 1]
    assert cli(*flags, "--epochs", 1)[0] == 0
    status, out, _ = cli(*flags, "--epochs", 2, "--flip")
    assert status == 0 and "any more (--keep leaves the best of them, that of epoch 1)" in out


def test_keep_leaves_the_best_that_is_there(cli, smallest, monkeypatch):
    """The best of a run that another one continues stays the other's file."""
    validations(monkeypatch, [0.9, 0.8, 0.6, 0.7, 0.5])
    flags = ["--train", *smallest, "--save_every", 1, "--epochs"]
    assert cli(*flags, 1, "--exp", "y")[0] == 0
    start = STEM.replace("_x_", "_y_") + "1.pth"
    assert cli(*flags, 5, "--exp", "x", "--keep", 1, "--resume", start)[0] == 0
    assert [saved.epoch for saved in Run("tiny", "custom", "x").saved()] == [2, 5]
    assert find_checkpoint("tiny", "custom", "x", None, best=True) == f"{STEM}2.pth"


def test_validations_of_checkpoints_that_are_gone_stay(cli, smallest, monkeypatch):
    """Their rows are of another attempt, which data/old keeps."""
    validations(monkeypatch, [0.1, 0.2, 0.3, 0.4, 0.5])
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--epochs", 3]
    assert cli(*flags)[0] == 0
    before = Path(LOG).read_bytes()
    for epoch in (2, 3):
        os.remove(f"{STEM}{epoch}.pth")
    status, out, _ = cli(*flags, "--resume", "auto", "--base_lr", 0.001)
    assert status == 0 and f"had beyond {STEM}1.pth to data/old/x-1\n" in out
    assert contents("data/old/x-1") == {f"{NAME}.csv": before}


def test_other_images_to_train_on_are_told(cli, smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--resume", "auto", "--epochs"]
    assert cli(*flags, 1)[0] == 0
    assert "other images" not in cli(*flags, 2)[1]
    lists = tmp_path / "set/list/train.txt"
    lists.write_text(lists.read_text().replace("train0", "val0"))
    status, out, _ = cli(*flags, 3)
    assert status == 0 and "trains on other images than before\n" in out


def test_checkpoints_that_are_copied_without_their_log(cli, smallest, tmp_path, monkeypatch):
    """They tell the validations, which the new log has, too: --best goes by it."""
    validations(monkeypatch, [0.9, 0.2, 0.3, 0.4])
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto"]
    assert cli(*flags, "--epochs", 3)[0] == 0
    os.remove(LOG)
    status, out, _ = cli(*flags, "--epochs", 4)
    assert status == 0 and f"epoch 1 had the best validation, mean IoU 90.00: --best takes {STEM}1.pth" in out
    assert find_checkpoint("tiny", "custom", "x", None, best=True) == f"{STEM}1.pth"
    assert [row["val_mean_iou"] for row in read_log() if row["val_mean_iou"]] == ["0.9", "0.2", "0.4"]


def test_validation_that_a_stop_prevented_is_told_of_the_best(cli, smallest, monkeypatch, capsys):
    validations(monkeypatch, [0.5])
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1]
    assert cli(*flags, "--epochs", 1)[0] == 0

    def stopped(*args):
        raise Stopped

    monkeypatch.setattr(main, "validate", stopped)
    assert cli(*flags, "--epochs", 2, "--resume", "auto")[0] == 143
    assert find_checkpoint("tiny", "custom", "x", None, best=True) == f"{STEM}1.pth"
    assert f"{STEM}2.pth was not validated: --best passes it over" in capsys.readouterr().out


def test_log_of_another_run_is_no_log_of_a_checkpoint(cli, smallest, tmp_path, monkeypatch):
    """Checkpoints of a longer run of the same name, copied from another machine, say."""
    validations(monkeypatch, [0.5] * 9)
    flags = ["--train", *smallest, "--save_every", 1, "--resume", "auto", "--exp"]
    assert cli(*flags, "x", "--epochs", 1)[0] == 0
    assert cli(*flags, "y", "--epochs", 4)[0] == 0
    os.rename(STEM.replace("x", "y") + "4.pth", f"{STEM}4.pth")
    status, _, err = cli("--exp", "x", *smallest[:4], "--best")
    assert status == 1 and one_line(err) and f"{LOG} ends before {STEM}4.pth" in err
    status, out, _ = cli(*flags, "x", "--epochs", 5)
    assert status == 0 and "moved the log of another run of --exp x, which does not reach" in out
    assert [row["epoch"] for row in read_log() if row["loss"]] == ["5"]
    assert [row["epoch"] for row in read_log("data/old/x-1/" + Path(LOG).name)] == ["1"]


def test_init_of_the_run_that_begins_anew(cli, smallest, tmp_path):
    """It would be moved away, and the same command would begin from other weights the next time."""
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 1]
    assert cli(*flags)[0] == 0
    before = contents("data")
    status, _, err = cli(*flags, "--init", f"{STEM}1.pth")
    assert status == 1 and one_line(err) and "is of --exp x, which begins anew: choose another --exp" in err
    assert contents("data") == before


def test_images_per_second_are_those_that_were_trained(cli, tmp_path, monkeypatch):
    """Also where an epoch's last batch is smaller, or a batch larger than the list."""
    clock = iter(range(10_000))
    monkeypatch.setattr(main.time, "perf_counter", lambda: next(clock))
    root = make_list_dataset(tmp_path / "set", train=5)
    flags = ["--train", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK, "--epochs", 2]
    for batch_size, images in ((2, [2, 2, 1]), (4, [4, 1]), (9, [5])):
        status, out, _ = cli(*flags, "--batch_size", batch_size, "--exp", batch_size, "--log_every", 1)
        rows = read_log(LOG.replace("_x", f"_{batch_size}"))
        seconds = [
            round(n / float(row["images_per_second"]), 6) for n, row in zip(images * 2, rows, strict=True)
        ]
        assert status == 0 and len(set(seconds)) == 1


def test_steps_of_tensorboard_grow_when_an_epoch_has_fewer(cli, smallest, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written[:] = [step for step in written if step < purge_step]

        def add_scalar(self, name, value, step):
            written.append(step)

        add_image = close = flush = lambda self, *args, **options: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--tensorboard"]
    flags += ["--log_every", 1000]
    for epochs, batch_size in ((2, 2), (3, 6), (4, 2)):  # of 3, 1 and 3 iterations
        assert cli(*flags, "--epochs", epochs, "--batch_size", batch_size)[0] == 0
    assert sorted(set(written)) == [3, 6, 7, 10]


def test_another_number_of_threads_is_told(cli, smallest, monkeypatch):
    """It rounds differently: a resumed run is not that of one number, to the bit."""
    flags = ["--train", "--exp", "x", *smallest, "--resume", "auto"]
    assert cli(*flags, "--epochs", 1)[0] == 0
    assert "threads, not" not in cli(*flags, "--epochs", 2)[1]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    status, out, _ = cli(*flags, "--epochs", 3)
    assert status == 0 and f"torch has {threads + 1} threads, not {threads} as before" in out


def test_output_stride_stays_in_a_resumed_run(cli, smallest):
    flags = ["--train", "--exp", "x", *smallest, "--resume", "auto"]
    assert cli(*flags, "--epochs", 1, "--output_stride", 32)[0] == 0
    status, _, err = cli(*flags, "--epochs", 2)
    assert status == 1 and one_line(err) and "--output_stride 32, and not 16" in err


def test_init_and_resume_auto(cli, smallest, monkeypatch):
    """As schedulers start a job again: it begins once from the weights, and then goes on."""
    flags = [*smallest, "--save_every", 1]
    assert cli("--train", "--exp", "a", *flags, "--epochs", 1)[0] == 0
    start = f"{STEM}1.pth".replace("_x_", "_a_")
    flags = ["--train", "--exp", "x", *flags, "--init", start, "--resume", "auto"]
    status, out, _ = cli(*flags, "--epochs", 1)
    assert status == 0 and "a new run begins" in out and f"starts from {start}" in out
    status, out, _ = cli(*flags, "--epochs", 2)
    assert status == 0 and f"resumed from {STEM}1.pth" in out and "starts from" not in out
    status, _, err = cli(*flags[:-2], "--resume", start)
    assert status == 2 and one_line(err) and "only --resume auto goes with --init" in err


def test_resume_auto_begins_no_run_beside_one_on_another_backbone(cli, smallest):
    assert cli("--train", "--exp", "x", *smallest, "--epochs", 1)[0] == 0
    flags = ["--train", "--exp", "x", *smallest, "--backbone", "resnet50", "--resume", "auto"]
    status, _, err = cli(*flags)
    assert status == 1 and one_line(err) and "but none of resnet50: give --backbone tiny" in err


def test_dropout_is_that_of_the_iteration(cli, smallest):
    """torchvision's head has some: a resumed run ends at the same weights."""
    flags = ["--train", *smallest, "--head", "torchvision", "--save_every", 1, "--epochs", 2]
    assert cli(*flags, "--exp", "x")[0] == 0
    assert cli(*flags, "--exp", "y", "--resume", f"{STEM}1.pth")[0] == 0
    assert same_weights(f"{STEM}2.pth", f"{STEM}2.pth".replace("_x_", "_y_"))


def test_freeze_bn_of_a_head_that_is_new(cli, small, tmp_path):
    torch.save(deeplab.build("tiny", False).trunk.state_dict(), tmp_path / "trunk.pth")
    status, _, err = cli("--train", "--exp", "x", *small, "--freeze_bn", "--init", "trunk.pth")
    assert status == 1 and one_line(err) and "--freeze_bn would freeze ASPP, which is new" in err


def test_init_takes_all_but_a_classifier_of_other_classes(cli, small, tmp_path):
    flags = [*small, *NETWORK, "--epochs", 1]
    assert cli("--train", "--exp", "x", *flags)[0] == 0
    make_list_dataset(tmp_path / "set", classes=("a", "b", "c", "d"))
    flags = ["--train", "--exp", "y", *flags, "--init", f"{STEM}1.pth"]
    status, out, _ = cli(*flags, "--base_lr", 0)
    assert status == 0 and f"starts from {STEM}1.pth without aspp.conv3.weight and aspp.conv3.bias" in out
    paths = f"{STEM}1.pth", f"{STEM}1.pth".replace("_x_", "_y_")
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in paths)
    differing = [key for key in before if not torch.equal(before[key], after[key])]
    assert differing == ["module.aspp.conv3.weight", "module.aspp.conv3.bias"]
    status, _, err = cli(*flags, "--groups", 16)
    assert status == 1 and one_line(err) and "--groups" in err


# ----------------------------------------------------------------------------------------------------------
# resuming: what becomes of checkpoints and rows


def places(path: str | Path = LOG) -> list[str]:
    """The rows of a log as iteration/per_epoch."""
    return [f"{row['iteration']}/{row['per_epoch']}" for row in read_log(path)]


def test_log_of_a_run_and_of_the_resumed_one(cli, smallest):
    flags = ["--train", "--exp", "x", *smallest, "--log_every", 1, "--save_every", 1, "--base_lr", 0]
    assert cli(*flags, "--epochs", 1)[0] == 0
    first = read_log()
    assert cli(*flags, "--epochs", 2, "--resume", "auto")[0] == 0
    rows = read_log()
    assert rows[:2] == first and places() == ["1/2", "2/2", "3/2", "4/2"]
    assert [(row["epoch"], row["lr"], bool(row["val_mean_iou"])) for row in rows] == [
        (epoch, "0.0", validated) for epoch in "12" for validated in (False, True)
    ]


def test_new_run_moves_the_earlier_one_aside(cli, smallest, tmp_path):
    """Stopped in its first epoch, it is the one to continue, not the three epochs before it."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto"]
    assert cli(*flags, "--epochs", 3)[0] == 0
    Path(f"data/{NAME}.png").write_text("its plot")
    more = [f"runs/{NAME}/events", f"val/{NAME}_epoch1/metrics.json", f"val/{NAME}_epoch3/metrics.json"]
    for path in more:
        Path(f"data/{path}").parent.mkdir(parents=True)
        Path(f"data/{path}").write_text("{}")
    before = contents("data")
    for number in (1, 2):
        status, out, _ = cli(*flags[:-2], "--epochs", 3, "--seed", number)
        folder = f"data/old/x-{number}"
        assert status == 0 and f"moved what an earlier run of --exp x left to {folder}\n" in out
        assert contents(folder) == before
        assert [Path(f"{folder}/{path}").exists() for path in more] == 3 * [number == 1]
        before = contents("data")
        assert len(before) == 4 and not any(Path(f"data/{path}").parent.exists() for path in more)

    # Going back to an earlier checkpoint keeps the later ones aside, too, and their results.
    for path in more[1:]:
        Path(f"data/{path}").parent.mkdir(parents=True)
    status, out, _ = cli(*flags[:-1], f"{STEM}1.pth", "--epochs", 2)
    assert status == 0 and f"moved what --exp x had beyond {STEM}1.pth to data/old/x-3\n" in out
    assert contents("data/old/x-3") == {name: file for name, file in before.items() if "epoch1" not in name}
    assert [path.name for path in Path("data/old/x-3/val").iterdir()] == [f"{NAME}_epoch3"]
    assert [path.name for path in Path("data/val").iterdir()] == [f"{NAME}_epoch1"]


def test_what_lies_in_data_is_the_resumed_runs(cli, smallest):
    """The first run goes on after a second of its name: nothing of that passes for its own."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--log_every", 1]
    assert cli(*flags, "--epochs", 2)[0] == 0
    first = contents("data")
    assert cli(*flags, "--epochs", 3, "--seed", 1)[0] == 0
    second = contents("data")
    status, out, _ = cli(*flags, "--epochs", 4, "--resume", f"data/old/x-1/{NAME}_epoch2.pth")
    assert status == 0 and "moved what an earlier run of --exp x left to data/old/x-2\n" in out
    assert contents("data/old/x-1") == first and contents("data/old/x-2") == second
    assert epochs_left() == [3, 4] and places() == [f"{i}/2" for i in range(1, 9)]
    assert Path(LOG).read_bytes().startswith(first[f"{NAME}.csv"])


def test_resume_of_a_file_of_another_name(cli, smallest):
    """A copy stands beside no log; nothing is taken for one."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1]
    assert cli(*flags, "--epochs", 2)[0] == 0
    before = contents("data")
    shutil.copy(f"{STEM}1.pth", "copy.pth")
    status, out, _ = cli(*flags, "--epochs", 2, "--resume", "copy.pth")
    assert status == 0 and "edited" not in out and list(contents(".", "copy*")) == ["copy.pth"]
    assert contents("data/old/x-1") == before
    assert epochs_left() == [2] and places() == ["4/2"]


def test_killed_before_its_first_checkpoint(cli, smallest, monkeypatch):
    """The rows are all that there is of it."""
    flags = ["--train", "--exp", "x", *smallest, "--log_every", 1, "--epochs", 9]
    kill_at_step(monkeypatch, 8)
    with pytest.raises(Killed):
        cli(*flags)
    rows = Path(LOG).read_bytes()
    assert len(rows.splitlines()) == 8
    status, out, _ = cli(*flags, "--epochs", 1, "--resume", "auto")
    assert (
        status == 0 and "a new run begins" in out and "earlier run of --exp x left to data/old/x-1\n" in out
    )
    assert contents("data/old/x-1") == {f"{NAME}.csv": rows} and places() == ["1/2", "2/2"]


@pytest.mark.parametrize(
    ("more", "copied"),
    [([], False), (["--batch_size", 2], True), (["--epochs", 2], True)],
)
def test_rows_of_a_killed_run_are_written_again_or_kept(cli, smallest, monkeypatch, more, copied):
    """The same command writes them again; with another batch size, or to fewer epochs, it does not."""
    flags = ["--train", "--exp", "x", *smallest, "--log_every", 1, "--save_every", 1]
    assert cli(*flags, "--epochs", 1)[0] == 0
    kill_at_step(monkeypatch, 4)
    with pytest.raises(Killed):
        cli(*flags, "--epochs", 3, "--save_every", 9, "--resume", "auto")
    rows = Path(LOG).read_bytes()
    assert places() == [f"{i}/2" for i in range(1, 6)]
    status, out, _ = cli(*flags, "--epochs", 3, "--resume", "auto", *more)
    assert status == 0 and (f"had beyond {STEM}1.pth to data/old/x-1\n" in out) == copied
    assert contents("data/old/x-1") == ({f"{NAME}.csv": rows} if copied else {})


def test_batch_size_that_is_larger_within_an_epoch(cli, smallest, tmp_path, monkeypatch):
    """Stopped at 18 of 12 an epoch, and then at 10 of 6 an epoch: that is the newer one."""
    make_list_dataset(tmp_path / "set", train=12)
    flags = ["--train", "--exp", "x", *smallest, "--log_every", 1, "--epochs", 3, "--keep", 1]
    stop_at_step(monkeypatch, 18)
    assert f"{STEM}1_iter18.pth is saved" in cli(*flags, "--batch_size", 1)[2]
    stop_at_step(monkeypatch, 1)
    status, out, err = cli(*flags, "--batch_size", 2, "--resume", "auto")
    assert status == 143 and "iter18.pth: iteration 9 of 18" in out and f"{STEM}1_iter10.pth is saved" in err
    assert list(contents("data", "*.pth")) == [f"{NAME}_epoch1_iter10.pth"]
    assert find_checkpoint(None, "custom", "x", None) == f"{STEM}1_iter10.pth"
    status, out, _ = cli(*flags, "--batch_size", 2, "--resume", "auto")
    assert status == 0 and "iter10.pth: iteration 10 of 18" in out and epochs_left() == [3]
    assert places() == [*(f"{i}/12" for i in range(1, 19)), *(f"{i}/6" for i in range(10, 19))]
    assert not Path("data/old").exists()


def test_batch_size_that_is_larger_keeps_rows_and_the_best(cli, smallest, monkeypatch):
    set_scores(monkeypatch, 0.9, 0.2, 0.3, 0.4)
    flags = ["--train", "--exp", "x", *smallest, "--log_every", 1, "--save_every", 1]
    assert cli(*flags, "--epochs", 2, "--batch_size", 2)[0] == 0
    before = Path(LOG).read_bytes()
    assert cli(*flags, "--epochs", 4, "--batch_size", 4, "--keep", 2, "--resume", "auto")[0] == 0
    assert Path(LOG).read_bytes().startswith(before) and epochs_left() == [1, 3, 4]
    assert places() == ["1/3", "2/3", "3/3", "4/3", "5/3", "6/3", "5/2", "6/2", "7/2", "8/2"]
    assert not Path("data/old").exists()


def test_going_back_with_a_smaller_batch_forgets_the_abandoned_epoch(cli, smallest, monkeypatch):
    set_scores(monkeypatch, 0.2, 0.9, 0.1, 0.15)
    flags = ["--train", "--exp", "x", *smallest, "--log_every", 1, "--save_every", 1]
    assert cli(*flags, "--epochs", 2)[0] == 0
    before = contents("data")
    more = ["--epochs", 3, "--batch_size", 2, "--keep", 1, "--resume", f"{STEM}1.pth"]
    assert cli(*flags, *more)[0] == 0
    assert places() == ["1/2", "2/2", *(f"{i}/3" for i in range(4, 10))]
    assert epochs_left() == [1, 3]  # the best of this run, and the newest
    del before[f"{NAME}_epoch1.pth"]
    assert contents("data/old/x-1") == before


@pytest.mark.parametrize("colored", [False, True])
def test_masks_that_mean_something_else_are_not_resumed(cli, smallest, tmp_path, colored):
    """Two classes whose values or colours change places keep their names and their order. New names, values
    that are added, and checkpoints that do not tell, go on."""
    colors = {0: (0, 0, 0), 1: (9, 9, 9), 2: (0, 80, 200)}
    ends = [f" {' '.join(map(str, color))}" if colored else f" = {i}" for i, color in colors.items()]
    for path in (tmp_path / "set/masks").iterdir() if colored else ():
        mask = np.array(Image.open(path))
        Image.fromarray(np.array(list(colors.values()), np.uint8)[mask]).save(path)
    classes, flags = tmp_path / "set/classes.txt", ["--train", "--exp", "x", *smallest, "--resume", "auto"]

    def write(names, ends, more=""):
        classes.write_text("".join(f"{a}{b}\n" for a, b in zip(names, ends, strict=True)) + more)

    write("abc", ends)
    assert cli(*flags, "--epochs", 1)[0] == 0
    write("abc", [ends[0], ends[2], ends[1]])
    status, _, err = cli(*flags, "--epochs", 2)
    pixel = "colour 9 9 9" if colored else "value 1"
    assert status == 1 and one_line(err)
    assert f"{STEM}1.pth: in the masks {pixel} was 'b', and now it is 'c'" in err
    before = torch.load(f"{STEM}1.pth")
    torch.save({key: value for key, value in before.items() if key != "masks"}, f"{STEM}1.pth")
    assert cli(*flags, "--epochs", 2)[0] == 0  # written by an earlier version
    write("xbc", [ends[0], ends[2], ends[1]], "ignore = 77\n")
    assert cli(*flags, "--epochs", 3)[0] == 0


def test_list_that_grew(cli, smallest, tmp_path):
    """The run continues at the same fraction of its schedule, and no epoch that is done is written again."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--epochs"]
    assert cli(*flags, 4)[0] == 0
    before = contents("data", "*.pth")
    lines = (tmp_path / "set/list/train.txt").read_text()
    (tmp_path / "set/list/train.txt").write_text(lines + lines)
    status, out, _ = cli(*flags, 6, "--resume", "auto")
    assert status == 0 and "an epoch is 12 images in 3 iterations, not 6 images in 2 iterations" in out
    assert "iteration 12 of 18" in out and len(before) == 4
    after = contents("data", "*.pth")
    assert len(after) == 6 and before.items() <= after.items() and not Path("data/old").exists()


def test_list_that_shrank(cli, smallest, tmp_path, monkeypatch):
    """The checkpoint that the run continues stays until there is a newer one, though its iterations lie
    beyond those of the shorter epochs."""
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 3, "--batch_size", 2]
    stop_at_step(monkeypatch, 8)
    assert cli(*flags)[0] == 143
    lines = (tmp_path / "set/list/train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "set/list/train.txt").write_text("".join(lines[:2]))
    prune, seen = Run.prune, []

    def pruned(run, newest, *args):
        seen.append([item.path for item in run.saved()])
        prune(run, newest, *args)

    monkeypatch.setattr(Run, "prune", pruned)
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and "iter8.pth: iteration 2 of 3" in out and not Path("data/old").exists()
    assert seen == [[f"{STEM}2_iter8.pth", f"{STEM}3.pth"], [f"{STEM}3.pth"]]


def test_keep_leaves_the_newest_and_the_best(cli, smallest, monkeypatch):
    set_scores(monkeypatch, 0.2, 0.9, 0.3, 0.1, 0.5, 0.0)
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--keep", 2]
    for epochs in (4, 5):  # the best is known after resuming, too
        assert cli(*flags, "--epochs", epochs)[0] == 0
        assert epochs_left() == [2, epochs - 1, epochs]
    assert cli("--train", "--exp", "y", *smallest, "--epochs", 1, "--keep", 1)[0] == 0
    assert len(contents("data", "*_x_*.pth")) == 3  # another --exp is left alone


def test_best_epoch_outlives_the_log(cli, smallest, monkeypatch):
    set_scores(monkeypatch, 0.2, 0.9, 0.3, 0.1, 0.5)
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto", "--keep", 2]
    assert cli(*flags, "--epochs", 3)[0] == 0
    Path(LOG).unlink()
    assert cli(*flags, "--epochs", 5)[0] == 0
    assert epochs_left() == [2, 4, 5]


def test_newest_checkpoint_goes_by_number_whatever_the_clock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run("tiny", "custom", "x")
    os.mkdir("data")
    order = [(1, 0), (1, 7), (1, 10), (2, 0), (9, 0), (10, 0), (10, 55)]
    for age, (epoch, iteration) in enumerate(order):
        path = Path(run.checkpoint(epoch, iteration))
        path.touch()
        os.utime(path, (10**9 - age, 10**9 - age))
    for name in ("x_y_epoch99", "x_epoch99.tmp", "xx_epoch99", "x_epoch99_best"):
        Path(f"data/deeplab_tiny_custom_v3_{name}.pth").touch()
    assert [item[:2] for item in run.saved()] == order


def test_names_that_look_like_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    run = Run("tiny", "custom", "a_epoch0")
    for epoch in (2, 10):
        Path(run.checkpoint(epoch)).touch()
    assert [item.epoch for item in run.saved()] == [2, 10]
    os.remove(run.checkpoint(10))
    run.prune(run.checkpoint(10), 1, new_training())  # somebody has moved the newest, meanwhile
    assert run.saved() == []


# ----------------------------------------------------------------------------------------------------------
# the disk, the log, the lock


def test_full_disk_leaves_the_checkpoint_before(cli, smallest, tmp_path):
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--resume", "auto"]
    assert cli(*flags, "--epochs", 1)[0] == 0
    before = contents("data", "*.pth*")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        status, _, err = cli(*flags, "--epochs", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1 and one_line(err) and f"cannot write {STEM}2.pth: File too large" in err
    assert contents("data", "*.pth*") == before
    assert cli(*flags, "--epochs", 3)[0] == 0


def new_training(resumed: Resumed | None = None, per_epoch: int = 2) -> Training:
    iteration = resumed.iteration if resumed else 0
    progress = {"iteration": iteration, "resumed": resumed}
    return Training(None, None, OFF, 4, per_epoch, {"epochs": 9}, LABELS, "", "", **progress)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_while_the_log_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(Run("tiny", "custom", "x"), new_training(), False)
    log.file.close()
    log.file = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(UserError, match="cannot write /dev/full: No space left on device"):
        log.write({"epoch": 1, "iteration": 1})


def test_unfinished_files_of_a_killed_run_alone_are_deleted(tmp_path, monkeypatch):
    """Another run may be writing its own, whatever its name."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    names = ["bn_epoch3.pth.77.78.tmp", "bn_epoch3_iter9.pth.77.78.tmp"]
    others = [
        "bn_epoch50_epoch3.pth.77.78.tmp",
        "bn_epoch50_epoch3_iter9.pth.77.78.tmp",
        "b_epoch1.pth.7.8.tmp",
    ]
    for name in [*names, *others]:
        Path(f"data/deeplab_tiny_custom_v3_{name}").touch()
    RunLog(Run("tiny", "custom", "bn"), new_training(), False).close()
    left = {path.name for path in Path("data").glob("*.tmp")}
    assert left == {f"deeplab_tiny_custom_v3_{name}" for name in others}


ROWS = [b"1,1,0.1,0.5,,9,2,", b"1,2,0.1,0.25,0.75,9,2,", b"2,3,0.05,0.125,,9,2,"]
HEADER = ",".join(COLUMNS).encode()
PLAIN = b"\r\n".join([HEADER, *ROWS, b""])


@pytest.mark.parametrize("moment", range(3))
def test_killed_while_it_moves_files_aside(tmp_path, monkeypatch, moment):
    """It copies the log and moves two checkpoints: what is left to do, the next run does."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    run, calls = Run("tiny", "custom", "x"), []
    Path(LOG).write_bytes(
        b"\r\n".join([HEADER, *(b"%d,%d,0.1,0.5,0.75,9,1" % (i, i) for i in (1, 2, 3)), b""])
    )
    for epoch in (1, 2, 3):
        Path(run.checkpoint(epoch)).write_text(str(epoch))

    def killed(function):
        def call(*args):
            calls.append(args)
            if len(calls) == moment + 1:
                raise Killed
            function(*args)

        return call

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "move", killed(shutil.move))
        patch.setattr(runs, "write_whole", killed(runs.write_whole))
        RunLog(run, new_training(Resumed(run.checkpoint(1), 1, 1), 1), False)
    RunLog(run, new_training(Resumed(run.checkpoint(1), 1, 1), 1), False).close()
    assert epochs_left() == [1] and places() == ["1/1"]
    assert sorted(path.read_text() for path in Path("data").rglob("*.pth")) == ["1", "2", "3"]
    assert {place for path in Path("data").rglob("*.csv") for place in places(path)} == {"1/1", "2/1", "3/1"}


@pytest.mark.parametrize(
    ("data", "edited", "kept"),
    [
        (b"", False, []),
        (PLAIN, False, [1, 2, 3]),
        (PLAIN[:-1], False, [1, 2]),  # cut by a kill
        (PLAIN[:-4], False, [1, 2]),
        (PLAIN[:-9], False, [1, 2]),  # a row, but for its last columns
        (PLAIN + b"3,4,0.0", False, [1, 2, 3]),
        (
            PLAIN.replace(b",per_epoch,val_set", b"").replace(b",9,2,", b",9"),
            False,
            [1, 2, 3],
        ),  # of an earlier version
        (PLAIN.replace(b"\r\n", b"\n"), True, [1, 2, 3]),
        (PLAIN.replace(b"\r\n", b"\r"), True, []),
        (b"\xef\xbb\xbf" + PLAIN, True, [1, 2, 3]),
        (PLAIN.replace(b"1,1,", b'"1","1",'), True, [1, 2, 3]),
        (PLAIN.replace(b"2,3,", b"\xe4\xdf note\r\n2,3,"), True, [1, 2, 3]),  # Latin-1
        (PLAIN.replace(b"1,2,", b"# good, so far\r\n\r\n1,2,"), True, [1, 2, 3]),
        (PLAIN.replace(b"\r\n", b",\r\n"), True, [1, 2, 3]),  # a column more
        (PLAIN + b'"' + 200_000 * b"x" + b"\r\n", True, [1, 2, 3]),
        (b"\r\n".join([HEADER, *ROWS[::-1], b""]), True, [1, 2, 3]),
        (PLAIN.replace(b"0.5", b"n/a"), True, [2, 3]),
        (PLAIN.replace(b"0.5", b"inf"), True, [2, 3]),
        (PLAIN.replace(b"\r", b"\0"), True, [1, 2, 3]),
        (b"quite another file\n" * 9, True, []),
        (bytes(range(256)), True, []),
    ],
)
def test_log_that_somebody_edited(tmp_path, monkeypatch, capsys, data, edited, kept):
    """The rows that can be read as CSV are taken over; the file stays beside as it was."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    Path(LOG).write_bytes(data)
    run = Run("tiny", "custom", "x")
    Path(run.checkpoint(1, 3)).touch()
    RunLog(run, new_training(Resumed(run.checkpoint(1, 3), 3, 2)), False).close()
    rows = [ROWS[number - 1] for number in kept]
    assert Path(LOG).read_bytes() == b"\r\n".join([HEADER, *rows, b""])
    backup = Path(f"{LOG}.bak1")
    assert backup.exists() == edited and (not edited or backup.read_bytes() == data)
    notice = f"{LOG} was edited: its {len(kept)} rows are taken over, and {LOG}.bak1 is a copy of it\n"
    assert capsys.readouterr().out == (notice if edited else "")

    training = new_training(Resumed(run.checkpoint(1, 2), 2, 2))
    os.rename(run.checkpoint(1, 3), run.checkpoint(1, 2))
    RunLog(run, training, False).close()  # a run that continues from iteration 2
    assert training.best == (Best(1, 0.75) if 2 in kept else None)
    assert [int(row["iteration"]) for row in read_log()] == [number for number in kept if number < 3]


def test_log_tells_tensorboard_each_thing_once(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (f"data/runs/{NAME}", 1)

        def add_scalar(self, name, value, iteration):
            written.append((name, value, iteration))

        def flush(self):
            pass

        close = flush

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    log = RunLog(Run("tiny", "custom", "x"), new_training(), True)
    row = {"epoch": 1, "iteration": 7, "lr": 0.1, "loss": 2.0, "images_per_second": 3.0, "per_epoch": 7}
    log.write(row)
    log.write({**row, "val_mean_iou": 0.5})
    log.close()
    assert [row["val_mean_iou"] for row in read_log()] == ["0.5"]  # the row is there once, too
    names = ["lr", "loss", "images_per_second", "val_mean_iou"]
    assert written == list(zip(names, [0.1, 2.0, 3.0, 0.5], [7] * 4, strict=True))


def test_tensorboard(cli, smallest):
    flags = ["--train", "--exp", "x", *smallest, "--epochs", 1, "--tensorboard"]
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        status, _, err = cli(*flags)
        assert status == 1 and one_line(err) and "pip install tensorboard" in err
        assert not Path("data").exists()
    else:
        assert cli(*flags)[0] == 0 and list(Path(f"data/runs/{NAME}").iterdir())


def test_plot_of_a_run(cli, smallest, monkeypatch):
    """Drawn at each validation, of all rows: those before a stop, too."""
    pytest.importorskip("matplotlib")
    drawn, draw = [], runs.plot_run

    def counted(path, rows):
        drawn.append((path, len(rows)))
        draw(path, rows)

    monkeypatch.setattr(runs, "plot_run", counted)
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--plots"]
    assert cli(*flags, "--epochs", 2)[0] == 0
    assert cli(*flags, "--epochs", 3, "--resume", "auto")[0] == 0
    assert drawn == [(f"data/{NAME}.png", count) for count in (1, 2, 3)]
    assert Image.open(drawn[0][0]).size == (800, 800)


def validations(monkeypatch, values):
    """Let the validations of runs give these mean IoUs, one after the other."""
    values = iter(values)
    monkeypatch.setattr(main, "validate", lambda *args: (next(values), None))


def test_patience_and_best(cli, smallest, monkeypatch):
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--epochs", 6, "--patience", 2]
    validations(monkeypatch, [0.2, 0.5, 0.4, 0.5])  # as good is not better
    status, out, _ = cli(*flags)
    assert status == 0 and "2 validations were no better than that after epoch 2: training stops\n" in out
    assert f"epoch 2 had the best validation, mean IoU 50.00: --best takes {STEM}2.pth\n" in out
    assert [saved.epoch for saved in Run("tiny", "custom", "x").saved()] == [1, 2, 3, 4]
    # The waiting is over for a resumed run, too; with more patience it goes on, and knows the best.
    before = Path(LOG).read_bytes()
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and "training stops" in out and Path(LOG).read_bytes() == before
    validations(monkeypatch, [0.45, 0.6])
    status, out, _ = cli(*flags, "--resume", "auto", "--patience", 4)
    assert status == 0 and "training stops" not in out and "--best" not in out  # the last is the best
    assert Run("tiny", "custom", "x").best().path == f"{STEM}6.pth"
    # Back at epoch 3, what came later is forgotten.
    validations(monkeypatch, [0.3])
    status, out, _ = cli(*flags, "--resume", f"{STEM}3.pth")
    assert status == 0 and "2 validations were no better than that after epoch 2" in out


def test_patience_without_the_log(cli, smallest, monkeypatch):
    """The checkpoint knows the validations before it."""
    flags = ["--train", "--exp", "x", *smallest, "--save_every", 1, "--epochs", 6, "--patience", 3]
    validations(monkeypatch, [0.5, 0.4, 0.3, 0.2])
    assert cli(*flags)[0] == 0
    os.remove(LOG)
    validations(monkeypatch, [0.1])
    status, out, _ = cli(*flags, "--resume", f"{STEM}4.pth")
    assert status == 0 and "3 validations were no better than that after epoch 1" in out
    # That of an earlier version knows the best of them.
    entries = torch.load(f"{STEM}4.pth")
    entries["best"] = (2, 0.5) if entries.pop("validations") else None
    torch.save(entries, f"{STEM}4.pth")
    os.remove(LOG)
    validations(monkeypatch, [0.1, 0.2])
    status, out, _ = cli(*flags, "--resume", f"{STEM}4.pth", "--patience", 2)
    assert status == 0 and "2 validations were no better than that after epoch 2" in out


def test_best_checkpoint_is_evaluated_predicted_and_exported(cli, smallest, monkeypatch):
    flags = ["--exp", "x", *smallest]
    with monkeypatch.context() as patch:
        validations(patch, [0.2, 0.5, 0.4])
        assert cli("--train", *flags, "--save_every", 1, "--epochs", 3)[0] == 0
    assert find_checkpoint(None, "custom", "x", None) == f"{STEM}3.pth"
    image = next(Path(smallest[smallest.index("--data_root") + 1]).glob("images/*"))
    for command in ([], ["--predict", image], ["--export", "net.pth"]):
        status, out, _ = cli(*command, *flags, "--best")
        assert status == 0 and f"{STEM}2.pth" in out and f"{STEM}3.pth" not in out
    os.remove(f"{STEM}2.pth")
    status, out, _ = cli(*flags, "--best")
    assert (
        status == 0 and f"{STEM}2.pth had the best validation, and is not there: --best takes {STEM}3" in out
    )
    for epoch in (1, 3):
        os.rename(f"{STEM}{epoch}.pth", f"{epoch}.pth")
    status, _, err = cli(*flags[:2], *flags[2:], "--backbone", "tiny", "--best")
    assert (
        status == 1 and one_line(err) and f"{STEM}2.pth had the best validation, and is not there, nor" in err
    )
    Path(LOG).write_bytes(HEADER + b"\r\n")
    status, _, err = cli(*flags, "--best")
    assert status == 1 and one_line(err) and f"no validation is in {LOG}" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--best", "--checkpoint", "a.pth"], "--best"),
        (["--best", "--exp", "x", "--epochs", 3], "--best"),
        (["--best", "--exp", "x", "--train"], "--best"),
        (["--patience", 1, "--exp", "x"], "--patience goes with --train"),
        (["--patience", 3, "--exp", "x", "--train"], "30 epochs have 3 validations"),
    ],
)
def test_best_and_patience_that_have_no_meaning(cli, flags, message):
    status, _, err = cli(*flags)
    assert status == 2 and one_line(err) and message in err


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=1); input()"


def test_two_runs_of_one_exp(cli, smallest):
    os.mkdir("data")
    Path(LOG).write_text("the other's\n")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, LOG], **pipes) as other:
        other.stdout.readline()
        status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *smallest)
        assert status == 1 and one_line(err) and "--exp x is being trained by another process" in err
        assert contents("data") == {f"{NAME}.csv": b"the other's\n"}
        other.kill()
    assert cli("--train", "--exp", "x", "--epochs", 1, *smallest)[0] == 0  # a killed run holds nothing


def test_disk_that_does_not_tell_names_apart(tmp_path, monkeypatch):
    """As on macOS: opening X.csv opens x.csv, and so its checkpoints would be replaced."""
    monkeypatch.chdir(tmp_path)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [name.replace("_X", "_x") for name in listdir(path)])
    RunLog(Run("tiny", "custom", "x"), new_training(), False).close()
    with pytest.raises(UserError, match="--exp X: to this disk another run has the same name"):
        RunLog(Run("tiny", "custom", "X"), new_training(), False)


def test_data_folder_that_cannot_be_written(cli, smallest, tmp_path):
    (tmp_path / "data").write_text("")
    status, _, err = cli("--train", "--exp", "x", "--epochs", 1, *smallest)
    assert (status, err) == (1, "main.py: error: data: File exists\n")

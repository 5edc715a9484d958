"""Nothing let in: checkpoints that would run code, are damaged, or are of another model or program."""

import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import one_line, spoil
from test_runs import two_groups

import deeplab
import main
from files.runs import Length, load_progress


class Program:
    """A pickle that runs a command when it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("flag", ["--checkpoint", "--resume", "--init"])
def test_checkpoint_that_would_run_code(cli, smallest, tmp_path, flag, legacy):
    target = tmp_path / "it_ran"
    hostile = {"epoch": 1, "state_dict": {"conv1.weight": torch.zeros(1)}, "optimizer": Program(target)}
    torch.save(hostile, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    train = ["--train"] * (flag != "--checkpoint")
    status, _, err = cli("--exp", "x", *smallest, *train, flag, "x.pth")
    assert status == 1 and one_line(err) and "x.pth is refused" in err
    assert not target.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert target.exists()  # it would have run


def test_plain_pickle_that_would_run_code(cli, small, tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Program(tmp_path / "it_ran")))
    status, _, err = cli("--predict", "x.pth", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and not (tmp_path / "it_ran").exists()


FLAWS = ["nan", "integers", "lacks one", "one too many", "another shape", "no tensor", "no model", "cut"]


@pytest.mark.parametrize("kind", [*FLAWS, "cut legacy", "text", "empty"])
def test_checkpoint_that_cannot_be_used(cli, smallest, tmp_path, kind):
    spoil(kind, tmp_path / "x.pth")
    for flags in (
        ["--exp", "x", *smallest],
        ["--train", "--resume", "x.pth", "--exp", "x", *smallest],
        ["--predict", "set/images"],
    ):
        checkpoint = [] if "--train" in flags else ["--checkpoint", "x.pth"]
        status, _, err = cli(*flags, *checkpoint)
        assert status == 1 and one_line(err) and "x.pth" in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_checkpoint_without_a_flaw(cli, smallest, tmp_path, kind):
    spoil(kind, tmp_path / "x.pth")
    assert cli("--exp", "x", *smallest, "--checkpoint", "x.pth")[0] == 0


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


@pytest.mark.parametrize(
    "entries",
    [
        {"optimizer": 3},
        {"optimizer": {"state": [], "param_groups": []}},
        {"epoch": math.inf},
        {"flags": {"seed": torch.zeros(2)}},
        {"best": ("x", 1)},
        {"per_epoch": 0},
    ],
)
def test_progress_of_another_kind_is_refused(cli, smallest, tmp_path, entries):
    flags = ["--train", "--exp", "x", *smallest, "--epochs"]
    assert cli(*flags, 1)[0] == 0
    path = tmp_path / "data/deeplab_resnet50_custom_v3_x_epoch1.pth"
    torch.save({**torch.load(path), **entries}, path)
    status, _, err = cli(*flags, 2, "--resume", "auto")
    assert status == 1 and one_line(err) and "cannot be resumed, only evaluated" in err


def test_hyperparameters_are_not_the_checkpoints():
    """Of the optimizer's state only the momentum is taken: what else it says could be another program's."""
    model, off = two_groups(torch.contiguous_format), torch.amp.GradScaler(enabled=False)
    optimizer = main.make_optimizer(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(momentum=0.0, weight_decay=7.0, nesterov=True, fused=False)
    load_progress({"optimizer": state, "epoch": 0}, "x.pth", optimizer, off, Length(2, 1), {})
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)


@pytest.mark.parametrize(
    "config",
    [{"num_classes": 1.5}, {"multi_grid": "abc"}, {"aspp_rates": torch.ones(2)}, {"beta": [], "x": 1}],
)
def test_model_of_another_kind_is_refused(tmp_path, config):
    spoil("", tmp_path / "x.pth")
    checkpoint = torch.load(tmp_path / "x.pth")
    model = {
        "backbone": "resnet50",
        "num_classes": 3,
        "num_groups": 32,
        "weight_std": True,
        "aspp_rates": [6],
    }
    torch.save({**checkpoint, "model": {**model, **config}}, tmp_path / "x.pth")
    with pytest.raises(deeplab.ModelError, match="does not say what model it holds"):
        deeplab.load(str(tmp_path / "x.pth"))

"""Nothing let in: checkpoints that would run code, are damaged, or are of another model or program."""

import math
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from conftest import file_state, one_line, spoil
from processes import narrow
from test_runs import OFF, two_groups

import deeplab
import main
from files import checkpoints
from files.training import Training, training_flags
from utils import UserError

PATH = "data/deeplab_tiny_custom_v3_x_epoch1.pth"


@pytest.fixture(autouse=True)
def narrow_network(monkeypatch):
    narrow(monkeypatch.setattr)


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


def test_plain_pickle_that_would_run_code(cli, tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Program(tmp_path / "it_ran")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the pickle's protocol
        status, _, err = cli("--predict", "x.pth", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "layer4.0.conv2.weight holds values that are not finite"),
        ("integers", "layer4.0.conv2.weight is of type torch.int32, expected torch.float32"),
        ("float8", "layer4.0.conv2.weight is of type torch.float8_e4m3fn, expected torch.float32"),
        ("sparse", "is of type torch.float32 in torch.sparse_coo, expected torch.float32"),
        ("no values", "layer4.0.conv2.weight has a shape, but no values"),
        ("lacks one", "layer4.0.conv2.weight is missing"),
        ("one too many", "1 tensors are not of this model, more first"),
        ("another shape", "layer4.0.conv2.weight has shape (7, 8, 3, 3), expected (8, 8, 3, 3)"),
        ("no tensor", "holds no state_dict of tensors"),
        ("no model", "x.pth"),
        ("cut", "is damaged or not a PyTorch checkpoint"),
        ("cut legacy", "is damaged or not a PyTorch checkpoint"),
        ("text", "is not a PyTorch checkpoint"),
        ("empty", "is damaged or not a PyTorch checkpoint"),
    ],
)
def test_checkpoint_that_cannot_be_used(cli, smallest, tmp_path, kind, message):
    spoil(kind, tmp_path / "x.pth")
    for flags in (
        ["--exp", "x", *smallest, "--checkpoint", "x.pth"],
        ["--train", "--exp", "x", *smallest, "--resume", "x.pth"],
        ["--train", "--exp", "x", *smallest, "--init", "x.pth"],
        ["--predict", "set/images", *smallest, "--checkpoint", "x.pth"],
    ):
        status, _, err = cli(*flags)
        assert status == 1 and one_line(err) and "x.pth" in err and message in err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_checkpoint_without_a_flaw(cli, smallest, tmp_path, kind):
    spoil(kind, tmp_path / "x.pth")
    assert cli("--exp", "x", *smallest, "--checkpoint", "x.pth")[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read checkpoint x.pth: No such file"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "does not hold the weights of a DeepLabv3"),
        ([1, 2], "holds no state_dict of tensors"),
        ({"state_dict": {}}, "holds no state_dict of tensors"),
        ({"state_dict": {"a": torch.zeros(1)}, "model": [1]}, "does not hold the weights of a DeepLabv3"),
        ({"state_dict": {"a": torch.zeros(1)}, "model": {"beta": torch.ones(2)}}, "does not say what model"),
        (
            {"state_dict": {"a": torch.zeros(1)}, "model": {"beta": 1}, "classes": "abc"},
            "does not name its classes",
        ),
        (
            {"state_dict": {"a": torch.zeros(1)}, "model": {"beta": 1}, "classes": ["a", 1]},
            "does not name its classes",
        ),
    ],
)
def test_file_that_is_no_checkpoint(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        torch.save(content, "x.pth")
    with pytest.raises(UserError, match=message):
        deeplab.load("x.pth")


def test_statistics_that_cannot_be(tmp_path):
    """A negative variance gives NaN, of which argmax makes the first class; also where a trunk is alone."""
    model = deeplab.build("tiny", False, 3, aspp_rates=[6], image_pooling=False)
    state, path = file_state(model), str(tmp_path / "x.pth")
    for key, value, message in (
        ("running_var", -torch.ones(8), "layer1.0.bn1.running_var, a variance, is negative"),
        ("running_mean", torch.ones(8) / 0, "layer1.0.bn1.running_mean holds values that are not finite"),
        ("num_batches_tracked", torch.ones(3), "num_batches_tracked has shape"),
    ):
        torch.save({"state_dict": {**state, f"layer1.0.bn1.{key}": value}}, path)
        with pytest.raises(UserError, match=message):
            deeplab.load(path)
        trunk = {k: v for k, v in torch.load(path)["state_dict"].items() if not k.startswith("aspp.")}
        if key != "num_batches_tracked":
            with pytest.raises(UserError, match=message):
                checkpoints.init_weights(model, {"state_dict": trunk}, path)
    torch.save({"state_dict": {key: tensor.half() for key, tensor in state.items()}}, path)
    deeplab.load(path)  # the counts, too, which some programs halve


def test_checkpoint_of_other_flags(cli, smallest, tmp_path):
    """A file in the published format tells less of its model than ours; the line names the flag."""
    spoil("none", tmp_path / "x.pth")
    flags = [word for word in smallest if word not in ("--groups", 32, "--weight_std")]
    differing = "x.pth was trained with other flags: --groups (checkpoint: 32, here: None)\n"
    for command in (["--train", "--resume", "x.pth"], ["--groups", 0, "--checkpoint", "x.pth"]):
        status, _, err = cli("--exp", "x", *flags, *command)
        assert status == 1 and one_line(err) and err.endswith(differing)
    assert cli("--exp", "x", *flags, "--checkpoint", "x.pth")[0] == 0


@pytest.mark.parametrize(
    "entries",
    [
        {"optimizer": 3},
        {"optimizer": {"state": [], "param_groups": []}},
        {"epoch": math.inf},
        {"flags": {"seed": torch.zeros(2)}},
        {"validations": {"x": 1}},
        {"per_epoch": 0},
    ],
)
def test_progress_of_another_kind_is_refused(cli, smallest, entries):
    flags = ["--train", "--exp", "x", *smallest, "--epochs"]
    assert cli(*flags, 1)[0] == 0
    torch.save({**torch.load(PATH), **entries}, PATH)
    before = {path.name for path in Path("data").iterdir()}
    status, _, err = cli(*flags, 2, "--resume", "auto")
    assert status == 1 and one_line(err) and "cannot be resumed, only evaluated" in err
    assert {path.name for path in Path("data").iterdir()} == before


def test_hyperparameters_are_not_the_checkpoints():
    """Of the optimizer's state only the momentum is taken: what else it says could be another program's."""
    model = two_groups(torch.contiguous_format)
    optimizer = main.make_optimizer(model)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(momentum=0.0, weight_decay=7.0, nesterov=True, fused=False)
    Training(model, optimizer, OFF, 2, 1, {}, None, "", "").load_momentum(state)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 1e-4, False)
        assert group["fused"] is True


@pytest.mark.parametrize("flags", [None, ["dataset"], "dataset", 3])
def test_flags_of_another_kind_are_not_the_trainings(flags):
    assert training_flags({"flags": flags}) == {}


@pytest.mark.parametrize(
    "config",
    [{"num_classes": 1.5}, {"multi_grid": "abc"}, {"aspp_rates": torch.ones(2)}, {"beta": [], "x": 1}],
)
def test_model_of_another_kind_is_refused(tmp_path, config):
    path = str(tmp_path / "x.pth")
    spoil("", path)
    checkpoint = torch.load(path)
    model = {**checkpoints.model_config(checkpoints.read(path), path), "backbone": "tiny", "aspp_rates": [6]}
    torch.save({**checkpoint, "model": {**model, **config}}, path)
    with pytest.raises(UserError, match="does not say what model it holds"):
        deeplab.load(path)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "does not name its classes"),
        ({"classes": ["a", "b", "c"]}, "does not name its classes and their colours"),
        ({"classes": ["a", "b", "c"], "palette": [[0, 0, 0]]}, "does not name its classes and their colours"),
        (
            {"classes": ["a", "b", "c"], "palette": [[-1, 0, 0]] * 3},
            "does not name its classes and their col",
        ),
    ],
)
def test_classes_of_another_kind_are_refused(tmp_path, classes, message):
    path = str(tmp_path / "x.pth")
    spoil("", path)
    checkpoint = torch.load(path)
    config = checkpoints.model_config(checkpoints.read(path), path)
    torch.save({**checkpoint, "model": config, **classes}, path)
    with pytest.raises(UserError, match=message):
        deeplab.load(path)
    torch.save({**checkpoint, "model": config, "classes": list("abc"), "palette": [[0, 1, 2]] * 3}, path)
    assert deeplab.load(path).classes == list("abc")

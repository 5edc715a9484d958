"""Exported files: what they compute, what travels in them, and what is said when there can be none."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import one_line
from onnxruntime import InferenceSession
from PIL import Image

import deeplab
from commands import export

writes_onnx = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 cannot write these networks as ONNX"
)
NETWORKS = {
    "bn": {},
    "gn_ws": {"num_groups": 32, "weight_std": True},
    "multi_grid": {"multi_grid": (1, 2, 4), "image_pooling": False},
    "stride 8": {"output_stride": 8, "aspp_rates": (6, 12, 18, 24)},
    "stride 32, beta": {"output_stride": 32, "beta": True},
}
PALETTE = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [9, 8, 7]]


def make_checkpoint(path, monkeypatch, **options):
    """A small network whose labels are about equally common, of weights that are not those of a new one."""
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 3))
    torch.manual_seed(0)
    model = deeplab.resnet50(False, 4, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    model.classes, model.palette = ["ground", "a", "b", "näme"], PALETTE
    torch.save(deeplab.to_checkpoint(model), path)
    return deeplab.load(path)


def run_file(path, images):
    """Labels and logits by the runtime that the format is for."""
    if path.suffix == ".onnx":
        return InferenceSession(path).run(["labels", "logits"], {"image": images})
    labels, logits = torch.export.load(path).module()(torch.from_numpy(images))
    return labels.numpy(), logits.detach().numpy()


@pytest.mark.parametrize(
    ("network", "ending"),
    [
        *(pytest.param(network, "onnx", marks=writes_onnx) for network in NETWORKS),
        ("bn", "pt2"),
        ("gn_ws", "pt2"),
    ],
)
def test_exported_network_predicts_as_the_model(cli, tmp_path, monkeypatch, network, ending):
    """Images of any size and number, among them those that fit the output stride and the smallest."""
    model = make_checkpoint(tmp_path / "x.pth", monkeypatch, **NETWORKS[network])
    status, out, err = cli("--export", f"out/x.{ending}", "--checkpoint", "x.pth")
    assert status == 0 and "% of the labels agree" in out and "Warning" not in err
    assert os.listdir(tmp_path / "out") == [f"x.{ending}"]
    rng = np.random.default_rng(0)
    for n, height, width in ((1, 97, 129), (2, 60, 81), (3, 33, 200), (1, 5, 16), (1, 1, 2)):
        images = np.stack(
            [
                np.asarray(Image.fromarray(each).resize((width, height), Image.Resampling.BICUBIC))
                for each in rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)
            ]
        )
        labels, logits = run_file(tmp_path / f"out/x.{ending}", images.transpose(0, 3, 1, 2))
        expected = np.stack([model.predict(image) for image in images])
        assert labels.dtype == np.uint8 and labels.shape == (n, height, width)
        assert logits.dtype == np.float32 and logits.shape == (n, 4, height, width)
        assert np.array_equal(logits.argmax(1), labels)
        assert (labels == expected).mean() >= (0.999 if labels.size > 1000 else 1)


@writes_onnx
def test_names_and_colours_travel_in_the_file(cli, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "x.pth", monkeypatch, output_stride=32)
    for ending in ("onnx", "pt2"):
        assert cli("--export", f"x.{ending}", "--checkpoint", "x.pth", "--output_stride", 8)[0] == 0
    session, files = InferenceSession("x.onnx"), dict.fromkeys(["classes", "palette", "model"], "")
    torch.export.load("x.pt2", extra_files=files)
    for about in (session.get_modelmeta().custom_metadata_map, files):
        assert json.loads(about["classes"]) == ["ground", "a", "b", "näme"]
        assert json.loads(about["palette"]) == PALETTE
        assert json.loads(about["model"])["output_stride"] == 8
    shapes = {each.name: each.shape for each in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes["image"] == ["batch", 3, "height", "width"]
    assert shapes["labels"] == ["batch", "height", "width"]


def test_export_of_a_published_checkpoint(cli, tmp_path, monkeypatch):
    """The flags say what it holds, as in evaluation."""
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    state = {f"module.{key}": tensor for key, tensor in deeplab.resnet50(False).state_dict().items()}
    torch.save({"epoch": 50, "state_dict": state, "optimizer": {}}, tmp_path / "x.pth")
    status, _, err = cli("--export", "x.pt2", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and "--backbone" in err
    assert cli("--export", "x.pt2", "--checkpoint", "x.pth", "--backbone", "resnet50")[0] == 0
    files = {"classes": ""}
    torch.export.load("x.pt2", extra_files=files)
    assert len(json.loads(files["classes"])) == 21


def test_export_that_differs_is_not_left_behind(cli, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "x.pth", monkeypatch)
    save, load = export.FORMATS[".pt2"]

    def load_shifted(path):
        run = load(path)

        def shifted(image):
            labels, logits = run(image)
            return labels.roll(1, 2), logits

        return shifted

    monkeypatch.setitem(export.FORMATS, ".pt2", (save, load_shifted))
    status, _, err = cli("--export", "x.pt2", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and "not written" in err and os.listdir(tmp_path) == ["x.pth"]


def test_what_an_export_lacks_is_said(cli, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "x.pth", monkeypatch)
    assert "--checkpoint FILE" in cli("--export", "x.onnx")[2]
    assert "--scales" in cli("--export", "x.onnx", "--checkpoint", "x.pth", "--flip")[2]
    status, _, err = cli("--export", "x.torchscript", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and ".pt2 or .onnx" in err
    status, _, err = cli("--export", "x.pth/x.pt2", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and "x.pth/x.pt2" in err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    status, _, err = cli("--export", "x.onnx", "--checkpoint", "absent.pth")
    assert status == 1 and one_line(err) and "pip install onnx onnxscript onnxruntime" in err
    assert os.listdir(tmp_path) == ["x.pth"]

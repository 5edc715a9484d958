"""Exported files: what they compute, what travels in them, and what is said when there can be none."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_line
from PIL import Image

import deeplab
from commands import export
from files.masks import VOC_CLASSES
from files.pictures import voc_palette

# Options of the network, and flags of --export.
NETWORKS = {
    "bn": ({}, ["--backbone", "tiny"]),
    "gn_ws": (
        {"num_groups": 32, "weight_std": True, "aspp_rates": (6,), "output_stride": 32},
        ["--output_stride", 16],
    ),
    "multi_grid": ({"backbone": "three", "multi_grid": (1, 2, 4), "image_pooling": False}, []),
    "stride 8": ({"output_stride": 8, "aspp_rates": (6, 12, 18, 24)}, []),
    "stride 32, beta": ({"output_stride": 32, "beta": True}, []),
    "resnet101": ({"backbone": "resnet101"}, []),
}
CLASSES = ["ground", "a", "b", "näme"]
PALETTE = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [9, 8, 7]]


def skip_without_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot write these networks as ONNX")


def make_checkpoint(path, published=False, backbone="tiny", **options):
    """A network whose labels are about equally common, of weights that are not those of a new one."""
    torch.manual_seed(0)
    model = deeplab.build(backbone, False, 21 if published else 4, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    images = torch.randint(0, 256, (2, 3, 5, 6), dtype=torch.uint8)
    images = torch.nn.functional.interpolate(images.float(), (60, 80), mode="bicubic").clamp(0, 255)
    with torch.inference_mode():
        model.head.conv3.bias -= model.eval().segment(images.byte()).mean((0, 2, 3))
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    ours = {} if published else {"model": model.config, "classes": CLASSES, "palette": PALETTE}
    torch.save({"epoch": 50, "state_dict": state, "optimizer": {}, **ours}, path)


def open_file(path):
    """What runs the images through a file, by the runtime that its format is for, and its metadata."""
    if path.suffix == ".onnx":
        from onnxruntime import InferenceSession

        session = InferenceSession(path)
        shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
        assert shapes["image"] == ["batch", 3, "height", "width"]
        assert shapes["labels"] == ["batch", "height", "width"]
        about = session.get_modelmeta().custom_metadata_map
        return lambda images: session.run(["labels", "logits"], {"image": images}), about
    about = dict.fromkeys(["classes", "palette", "model", "checkpoint"], "")
    network = torch.export.load(path, extra_files=about).module()
    return lambda images: [out.detach().numpy() for out in network(torch.from_numpy(images))], about


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
@pytest.mark.parametrize(
    "network",
    [name if name in ("bn", "gn_ws") else pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS],
)
def test_exported_network_predicts_as_the_model(cli, tmp_path, monkeypatch, network, ending):
    """Images of any size and number, among them those that fit the output stride and the smallest. The flags
    say what a published checkpoint holds, as in evaluation; names and colours travel in the file."""
    if ending == "onnx":
        skip_without_onnx()
    monkeypatch.setitem(deeplab.BACKBONES, "three", {"layers": (1, 1, 1, 3)})  # one block for each rate
    (options, flags), published = NETWORKS[network], network == "bn"
    make_checkpoint(tmp_path / "x.pth", published, **options)
    if published:  # its tensors tell the backbone; a flag that contradicts them is an error
        status, _, err = cli("--export", f"out/x.{ending}", "--checkpoint", "x.pth", "--backbone", "resnet50")
        assert status == 1 and one_line(err) and "--backbone" in err
    status, out, err = cli("--export", f"out/x.{ending}", "--checkpoint", "x.pth", *flags)
    assert status == 0 and "% of the labels agree" in out and "Warning" not in err
    assert os.listdir(tmp_path / "out") == [f"x.{ending}"]
    run, about = open_file(tmp_path / f"out/x.{ending}")
    about = {key: json.loads(about[key]) for key in ("classes", "palette", "model", "checkpoint")}
    stride = 16 if network == "gn_ws" else options.get("output_stride", 16)
    assert about["model"]["output_stride"] == stride and about["checkpoint"] == "x.pth"
    if published:
        assert about["classes"] == VOC_CLASSES and about["palette"] == voc_palette(21)
    else:
        assert about["classes"] == CLASSES and about["palette"] == PALETTE

    model, rng = deeplab.load(tmp_path / "x.pth", output_stride=stride), np.random.default_rng(0)
    for n, height, width in ((1, 97, 129), (2, 60, 81), (3, 33, 200), (1, 5, 16), (1, 1, 2)):
        images = np.stack(
            [
                np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC))
                for blocks in rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8)
            ]
        )
        labels, logits = run(images.transpose(0, 3, 1, 2))
        expected = np.stack([model.predict(image) for image in images])
        assert labels.dtype == np.uint8 and labels.shape == (n, height, width)
        assert logits.dtype == np.float32 and logits.shape == (n, len(about["classes"]), height, width)
        assert np.array_equal(logits.argmax(1), labels)
        assert (labels == expected).mean() >= (0.999 if labels.size > 1000 else 1)
        assert len(np.unique(expected)) > 1 or labels.size < 1000  # so that there is something to compare


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_example_of_the_readme_predicts_as_the_model(cli, tmp_path, ending):
    """As it stands there, also of photos that are turned, and of grey of 16 bits."""
    if ending == "onnx":
        skip_without_onnx()
    make_checkpoint(tmp_path / "x.pth", aspp_rates=[6], image_pooling=False)
    assert cli("--export", f"net.{ending}", "--checkpoint", "x.pth")[0] == 0
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (example,) = (text for text in re.findall("```python\n(.*?)```", readme, re.S) if f"net.{ending}" in text)
    rng, model, exif = np.random.default_rng(0), deeplab.load(tmp_path / "x.pth"), Image.Exif()
    exif[274] = 6
    colours = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((80, 60))
    deep = np.asarray(colours.convert("L")).astype(np.uint16) * 257
    for photo in (colours, Image.fromarray(deep), colours.convert("P")):
        photo.save("photo.png", exif=exif)
        found = {}
        exec(example.replace("photo.jpg", "photo.png"), found)
        labels = np.asarray(found["labels"])[0]
        assert labels.shape == (80, 60) and len(np.unique(labels)) > 1 and found["classes"] == CLASSES
        assert (labels == model.predict("photo.png")).mean() >= 0.999, photo.mode


def test_export_that_differs_is_not_left_behind(cli, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "x.pth", aspp_rates=[6], image_pooling=False)
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
    make_checkpoint(tmp_path / "x.pth", aspp_rates=[6], image_pooling=False)
    assert "--checkpoint FILE" in cli("--export", "x.onnx")[2]
    assert "--scales" in cli("--export", "x.onnx", "--checkpoint", "x.pth", "--flip")[2]
    status, _, err = cli("--export", "x.torchscript", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and ".pt2, .onnx or .pth" in err
    assert cli("--export", "y.PTH", "--checkpoint", "x.pth")[0] == 0
    (tmp_path / "y.PTH").unlink()
    status, _, err = cli("--export", "x.pth/x.pt2", "--checkpoint", "x.pth")
    assert status == 1 and one_line(err) and "x.pth/x.pt2" in err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    before = (tmp_path / "x.pth").read_bytes()
    status, _, err = cli("--export", "x.pth", "--checkpoint", "x.pth")  # a training could not go on from it
    assert status == 1 and one_line(err) and "x.pth: that file is there" in err
    assert (tmp_path / "x.pth").read_bytes() == before
    status, _, err = cli("--export", "x.onnx", "--checkpoint", "absent.pth")
    assert status == 1 and one_line(err) and "pip install onnx onnxscript onnxruntime" in err
    assert os.listdir(tmp_path) == ["x.pth"]

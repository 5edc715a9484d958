"""Export: the network in one file, for programs that have none of this code.

The file takes an image as it is and gives its labels: what users would otherwise get wrong is inside.
"""

import json
import os
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from deeplab import DeepLabv3
from files.whole import write_whole
from utils import UserError, end_if_stopped

MIN_AGREEMENT = 0.999  # share of the pixels
SIZES = {0: "batch", 2: "height", 3: "width"}  # of the image's axes, those that are not fixed
ONNX_PACKAGES = "onnx onnxscript onnxruntime"


class Exported(nn.Module):
    """What an exported file computes, on a model of `DeepLabv3.fuse`."""

    def __init__(self, model: DeepLabv3):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """RGB uint8 (N, 3, H, W) to labels uint8 (N, H, W) and logits float32 (N, num_classes, H, W)."""
        logits = self.model.segment(image)
        return logits.argmax(1).byte(), logits


def export(model: DeepLabv3, path: str, about: dict) -> None:
    """Write a model of `DeepLabv3.fuse`, which is on the CPU, to `path`: .pt2 is torch.export's format, .onnx
    that of ONNX. The file appears once it has been loaded and gives the model's predictions. It takes images
    of any size and number, but torch.export refuses those one pixel wide in networks with GroupNorm, and
    sides up to the output stride in those with torchvision's head, which pads nothing.

    Args:
        about: what to know of it, in values that JSON has; it travels in the file.

    Raises:
        UserError: if the ending is another, packages are missing, the predictions differ, or the file cannot
            be written.
        Stopped: if a stop signal has come.
    """
    save, load = FORMATS[check_format(path)]
    network = Exported(model).eval()
    about = {key: json.dumps(value) for key, value in about.items()}
    # Sizes that are neither alike nor fit the output stride: nothing about them can be taken for granted.
    example = torch.zeros(2, 3, 97, 131, dtype=torch.uint8)
    sizes = {"image": dict.fromkeys(SIZES, torch.export.Dim.DYNAMIC)}

    def write(file: BinaryIO) -> None:
        print("tracing the network", flush=True)
        program = torch.export.export(network, (example,), dynamic_shapes=sizes, strict=False)
        end_if_stopped()
        print(f"writing {path}", flush=True)
        save(program, file, about)
        file.flush()
        end_if_stopped()
        print("comparing the file with the model", flush=True)
        compare(network, load(file.name), path)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own ways
        write_whole(path, write)


def check_format(path: str) -> str:
    """The ending of a file to export to. Raises UserError if it is none of `FORMATS`, the packages for it
    are missing, or it is a .pth that is there already."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in FORMATS and ending != ".pth":
        raise UserError(f"--export {path}: its ending tells the format, {', '.join(FORMATS)} or .pth")
    if ending == ".pth" and os.path.exists(path):
        raise UserError(f"--export {path}: that file is there, perhaps from a training: choose another name")
    if ending == ".onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise UserError(f"--export {path} needs packages: pip install {ONNX_PACKAGES}") from error
    return ending


def save_pt2(program: torch.export.ExportedProgram, file: BinaryIO, about: dict[str, str]) -> None:
    torch.export.save(program, file, extra_files=about)


def load_pt2(path: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def save_onnx(program: torch.export.ExportedProgram, file: BinaryIO, about: dict[str, str]) -> None:
    import onnx

    names = {
        "input_names": ["image"],
        "output_names": ["labels", "logits"],
        "dynamic_shapes": {"image": SIZES},
    }
    try:
        proto = torch.onnx.export(program, dynamo=True, verbose=False, **names).model_proto
    except torch.onnx.OnnxExporterError as error:  # torch 2.6
        hint = "use a newer torch, or export to .pt2"
        raise UserError(f"torch {torch.__version__} cannot write this network as ONNX: {hint}") from error
    onnx.helper.set_model_props(proto, about)
    file.write(proto.SerializeToString())


def load_onnx(path: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: map(torch.from_numpy, session.run(["labels", "logits"], {"image": image.numpy()}))


FORMATS = {".pt2": (save_pt2, load_pt2), ".onnx": (save_onnx, load_onnx)}


def compare(network: Exported, loaded: Callable[[Tensor], tuple[Tensor, Tensor]], path: str) -> None:
    """Print how far a loaded file agrees with its network on images of two other sizes than the exported.
    Raises UserError if the labels of too many pixels differ."""
    rng = np.random.default_rng(0)
    for n, height, width in ((1, 161, 240), (3, 96, 65)):
        coarse = torch.from_numpy(rng.integers(0, 256, (n, 3, 6, 8), dtype=np.uint8)).float()
        image = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).byte()
        with torch.inference_mode():
            (labels, logits), (expected, expected_logits) = loaded(image), network(image)
        agreement = (labels == expected).float().mean().item()
        difference = (logits - expected_logits).abs().max() / expected_logits.abs().max()
        print(f"{n} of {width}x{height}: {agreement:.4%} of the labels agree, logits to {difference:.1e}")
        if not agreement >= MIN_AGREEMENT:
            raise UserError(
                f"{path} is not written: its labels differ from the model's for {1 - agreement:.2%}"
            )

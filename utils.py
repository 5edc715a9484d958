"""Measures, schedule, files: what the loops of main.py and the data sets share."""

import json
import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IGNORE_INDEX = 255
Palette = Sequence[Sequence[int]]  # (r, g, b) in 0..255 for each class


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what and how."""


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts of (truth, prediction) pairs, truth in rows.

    Args:
        prediction: integer labels below `num_classes`, any shape.
        target: integer labels of the same shape; pixels of `IGNORE_INDEX` are not counted.

    Returns:
        int64 (num_classes, num_classes) on the device of the inputs.
    """
    pairs = target.long() * num_classes + prediction
    pairs = torch.where(target == IGNORE_INDEX, num_classes**2, pairs)  # a last bin for what is ignored
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def metrics(confusion: Tensor) -> dict:
    """Measures of an int64 confusion matrix (truth in rows), all in 0..1.

    `iou` has None for a class that appears neither in the truth nor in the predictions, and `mean_iou` leaves
    it out; `mean_accuracy` leaves out the classes without truth. Each is None where nothing is left to
    average.
    """
    confusion = confusion.cpu().double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)

    def mean(values: Tensor) -> float | None:
        values = values[values.isfinite()]
        return values.mean().item() if len(values) else None

    return {
        "mean_iou": mean(iou),
        "iou": [value if np.isfinite(value) else None for value in iou.tolist()],
        "pixel_accuracy": mean(hits.sum() / truth.sum()[None]),
        "mean_accuracy": mean(hits / truth),
    }


def poly_lr(base_lr: float, iteration: int, max_iter: int) -> float:
    """The paper's learning-rate schedule: base_lr (1 - iteration / max_iter)^0.9, iterations counted from
    0."""
    return base_lr * (1 - iteration / max_iter) ** 0.9


def write_whole(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Let `write(file)` make a file that appears at `path` only when it is whole and on the disk.

    A kill at any moment leaves the old file or the new one.

    Raises:
        UserError: if the file cannot be written; what stood at `path` before is untouched.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def save_json(path: str, value: dict) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_mask(path: str, mask: np.ndarray, palette: Palette) -> None:
    """Write uint8 labels (H, W) as a palette PNG: the pixels are the labels, the palette only shows them."""
    image = Image.fromarray(mask)
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    write_whole(path, lambda file: image.save(file, "PNG"))


def voc_palette(num_colors: int = 256) -> list[list[int]]:
    """The colours of the PASCAL VOC devkit: the label's bits dealt in threes to r, g and b from the highest
    bit down."""
    labels = np.arange(num_colors)
    colors = np.zeros((num_colors, 3), int)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (labels >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.tolist()

"""Measures, schedule, files, pictures: what the loops of main.py and the data sets share."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
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


def percent(value: float | None) -> str:
    """A share in 0..1 as in `75.36`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def table(classes: Sequence[str], result: dict) -> str:
    """A line for each class: its IoU as a bar and a number, its accuracy, its share of the labelled pixels.

    `result` is that of `metrics` with its `confusion`.
    """
    confusion = np.array(result["confusion"])
    width = max(map(len, [*classes, "class"]))
    lines = [f"{'class':{width}}  {'':20}    IoU  accuracy  pixels"]
    for name, iou, hits, truth in zip(
        classes, result["iou"], confusion.diagonal(), confusion.sum(1), strict=True
    ):
        accuracy = percent(hits / truth if truth else None)
        share = percent(truth / max(1, confusion.sum()))
        lines.append(
            f"{name:{width}}  {'#' * round(20 * (iou or 0)):20} {percent(iou):>6}  {accuracy:>8}  {share:>6}"
        )
    return "\n".join(lines)


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
    save_image(path, image)


def voc_palette(num_colors: int = 256) -> list[list[int]]:
    """The colours of the PASCAL VOC devkit: the label's bits dealt in threes to r, g and b from the highest
    bit down."""
    labels = np.arange(num_colors)
    colors = np.zeros((num_colors, 3), int)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (labels >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.tolist()


def colorize(mask: np.ndarray, palette: Palette) -> Image.Image:
    """uint8 labels (H, W) as an RGB picture; `IGNORE_INDEX` is white."""
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(palette)] = palette
    return Image.fromarray(colors[mask])


def overlay(image: Image.Image, mask: np.ndarray, palette: Palette) -> Image.Image:
    """The labels' colours laid half transparent over their RGB image."""
    return Image.blend(image, colorize(mask, palette), 0.5)


def add_legend(
    picture: Image.Image, labels: Sequence[int], classes: Sequence[str], palette: Palette
) -> Image.Image:
    """The picture with the colour and name of each of the labels below it, in rows as wide as the picture
    allows."""
    font = ImageFont.load_default(14)
    boxes, x, y, width = [], 6, picture.height + 4, picture.width
    for label in labels:
        length = 22 + round(font.getlength(classes[label])) + 14
        if x > 6 and x + length > picture.width:
            x, y = 6, y + 20
        boxes.append((x, y, label))
        x, width = x + length, max(width, x + length)
    canvas = Image.new("RGB", (width, y + 24), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for x, y, label in boxes:
        draw.rectangle((x, y + 3, x + 14, y + 16), fill=tuple(palette[label]), outline="black")
        draw.text((x + 20, y + 1), classes[label], fill="black", font=font)
    return canvas


def sample_sheet(
    samples: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], classes: Sequence[str], palette: Palette
) -> Image.Image:
    """Rows of (image, truth, prediction), 320 wide each, and the legend of the classes that appear."""
    rows = [
        [image.resize((320, max(1, round(320 * image.height / image.width)))) for image in pictures]
        for pictures in (
            (image, colorize(truth, palette), overlay(image, seen, palette)) for image, truth, seen in samples
        )
    ]
    sheet = Image.new("RGB", (3 * 324, sum(row[0].height + 4 for row in rows)), "white")
    y = 0
    for row in rows:
        for i, picture in enumerate(row):
            sheet.paste(picture, (324 * i, y))
        y += row[0].height + 4
    present = np.unique([label for _, *masks in samples for mask in masks for label in np.unique(mask)])
    return add_legend(sheet, [label for label in present if label < len(classes)], classes, palette)


def save_image(path: str, image: Image.Image) -> None:
    """Write a picture whole or not at all, in the format of the path's ending."""
    format = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    write_whole(path, lambda file: image.save(file, format))


class RunLog:
    """The rows of data/EXP.csv, and with --tensorboard the same for TensorBoard in data/runs/EXP."""

    columns = ("epoch", "iteration", "lr", "loss", "val_mean_iou", "images_per_second")

    def __init__(self, exp: str, start: int, tensorboard: bool):
        """A run resumed at iteration `start` keeps the rows up to there.

        Raises:
            UserError: if TensorBoard is wanted and not installed.
        """
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from error
            self.board = SummaryWriter(f"data/runs/{exp}", purge_step=start + 1)
        path, rows = f"data/{exp}.csv", []
        if start and os.path.exists(path):
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["iteration"]) <= start]
        os.makedirs("data", exist_ok=True)
        self.file = open(path, "w", newline="")  # noqa: SIM115, open for as long as the run
        self.rows = csv.DictWriter(self.file, self.columns)
        self.rows.writeheader()
        self.rows.writerows(rows)

    def write(self, row: dict) -> None:
        self.rows.writerow(row)
        self.file.flush()
        if self.board:
            for name in ("lr", "loss", "val_mean_iou", "images_per_second"):
                if row.get(name) is not None:
                    self.board.add_scalar(name, row[name], row["iteration"])

    def show(self, samples: Image.Image, iteration: int) -> None:
        if self.board:
            self.board.add_image("samples", np.array(samples), iteration, dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()

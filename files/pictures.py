"""Pictures of labels: palettes, overlays, legends, sheets of samples; plots."""

import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from files.whole import write_whole
from utils import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Palette = Sequence[Sequence[int]]  # (r, g, b) in 0..255 for each class
NAMES = "classes"  # the text in a PNG that names its labels: names and palette, in JSON


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


def overlay(image: Image.Image, mask: np.ndarray, palette: Palette, factor: int = 1) -> Image.Image:
    """The labels' colours laid half transparent over their RGB image, `factor` times smaller: there the image
    is the mean of each square of that side."""
    width, height = (math.ceil(side / factor) for side in image.size)
    picture = Image.new("RGB", (width, height))
    for y in range(0, height, 64):  # in strips, as each of these steps makes another picture
        box = (0, y * factor, image.width, min(image.height, (y + 64) * factor))
        colors = colorize(mask[box[1] : box[3] : factor, ::factor], palette)
        picture.paste(Image.blend(image.crop(box).reduce(factor), colors, 0.5), (0, y))
    return picture


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


def sample_row(image: Image.Image, truth: np.ndarray, labels: np.ndarray, palette: Palette) -> Image.Image:
    """The image, its truth and its prediction side by side, each to fill 320 x 320."""
    scale = 320 / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size)
    masks = (Image.fromarray(mask).resize(size, Image.Resampling.NEAREST) for mask in (truth, labels))
    truth, labels = map(np.asarray, masks)
    row = Image.new("RGB", (3 * 324, size[1] + 4), "white")
    for i, tile in enumerate([image, colorize(truth, palette), overlay(image, labels, palette)]):
        row.paste(tile, (324 * i, 0))
    return row


def sample_sheet(
    rows: Sequence[Image.Image], labels: Sequence[int], classes: Sequence[str], palette: Palette
) -> Image.Image:
    """The rows one below the other, and the legend of the labels."""
    width = max((row.width for row in rows), default=324)
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height
    return add_legend(sheet, labels, classes, palette)


def save_image(path: str, image: Image.Image, **options) -> None:
    """Write a picture whole or not at all, in the format of the path's ending, with Pillow's `options`."""
    format = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    write_whole(path, lambda file: image.save(file, format, **options))


def save_mask(path: str, mask: np.ndarray, palette: Palette, classes: Sequence[str]) -> None:
    """Write uint8 labels (H, W) as a palette PNG: the pixels are the labels, the palette only shows them, and
    a text in the file names them."""
    image, about = Image.fromarray(mask), PngInfo()
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    about.add_text(NAMES, json.dumps([list(classes), np.asarray(palette).tolist()]))
    save_image(path, image, pnginfo=about)


def make_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without a window. Raises UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plots needs a package: pip install matplotlib") from error
    return Figure((width, height), dpi=100, layout="constrained")


def save_figure(path: str, figure: "Figure") -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def plot_run(path: str, rows: Sequence[dict]) -> None:
    """Write the loss, the learning rate and the validation mean IoU of a log's rows as a PNG. Raises
    UserError if the file cannot be written."""
    figure = make_figure(8, 8)
    panels = zip(figure.subplots(3, 1, sharex=True), ("loss", "lr", "val_mean_iou"), strict=True)
    for axes, column in panels:
        points = [(row["iteration"] / row["per_epoch"], float(row[column])) for row in rows if row[column]]
        axes.plot(*np.reshape(points, (-1, 2)).T, marker="." if len(points) < 50 else "")
        axes.set(ylabel=column)
        axes.grid(alpha=0.3)
    axes.set(xlabel="epoch")
    save_figure(path, figure)

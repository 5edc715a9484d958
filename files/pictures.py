"""Pictures of labels: palettes, overlays, legends, sheets of samples."""

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import IGNORE_INDEX, write_whole

Palette = Sequence[Sequence[int]]  # (r, g, b) in 0..255 for each class


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


def sample_row(
    image: Image.Image, truth: np.ndarray, labels: np.ndarray, palette: Palette, title: str | None = None
) -> Image.Image:
    """The image, its truth and its prediction side by side, each to fill 320 x 320; with a `title` above them
    a fourth shows the errors, in the colour of the truth, and whatever is right faintly."""
    scale = 320 / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size)
    masks = (Image.fromarray(mask).resize(size, Image.Resampling.NEAREST) for mask in (truth, labels))
    truth, labels = map(np.asarray, masks)
    tiles, top = [image, colorize(truth, palette), overlay(image, labels, palette)], 0
    if title is not None:
        # Pale, not dark: on black the errors in a black background could not be seen.
        faint = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", size, "white"), 0.7)
        wrong = (truth != labels) & (truth != IGNORE_INDEX)
        faint.paste(colorize(truth, palette), mask=Image.fromarray(wrong))
        tiles, top = [*tiles, faint], 20
    row = Image.new("RGB", (len(tiles) * 324, top + size[1] + 4), "white")
    for i, tile in enumerate(tiles):
        row.paste(tile, (324 * i, top))
    if title:
        ImageDraw.Draw(row).text((4, 1), title, fill="black", font=ImageFont.load_default(14))
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


def save_image(path: str, image: Image.Image) -> None:
    """Write a picture whole or not at all, in the format of the path's ending."""
    format = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    write_whole(path, lambda file: image.save(file, format))


def save_mask(path: str, mask: np.ndarray, palette: Palette) -> None:
    """Write uint8 labels (H, W) as a palette PNG: the pixels are the labels, the palette only shows them."""
    image = Image.fromarray(mask)
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    save_image(path, image)

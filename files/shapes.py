"""The embedded data set: small scenes of coloured shapes, drawn when first asked for."""

import colorsys
import os
import shutil
import tempfile

import numpy as np
from PIL import Image, ImageDraw

from files.pictures import save_mask


def ring(count: int) -> np.ndarray:
    """The corners of a regular polygon in the complex plane."""
    return np.exp(2j * np.pi * np.arange(count) / count)


# name: outline, typical hue, colour in the palette
SHAPES = {
    "circle": (ring(48), 0.0, (220, 50, 50)),
    "square": (ring(4), 0.6, (60, 90, 230)),
    "triangle": (ring(3), 0.3, (60, 180, 75)),
    "cross": (np.outer(ring(4), [1 - 1j / 3, 1 + 1j / 3, 1 / 3 + 1j / 3]).flatten(), 0.13, (240, 190, 40)),
}


def draw_scene(rng: np.random.RandomState) -> tuple[Image.Image, Image.Image]:
    """An image of 160x128, two or three shapes on a grey ground, and its mask."""
    ground = rng.randint(50, 190, (5, 6)).astype(np.uint8)
    image = Image.fromarray(ground).resize((160, 128), Image.BICUBIC).convert("RGB")
    mask = Image.new("L", image.size)
    for _ in range(rng.randint(2, 4)):
        label = rng.randint(1, len(SHAPES) + 1)
        outline, hue, _ = list(SHAPES.values())[label - 1]
        center = complex(rng.uniform(16, 144), rng.uniform(16, 112))
        outline = center + outline * rng.uniform(22, 44) * np.exp(2j * np.pi * rng.uniform())
        points = list(zip(outline.real.tolist(), outline.imag.tolist(), strict=True))
        hue = (hue + rng.uniform(-0.06, 0.06)) % 1
        color = colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.95))
        ImageDraw.Draw(image).polygon(points, fill=tuple(round(255 * value) for value in color))
        ImageDraw.Draw(mask).polygon(points, fill=label)
    noise = rng.normal(0, 8, (128, 160, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8)), mask


def draw_shapes(root: str) -> None:
    """Draw the `shapes` data set at `root`: 240 scenes to train, 60 to validate, JPEG and PNG files.

    numpy's frozen RandomState makes them the same on every machine, but for 90 pixels at the edges of shapes,
    which Pillow before 11.2 draws in another way. They appear at `root` all at once; of several processes
    that draw, the first wins.
    """
    parent = os.path.dirname(root.rstrip("/")) or "."
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="shapes.", dir=parent)
    os.chmod(temporary, 0o755)
    for folder in ("JPEGImages", "SegmentationClass", "list"):
        os.mkdir(os.path.join(temporary, folder))
    classes = ["background", *SHAPES]
    palette = [(0, 0, 0), *(color for _, _, color in SHAPES.values())]
    rng = np.random.RandomState(0)
    for split, count in (("train", 240), ("val", 60)):
        lines = []
        for i in range(count):
            image, mask = draw_scene(rng)
            image_name, mask_name = f"JPEGImages/{split}_{i:03}.jpg", f"SegmentationClass/{split}_{i:03}.png"
            image.save(os.path.join(temporary, image_name), quality=90)
            save_mask(os.path.join(temporary, mask_name), np.asarray(mask), palette, classes)
            lines.append(f"/{image_name} /{mask_name}\n")
        with open(os.path.join(temporary, "list", f"{split}.txt"), "w") as file:
            file.writelines(lines)
    with open(os.path.join(temporary, "classes.txt"), "w") as file:
        names = zip(classes, palette, strict=True)
        file.writelines(f"{name} {r} {g} {b}\n" for name, (r, g, b) in names)
    try:
        os.rename(temporary, root)
    except OSError:
        shutil.rmtree(temporary)
        if not os.path.exists(root):
            raise

"""Images from a file's bytes to upright RGB, and their sizes by the headers alone."""

import struct
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from utils import UserError

# Pillow refuses a PNG for its metadata, which nobody looks at, from 1 MB on.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26
# What shows a stored image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}


def open_image(path: str, load: bool = True) -> Image.Image:
    """The image in a file as it is stored, decoded if `load`. Raises UserError if it cannot be read."""
    try:
        image = Image.open(path)
        if load:
            image.load()
        return image
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises depends on the format and on where the damage lies
        reason = getattr(error, "strerror", None) or str(error).replace(repr(path), "it")
        raise UserError(f"cannot read {path}: {reason or type(error).__name__}") from error


def read_image(path: str) -> Image.Image:
    """The image in a file as 8-bit RGB, see `to_rgb`. Raises UserError if it cannot be read."""
    return to_rgb(open_image(path))


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, upright, transparency on white."""
    image = upright(image)
    if image.mode.startswith("I"):  # 16 bits of grey, whatever Pillow's version calls them
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """An image, turned as its EXIF orientation says."""
    # Not ImageOps.exif_transpose: that writes the EXIF anew, and fails if another tag of it is damaged.
    image.load()  # which turns a TIFF
    turn = turn_of(image.getexif)
    return image if turn is None else image.transpose(turn)


def turn_of(getexif: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """What shows an image upright; None for nothing, or if its EXIF is damaged, which viewers ignore, too."""
    try:
        return TURNS.get(getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, TypeError, ValueError, struct.error):
        return None


def stored_size(path: str) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Width and height of an image as it is stored, and the turn that shows it upright, by its header alone.
    Raises UserError if it cannot be read."""
    image = open_image(path, load=False)
    size = image.size
    if image.format == "TIFF":  # some versions of Pillow have turned it already
        size = tuple(image.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    # Not image.getexif(): for a PNG that decodes the file, as the tag may stand behind the pixels.
    return size, turn_of(partial(Image.Image.getexif, image))


def upright_size(path: str) -> tuple[int, int]:
    """Width and height of an image, turned as its EXIF orientation says, by its header alone. Raises
    UserError if it cannot be read."""
    size, turn = stored_size(path)
    return size[::-1] if turn in SIDEWAYS else size


def header_size(image_path: str, mask_path: str | None) -> tuple[int, int]:
    """Height and width of an image, by its header, which its mask must have, too. Raises UserError if one of
    them cannot be read, or their sizes differ."""
    size = upright_size(image_path)
    if mask_path:
        check_sizes(image_path, size, mask_path, upright_size(mask_path))
    return size[::-1]


def check_sizes(image: str, image_size: tuple[int, int], mask: str, mask_size: tuple[int, int]) -> None:
    """Raises UserError if the (width, height) of two files differ."""
    if tuple(image_size) != tuple(mask_size):
        sizes = ["x".join(map(str, size)) for size in (mask_size, image_size)]
        raise UserError(f"{mask} is {sizes[0]}, but its image {image} is {sizes[1]}")


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """An image, made smaller if a side is longer than `max_side`."""
    factor = min(1.0, max_side / max(image.size))
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)


def enlarge(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 labels (H, W) at the (width, height) that the image had before `shrink`."""
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))

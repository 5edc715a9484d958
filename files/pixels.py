"""The pixels of images: from any number format and mode to upright RGB of 8 bits, and to another size."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from PIL import Image

from files import tiffs
from files.images import (
    AS_STORED,
    Header,
    Reading,
    check_bands,
    is_misread,
    open_image,
    read_header,
    samples,
    upright,
)
from utils import UserError

# Of 16 bits, an eighth of the range: if all values are within so much, 32 levels are left of them in 8 bits.
NARROW = 1 << 13
Convert = Callable[[np.ndarray], np.ndarray]  # of samples to uint8


def read_image(path: str, reading: Reading = AS_STORED) -> Image.Image:
    """The image in a file as upright RGB of 8 bits, transparency on white, of several frames the first.
    Raises UserError if it cannot be read, or not as `reading` says."""
    return decode(path, read_header(path, reading), reading)


def decode(path: str, header: Header, reading: Reading) -> Image.Image:
    """The same, given the file's header."""
    if header.kind not in ("uint8", "uint16") and reading.value_range is None:
        found = "{} has {} values from {:.6g} to {:.6g}".format(
            path, header.kind, *value_range(path, header, reading)
        )
        raise UserError(f"{found}: --value_range LOW HIGH says which are black and white")
    return decode_by(partial(to_bytes, value_range=reading.value_range), path, header, reading)


def decode_by(convert: Convert, path: str, header: Header, reading: Reading) -> Image.Image:
    """The same, where `convert` makes uint8 of samples that have more bits."""
    if header.deep:
        bands = reading.bands or (1, 2, 3)
        numbers = [0 if header.bands == 1 else band - 1 for band in bands]
        image = tiffs.read_bands(path, numbers, convert)
        return image if header.turn is None else image.transpose(header.turn)
    image = open_image(path, max_pixels=reading.max_pixels)
    if header.kind == "uint16" and image.mode in ("RGB", "RGBA") and reading.value_range:
        image = convert_deep_png(image, path, convert)
    return flatten(image, header.kind, convert, reading.bands)


def as_rgb(image: Image.Image | np.ndarray | str | os.PathLike, reading: Reading = AS_STORED) -> Image.Image:
    """What Python users have as `read_image`: a PIL image, the path of a file, or a uint8 array (H, W, 3) of
    RGB or (H, W) of grey. Warns of what `is_flat`. Raises TypeError for anything else; UserError as
    `read_image` and `to_rgb`."""
    is_bytes = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if is_bytes and (image.ndim == 2 or image.shape[2:] == (3,)):
        return Image.fromarray(image).convert("RGB")  # of the bands that the model takes
    if isinstance(image, str | os.PathLike | Image.Image):
        if isinstance(image, Image.Image):
            kind, rgb = samples(image)[0], to_rgb(image, reading)
        else:
            path = os.fspath(image)
            header = read_header(path, reading)
            kind, rgb = header.kind, decode(path, header, reading)
        if is_flat(rgb, kind, reading):
            hint = "model.reading = Reading(value_range=(0, 4095)) is right for 12 bits, say"
            found = "an image of more than 8 bits is nearly black, white or of one grey for the network"
            warnings.warn(f"{found}: {hint}", stacklevel=4)
        return rgb
    taken = "a PIL image, a path, or a uint8 array (H, W, 3) of RGB or (H, W) of grey"
    given = f"{type(image).__name__} {getattr(image, 'dtype', '')} {tuple(getattr(image, 'shape', ()))}"
    raise TypeError(f"predict takes {taken}, not {given}")


def is_flat(image: Image.Image, kind: str, reading: Reading) -> bool:
    """Whether little is left of the values of this kind that an RGB image was read from: all are within an
    eighth of the levels, as 12 bits in 16 are, or nine in ten are black or white by `reading`'s range."""
    if kind == "uint8":
        return False
    lows, highs = zip(*image.getextrema(), strict=True)
    if max(highs) - min(lows) < NARROW >> 8:
        return True
    if not reading.value_range:
        return False
    counts = np.reshape(image.histogram(), (3, 256)).sum(0)
    return bool(counts[0] + counts[255] > 0.9 * counts.sum())


def to_rgb(image: Image.Image, reading: Reading = AS_STORED) -> Image.Image:
    """A PIL image of any mode as upright RGB of 8 bits, transparency on white. Raises UserError if its
    numbers or bands are not those of `reading`, or Pillow shows less than its file has, or other numbers."""
    name, (kind, bands) = getattr(image, "filename", "") or "the image", samples(image)
    check_bands(name, bands, reading)
    if bands not in (1, 3) or (bands == 3 and kind != "uint8" and reading.value_range) or is_misread(image):
        raise UserError(f"{name} has {bands} bands of {kind}, which Pillow shows only in part: give its path")
    if kind not in ("uint8", "uint16") and reading.value_range is None:
        found = "{} has {} values from {:.6g} to {:.6g}".format(name, kind, *image.getextrema())
        raise UserError(f"{found}: a model that is trained with --value_range takes such")
    return flatten(image, kind, partial(to_bytes, value_range=reading.value_range), reading.bands)


def flatten(
    image: Image.Image, kind: str, convert: Convert, bands: tuple[int, int, int] | None
) -> Image.Image:
    """An image of any mode as `to_rgb`; its samples are of this `kind`."""
    image = upright(image)
    if image.mode.startswith(("I", "F")):  # grey, of which Pillow makes no RGB
        image, stored = Image.new("RGB", image.size), image
        for y, strip in strips(stored):
            grey = convert(as_kind(np.asarray(strip), kind))
            image.paste(Image.fromarray(grey).convert("RGB"), (0, y))
        return image
    if image.has_transparency_data:
        image, stored = Image.new("RGB", image.size), image
        for y, strip in strips(stored):
            white = Image.new("RGBA", strip.size, "white")
            image.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), (0, y))
    image = image if image.mode == "RGB" else image.convert("RGB")  # which copies
    if bands in (None, (1, 2, 3)):
        return image
    return Image.merge("RGB", [image.getchannel(band - 1) for band in bands])


def as_kind(values: np.ndarray, kind: str) -> np.ndarray:
    """The samples of a grey image; Pillow has all integers of 32 bits, and some of 16, as int32."""
    if kind == "uint32":
        return values.view(np.uint32)
    return values.astype(np.uint16) if kind == "uint16" else values


def convert_deep_png(image: Image.Image, path: str, convert: Convert) -> Image.Image:
    """A PNG of 16 bits in colour, of which Pillow keeps the high bytes alone, converted at full depth. Raises
    UserError for grey with transparency."""
    low = open_image(path, load=False, max_pixels=image.width * image.height)
    codec, box, offset, layout = low.tile[0]
    if layout not in ("RGB;16B", "RGBA;16B"):
        raise UserError(f"{path}: --value_range cannot be used on 16 bits of grey with transparency")
    # As if its numbers were little-endian: what Pillow then takes for the high bytes are the low ones.
    low.tile = [(codec, box, offset, layout[:-1] + "L")]
    low.load()
    converted = Image.new(image.mode, image.size)
    for (y, high), (_, rest) in zip(strips(image), strips(low), strict=True):
        pixels = np.array(high)
        pixels[..., :3] = convert(pixels[..., :3].astype(np.uint16) << 8 | np.asarray(rest)[..., :3])
        converted.paste(Image.fromarray(pixels), (0, y))
    return converted


def to_bytes(values: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Samples of any number format as uint8: `value_range` becomes 0 to 255, rounded, and what lies beyond is
    clipped; NaN is 0. Without a range 16 bits lose their low byte."""
    if values.dtype == np.uint8:
        return values
    if value_range is None:
        return (values >> 8).astype(np.uint8)
    low, high = value_range

    def scale(values: np.ndarray) -> np.ndarray:
        shares = np.nan_to_num((values.astype(np.float64) - low) / (high - low))
        return np.rint(255 * shares.clip(0, 1)).astype(np.uint8)

    if values.dtype.kind == "u" and values.itemsize == 2:
        return scale(np.arange(1 << 16))[values]  # in a third of the time
    return scale(values)


def value_range(path: str, header: Header, reading: Reading) -> tuple[float, float]:
    """The lowest and the highest finite value of an image that is not of 8 bits, without what means that
    there is nothing; of 16 bits those that the lowest and the highest high byte allow. Raises UserError if it
    cannot be read."""
    if header.kind == "uint16" and math.isnan(header.nodata):
        lows, highs = zip(*read_image(path, reading._replace(value_range=None)).getextrema(), strict=True)
        return 256 * min(lows), 256 * max(highs) + 255
    if header.kind == "uint16":
        header = read_header(path, reading._replace(value_range=(0, 1)))  # to be read in full
    found = []

    def note(values: np.ndarray) -> np.ndarray:
        finite = values[np.isfinite(values) & ~np.isclose(values, header.nodata, rtol=1e-6, atol=0)]
        found.extend([finite.min().item(), finite.max().item()] if finite.size else [])
        return np.zeros(values.shape, np.uint8)

    decode_by(note, path, header, reading)
    return min(found, default=0), max(found, default=0)


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image cut into strips, with the row at which each begins, so that what is made of it on the way to
    something else is never the size of the whole."""
    for y in range(0, image.height, tiffs.ROWS):
        yield y, image.crop((0, y, image.width, min(image.height, y + tiffs.ROWS)))


def to_array(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 (H, W, 3)."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for y, strip in strips(image):
        pixels[y : y + strip.height] = np.asarray(strip)
    return pixels


def padded_side(side: int, stride: int) -> int:
    """The side of an image, padded to a multiple of the output stride, plus 1."""
    return (side + stride - 2) // stride * stride + 1


def shrink(image: Image.Image, max_side: int) -> Image.Image:
    """An image, made smaller if a side is longer than `max_side`."""
    factor = min(1.0, max_side / max(image.size))
    return image.resize([max(1, round(side * factor)) for side in image.size], Image.Resampling.BILINEAR)


def enlarge(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 labels (H, W) at the (width, height) that the image had before `shrink`."""
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))

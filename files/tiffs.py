"""TIFFs that Pillow cannot read in full, by tifffile: any number of bands, any number format."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils import UserError

if TYPE_CHECKING:
    from tifffile import TiffPage

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the first bytes of a TIFF; + is of BigTIFF
ROWS = 256  # that are converted at once
BUFFER = 1 << 24  # bytes that are read from a file at once


def is_tiff(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in MAGIC
    except OSError:
        return False


@contextmanager
def first_page(path: str) -> Iterator["TiffPage"]:
    """The first page of a TIFF. Raises UserError if tifffile is missing, or the page cannot be read."""
    try:
        from tifffile import TiffFile
    except ImportError as error:
        hint = "pip install tifffile imagecodecs"
        raise UserError(f"{path} is a TIFF that needs a package for its bands or numbers: {hint}") from error
    try:
        with TiffFile(path) as file:
            yield file.pages[0]
    except (MemoryError, UserError):
        raise
    except Exception as error:  # what is raised depends on where the damage lies
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from error


def read_bands(
    path: str, bands: tuple[int, int, int], convert: Callable[[np.ndarray], np.ndarray]
) -> Image.Image:
    """The RGB image of the bands of these numbers, from 0, as the file has them: not turned.

    `convert` makes uint8 of an array of samples; it gets a tile or a strip of the file at a time, so that the
    whole image is held as bytes alone. Raises UserError as `first_page`."""
    with first_page(path) as page:
        image = Image.new("RGB", (page.imagewidth, page.imagelength))
        for samples, first, y, x in blocks(page):
            height, width, count = samples.shape
            box = x, y, x + width, y + height
            pixels = np.array(image.crop(box))  # which may have other bands already
            for channel, band in enumerate(bands):
                if first <= band < first + count:
                    pixels[..., channel] = convert(samples[..., band - first])
            image.paste(Image.fromarray(pixels), box)
    return image


def blocks(page: "TiffPage") -> Iterator[tuple[np.ndarray, int, int, int]]:
    """The samples (h, w, bands) of a page piece by piece, each with its first band, top row, left column."""
    if page.is_memmappable:  # often a single strip, which would be read whole
        planes, _, height, width, bands = page.shaped
        dtype, offset = np.dtype(page.parent.byteorder + page.dtype.char), page.dataoffsets[0]
        for band in range(planes):
            for y in range(0, height, ROWS):
                rows = min(ROWS, height - y)
                start = offset + (band * height + y) * width * bands * dtype.itemsize
                # Not a map: what was read of one counts as memory of the process.
                samples = np.fromfile(page.parent.filehandle.path, dtype, rows * width * bands, offset=start)
                yield samples.reshape(rows, width, bands), band, y, 0
        return
    for samples, (band, _, y, x, _), (_, height, width, _) in page.segments(maxworkers=1, buffersize=BUFFER):
        if samples is not None:  # what the file leaves out is 0; tiles may reach beyond the image
            height, width = min(height, page.imagelength - y), min(width, page.imagewidth - x)
            yield samples[0, :height, :width], band, y, x

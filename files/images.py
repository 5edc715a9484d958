"""Image files: how they are opened, and what their headers tell by themselves."""

import math
import os
import struct
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from mmap import ACCESS_READ, mmap
from typing import NamedTuple

from PIL import ExifTags, Image, PngImagePlugin

from files import tiffs
from utils import UserError

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

# Pillow refuses a PNG for its metadata, which nobody looks at, from 1 MB on.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26
Image.MAX_IMAGE_PIXELS = None  # `open_image` has a limit of its own
MAX_PIXELS = 10**9
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
UNCLEAR = "images are turned by EXIF, and their size does not tell whether {} go by the upright image"
SIDEWAYS = {TURNS[orientation] for orientation in (5, 6, 7, 8)}
# Formats that Pillow opens without a decoder of its own, or whose values it changes, or that are no pictures.
NO_PHOTOS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}
PILLOWS_KINDS = ("uint8", "uint16", "int16", "int32", "uint32", "float32")  # that it reads if grey
NOT_FRAMES = ("MPO", "PSD")  # whose further images are previews, other exposures, layers
# Tags of TIFF.
BITS, PHOTOMETRIC, ORIENTATION, SAMPLES, SUBFILE, FORMAT = 258, 262, 274, 277, 254, 339
WIDTH, LENGTH, COMPRESSION, PLANES, NODATA = 256, 257, 259, 284, 42113  # the last is GDAL's
BANDED = (0, 1, 2)  # photometric interpretations: grey and RGB; others are palettes, CMYK and the like
NUMBERS = {1: "uint", 2: "int", 3: "float"}  # sample formats
JPEG_START, JPEG_PIXELS, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"  # markers
JPEG2000_START, JPEG2000_BITS = b"\xff\x4f\xff\x51", 42  # bytes from there to the number of bits, less 1


class Reading(NamedTuple):
    """How the pixels in image files become RGB of 8 bits.

    Args:
        value_range: (low, high), the values that become 0 and 255 in images that are not of 8 bits; what lies
            beyond is clipped. None: 16 bits by their high byte, and no others.
        bands: the bands, numbered from 1, that are taken for red, green and blue; None is the only ones.
        max_pixels: an image with more is refused.
    """

    value_range: tuple[float, float] | None = None
    bands: tuple[int, int, int] | None = None
    max_pixels: int = MAX_PIXELS

    def words(self, key: str) -> str:
        """The numbers of `value_range` or `bands` as their flags take them, or `none`."""
        return " ".join(f"{number:g}" for number in getattr(self, key) or ()) or "none"


AS_STORED = Reading()


class Header(NamedTuple):
    """What an image file tells before it is decoded.

    `size` is the upright width and height, `kind` numpy's name of the samples' number format, `bands` the
    number of samples in a pixel, see `samples`, `frames` the number of images in the file. `deep`: tifffile
    reads it, as Pillow does not show it in full, and `turn` is what makes its pixels upright. `unclear`: see
    `is_unclear`. `nodata` is the value that a GeoTIFF has where there is nothing, NaN without one.
    """

    size: tuple[int, int]
    kind: str = "uint8"
    bands: int = 3
    frames: int = 1
    deep: bool = False
    turn: Image.Transpose | None = None
    unclear: bool = False
    nodata: float = math.nan


@cache
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the files that `open_image` can open."""
    endings = Image.registered_extensions().items()
    return frozenset(end for end, name in endings if name in Image.OPEN and name not in NO_PHOTOS)


# ----------------------------------------------------------------------------------------------------------
# headers


def read_header(path: str, reading: Reading = AS_STORED) -> Header:
    """What an image's header tells. Raises UserError if it cannot be read, the image is too large, or its
    bands are not those of `reading`."""
    try:
        image = open_image(path, load=False, max_pixels=reading.max_pixels)
    except UserError:
        if not tiffs.is_tiff(path):
            raise
        header = read_tiff_header(path, reading.max_pixels)
    else:
        kind, bands = samples(image)
        if reading.value_range:
            check_unscaled(path, image)
        if image.format == "TIFF":
            check_black(path, kind, image.tag_v2.get(PHOTOMETRIC))
        deep = bands not in (1, 3) or kind not in PILLOWS_KINDS
        deep |= image.format == "TIFF" and bands == 3 and kind != "uint8"
        if kind == "uint16" and bands == 3 and not reading.value_range:
            deep = False  # the high bytes are what Pillow keeps
        turn = TURNS.get(image.tag_v2.get(ORIENTATION)) if deep else None
        unclear = is_unclear(*stored_size(image))
        nodata = to_number(image.tag_v2.get(NODATA)) if image.format == "TIFF" else math.nan
        header = Header(upright_size(image), kind, bands, count_frames(image), deep, turn, unclear, nodata)
    check_bands(path, header.bands, reading)
    return header


def read_tiff_header(path: str, max_pixels: int) -> Header:
    """The header of a TIFF that Pillow cannot open. Raises UserError as `read_header`."""
    with tiffs.first_page(path) as page:
        size, kind, bands = (page.imagewidth, page.imagelength), page.dtype.name, page.samplesperpixel
        turn, nodata = TURNS.get(int(page.tags.valueof(ORIENTATION, 1))), page.tags.valueof(NODATA)
        if page.photometric not in BANDED[1:] or page.dtype.kind not in "iuf":
            found = f"{kind} values, photometric interpretation {int(page.photometric)}"
            raise UserError(f"{path} has {found}; save it as grey or RGB whose 0 is black")
        frames = sum(not (other.is_reduced or other.is_mask) for other in page.parent.pages)
        check_pixels(path, size, max_pixels)
    upright = size[::-1] if turn in SIDEWAYS else size
    return Header(upright, kind, bands, frames, True, turn, is_unclear(size, turn), to_number(nodata))


def to_number(text: object) -> float:
    """The number in a tag; NaN if it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def check_black(path: str, kind: str, photometric: int | None) -> None:
    """Raises UserError if 0 is white in a TIFF of more than 8 bits: Pillow inverts those of 8 alone."""
    if photometric == 0 and kind != "uint8":
        raise UserError(f"{path} has {kind} values of which 0 is white; save it with 0 as black")


def check_unscaled(path: str, image: Image.Image) -> None:
    """Raises UserError if Pillow scales the values of an opened image to fill 8 or 16 bits: if the highest of
    a PGM or PPM is another, or a JPEG 2000 has another number of bits."""
    highest = None
    if image.format == "PPM" and isinstance(image.tile[0][3], tuple) and image.mode != "F":
        highest = image.tile[0][3][1]
    elif image.format == "JPEG2000":
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            highest = (2 << (data[data.find(JPEG2000_START) + JPEG2000_BITS] & 127)) - 1
    if highest not in ((None, 255, 65535) if image.mode.startswith("I") else (None, 255)):
        reason = f"its values go to {highest}, which is not what Pillow reads"
        raise UserError(f"{path}: {reason}; save it as PNG or TIFF")


def check_pixels(path: str, size: tuple[int, int], max_pixels: int) -> None:
    """Raises UserError for an image of more pixels than that: a few bytes can claim to be one."""
    if size[0] * size[1] > max_pixels:
        found = f"Image of {size[0]}x{size[1]} pixels"
        raise UserError(f"cannot read {path}: {found}, more than --max_pixels {max_pixels} allows")


def samples(image: Image.Image) -> tuple[str, int]:
    """numpy's name of the number format in which an opened image's file has its samples, and the number of
    its bands. Transparency is a band in TIFFs alone, where nothing tells it from infrared."""
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) in BANDED:
        tags = image.tag_v2
        bits, number = max(tags.get(BITS, (1,))), NUMBERS.get(tags.get(FORMAT, (1,))[0], "uint")
        return f"{number}{max(8, 1 << (bits - 1).bit_length())}", tags.get(SAMPLES, 1)
    if image.mode == "F":
        return "float32", 1
    if image.mode.startswith("I"):
        # Of files with 16 bits some versions of Pillow make 32.
        return "uint16" if image.mode != "I" or image.format in ("PNG", "PPM") else "int32", 1
    tile = image.tile if image.format == "PNG" else []
    if image.format == "PNG" and not tile and os.path.isfile(image.filename):  # it is decoded already
        with Image.open(image.filename) as unread:
            tile = unread.tile
    return "uint16" if tile and ";16" in tile[0][3] else "uint8", 3


def is_misread(image: Image.Image) -> bool:
    """Whether Pillow takes the numbers in a TIFF for others: 16 bits in uncompressed planes, each byte for
    one, and those of compressed big-endian ones, if signed or floats, for little-endian."""
    if image.format != "TIFF":
        return False
    tags = image.tag_v2
    swapped = tags.prefix == b"MM" and image.mode in ("I", "F")
    if tags.get(COMPRESSION, 1) != 1:
        return swapped
    return tags.get(PLANES) == 2 and (swapped or max(tags.get(BITS, (1,))) == 16)


def check_bands(path: str, bands: int, reading: Reading) -> None:
    """Raises UserError if nothing tells which bands of an image to take, or it lacks one of them."""
    if reading.bands and max(reading.bands) > max(bands, 3 if bands == 1 else 1):  # grey is R, G and B
        wanted = " ".join(map(str, reading.bands))
        raise UserError(f"{path} has {bands} bands; --bands {wanted} asks for more")
    if not reading.bands and bands not in (1, 3):
        example = "1 2 3, or 4 1 2 with infrared" if bands > 3 else "1 1 1"
        raise UserError(f"{path} has {bands} bands; say which are red, green and blue by --bands {example}")


def count_frames(image: Image.Image) -> int:
    """The number of images in a file, smaller copies of the first not counted."""
    if image.format in NOT_FRAMES:
        return 1
    try:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format == "TIFF":
            image.seek(1)
            frames = 1 if image.tag_v2.get(SUBFILE, 0) & 5 else frames  # a smaller copy, a mask
    except Exception:  # the others may be damaged, or of a kind that Pillow does not know: the first is not
        return 2
    return frames


def stored_size(image: Image.Image) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Width and height of an opened image as it is stored, and the turn that shows it upright, by its header
    alone."""
    size = image.size
    if image.format == "TIFF":  # some versions of Pillow have turned it already
        size = image.tag_v2[WIDTH], image.tag_v2[LENGTH]
    # Not image.getexif(): for a PNG that decodes the file, as the tag may stand behind the pixels.
    return size, turn_of(partial(Image.Image.getexif, image))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image, turned as its EXIF orientation says, by its header alone."""
    size, turn = stored_size(image)
    return size[::-1] if turn in SIDEWAYS else size


def is_unclear(size: tuple[int, int], turn: Image.Transpose | None) -> bool:
    """Whether EXIF turns an image of this stored size, and a mask's size does not tell whether it is of the
    upright image or of the stored one."""
    return turn is not None and (turn not in SIDEWAYS or size[0] == size[1])


def turn_of(getexif: Callable[[], Image.Exif]) -> Image.Transpose | None:
    """What shows an image upright; None for nothing, or if its EXIF is damaged, which viewers ignore, too."""
    try:
        return TURNS.get(getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, TypeError, ValueError, struct.error):
        return None


def sample_header(image_path: str, mask_path: str | None, reading: Reading = AS_STORED) -> Header:
    """The header of an image, whose size its mask must have, too. Raises UserError if one of them cannot be
    read, as `read_header`, or their sizes differ."""
    header = read_header(image_path, reading)
    if mask_path:
        mask = open_image(mask_path, load=False, max_pixels=reading.max_pixels, is_mask=True)
        check_sizes(image_path, header.size, mask_path, upright_size(mask))
    return header


def check_sizes(image: str, image_size: tuple[int, int], mask: str, mask_size: tuple[int, int]) -> None:
    """Raises UserError if the (width, height) of two files differ."""
    if tuple(image_size) != tuple(mask_size):
        sizes = ["x".join(map(str, size)) for size in (mask_size, image_size)]
        raise UserError(f"{mask} is {sizes[0]}, but its image {image} is {sizes[1]}")


# ----------------------------------------------------------------------------------------------------------
# opening


def open_image(
    path: str, load: bool = True, max_pixels: int = MAX_PIXELS, is_mask: bool = False
) -> Image.Image:
    """The image in a file as it is stored, decoded if `load`; of several frames the first.

    A JPEG that lacks its end is opened if none of its pixels is missing. Raises UserError if the file cannot
    be read, has more pixels than `max_pixels`, or is a mask as `check_mask`."""
    try:
        image = Image.open(path)
        check_pixels(path, image.size, max_pixels)
        if image.format in NO_PHOTOS:
            raise UserError(f"{path} is {image.format}, which is not read right; convert it to TIFF or PNG")
        if is_misread(image):
            raise UserError(f"{path}: Pillow reads other numbers than it has; save it as a PNG")
        if is_mask:
            check_mask(path, image)
        if load:
            image = load_pixels(image, path)
        return image
    except (MemoryError, UserError):
        raise
    except Exception as error:  # what a decoder raises depends on the format and on where the damage lies
        reason = getattr(error, "strerror", None) or str(error).replace(repr(path), "it")
        hint = "; save it as grey or RGB of 8 or 16 bits" if tiffs.is_tiff(path) else ""
        raise UserError(f"cannot read {path}: {reason or type(error).__name__}{hint}") from error


def check_mask(path: str, image: Image.Image) -> None:
    """Raises UserError if the pixels of an opened mask are not those that were drawn, as in a JPEG, or not
    all of it is read, as of several frames; or as `check_unscaled`."""
    if image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg":
        raise UserError(f"{path}: a mask in a JPEG, which changes values and colours; save masks as PNGs")
    check_unscaled(path, image)
    if samples(image)[0] == "uint16" and not image.mode.startswith("I"):
        found = "a mask of 16 bits with colours or alpha, of which Pillow reads half"
        raise UserError(f"{path}: {found}; save it with 8 bits")
    if count_frames(image) > 1:
        raise UserError(f"{path}: a mask of several frames or pages; save one of them alone")
    image.seek(0)


def load_pixels(image: Image.Image, path: str) -> Image.Image:
    """An opened image, decoded."""
    try:
        load_unmapped(image)
        return image
    except OSError:
        with open(path, "rb") as file:
            mended = mend_jpeg(file.read())
        if mended is None:
            raise
        return mended


def load_unmapped(image: Image.Image) -> None:
    """Decode an opened image. A TIFF that Pillow turns by EXIF is not mapped into memory, where some versions
    take the turned width for that of the rows."""
    if image.format != "TIFF" or TURNS.get(image.tag_v2.get(ORIENTATION)) not in SIDEWAYS:
        image.load()
        return
    name, image.filename = image.filename, ""  # without a name nothing is mapped
    try:
        image.load()
    finally:
        image.filename = name


def mend_jpeg(data: bytes) -> Image.Image | None:
    """The image of a JPEG that lacks its end; None if pixels are missing, too, or it is none."""
    if not lacks_end(data):
        return None
    data = data.removesuffix(JPEG_END[:1])
    # If pixels are missing, the decoder takes what follows for them: then these two differ.
    first, second = (Image.open(BytesIO(data + 512 * filler + JPEG_END)) for filler in (b"\0", b"\xa5"))
    try:
        return first if first.tobytes() == second.tobytes() else None
    except OSError:
        return None


def lacks_end(data: bytes) -> bool:
    """Whether these are the bytes of a JPEG that ends within its pixels, or right behind them."""
    # A preview in its EXIF has an end, but stands before the pixels.
    return data.startswith(JPEG_START) and data.rfind(JPEG_END) < data.rfind(JPEG_PIXELS)


def upright(image: Image.Image) -> Image.Image:
    """An image, turned as its EXIF orientation says."""
    # Not ImageOps.exif_transpose: that writes the EXIF anew, and fails if another tag of it is damaged.
    load_unmapped(image)  # which turns a TIFF
    turn = turn_of(image.getexif)
    return image if turn is None else image.transpose(turn)

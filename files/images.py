"""Image files: opened, and their sizes told by their headers alone."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from PIL import ExifTags, Image

from deeplab import TURNS, turn_of
from files.lists import Pairs
from utils import UserError, ahead, outlive_stop_signals


def open_image(path: str, load: bool = True) -> Image.Image:
    """The image in a file, decoded if `load`.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        picture = Image.open(path)
        if load:
            picture.load()
        return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).replace(repr(path), "it").split())
        raise UserError(f"cannot read {path}: {reason}") from error


def check_sizes(image: str, image_size: Sequence[int], mask: str, mask_size: Sequence[int]) -> None:
    """Raises:
    UserError: if the (width, height) of two files differ.
    """
    if tuple(image_size) != tuple(mask_size):
        sizes = ["x".join(map(str, size)) for size in (mask_size, image_size)]
        raise UserError(f"{mask} is {sizes[0]}, but its image {image} is {sizes[1]}")


def header_sizes(pairs: Pairs) -> Iterator[tuple[int, int] | str]:
    """For each pair the height and width of its image, or what is wrong with the two, as the headers tell."""
    starts = range(0, len(pairs), 100)
    chunks = ([pairs[i] for i in range(start, min(start + 100, len(pairs)))] for start in starts)
    if len(pairs) > 10_000:  # processes, for reading headers is Python's work
        pool = ProcessPoolExecutor(initializer=outlive_stop_signals, initargs=(0,))
    else:
        pool = ThreadPoolExecutor()  # so that a slow disk is not waited for once a file
    with pool:
        for sizes in ahead(pool, header_sizes_of, chunks):
            yield from sizes


def header_sizes_of(pairs: list[tuple[str, str | None]]) -> list[tuple[int, int] | str]:
    found = []
    for image_path, mask_path in pairs:
        try:
            size = upright_size(open_image(image_path, load=False))
            if mask_path:
                check_sizes(image_path, size, mask_path, upright_size(open_image(mask_path, load=False)))
            found.append(size[::-1])
        except UserError as error:
            found.append(str(error))
    return found


# Where a PNG keeps an orientation: in Pillow's words, and as the bytes of the file.
PNG_ORIENTATION = {
    "exif": b"eXIf",
    "Raw profile type exif": b"Raw profile type exif",  # ImageMagick's way
    "XML:com.adobe.xmp": b"XML:com.adobe.xmp",
}


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a picture of `open_image`, turned as its EXIF orientation says.

    Raises:
        UserError: if that takes decoding, and it cannot be.
    """
    stored = picture.size
    if picture.format == "TIFF":  # some versions of Pillow have turned it already
        stored = tuple(picture.tag_v2[tag] for tag in (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength))
    if picture.format == "PNG" and "exif" not in picture.info:
        # Asked for it, Pillow decodes the whole file, for the tag may stand at its end. It seldom does.
        end = file_end(picture.filename)
        if not any(key in picture.info or mark in end for key, mark in PNG_ORIENTATION.items()):
            return stored
        picture = open_image(picture.filename)
    sideways = {TURNS[orientation] for orientation in (5, 6, 7, 8)}
    return stored[::-1] if turn_of(picture) in sideways else stored


def file_end(path: str) -> bytes:
    """The last 128 KiB of a file, or all of it."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - (1 << 17)))
        return file.read()

"""Prediction: people's own images, without a truth to compare with."""

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deeplab import DeepLabv3, autocast, enlarge, to_pixels, to_rgb
from files.images import header_sizes, open_image
from files.lists import Pairs, is_image_name
from files.pictures import add_legend, overlay, save_image, save_mask
from utils import UserError, ahead, end_if_stopped, progress, save_csv


def image_files(paths: Sequence[str], out: str) -> list[str]:
    """The files of these paths, each once; the results go to the folder `out`.

    A folder stands for the images in it, a pattern such as `photos/**/*.jpg` for what it matches, and `-` for
    the paths on standard input, one a line.

    Raises:
        UserError: if there are none, or a folder or a pattern leads to `out`.
    """
    files = {}
    for path in (path for word in paths for path in (read_paths() if word == "-" else [word])):
        found = [path]
        if os.path.isdir(path):
            found = [os.path.join(path, name) for name in sorted(os.listdir(path)) if is_image_name(name)]
        elif glob.has_magic(path) and not os.path.exists(path):
            found = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
        folders = {os.path.realpath(os.path.dirname(name)) for name in found if name != path}
        if os.path.realpath(out) in folders:
            raise UserError(f"{path} is --out, too, and would be predicted with its masks: name another")
        if not found:
            raise UserError(f"no images in {path}: --predict takes image files, folders and patterns of them")
        files.update(dict.fromkeys(found))
    if not files:
        raise UserError("no paths of images came on standard input")
    return list(files)


def read_paths() -> list[str]:
    """The paths on standard input, one a line."""
    if sys.stdin is None:
        raise UserError("--predict - reads paths from standard input, which is closed")
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line.strip()]


class Photo(NamedTuple):
    """A decoded image: upright in RGB, and as uint8 (3, H, W) of the size to predict it at."""

    image: Image.Image
    pixels: Tensor


def read_photo(path: str, max_side: int) -> Photo | UserError:
    """The image in a file, or what is wrong with it; see `deeplab.to_pixels`."""
    try:
        image = to_rgb(open_image(path))
        return Photo(image, to_pixels(image, max_side))
    except UserError as error:
        return error


def predict_files(
    model: DeepLabv3,
    files: Sequence[str],
    out: str,
    batch_size: int = 4,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_side: int = 2049,
    amp: str | None = None,
    confidence: bool = False,
) -> int:
    """Write what the model sees in each image to the folder `out`, see `write_result`, and the shares of the
    classes to `out`/predictions.csv. What is wrong with an image is said, and the others are done.

    `batch_size` images of one size go through the network together, while other threads decode the next ones
    and write the last. Other arguments as for `DeepLabv3.predict`.

    Returns:
        how many could not be predicted.
    """
    stems, batches = unique_stems(files), batches_of_one_size(files, batch_size)

    def predicted() -> Iterator[tuple]:
        in_order = chain.from_iterable(batches)
        read_ahead = ahead(pool, lambda index: read_photo(files[index], max_side), in_order, batch_size)
        for batch in batches:
            end_if_stopped()
            found = [(index, next(read_ahead)) for index in batch]
            yield from ((i, error) for i, error in found if isinstance(error, UserError))
            photos = [(i, photo) for i, photo in found if isinstance(photo, Photo)]
            # Of one size, unless a file has changed meanwhile.
            for _, group in groupby(photos, lambda each: each[1].pixels.shape):
                group = list(group)
                pixels = [photo.pixels for _, photo in group]
                results = predict_batch(model, pixels, scales, flip, amp, confidence)
                for (index, photo), result in zip(group, results, strict=True):
                    yield index, photo.image, *result

    def write(task: tuple) -> tuple[int, np.ndarray | UserError]:
        index, found, *result = task
        try:
            return index, write_result(f"{out}/{stems[index]}", found, *result, model) if result else found
        except UserError as error:
            return index, error

    shares = {}
    with ThreadPoolExecutor() as pool:
        written = ahead(pool, write, predicted(), batch_size)
        for index, result in progress(written, "predicting", len(files)):
            if isinstance(result, UserError):
                print(f"main.py: error: {result}", file=sys.stderr)
            else:
                shares[index] = result
    rows = ([files[index], *(f"{share:.6f}" for share in shares[index])] for index in sorted(shares))
    save_csv(f"{out}/predictions.csv", [["file", *model.classes], *rows])
    return len(files) - len(shares)


@torch.inference_mode()
def predict_batch(
    model: DeepLabv3,
    pixels: list[Tensor],
    scales: Sequence[float],
    flip: bool,
    amp: str | None,
    confidence: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Of each image uint8 (3, H, W), all of one size, the labels uint8 (H, W) and, with `confidence`, their
    probabilities float32 (H, W)."""
    images = torch.stack(pixels).to(model.pixel_mean.device)
    with autocast(images.device, amp):
        best, labels = model.segment(images, scales, flip, softmax=confidence).max(1)
    best = best.cpu().numpy() if confidence else [None] * len(pixels)
    return zip(labels.byte().cpu().numpy(), best, strict=True)


def write_result(
    path: str, image: Image.Image, labels: np.ndarray, best: np.ndarray | None, model: DeepLabv3
) -> np.ndarray:
    """Write files that begin with `path`: a palette mask, an overlay with a legend, and, if `best` tells it,
    a grey picture of the winning class's probability, where 255 is 1.

    `labels` uint8 and `best` float32 are (H, W) of the size that was predicted.

    Returns:
        the share of each class.

    Raises:
        UserError: if a file cannot be written.
    """
    labels = enlarge(labels, image.size)
    save_mask(f"{path}_mask.png", labels, model.palette)
    picture = overlay(image, labels, model.palette)
    save_image(f"{path}_overlay.jpg", add_legend(picture, np.unique(labels), model.classes, model.palette))
    if best is not None:
        grey = Image.fromarray((255 * best).round().astype(np.uint8))
        save_image(f"{path}_confidence.png", grey.resize(image.size, Image.Resampling.BILINEAR))
    return np.bincount(labels.ravel(), minlength=len(model.classes)) / labels.size


def unique_stems(files: Sequence[str]) -> list[str]:
    """The files' names without their endings, those of several files told apart."""
    stems, taken = [], set()
    for path in files:
        stem = os.path.splitext(os.path.basename(path))[0]
        while stem.lower() in taken:  # images of one name, from several folders or in several formats
            stem += "_"
        taken.add(stem.lower())  # some disks see no case
        stems.append(stem)
    return stems


def batches_of_one_size(files: Sequence[str], batch_size: int) -> list[list[int]]:
    """The numbers of the files, in batches of images that have one size."""
    groups: dict[tuple[int, int] | str, list[int]] = {}
    sizes = header_sizes(Pairs("", ((path, None) for path in files)))
    for index, size in enumerate(progress(sizes, "reading sizes", len(files))):
        groups.setdefault(size, []).append(index)  # what cannot be read forms a group of its own
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]

"""Prediction: people's own images, without a truth to compare with."""

import glob
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets import batches_of_one_size
from deeplab import DeepLabv3, Inference
from files.images import Header, Reading, read_header
from files.lists import describe_left_out, is_image_name, unique_names
from files.pictures import add_legend, overlay, save_image, save_mask
from files.pixels import decode, enlarge, is_flat, read_image, shrink, to_array
from files.tiles import windows
from files.whole import free_name, read_csv, save_csv
from utils import Stopped, UserError, ahead, end_if_stopped, progress

PIXELS_AHEAD = 2**26  # that are read before their turn, or wait to be written
# An overlay with more pixels, or with a longer side, which JPEG cannot have, is reduced.
OVERLAY_PIXELS, OVERLAY_SIDE = 2**26, 65_000


def image_files(paths: Sequence[str], out: str) -> list[str]:
    """The files of these paths, each once, by the first of its names; the results go to the folder `out`.

    A folder stands for the images in it, a pattern such as `photos/**/*.jpg` for what it matches, and `-` for
    the paths on standard input, one a line. Prints what a folder has besides images, and how many names were
    of files that had been named. Raises UserError if there are none, or a folder or a pattern leads into
    `out`."""
    files, named = {}, 0
    for path in (path for word in paths for path in (read_paths() if word == "-" else [word])):
        found, left_out = [path], ""
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            found = [os.path.join(path, name) for name in names if is_image_name(name)]
            left_out = describe_folder(path, names, out)
        elif glob.has_magic(path) and not os.path.exists(path):
            found = sorted(filter(os.path.isfile, glob.iglob(path, recursive=True)))
        folders = {os.path.realpath(os.path.dirname(name)) + os.sep for name in found if name != path}
        if any(folder.startswith(os.path.realpath(out) + os.sep) for folder in folders):
            raise UserError(f"{path} leads into --out, whose masks would be predicted, too: name another")
        if not found:
            hint = left_out or "--predict takes image files, folders and patterns of them"
            raise UserError(f"no images in {path}: {hint}")
        if left_out:
            print(f"{path}: {left_out}")
        for name in found:
            files.setdefault(os.path.realpath(name), name)
        named += len(found)
    if not files:
        raise UserError("no paths of images came on standard input")
    if named > len(files):
        print(f"{named - len(files)} names were of files that had been named: each is predicted once")
    return list(files.values())


def describe_folder(folder: str, names: Sequence[str], out: str) -> str:
    """What is left out of a folder with these names in it: what `describe_left_out` says, and other folders
    than `out`."""
    paths = {name: os.path.join(folder, name) for name in names}
    folders = {name: path for name, path in paths.items() if os.path.isdir(path)}
    described = describe_left_out(name for name in names if name not in folders)
    folders = [name for name in folders if not (name.startswith(".") or is_image_name(name))]
    folders = [name for name in folders if os.path.realpath(paths[name]) != os.path.realpath(out)]
    if not folders:
        return described
    hint = f"left out {len(folders)} folders, which '{os.path.join(folder, '**', '*.jpg')}' looks into"
    return f"{described}; {hint}" if described else hint


def read_paths() -> list[str]:
    """The paths on standard input, one a line, or with a NUL behind each, as `find -print0` writes them."""
    if sys.stdin is None:
        raise UserError("--predict - reads paths from standard input, which is closed")
    data = sys.stdin.buffer.read()
    paths = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(path) for path in paths if path.strip()]


class Photo(NamedTuple):
    """An image to predict: its (width, height), the RGB image of the size to predict it at, its header, and
    whether it has more than 8 bits, of which little is left as it is read."""

    size: tuple[int, int]
    image: Image.Image
    header: Header
    flat: bool


def read_photo(path: str, inference: Inference, reading: Reading) -> Photo | UserError:
    """The image in a file, or what is wrong with it."""
    try:
        header = read_header(path, reading)
        image = decode(path, header, reading)
        size = image.size
        image = image if inference.tile else shrink(image, inference.max_side)
    except UserError as error:
        return error
    except MemoryError:
        return UserError(f"{path} does not fit into memory")
    return Photo(size, image, header, is_flat(image, header.kind, reading))


def read_sizes(files: Sequence[str], reading: Reading) -> list[tuple[int, int] | None]:
    """Width and height of each image; None of one that cannot be read, as its turn will tell."""

    def read_size(path: str) -> tuple[int, int] | None:
        try:
            return read_header(path, reading).size
        except UserError:
            return None

    with ThreadPoolExecutor() as pool:
        return list(progress(ahead(pool, read_size, files), "reading sizes", len(files)))


def predict_files(
    model: DeepLabv3, files: Sequence[str], out: str, inference: Inference, confidence: bool = False
) -> int:
    """Write what the model predicts for each image to the folder `out`, see `write_result`, and the shares of
    the classes to `out`/predictions.csv. What is wrong with an image is printed, and the others are done.

    Images of one size go through the network together, while other threads decode the next ones and write the
    last. Returns how many could not be predicted."""
    header, earlier = ["file", "mask", *model.classes], earlier_rows(out)
    names = result_names(files, earlier, out)
    reading, notes = model.reading, Counter()
    sizes, workers = read_sizes(files, reading), os.cpu_count() or 1  # each of them holds a whole photo
    batches, limit = batches_of_one_size(sizes, inference.images), inference.batch_size
    if inference.tile:  # nothing is shrunk
        limit = min(limit, PIXELS_AHEAD // max(math.prod(size or (1, 1)) for size in sizes))

    def predicted() -> Iterator[tuple]:
        order = chain.from_iterable(batches)
        photos = ahead(pool, lambda i: read_photo(files[i], inference, reading), order, limit)
        for batch in batches:
            end_if_stopped()
            # In a function of its own, which holds the photos no longer than they are needed.
            yield from predicted_of([(index, next(photos)) for index in batch])

    def predicted_of(found: list[tuple[int, Photo | UserError]]) -> Iterator[tuple]:
        yield from ((i, error) for i, error in found if isinstance(error, UserError))
        # Of one size, unless a file has changed meanwhile.
        read = [(i, photo) for i, photo in found if isinstance(photo, Photo)]
        for _, group in groupby(read, lambda item: item[1].image.size):
            group = list(group)
            results = predict_batch(model, [photo.image for _, photo in group], inference, confidence)
            for (index, photo), result in zip(group, results, strict=True):
                notes["shrunk"] += photo.image.size != photo.size
                notes["flat"] += photo.flat
                notes["frames"] += photo.header.frames > 1
                yield index, photo, *result

    def write(task: tuple) -> UserError | None:
        index, found, *result = task
        if not result:
            return found
        try:
            shares = write_result(f"{out}/{names[index]}", files[index], found, *result, model)
        except UserError as error:
            return error
        shares = [f"{share:.6f}" for share in shares]
        rows[index] = [os.path.abspath(files[index]), f"{names[index]}_mask.png", *shares]
        return None

    with recorded(out, header, earlier, files, names) as rows, ThreadPoolExecutor(workers) as pool:
        written = ahead(pool, write, predicted(), limit)
        for error in filter(None, progress(written, "predicting", len(files))):
            print(f"main.py: error: {error}", file=sys.stderr)
    print_notes(notes, inference)
    return len(files) - len(rows)


def print_notes(notes: Counter, inference: Inference) -> None:
    """Print what the user would not expect of some images: that they were `shrunk`, were `flat`, or have
    several `frames`."""
    if notes["shrunk"]:
        longer = f"{notes['shrunk']} images are longer than --max_side {inference.max_side}"
        print(f"{longer}: predicted at that size, then enlarged; --tile 513 segments them at their own")
    if notes["frames"]:
        print(f"{notes['frames']} images have several frames or pages: the first was predicted")
    if notes["flat"]:
        found = f"{notes['flat']} images of more than 8 bits were nearly black, white or of one grey"
        hint = "--value_range says which values become black and white, 0 4095 of 12 bits in 16, say"
        print(f"{found} for the network: {hint}")


def earlier_rows(out: str) -> list[list[str]]:
    """What an earlier prediction has written to predictions.csv: the header and the rows of which a result is
    still there."""
    path = f"{out}/predictions.csv"
    header, *rows = (read_csv(path) if os.path.exists(path) else []) or [[]]
    there = (row for row in rows if len(row) > 1 and any(map(os.path.exists, results(out, row[1]))))
    return [header, *there]


def results(out: str, mask: str) -> list[str]:
    """The paths of what may be written with a mask of this name."""
    name = mask.removesuffix("_mask.png")
    return [f"{out}/{name}_{end}" for end in ("mask.png", "overlay.jpg", "confidence.png")]


def result_names(files: Sequence[str], earlier: list[list[str]], out: str) -> list[str]:
    """What the names of each file's results begin with; a file that is predicted anew keeps its name. Raises
    UserError if `out` has a file of another origin in the place of one, or a file is an earlier result."""
    files = [os.path.abspath(file) for file in files]
    names = {file: mask.removesuffix("_mask.png") for file, mask, *_ in earlier[1:]}
    folder = os.path.realpath(out)
    own = {os.path.normpath(path) for _, mask, *_ in earlier[1:] for path in results(folder, mask)}
    if result := next((file for file in files if os.path.realpath(file) in own), None):
        hint = "leave it out, or name another --out"
        raise UserError(f"{result} is what an earlier prediction has written into --out: {hint}")
    new = [file for file in files if file not in names]
    taken = {name.lower() for name in names.values()}
    names |= dict(zip(new, unique_names(new, taken), strict=True))
    for path in (path for file in new for path in results(out, names[file])):
        if os.path.exists(path):
            raise UserError(f"{path} is there, and not in predictions.csv: move it, or name another --out")
    if again := sum(os.path.exists(f"{out}/{names[file]}_mask.png") for file in files):
        there = len(earlier) - 1 - again
        print(f"replaces {again} masks in {out}; {max(0, there)} others of earlier predictions stay there")
    return [names[file] for file in files]


@contextmanager
def recorded(
    out: str, header: list[str], earlier: list[list[str]], files: Sequence[str], names: Sequence[str]
) -> Iterator[dict[int, list[str]]]:
    """Write the rows that this context fills in, by number of file, to predictions.csv, also of a prediction
    that was stopped. Meanwhile the rows of all `files` have no shares there: a kill leaves no mask without a
    row, nor with the shares of the mask before. Raises Stopped with the count."""
    path, empty, rows = f"{out}/predictions.csv", [""] * (len(header) - 2), {}
    masks = {f"{name}_mask.png": file for file, name in zip(files, names, strict=True)}
    pending = [[os.path.abspath(file), mask, *empty] for mask, file in masks.items()]
    there = earlier[1:]
    if there and earlier[0] != header:
        os.rename(path, copy := free_name(f"{path}.old"))
        print(f"{path} has other columns, of other classes say: it is now {copy}")
        there = pending
    save_csv(path, [header, *(row for row in there if row[1] not in masks), *pending])
    try:
        yield rows
    except Stopped:
        raise Stopped(f"{len(rows)} of {len(files)} images are predicted") from None
    finally:
        done = {row[1] for row in rows.values()}
        kept = [row for row in there if row[1] not in done and os.path.exists(f"{out}/{row[1]}")]
        done |= {row[1] for row in kept}  # of one that failed there may be a part
        kept += [r for r in pending if r[1] not in done and any(map(os.path.exists, results(out, r[1])))]
        save_csv(path, [header, *kept, *(rows[index] for index in sorted(rows))])


@torch.inference_mode()
def predict_batch(
    model: DeepLabv3, images: list[Image.Image], inference: Inference, confidence: bool
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """For each RGB image, all of one size, the labels uint8 (H, W) and, with `confidence`, their
    probabilities, uint8 (H, W) where 255 is 1."""
    if inference.takes_tiles(images[0].size):
        yield from (segment_tiles(model, image, inference, confidence) for image in images)
        return
    pixels = torch.from_numpy(np.stack([to_array(image) for image in images])).permute(0, 3, 1, 2)
    best, labels = model.segment(pixels.to(model.pixel_mean.device), inference, softmax=confidence).max(1)
    best = (255 * best).round().byte().cpu().numpy() if confidence else [None] * len(images)
    yield from zip(labels.byte().cpu().numpy(), best, strict=True)


@torch.inference_mode()
def segment_tiles(
    model: DeepLabv3, image: Image.Image, inference: Inference, confidence: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The same of one image, in tiles. Raises Stopped if a stop signal has come."""
    labels = np.empty(image.size[::-1], np.uint8)
    best = np.empty_like(labels) if confidence else None

    def finish(scores: Tensor) -> tuple[Tensor, Tensor]:
        probability, label = scores.max(0)
        return label.byte().cpu(), (255 * probability).round().byte().cpu()

    pieces = model.segment_tiles(image, inference, finish)
    count = math.prod(len(windows(side, inference.tile, inference.overlap)) for side in image.size)
    for rows, columns, (label, probability) in progress(pieces, "tiles", count, "tile"):
        labels[rows, columns] = label
        if confidence:
            best[rows, columns] = probability
    return labels, best


def write_result(
    path: str, file: str, photo: Photo, labels: np.ndarray, best: np.ndarray | None, model: DeepLabv3
) -> np.ndarray:
    """Write files that begin with `path`: a palette mask, an overlay with a legend, and, if `best` tells it,
    a grey picture of the winning class's probability, where 255 is 1.

    `labels` and `best` are uint8 (H, W) of the size that was predicted. The overlay of a very large photo is
    a smaller picture. Returns the share of each class. Raises UserError if a file cannot be written."""
    shrunk = photo.image.size != photo.size
    labels = enlarge(labels, photo.size) if shrunk else labels
    # Row by row, for it counts in integers of 64 bits.
    counts = np.sum([np.bincount(row, minlength=len(model.classes)) for row in labels], 0)
    # A photo that was shrunk is decoded once more, so as not to hold many of them.
    image = read_image(file, model.reading) if shrunk else photo.image
    factor = math.ceil(max((labels.size / OVERLAY_PIXELS) ** 0.5, max(labels.shape) / OVERLAY_SIDE))
    picture = overlay(image, labels, model.palette, factor)
    legend = np.flatnonzero(counts)
    save_image(f"{path}_overlay.jpg", add_legend(picture, legend, model.classes, model.palette))
    if best is not None:
        grey = Image.fromarray(best)
        save_image(f"{path}_confidence.png", grey.resize(photo.size, Image.Resampling.BILINEAR))
    elif os.path.exists(f"{path}_confidence.png"):
        os.remove(f"{path}_confidence.png")  # of an earlier mask
    save_mask(
        f"{path}_mask.png", labels, model.palette, model.classes
    )  # last: where it is, nothing is missing
    return counts / labels.size

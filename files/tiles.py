"""Images larger than a network can take at once: windows at full resolution, whose scores are blended.

The memory for them is bounded by the tile and the width of the image, and not by classes x height x width:
windows go from left to right and from top to bottom, and what they share with the next is all that is kept of
their scores.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from files.pixels import to_array

Result = TypeVar("Result")


class Window(NamedTuple):
    """A window along one axis of an image.

    The network sees [start, stop). The scores of [first, last) count, with `weights` (last - first,): the
    first `before` of these pixels are shared with the window before it, the last `after` with the next, and
    the weights of both add up to 1.
    """

    start: int
    stop: int
    first: int
    last: int
    before: int
    after: int
    weights: Tensor


def windows(length: int, size: int, overlap: float) -> list[Window]:
    """The windows of this size along a side of an image: as few as overlap by that share of it, evenly
    spaced, so that all are full of image. One of the side's length, if that is not longer.

    Two neighbours are blended over that share in the middle of what both see. Nearer to its edge a window
    does not count: there the network sees least of what is around a pixel."""
    size, shared = min(size, length), round(min(size, length) * overlap)
    count = 1 + math.ceil((length - size) / (size - shared))
    starts = [i * (length - size) // max(1, count - 1) for i in range(count)]
    steps = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    if count > 2:  # the ramps on both sides of a window may not meet
        shared = min(shared, min(steps) - 1)
    ramps = [(start + (size - step - shared) // 2) for start, step in zip(starts[1:], steps, strict=True)]
    rising = (torch.arange(shared) + 0.5) / max(1, shared)
    found = []
    for i, start in enumerate(starts):
        before, after = shared if i else 0, shared if i < count - 1 else 0
        first = ramps[i - 1] if i else 0
        last = ramps[i] + shared if i < count - 1 else length
        weights = torch.ones(last - first)
        weights[:before] = rising[:before]
        weights[last - first - after :] = 1 - rising[:after]
        found.append(Window(start, start + size, first, last, before, after, weights))
    return found


def blend(
    segment: Callable[[Tensor], Tensor],
    image: Image.Image,
    tile: int,
    overlap: float,
    batch_size: int,
    finish: Callable[[Tensor], Result],
) -> Iterator[tuple[slice, slice, Result]]:
    """Segment an RGB image window by window, and blend the scores where windows overlap.

    Args:
        segment: gives the softmax scores (N, num_classes, height, width) of uint8 (N, 3, height, width).
        tile, overlap: side of the windows, and the share of it by which they overlap, see `windows`.
        batch_size: windows that are segmented together.
        finish: what to make of blended scores (num_classes, height, width).

    Yields:
        what `finish` gives, piece by piece, each with its rows and columns of the image, which the pieces
        cover without overlap.
    """
    rows, columns = (windows(side, tile, overlap) for side in image.size[::-1])
    above = None
    for row in rows:
        left = None
        height = slice(row.first - row.start, row.last - row.start)
        for i in range(0, len(columns), batch_size):
            batch = columns[i : i + batch_size]
            pixels = [to_array(image.crop((c.start, row.start, c.stop, row.stop))) for c in batch]
            batch_scores = segment(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))
            for column, scores in zip(batch, batch_scores, strict=True):
                scores = scores[:, height, column.first - column.start : column.last - column.start]
                scores.mul_((row.weights[:, None] * column.weights).to(scores.device))
                # Columns, then rows: added are what the window before and the row before have left, and what
                # is shared with the next is put aside.
                if column.before:
                    scores[..., : column.before] += left
                scores, left = split(scores, 2, column.after)
                width = slice(column.first, column.last - column.after)
                if row.before:
                    scores[:, : row.before] += above[..., width]
                scores, shared = split(scores, 1, row.after)
                if row.after:
                    if above is None:  # 16 bits: of a probability they lose 1/4096 at most
                        above = scores.new_empty(len(scores), row.after, image.width, dtype=torch.float16)
                    above[..., width] = shared  # for the next row: of this one it has been added
                yield slice(row.first, row.last - row.after), width, finish(scores)
            del batch_scores, scores, shared  # before the next ones are computed


def split(scores: Tensor, axis: int, after: int) -> tuple[Tensor, Tensor]:
    """The scores, and a copy of their last `after` along an axis, which would keep all of them in memory."""
    whole, shared = scores.split([scores.shape[axis] - after, after], axis)
    return whole, shared.clone()

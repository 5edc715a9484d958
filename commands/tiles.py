"""Images larger than the network can take at once: windows at full resolution, whose scores are blended.

Memory is bounded by the tile and the width of the image, and not by classes x height x width: windows go from
left to right and from top to bottom, and what they share with the next is all that is kept of their scores.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deeplab import DeepLabv3, Inference
from utils import progress


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


def is_larger(size: Sequence[int], inference: Inference) -> bool:
    """Whether an image of that height and width is to be segmented in tiles."""
    return inference.tile is not None and max(size) > inference.tile


@torch.inference_mode()
def segment_tiles(
    model: DeepLabv3, image: Tensor, inference: Inference, confidence: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Segment a uint8 image (3, H, W) window by window; the softmax scores are blended where windows overlap.

    Returns:
        labels uint8 (H, W) and, with `confidence`, their probabilities, uint8 (H, W) where 255 is 1; both on
        the CPU.

    Raises:
        Stopped: if a stop signal has come.
    """
    rows, columns = (windows(side, inference.tile, inference.overlap) for side in image.shape[1:])
    labels = torch.empty(image.shape[1:], dtype=torch.uint8)
    best, above = torch.empty_like(labels) if confidence else None, None
    for row in progress(rows, "rows of tiles", len(rows), "row"):
        left = None
        for column, scores in row_scores(model, image, row, columns, inference):
            # Columns, then rows: added are what the window before and the row before have left, and what is
            # shared with the next is put aside.
            if column.before:
                scores[..., : column.before] += left
            scores, left = split(scores, 2, column.after)
            width = slice(column.first, column.last - column.after)
            if row.before:
                scores[:, : row.before] += above[..., width]
            scores, shared = split(scores, 1, row.after)
            if row.after:
                if above is None:
                    above = scores.new_empty(len(scores), row.after, image.shape[2])
                above[..., width] = shared  # for the next row: of this one it has been added
            probability, label = scores.max(0)
            height = slice(row.first, row.last - row.after)
            labels[height, width] = label.byte().cpu()
            if confidence:
                best[height, width] = (255 * probability).round().byte().cpu()
    return labels, best


def split(scores: Tensor, axis: int, after: int) -> tuple[Tensor, Tensor]:
    """The scores, and a copy of their last `after` along an axis, which would keep all of them in memory."""
    whole, shared = scores.split([scores.shape[axis] - after, after], axis)
    return whole, shared.clone()


def row_scores(
    model: DeepLabv3, image: Tensor, row: Window, columns: list[Window], inference: Inference
) -> Iterator[tuple[Window, Tensor]]:
    """Each window of a row with its weighted scores (num_classes, height, width), where they count."""
    device = model.pixel_mean.device
    for i in range(0, len(columns), inference.batch_size):
        batch = columns[i : i + inference.batch_size]
        images = torch.stack([image[:, row.start : row.stop, c.start : c.stop] for c in batch]).to(device)
        scores = model.segment(images, inference, softmax=True)
        height = slice(row.first - row.start, row.last - row.start)
        for j, column in enumerate(batch):
            width = slice(column.first - column.start, column.last - column.start)
            weights = row.weights.to(device)[:, None] * column.weights.to(device)
            yield column, scores[j, :, height, width] * weights

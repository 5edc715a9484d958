"""Evaluation: a data set is predicted and compared with its truth."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from datasets import SegmentationDataset, load_batches
from deeplab import DeepLabv3, autocast
from pictures import sample_row, sample_sheet
from utils import IGNORE_INDEX, RANK, WORLD, confusion_matrix, metrics, progress


@torch.inference_mode()
def evaluate(
    model: DeepLabv3,
    dataset: SegmentationDataset,
    device: torch.device,
    batch_size: int = 4,
    workers: int = 0,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    amp: str | None = None,
    samples: int = 0,
    folder: str | None = None,
) -> dict:
    """Predict a whole data set and compare it with the truth; several processes share its batches.

    Args:
        model: ready for inference, as `fuse` makes it.
        dataset: `drop_bad` has looked at it.
        batch_size: images in one forward pass.
        workers: processes that load images.
        scales, flip: as for `DeepLabv3.scores`.
        amp: number format of the convs, as for `deeplab.autocast`.
        samples: how many images to show in the picture.
        folder: where to write the predictions, as PNGs of the images' own sizes.

    Returns:
        the measures of `utils.metrics`, the `confusion` matrix, and `samples`, a picture.

    Raises:
        UserError: if a sample cannot be used, or a prediction cannot be written.
        Stopped: if a stop signal has come.
    """
    classes, palette = dataset.classes, dataset.palette
    batches = dataset.eval_batches(batch_size)[RANK::WORLD]
    shown = set(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist())
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)
    rows, labels_shown = {}, set()

    def keep(indices: list[int], images: Tensor, masks: Tensor, sizes: Tensor, predictions: Tensor) -> None:
        """In a thread, which waits for the device: write what was predicted, and draw the samples' rows."""
        predictions = predictions.cpu().numpy()
        for i, (index, (h, w)) in enumerate(zip(indices, sizes.tolist(), strict=True)):
            labels = predictions[i, :h, :w]
            if folder:
                dataset.save(folder, index, labels)
            if index in shown:
                truth = masks[i, :h, :w].cpu().numpy()
                image = Image.fromarray(images[i, :, :h, :w].permute(1, 2, 0).cpu().numpy())
                rows[index] = sample_row(image, truth, labels, palette)
                labels_shown.update(np.unique(labels).tolist(), np.unique(truth).tolist())

    loaded = zip(batches, load_batches(dataset, batches, workers, device), strict=True)
    writing = deque()
    with ThreadPoolExecutor() as writers:
        for indices, (images, masks, sizes) in progress(loaded, "evaluating", len(batches), "batch"):
            with autocast(device, amp):
                scores = model.scores(model.normalize(images, sizes), scales, flip)
            predictions = scores.argmax(1).byte()
            confusion += confusion_matrix(predictions, masks, len(classes))
            writing.append(writers.submit(keep, indices, images, masks, sizes, predictions))
            if len(writing) > 2:
                writing.popleft().result()  # raises what went wrong; and no more than two wait to be written
        for future in writing:
            future.result()
    confusion = confusion.cpu()
    if WORLD > 1:
        dist.all_reduce(confusion)
        parts = [None] * WORLD
        dist.all_gather_object(parts, (rows, labels_shown))
        rows = {index: row for part, _ in parts for index, row in part.items()}
        labels_shown = set().union(*(labels for _, labels in parts))
    legend = sorted(labels_shown - {IGNORE_INDEX})
    sheet = sample_sheet([rows[i] for i in sorted(rows)], legend, classes, palette)
    return {**metrics(confusion), "confusion": confusion.tolist(), "samples": sheet}

"""Evaluation: a data set is predicted and compared with its truth, image by image."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from datasets import SegmentationDataset, load_batches
from deeplab import DeepLabv3, autocast
from files.pictures import sample_row, sample_sheet
from utils import (
    IGNORE_INDEX,
    RANK,
    WORLD,
    ahead,
    confusion_matrix,
    end_if_stopped,
    metrics,
    percent,
    progress,
)


class ImageResult(NamedTuple):
    """How one image came out.

    `mean_iou` is over the classes that the image or its prediction has; None without a labelled pixel.
    `truth` and `predicted_as` are the classes most confused, of `pixels`; empty where nothing is wrong.
    """

    name: str
    mean_iou: float | None
    pixel_accuracy: float | None
    truth: str
    predicted_as: str
    pixels: int


def image_result(name: str, confusion: Tensor, classes: Sequence[str]) -> ImageResult:
    """The result of an image whose int64 confusion matrix, truth in rows, is on the CPU."""
    measures = metrics(confusion)
    wrong = confusion - confusion.diag().diag()
    truth, predicted = divmod(wrong.argmax().item(), len(classes))
    pair = (classes[truth], classes[predicted]) if wrong.any() else ("", "")
    return ImageResult(name, measures["mean_iou"], measures["pixel_accuracy"], *pair, wrong.max().item())


class Row(NamedTuple):
    """An image's row in a picture, and the labels whose colours are in it."""

    picture: Image.Image
    labels: set[int]


class Findings:
    """What evaluation keeps of single images: the rows of some samples and, if it has a `folder` to write to,
    the result of each image and the rows of the worst. Threads may add to it."""

    def __init__(self, dataset: SegmentationDataset, samples: int, folder: str | None):
        self.dataset, self.most, self.folder, self.lock = dataset, samples, folder, threading.Lock()
        shown = np.linspace(0, len(dataset) - 1, min(samples, len(dataset)))  # spread evenly
        self.shown = set(shown.astype(int).tolist())
        self.samples: dict[int, Row] = {}
        self.results: dict[int, ImageResult] = {}
        self.worst: list[tuple[float, int, Row]] = []  # mean IoU, index; as many as samples

    def add(self, index: int, image: Tensor, truth: Tensor, labels: np.ndarray, confusion: Tensor) -> None:
        """An image: uint8 (3, H, W), its truth and predicted labels (H, W), and its confusion matrix."""
        if index in self.shown:
            self.samples[index] = self.draw(image, truth, labels)
        if not self.folder:
            return
        self.dataset.save(self.folder, index, labels)
        result = image_result(self.dataset.name(index), confusion, self.dataset.classes)
        self.results[index], iou = result, result.mean_iou
        worst = self.worst
        if iou is not None and (len(worst) < self.most or (self.most and (iou, index) < worst[-1][:2])):
            row = self.draw(image, truth, labels, f"{result.name}: mean IoU {percent(iou)}")
            with self.lock:
                self.keep_worst([(iou, index, row)])

    def add_batch(self, batch: tuple) -> Tensor:
        """The confusion matrix, on the CPU, of a padded batch of `evaluate`; this waits for the device."""
        indices, images, masks, sizes, labels = batch
        classes = len(self.dataset.classes)
        counts = [confusion_matrix(*pair, classes).cpu() for pair in zip(labels, masks, strict=True)]
        labels = labels.cpu().numpy()
        for i, (index, (h, w)) in enumerate(zip(indices, sizes.tolist(), strict=True)):
            self.add(index, images[i, :, :h, :w], masks[i, :h, :w], labels[i, :h, :w], counts[i])
        return sum(counts)

    def draw(self, image: Tensor, truth: Tensor, labels: np.ndarray, title: str | None = None) -> Row:
        picture, truth = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), truth.cpu().numpy()
        seen = {*np.unique(labels).tolist(), *np.unique(truth).tolist()} - {IGNORE_INDEX}
        return Row(sample_row(picture, truth, labels, self.dataset.palette, title), seen)

    def keep_worst(self, others: list[tuple[float, int, Row]]) -> None:
        self.worst = sorted([*self.worst, *others], key=lambda each: each[:2])[: self.most]

    def gather(self) -> None:
        """Take in what the other processes have found."""
        parts = [None] * WORLD
        dist.all_gather_object(parts, (self.samples, self.results, self.worst))
        for rank, (samples, results, worst) in enumerate(parts):
            self.samples.update(samples)
            self.results.update(results)
            self.keep_worst(worst if rank != RANK else [])

    def sheet(self, rows: Sequence[Row]) -> Image.Image:
        labels = sorted(set().union(*(row.labels for row in rows)))
        pictures = [row.picture for row in rows]
        return sample_sheet(pictures, labels, self.dataset.classes, self.dataset.palette)


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
        samples: how many images to show in a picture.
        folder: where to write the predictions, as PNGs of the images' own sizes.

    Returns:
        the measures of `utils.metrics`, the `confusion` matrix, `samples`, a picture, and, with a folder,
        `worst`, a picture, and `images`, the `ImageResult`s in the data set's order.

    Raises:
        UserError: if a sample cannot be used, or a prediction cannot be written.
        Stopped: if a stop signal has come.
    """
    batches = dataset.eval_batches(batch_size)[RANK::WORLD]
    findings = Findings(dataset, samples, folder)
    confusion = torch.zeros((len(dataset.classes),) * 2, dtype=torch.int64)

    def predicted() -> Iterator[tuple]:
        loaded = load_batches(dataset, batches, workers, device)
        for indices, (images, masks, sizes) in zip(batches, loaded, strict=True):
            end_if_stopped()  # `progress` looks only once the first batches are counted
            with autocast(device, amp):
                labels = model.scores(model.normalize(images, sizes), scales, flip).argmax(1).byte()
            yield indices, images, masks, sizes, labels

    with ThreadPoolExecutor() as pool:
        counted = ahead(pool, findings.add_batch, predicted(), 2)
        for counts in progress(counted, "evaluating", len(batches), "batch"):
            confusion += counts
    if WORLD > 1:
        dist.all_reduce(confusion)
        findings.gather()
    result = {**metrics(confusion), "confusion": confusion.tolist()}
    result["samples"] = findings.sheet([findings.samples[index] for index in sorted(findings.samples)])
    if folder:
        result["worst"] = findings.sheet([row for _, _, row in findings.worst])
        result["images"] = [findings.results[index] for index in sorted(findings.results)]
    return result

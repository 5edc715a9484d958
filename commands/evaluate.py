"""Evaluation: a data set is predicted and compared with its truth, image by image."""

import json
import os
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
from deeplab import DeepLabv3, Inference
from files.pictures import plot_confusion, sample_row, sample_sheet, save_image
from files.whole import save_csv, save_json
from utils import (
    IGNORE_INDEX,
    RANK,
    WORLD,
    UserError,
    ahead,
    end_if_stopped,
    percent,
    progress,
)


def confusion_matrices(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Counts of (truth, prediction) pairs for each image of a batch, truth in rows.

    Args:
        predictions: integer labels below `num_classes`, (N, H, W).
        targets: integer labels of the same shape; pixels of `IGNORE_INDEX` are not counted.

    Returns:
        int64 (N, num_classes, num_classes) on the device of the inputs.
    """
    count, bins = len(targets), num_classes**2 + 1  # the last bin of an image is for what is ignored
    pairs = targets.long() * num_classes + predictions
    pairs = pairs.where(targets != IGNORE_INDEX, num_classes**2).view(count, -1)
    pairs += bins * pairs.new_tensor(range(count))[:, None]
    counts = pairs.flatten().bincount(minlength=count * bins).view(count, bins)
    return counts[:, :-1].reshape(count, num_classes, num_classes)


def metrics(confusion: Tensor) -> dict:
    """Measures of an int64 confusion matrix (truth in rows), all in 0..1.

    `iou` has None for a class that appears neither in the truth nor in the predictions, and `mean_iou` leaves
    it out; `mean_accuracy` leaves out the classes without truth. A mean of nothing is None.
    """
    confusion = confusion.cpu().double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)

    def mean(values: Tensor) -> float | None:
        values = values[values.isfinite()]
        return values.mean().item() if len(values) else None

    return {
        "mean_iou": mean(iou),
        "iou": [None if value != value else value for value in iou.tolist()],  # NaN: 0 / 0
        "pixel_accuracy": mean(hits.sum() / truth.sum()[None]),
        "mean_accuracy": mean(hits / truth),
    }


class ImageResult(NamedTuple):
    """The result of one image.

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


class Details:
    """What evaluation keeps of single images: the rows of `samples` images, evenly spaced, and, if it has a
    `folder` to write to, the result of each image and the rows of the worst. Threads may add to it."""

    def __init__(self, dataset: SegmentationDataset, samples: int, folder: str | None):
        self.dataset, self.limit, self.folder, self.lock = dataset, samples, folder, threading.Lock()
        self.shown = set(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist())
        self.samples: dict[int, Row] = {}
        self.results: dict[int, ImageResult] = {}
        self.worst: list[tuple[float, int, Row]] = []  # mean IoU, index; `samples` of them

    def add_batch(self, batch: tuple[list[int], Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """The confusion matrix, on the CPU, of a padded batch: indices, images uint8 (N, 3, H, W), masks and
        predicted labels uint8 (N, H, W), sizes (N, 2). Waits for the device."""
        indices, images, masks, sizes, labels = batch
        confusions = confusion_matrices(labels, masks, len(self.dataset.classes)).cpu()
        if self.folder or not self.shown.isdisjoint(indices):
            labels = labels.cpu().numpy()
            for i, (index, (h, w)) in enumerate(zip(indices, sizes.tolist(), strict=True)):
                image, truth = images[i, :, :h, :w], masks[i, :h, :w]
                self.add(index, image, truth, labels[i, :h, :w], confusions[i])
        return confusions.sum(0)

    def add(self, index: int, image: Tensor, truth: Tensor, labels: np.ndarray, confusion: Tensor) -> None:
        if index in self.shown:
            self.samples[index] = self.draw(image, truth, labels)
        if not self.folder:
            return
        self.dataset.save(self.folder, index, labels)
        result = image_result(self.dataset.names[index], confusion, self.dataset.classes)
        self.results[index], iou = result, result.mean_iou
        worst, limit = self.worst, self.limit
        if iou is not None and limit and (len(worst) < limit or (iou, index) < worst[-1][:2]):
            row = self.draw(image, truth, labels, f"{result.name}: mean IoU {percent(iou)}")
            with self.lock:
                self.keep_worst([(iou, index, row)])

    def draw(self, image: Tensor, truth: Tensor, labels: np.ndarray, title: str | None = None) -> Row:
        picture, truth = Image.fromarray(image.permute(1, 2, 0).cpu().numpy()), truth.cpu().numpy()
        seen = {*np.unique(labels).tolist(), *np.unique(truth).tolist()} - {IGNORE_INDEX}
        return Row(sample_row(picture, truth, labels, self.dataset.palette, title), seen)

    def keep_worst(self, others: list[tuple[float, int, Row]]) -> None:
        self.worst = sorted([*self.worst, *others], key=lambda item: item[:2])[: self.limit]

    def gather(self) -> None:
        """Add what the other processes have kept."""
        parts = [None] * WORLD
        dist.all_gather_object(parts, (self.samples, self.results, self.worst))
        for rank, (samples, results, worst) in enumerate(parts):
            self.samples.update(samples)
            self.results.update(results)
            self.keep_worst(worst if rank != RANK else [])

    def sample_sheet(self) -> Image.Image:
        """Rows of image, truth and prediction."""
        return self.sheet([self.samples[index] for index in sorted(self.samples)])

    def worst_sheet(self) -> Image.Image:
        """The same for the images of lowest mean IoU, with their errors."""
        return self.sheet([row for _, _, row in self.worst])

    def sheet(self, rows: Sequence[Row]) -> Image.Image:
        labels = sorted(set().union(*(row.labels for row in rows)))
        pictures = [row.picture for row in rows]
        return sample_sheet(pictures, labels, self.dataset.classes, self.dataset.palette)


@torch.inference_mode()
def evaluate(
    model: DeepLabv3,
    dataset: SegmentationDataset,
    device: torch.device,
    inference: Inference,
    workers: int = 0,
    samples: int = 0,
    folder: str | None = None,
) -> tuple[dict, Details]:
    """Predict a whole data set and compare it with the truth; several processes share its batches.

    Args:
        model: ready for inference, as `fuse` makes it.
        dataset: `check.drop_bad` has looked at it.
        workers: processes that load images.
        samples: number of images to show in a picture.
        folder: where to write the predictions, as PNGs of the images' own sizes.

    Returns:
        the measures of `metrics` with the `confusion` matrix, and the details.

    Raises:
        UserError: if a sample cannot be used, or a prediction cannot be written.
        Stopped: if a stop signal has come.
    """
    batches = dataset.eval_batches(inference.batch_size)[RANK::WORLD]
    details = Details(dataset, samples, folder)
    confusion = torch.zeros((len(dataset.classes),) * 2, dtype=torch.int64)

    def predicted() -> Iterator[tuple]:
        loaded = load_batches(dataset, batches, workers, device)
        for indices, (images, masks, sizes) in zip(batches, loaded, strict=True):
            end_if_stopped()  # `progress` asks only once the first batches are counted
            labels = model.scores(model.normalize(images, sizes), inference).argmax(1).byte()
            yield indices, images, masks, sizes, labels

    with ThreadPoolExecutor() as pool:
        counted = ahead(pool, details.add_batch, predicted(), 2)
        for counts in progress(counted, "evaluating", len(batches), "batch"):
            confusion += counts
    if WORLD > 1:
        dist.all_reduce(confusion)
        details.gather()
    return {**metrics(confusion), "confusion": confusion.tolist()}, details


def results_folder(checkpoint: str, split: str) -> str:
    """Where the results of a checkpoint file go: data/SPLIT/ and its path below data/, or else its name.
    Raises UserError if the results of another file are there."""
    path = os.path.relpath(checkpoint, "data")
    if path.startswith(os.pardir):
        path = os.path.basename(checkpoint)
    folder = os.path.join("data", split, os.path.splitext(path)[0])
    if os.path.exists(f"{folder}/metrics.json"):
        with open(f"{folder}/metrics.json", encoding="utf-8") as file:
            other = json.load(file)["checkpoint"]
        if os.path.realpath(other) != os.path.realpath(checkpoint):
            raise UserError(f"{folder} has the results of {other}: move or rename one of the two")
    return folder


def write_results(
    folder: str, dataset: SegmentationDataset, result: dict, details: Details, about: dict, plots: bool
) -> None:
    """Write the pictures, per_image.csv and metrics.json; `about` is what else metrics.json tells. Raises
    UserError if a file cannot be written."""
    save_image(f"{folder}/samples.png", details.sample_sheet())
    save_image(f"{folder}/worst.png", details.worst_sheet())
    if plots:
        plot_confusion(f"{folder}/confusion.png", result["confusion"], dataset.classes)
    images = [details.results[index] for index in sorted(details.results)]
    rows = ([f"{v:.6f}" if isinstance(v, float) else v for v in row] for row in images)
    save_csv(f"{folder}/per_image.csv", [ImageResult._fields, *rows])
    iou = dict(zip(dataset.classes, result["iou"], strict=True))
    save_json(f"{folder}/metrics.json", {**result, "iou": iou, **about})


def print_never_predicted(classes: Sequence[str], result: dict) -> None:
    """Print the classes that the truth has and no prediction."""
    confusion = np.array(result["confusion"])
    missed = np.flatnonzero((confusion.sum(1) > 0) & (confusion.sum(0) == 0))
    if len(missed):
        print(f"never predicted: {', '.join(classes[label] for label in missed)}")


def print_results(classes: Sequence[str], result: dict) -> None:
    """Print a line for each class: its IoU as a bar and a number, its accuracy, its share of the labelled
    pixels; then the lines of the published code. `result` is that of `evaluate`."""
    confusion = np.array(result["confusion"])
    hits, truth = confusion.diagonal(), confusion.sum(1)
    width = max(map(len, [*classes, "class"]))
    print(f"{'class':{width}}  {'':20}    IoU  accuracy  pixels")
    for name, iou, hit, total in zip(classes, result["iou"], hits, truth, strict=True):
        accuracy, share = percent(hit / total if total else None), percent(total / max(1, confusion.sum()))
        bar = "#" * round(20 * (iou or 0))
        print(f"{name:{width}}  {bar:20} {percent(iou):>6}  {accuracy:>8}  {share:>6}")
    for name, iou in zip(classes, result["iou"], strict=True):
        print(f"IoU {name}: {percent(iou)}")
    print(f"Mean IoU: {percent(result['mean_iou'])}")

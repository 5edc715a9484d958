"""Evaluation: a data set is predicted and compared with its truth, image by image."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from glob import escape, glob
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from commands.predict import segment_tiles
from datasets import SegmentationDataset, load_batches
from deeplab import DeepLabv3, Inference
from files.pictures import sample_row, sample_sheet, save_image
from files.report import Card, files_folder, save_evaluation, save_preview
from files.whole import locked_folder, save_csv, save_json
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

RESULTS = ("samples.png", "report.html", "per_image.csv", "metrics.json")
# Flags that change results.
COMPARED = ("scales", "flip", "tile", "overlap", "amp", "output_stride", "value_range", "bands")
COUNTED = 1 << 22  # pixels that are counted at once, in integers of 64 bits


def confusion_matrices(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Counts of (truth, prediction) pairs for each image of a batch, truth in rows.

    Args:
        predictions: integer labels below `num_classes`, (N, H, W).
        targets: integer labels of the same shape; pixels of `IGNORE_INDEX` are not counted.

    Returns:
        int64 (N, num_classes, num_classes) on the device of the inputs.
    """
    count, bins = len(targets), num_classes**2 + 1  # the last bin of an image is for what is ignored
    first = torch.arange(0, count * bins, bins, device=targets.device)[:, None, None]
    counts = torch.zeros(count * bins, dtype=torch.int64, device=targets.device)
    rows = max(1, COUNTED // targets[:, 0].numel())
    for truth, predicted in zip(targets.split(rows, 1), predictions.split(rows, 1), strict=True):
        pairs = truth.long() * num_classes + predicted
        pairs = pairs.where(truth != IGNORE_INDEX, num_classes**2) + first
        counts += pairs.flatten().bincount(minlength=count * bins)
    return counts.view(count, bins)[:, :-1].reshape(count, num_classes, num_classes)


def metrics(confusion: Tensor) -> dict:
    """Measures of an int64 confusion matrix (truth in rows), all in 0..1.

    `iou` and `f1`, which is Dice, have None for a class that appears neither in the truth nor in the
    predictions, and `mean_iou` leaves it out. `recall` has None for a class without truth; `mean_accuracy`,
    its mean, leaves it out. `precision` has None for a class that was never predicted. A mean of nothing is
    None.
    """
    confusion = confusion.cpu().double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)

    def mean(values: Tensor) -> float | None:
        values = values[values.isfinite()]
        return values.mean().item() if len(values) else None

    def listed(values: Tensor) -> list[float | None]:
        return [None if value != value else value for value in values.tolist()]  # NaN: 0 / 0

    return {
        "mean_iou": mean(iou),
        "iou": listed(iou),
        "precision": listed(hits / predicted),
        "recall": listed(hits / truth),
        "f1": listed(2 * hits / (truth + predicted)),
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
    `folder` to write to, the result of each image and its card of the page. Threads may add to it."""

    def __init__(self, dataset: SegmentationDataset, samples: int, folder: str | None):
        self.dataset, self.folder = dataset, folder
        self.shown = set(np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist())
        self.samples: dict[int, Row] = {}
        self.results: dict[int, ImageResult] = {}
        self.cards: dict[int, Card] = {}
        self.written: set[str] = set()  # paths of predictions

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
        self.written.add(self.dataset.save(self.folder, index, labels))
        name, classes = self.dataset.names[index], self.dataset.classes
        self.results[index] = image_result(name, confusion, classes)
        if self.dataset.has_masks:
            self.cards[index] = self.card(index, image, truth.cpu().numpy(), labels, confusion)

    def card(
        self, index: int, image: Tensor, truth: np.ndarray, labels: np.ndarray, confusion: Tensor
    ) -> Card:
        """The image on the page; writes its previews."""
        stem = f"{files_folder(f'{self.folder}/report.html')}/{index}"
        picture = to_picture(image)
        errors = np.where(labels == truth, np.uint8(IGNORE_INDEX), truth)
        save_preview(stem, picture, [truth, labels, errors], self.dataset.palette)
        pairs = confusion.nonzero()
        cells = torch.cat([pairs, confusion[pairs.unbind(1)][:, None]], 1).flatten().tolist()
        result = self.results[index]
        mask = f"{self.folder}/{result.name}.png"
        return Card(result.name, stem, picture.size, cells, result.mean_iou, mask)

    def draw(self, image: Tensor, truth: Tensor, labels: np.ndarray) -> Row:
        picture, truth = to_picture(image), truth.cpu().numpy()
        seen = {*np.unique(labels).tolist(), *np.unique(truth).tolist()} - {IGNORE_INDEX}
        return Row(sample_row(picture, truth, labels, self.dataset.palette), seen)

    def gather(self) -> None:
        """Add what the other processes have kept."""
        parts = [None] * WORLD
        dist.all_gather_object(parts, (self.samples, self.results, self.cards, self.written))
        for samples, results, cards, written in parts:
            self.written |= written
            self.samples.update(samples)
            self.results.update(results)
            self.cards.update(cards)

    def sample_sheet(self) -> Image.Image:
        """Rows of image, truth and prediction."""
        rows = [self.samples[index] for index in sorted(self.samples)]
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
        ValueError: if nothing has looked at the data set.
        UserError: if a sample cannot be used, a prediction cannot be written, or another process evaluates
            to the same folder.
        Stopped: if a stop signal has come.
    """
    if len(dataset.sizes) != len(dataset):
        raise ValueError("commands.check.prepare comes first: the sizes of the images are not known")
    batches = dataset.eval_batches(inference.images)[RANK::WORLD]
    details = Details(dataset, samples, folder)
    confusion = torch.zeros((len(dataset.classes),) * 2, dtype=torch.int64)

    def predicted() -> Iterator[tuple]:
        loaded = load_batches(dataset, batches, workers, device)
        for indices, (images, masks, sizes) in zip(batches, loaded, strict=True):
            end_if_stopped()  # `progress` asks only once the first batches are counted
            labels = predict_labels(model, images, sizes, inference)
            if folder and indices is batches[0]:
                set_aside(folder)
            yield indices, images, masks, sizes, labels

    own = locked_folder(folder) if folder and not RANK else nullcontext()
    with own, ThreadPoolExecutor() as pool:
        counted = ahead(pool, details.add_batch, predicted(), 2)
        for counts in progress(counted, "evaluating", len(batches), "batch"):
            confusion += counts
    if WORLD > 1:
        dist.all_reduce(confusion)
        details.gather()
    return {**metrics(confusion), "confusion": confusion.tolist()}, details


def set_aside(folder: str) -> None:
    """Rename what an earlier evaluation tells of predictions that are about to be replaced."""
    for name in RESULTS:
        with suppress(FileNotFoundError):
            os.replace(f"{folder}/{name}", f"{folder}/{name}.old")


def predict_labels(model: DeepLabv3, images: Tensor, sizes: Tensor, inference: Inference) -> Tensor:
    """The labels, uint8 (N, H, W), of a padded batch: uint8 images (N, 3, H, W) of the sizes (N, 2)."""
    if not inference.takes_tiles(sizes.flatten().tolist()):
        return model.scores(model.normalize(images, sizes), inference).argmax(1).byte()
    labels = torch.zeros_like(images[:, 0])
    for i, (h, w) in enumerate(sizes.tolist()):
        found, _ = segment_tiles(model, to_picture(images[i, :, :h, :w]), inference, False)
        labels[i, :h, :w] = torch.from_numpy(found)
    return labels


def to_picture(image: Tensor) -> Image.Image:
    """A uint8 image (3, H, W) as a picture."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def results_folder(checkpoint: str, split: str, flags: dict, data: str) -> str:
    """Where the results of a checkpoint file go: data/SPLIT/ and its path below data/, or else its name. Says
    so if they replace those of other flags or of other samples at --data_root, `data` is their fingerprint.
    Raises UserError if the results of another file are there, or those on another data set."""
    path = os.path.relpath(checkpoint, "data")
    if path.startswith(os.pardir):
        path = os.path.basename(checkpoint)
    folder = os.path.join("data", split, os.path.splitext(path)[0])
    paths = [f"{folder}/metrics.json", f"{folder}/metrics.json.old"]  # the second of one that was cut
    if path := next(filter(os.path.exists, paths), None):
        try:
            with open(path, encoding="utf-8") as file:
                about = json.load(file)
            other, other_root = str(about["checkpoint"]), str(about["flags"]["data_root"])
            samples = about.get("data", data)
            keys = [key for key in COMPARED if about["flags"].get(key) != flags.get(key)]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is of no evaluation: move that folder") from error
        if os.path.realpath(other) != os.path.realpath(checkpoint):
            raise UserError(f"{folder} has the results of {other}: move or rename one of the two")
        same_root = os.path.realpath(other_root) == os.path.realpath(flags["data_root"])
        if not same_root and about.get("data") != data:  # else the data set was moved
            raise UserError(f"{folder} has the results on {other_root}: move or rename {folder}")
        if samples != data:
            print(f"replaces the results in {folder}, on other images or masks of {other_root}")
        if keys:
            changed = ", ".join(f"--{key} {about['flags'].get(key)} to {flags.get(key)}" for key in keys)
            print(f"replaces the results in {folder}, of other flags: {changed}")
    return folder


def write_results(
    folder: str, dataset: SegmentationDataset, result: dict, details: Details, about: dict
) -> None:
    """Write samples.png, per_image.csv, report.html and metrics.json in place of what was `set_aside`. The
    last two tell `about`, too. Raises UserError if a file cannot be written."""
    save_image(f"{folder}/samples.png", details.sample_sheet())
    images = [details.results[index] for index in sorted(details.results)]
    rows = ([f"{v:.6f}" if isinstance(v, float) else v for v in row] for row in images)
    save_csv(f"{folder}/per_image.csv", [ImageResult._fields, *rows])
    cards = [details.cards[index] for index in sorted(details.cards)]
    save_evaluation(f"{folder}/report.html", dataset.classes, dataset.palette, result, cards, about)
    by_class = {
        name: dict(zip(dataset.classes, result[name], strict=True))
        for name in ("iou", "precision", "recall", "f1")
    }
    save_json(f"{folder}/metrics.json", {**result, **by_class, **about})
    for name in RESULTS:
        with suppress(FileNotFoundError):
            os.remove(f"{folder}/{name}.old")


def print_left_over(folder: str, details: Details) -> None:
    """Print how many files an earlier evaluation, of other images or with masks, has left beside those of
    this one."""
    folders = {folder, *map(os.path.dirname, details.written)}
    found = [path for place in folders for path in glob(f"{escape(place)}/*.png")]
    if not details.dataset.has_masks:  # then nothing takes the place of these
        found += filter(os.path.exists, (f"{folder}/{name}.old" for name in RESULTS))
    if old := sorted(set(map(os.path.normpath, found)) - set(map(os.path.normpath, details.written))):
        print(
            f"{len(old)} files in {folder} are of an earlier evaluation, {old[0]} is one: move or delete them"
        )


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

"""Measures, schedule, files, pictures, the log, downloads: what main.py and the data sets share."""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from glob import glob
from http.client import HTTPException
from typing import BinaryIO, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IGNORE_INDEX = 255
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Palette = Sequence[Sequence[int]]  # (r, g, b) in 0..255 for each class
TRIES, PAUSE, TIMEOUT = 5, 1.0, 30.0  # of a download: requests, seconds between them, seconds of silence


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what and how."""


class Stopped(Exception):
    """SIGINT or SIGTERM ended the command: Stopped(number of the signal, what to tell the user)."""


def stop_now(number: int, frame) -> None:
    """The handler of STOP_SIGNALS, but for the steps of training."""
    raise Stopped(number, "training goes on from the last checkpoint with --resume auto")


@contextmanager
def stop_signals(handler: Callable):
    """Let `handler` take STOP_SIGNALS."""
    before = [signal.signal(number, handler) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, earlier in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, earlier)


def outlive_stop_signals(worker: int) -> None:
    """In a worker of a loader: a terminal or a cluster sends signals to all processes, but the main one still
    has an iteration to end and a checkpoint to write, for which there are 30 seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


class Download(NamedTuple):
    """A file to fetch to `data/`, and, for an archive, where it unpacks."""

    url: str
    digest: str | None = None  # algorithm:hex, or the start of it
    top: str = ""  # the folder in the archive whose contents go to `folder`
    folder: str | None = None
    key: str = ""  # once this is in `folder`, the archive is unpacked

    @property
    def name(self) -> str:
        return os.path.basename(self.url)

    @property
    def path(self) -> str:
        return os.path.join("data", self.name)


VOC2012 = "data/VOCdevkit/VOC2012"
# The names of --download.
DOWNLOADS = {
    "pascal": [
        Download(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            digest="md5:6cd6e144f989b92b3379bac3b3de84fd",
            top="VOCdevkit/VOC2012",
            folder=VOC2012,
            key="JPEGImages",
        ),
        Download(
            "http://cs.jhu.edu/~cxliu/data/SegmentationClassAug.zip",
            folder=VOC2012,
            key="SegmentationClassAug",
        ),
        Download("http://cs.jhu.edu/~cxliu/data/list.zip", folder=VOC2012, key="list/train_aug.txt"),
    ],
    "resnet101": [
        Download("https://download.pytorch.org/models/resnet101-63fe2227.pth", digest="sha256:63fe2227")
    ],
    "gn_ws_imagenet": [Download("https://cs.jhu.edu/~syqiao/WeightStandardization/R-101-GN-WS.pth.tar")],
    "bn_pascal": [
        Download("https://cs.jhu.edu/~cxliu/data/deeplab_resnet101_pascal_v3_bn_lr7e-3_epoch50.pth")
    ],
    "gn_ws_pascal": [
        Download("https://cs.jhu.edu/~cxliu/data/deeplab_resnet101_pascal_v3_gn_ws_lr7e-3_epoch50.pth")
    ],
}


def confusion_matrix(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Counts of (truth, prediction) pairs, truth in rows.

    Args:
        prediction: integer labels below `num_classes`, any shape.
        target: integer labels of the same shape; pixels of `IGNORE_INDEX` are not counted.

    Returns:
        int64 (num_classes, num_classes) on the device of the inputs.
    """
    pairs = target.long() * num_classes + prediction
    pairs = torch.where(target == IGNORE_INDEX, num_classes**2, pairs)  # a last bin for what is ignored
    counts = torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)
    return counts[:-1].view(num_classes, num_classes)


def metrics(confusion: Tensor) -> dict:
    """Measures of an int64 confusion matrix (truth in rows), all in 0..1.

    `iou` has None for a class that appears neither in the truth nor in the predictions, and `mean_iou` leaves
    it out; `mean_accuracy` leaves out the classes without truth. Each is None where nothing is left to
    average.
    """
    confusion = confusion.cpu().double()
    hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    iou = hits / (truth + predicted - hits)

    def mean(values: Tensor) -> float | None:
        values = values[values.isfinite()]
        return values.mean().item() if len(values) else None

    return {
        "mean_iou": mean(iou),
        "iou": [value if np.isfinite(value) else None for value in iou.tolist()],
        "pixel_accuracy": mean(hits.sum() / truth.sum()[None]),
        "mean_accuracy": mean(hits / truth),
    }


def percent(value: float | None) -> str:
    """A share in 0..1 as in `75.36`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def table(classes: Sequence[str], result: dict) -> str:
    """A line for each class: its IoU as a bar and a number, its accuracy, its share of the labelled pixels.

    `result` is that of `metrics` with its `confusion`.
    """
    confusion = np.array(result["confusion"])
    width = max(map(len, [*classes, "class"]))
    lines = [f"{'class':{width}}  {'':20}    IoU  accuracy  pixels"]
    for name, iou, hits, truth in zip(
        classes, result["iou"], confusion.diagonal(), confusion.sum(1), strict=True
    ):
        accuracy = percent(hits / truth if truth else None)
        share = percent(truth / max(1, confusion.sum()))
        lines.append(
            f"{name:{width}}  {'#' * round(20 * (iou or 0)):20} {percent(iou):>6}  {accuracy:>8}  {share:>6}"
        )
    return "\n".join(lines)


def poly_lr(base_lr: float, iteration: int, max_iter: int) -> float:
    """The paper's learning-rate schedule: base_lr (1 - iteration / max_iter)^0.9, iterations counted from
    0."""
    return base_lr * (1 - iteration / max_iter) ** 0.9


def write_whole(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Let `write(file)` make a file that appears at `path` only when it is whole and on the disk.

    A kill at any moment leaves the old file or the new one.

    Raises:
        UserError: if the file cannot be written; what stood at `path` before is untouched.
    """
    temporary = f"{path}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
    except (OSError, RuntimeError) as error:
        # After a write that failed, torch.save fails once more, in its own way, as it closes the archive.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"cannot write {path}: {cause.strerror or cause}") from error


def save_json(path: str, value: dict) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_mask(path: str, mask: np.ndarray, palette: Palette) -> None:
    """Write uint8 labels (H, W) as a palette PNG: the pixels are the labels, the palette only shows them."""
    image = Image.fromarray(mask)
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    save_image(path, image)


def voc_palette(num_colors: int = 256) -> list[list[int]]:
    """The colours of the PASCAL VOC devkit: the label's bits dealt in threes to r, g and b from the highest
    bit down."""
    labels = np.arange(num_colors)
    colors = np.zeros((num_colors, 3), int)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (labels >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.tolist()


def colorize(mask: np.ndarray, palette: Palette) -> Image.Image:
    """uint8 labels (H, W) as an RGB picture; `IGNORE_INDEX` is white."""
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(palette)] = palette
    return Image.fromarray(colors[mask])


def overlay(image: Image.Image, mask: np.ndarray, palette: Palette) -> Image.Image:
    """The labels' colours laid half transparent over their RGB image."""
    return Image.blend(image, colorize(mask, palette), 0.5)


def add_legend(
    picture: Image.Image, labels: Sequence[int], classes: Sequence[str], palette: Palette
) -> Image.Image:
    """The picture with the colour and name of each of the labels below it, in rows as wide as the picture
    allows."""
    font = ImageFont.load_default(14)
    boxes, x, y, width = [], 6, picture.height + 4, picture.width
    for label in labels:
        length = 22 + round(font.getlength(classes[label])) + 14
        if x > 6 and x + length > picture.width:
            x, y = 6, y + 20
        boxes.append((x, y, label))
        x, width = x + length, max(width, x + length)
    canvas = Image.new("RGB", (width, y + 24), "white")
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    for x, y, label in boxes:
        draw.rectangle((x, y + 3, x + 14, y + 16), fill=tuple(palette[label]), outline="black")
        draw.text((x + 20, y + 1), classes[label], fill="black", font=font)
    return canvas


def sample_sheet(
    samples: Sequence[tuple[Image.Image, np.ndarray, np.ndarray]], classes: Sequence[str], palette: Palette
) -> Image.Image:
    """Rows of (image, truth, prediction), 320 wide each, and the legend of the classes that appear."""
    rows = [
        [image.resize((320, max(1, round(320 * image.height / image.width)))) for image in pictures]
        for pictures in (
            (image, colorize(truth, palette), overlay(image, seen, palette)) for image, truth, seen in samples
        )
    ]
    sheet = Image.new("RGB", (3 * 324, sum(row[0].height + 4 for row in rows)), "white")
    y = 0
    for row in rows:
        for i, picture in enumerate(row):
            sheet.paste(picture, (324 * i, y))
        y += row[0].height + 4
    present = np.unique([label for _, *masks in samples for mask in masks for label in np.unique(mask)])
    return add_legend(sheet, [label for label in present if label < len(classes)], classes, palette)


def save_image(path: str, image: Image.Image) -> None:
    """Write a picture whole or not at all, in the format of the path's ending."""
    format = Image.registered_extensions()[os.path.splitext(path)[1].lower()]
    write_whole(path, lambda file: image.save(file, format))


def checkpoint_path(args: argparse.Namespace, epoch: int, iteration: int | None = None) -> str:
    """After so many whole epochs; `iteration`, if given, marks a checkpoint within an epoch."""
    within = f"_iter{iteration}" if iteration else ""
    return f"data/deeplab_{args.backbone}_{args.dataset}_v3_{args.exp}_epoch{epoch}{within}.pth"


class Saved(NamedTuple):
    """A checkpoint file; the order is that of training. `iteration` is 0 at an epoch's end."""

    epoch: int
    iteration: int
    path: str


def saved_checkpoints(args: argparse.Namespace) -> list[Saved]:
    """The checkpoints of --exp, by the numbers in their names: clocks jump."""
    pattern = re.escape(checkpoint_path(args, 0)).replace("epoch0", r"epoch(\d+)(?:_iter(\d+))?")
    paths = [f"data/{name}" for name in glob("*.pth", root_dir="data")]
    found = [match for path in paths if (match := re.fullmatch(pattern, path))]
    return sorted(Saved(int(match[1]), int(match[2] or 0), match[0]) for match in found)


def prune_checkpoints(args: argparse.Namespace, newest: str, best_epoch: int | None) -> None:
    """Delete what --keep does not keep; never the newest or the best.

    Without --keep these are the checkpoints within epochs, once a newer one is there.
    """
    saved = saved_checkpoints(args)
    older = saved[: [each.path for each in saved].index(newest)]
    for each in older[: max(0, len(older) + 1 - args.keep)] if args.keep else older:
        if each.iteration or (args.keep and each.epoch != best_epoch):
            os.remove(each.path)


class RunLog:
    """The rows of data/EXP.csv, and with --tensorboard the same for TensorBoard in data/runs/EXP.

    `best_epoch` is the one of the highest mean IoU so far, None before the first.
    """

    columns = ("epoch", "iteration", "lr", "loss", "val_mean_iou", "images_per_second")

    def __init__(self, exp: str, start: int, tensorboard: bool):
        """A run resumed at iteration `start` keeps the rows up to there.

        Raises:
            UserError: if another process writes this log, or TensorBoard is wanted and not installed.
        """
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        self.board, self.best_epoch, self.best = None, None, -1.0
        self.iteration = self.offset = 0  # of the last row
        path, header = f"data/{exp}.csv", ",".join(self.columns) + "\r\n"
        os.makedirs("data", exist_ok=True)
        self.file = open(path, "a+", newline="")  # noqa: SIM115, open for as long as the run
        self.lock(exp)
        self.file.seek(0)
        text = self.file.read() if start else ""
        kept = header if text.startswith(header) else ""
        for line in text[len(kept) :].splitlines(keepends=True) if kept else []:
            row = dict(zip(self.columns, line.strip().split(","), strict=False))
            whole = line.endswith("\n") and row.get("iteration", "").isdecimal()
            if not whole or int(row["iteration"]) > start:
                break
            kept += line
            self.note(row)
        self.file.truncate(len(kept))
        if not kept:
            self.file.write(header)
        if tensorboard:
            self.board = SummaryWriter(f"data/runs/{exp}", purge_step=start + 1)

    def lock(self, exp: str) -> None:
        """Hold the file for as long as this process lives, so that no two runs write the same checkpoints."""
        if fcntl is None:
            return
        try:
            # Not flock: the loader's workers would inherit that, and outlive a killed run by seconds.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(
                f"--exp {exp} is being trained by another process: choose another name"
            ) from error
        except OSError as error:
            print(
                f"{self.file.name} cannot be locked ({error.strerror}): see to it that no other run uses it"
            )

    def note(self, row: dict) -> None:
        if row.get("val_mean_iou") and float(row["val_mean_iou"]) > self.best:
            self.best, self.best_epoch = float(row["val_mean_iou"]), int(row["epoch"])

    def write(self, row: dict, samples: Image.Image | None = None) -> None:
        """Add a row; written again with its validation, it takes its own place.

        Raises:
            UserError: if the disk is full.
        """
        self.note(row)
        if row["iteration"] == self.iteration:
            self.file.truncate(self.offset)
        self.iteration, self.offset = row["iteration"], self.file.seek(0, os.SEEK_END)
        try:
            csv.DictWriter(self.file, self.columns).writerow(row)
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}") from error
        if self.board:
            for name in ("lr", "loss", "val_mean_iou", "images_per_second"):
                if row.get(name) is not None:
                    self.board.add_scalar(name, row[name], row["iteration"])
            if samples:
                self.board.add_image("samples", np.array(samples), row["iteration"], dataformats="HWC")

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def mirrored(files: Sequence[Download], mirror: str | None) -> list[tuple[Download, str]]:
    """Each file with the address to fetch it from.

    `mirror` is the address of one of the files, which then replaces that file's own, or else of a folder that
    holds all of them under their own names.
    """
    if mirror is None:
        return [(file, file.url) for file in files]
    named = os.path.basename(re.split("[?#]", mirror)[0])
    if named in [file.name for file in files]:
        return [(file, mirror if file.name == named else file.url) for file in files]
    return [(file, f"{mirror.rstrip('/')}/{file.name}") for file in files]


def download(file: Download, url: str) -> None:
    """Fetch a file from `url` and unpack it if it is an archive; what is there already is left alone.

    Raises:
        UserError: if it cannot be had or unpacked.
    """
    key = os.path.join(file.folder, file.key) if file.folder else file.path
    if os.path.exists(key):
        print(f"{key} is there already")
        return
    if os.path.exists(file.path):
        print(f"{file.path} is there already")
    else:
        fetch(url, file.path, file.digest)
    if file.folder:
        print(f"unpacking {file.path} in {file.folder}")
        unpack(file)


def fetch(url: str, path: str, digest: str | None = None) -> None:
    """Download a file that appears at `path` only when it is whole.

    What has come is kept in `path`.part: after a cut, or a kill, the download goes on from there.

    Raises:
        UserError: if the file cannot be had, or does not have the `digest` (algorithm:hex, or the start of
        it).
    """
    # Not torch.hub.download_url_to_file: that starts anew after a cut, which 2 GB may never survive.
    part, size, total = f"{path}.part", 0, None
    print(f"downloading {url} to {path}")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE)
            size, announced = receive(url, part)
            if total is not None and announced not in (None, total):
                os.remove(part)
                raise OSError(f"the server says that it has {total} bytes, then {announced}")
            total = announced if total is None else total
            if size == total:
                break
        else:
            raise OSError(f"cut {TRIES} times, now at {size} bytes; the same command goes on from there")
        if digest:
            algorithm, expected = digest.split(":")
            found = file_hash(part, algorithm)
            if not found.startswith(expected):
                os.remove(part)
                raise OSError(f"deleted, as its {algorithm} is {found}, not {expected}")
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        reason = " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__
        raise UserError(
            f"cannot download {url} ({reason}): put that file at {path} by hand, or name a mirror by --url"
        ) from error


def receive(url: str, part: str) -> tuple[int, int | None]:
    """One request for what the file `part` lacks, which is appended to it, or replaces it if the server sends
    the whole.

    Returns:
        the size of `part` now, and the size of the whole, None if the server does not say; they are equal
        when there is nothing left to fetch.

    Raises:
        OSError, HTTPException, ValueError: if there is no use in trying again.
    """
    start = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "deeplab"}  # some hosts turn Python's away
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing comes after `start`: `part` is whole, or it is of another file.
        if error.headers["Content-Range"] == f"bytes */{start}":
            return start, start
        os.remove(part)
        return 0, None

    with response:
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise OSError("a web page comes instead of the file")
        total = None
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers["Content-Range"] or "")
            if not start:
                raise OSError("the server sends a part, asked for the whole")
            if not span or int(span[1]) != start:
                os.remove(part)
                return 0, None
            total = int(span[2])
        else:
            start = 0
        end = start + int(headers["Content-Length"]) if headers["Content-Length"] else None
        total = end if total is None else total
        if total is None and not response.chunked:
            raise OSError("the server does not say how long it is")
        if end is not None and end > total:
            raise OSError(f"the server says that it has {total} bytes, but sends {end}")

        # Read to the end of the connection, past Content-Length: more than was announced is wrong, too.
        response.length = None
        size, cut = start, False
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(
                total=total, initial=start, unit="B", unit_scale=True, disable=None, dynamic_ncols=True
            ) as bar,
        ):
            while end is None or size <= end:
                try:
                    block = response.read1(1 << 20)
                except (OSError, HTTPException):
                    cut = True
                    break
                if not block:
                    break
                file.write(block)
                size += len(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    limit = total if end is None else end
    if limit is not None and size > limit:
        os.remove(part)
        raise OSError(f"the server sends more than the {limit} bytes that it announces")
    return size, size if total is None and not cut else total


def file_hash(path: str, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(file: Download) -> None:
    """Unpack a tar or zip archive; `file.key` appears last, and only when everything is there.

    Raises:
        UserError: if the archive is damaged or not the right one, a member would leave the folder or is no
        plain file (nothing is unpacked then), or the disk is full.
    """
    temporary = os.path.join(file.folder, f"{file.name}.tmp")  # inside, so that moving is only renaming
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        if file.name.endswith(".zip"):
            with zipfile.ZipFile(file.path) as archive:
                for info in archive.infolist():
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    check_member(file, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                archive.extractall(temporary)
        else:
            with tarfile.open(file.path, "r:") as archive:
                for member in archive.getmembers():
                    check_member(file, member.name, member.isreg() or member.isdir())
                # Without links there is no way out of the folder, so a Python that is too old to have the
                # filter is as safe.
                archive.extractall(
                    temporary, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
                )
        source = os.path.join(temporary, file.top)
        if not os.path.exists(os.path.join(source, file.key)):
            missing = os.path.join(file.top, file.key)
            raise UserError(f"{file.path} holds no {missing}: remove it, and name a mirror by --url")
        merge(source, file.folder, file.key)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file.path} is damaged ({reason}): remove it and run the command again") from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {file.path} in {file.folder}: {error.strerror or error}; mend that and run again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_member(file: Download, name: str, is_plain: bool) -> None:
    """Refuse an archive's member that could write outside the folder.

    Raises:
        UserError: if it is absolute, climbs by `..`, or is a link or device.
    """
    steps = re.split(r"[/\\]", name)
    if not is_plain or not steps[0] or ":" in steps[0] or ".." in steps:
        what = "would leave the folder" if is_plain else "is a link or a device"
        raise UserError(
            f"{file.path} is refused, as {name!r} in it {what}: remove it, and name a mirror by --url"
        )


def merge(source: str, target: str, last: str) -> None:
    """Move what `target` does not have from `source` to it, and the path `last` after all else."""
    last, _, rest = last.partition("/")
    for name in sorted(os.listdir(source), key=lambda name: name == last):
        old, new = os.path.join(source, name), os.path.join(target, name)
        if os.path.isdir(old) and os.path.isdir(new):
            merge(old, new, rest if name == last else "")
        elif not os.path.lexists(new):
            os.rename(old, new)

"""What a run leaves on disk and how it goes on: checkpoints, the place in the run, the log and its lock."""

import csv
import io
import math
import os
import re
import shutil
from contextlib import suppress
from functools import partial
from glob import escape, glob
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from utils import UserError, write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class Saved(NamedTuple):
    """A checkpoint file; the order is that of training. `iteration` is 0 at an epoch's end."""

    epoch: int
    iteration: int
    path: str


class Run(NamedTuple):
    """A training run. Its files are named by backbone, data set and --exp, as in the published code."""

    backbone: str
    dataset: str
    exp: str

    @property
    def name(self) -> str:
        return f"deeplab_{self.backbone}_{self.dataset}_v3_{self.exp}"

    def checkpoint(self, epoch: int, iteration: int = 0) -> str:
        """The path after so many whole epochs; `iteration`, if given, marks a checkpoint within an epoch."""
        within = f"_iter{iteration}" if iteration else ""
        return f"data/{self.name}_epoch{epoch}{within}.pth"

    def saved(self) -> list[Saved]:
        """The checkpoints that are there, by the numbers in their names: clocks jump."""
        pattern = re.escape(f"data/{self.name}_epoch") + r"(\d+)(?:_iter(\d+))?\.pth"
        paths = [f"data/{name}" for name in glob("*.pth", root_dir="data")]
        found = [match for path in paths if (match := re.fullmatch(pattern, path))]
        return sorted(Saved(int(match[1]), int(match[2] or 0), match[0]) for match in found)

    def prune(self, newest: str, keep: int | None, best_epoch: int | None) -> None:
        """Keep the `keep` newest checkpoints, up to `newest`, and that of the best epoch; delete the others.

        Without `keep` only those within epochs are deleted, once a newer one is there.
        """
        older = [each for each in self.saved() if each.path != newest]  # `set_aside` has left no later ones
        for each in older[: max(0, len(older) + 1 - keep)] if keep else older:
            if each.iteration or (keep and each.epoch != best_epoch):
                with suppress(FileNotFoundError):
                    os.remove(each.path)

    def set_aside(self, place: "Place", log: bytes) -> None:
        """Move the checkpoints that lie beyond this place to data/old/EXP-N, with the log as it was.

        A run that starts anew or goes back would write over them.
        """
        saved = self.saved()
        paths = [os.path.realpath(each.path) for each in saved]
        start = Saved(place.epoch, place.iteration, "")
        if place.resumed and os.path.realpath(place.resumed) in paths:
            # By its own numbers: another list or batch size gives the place others.
            start = saved[paths.index(os.path.realpath(place.resumed))]
        beyond = [each.path for each in saved if each > start]
        if not beyond:
            return
        what = f"the checkpoints of --exp {self.exp} beyond {place.resumed}"
        if not place.resumed:
            what = f"what an earlier run of --exp {self.exp} left"
            others = (f"data/{self.name}.png", f"data/runs/{self.name}")
            beyond += filter(os.path.exists, others)
        folder = free_name(f"data/old/{self.exp}-")
        os.makedirs(folder)
        for path in beyond:
            shutil.move(path, folder)
        write_whole(f"{folder}/{self.name}.csv", lambda file: file.write(log))
        print(f"moved {what} to {folder}")


def free_name(start: str) -> str:
    """The first path of `start`1, `start`2, ... that is not taken."""
    return next(path for number in count(1) if not os.path.exists(path := f"{start}{number}"))


def find_checkpoint(backbones: list[str], dataset: str, exp: str, epoch: int | None) -> str:
    """The checkpoint of an experiment after `epoch` epochs, or the newest, on whichever of the backbones.

    Raises:
        UserError: if there is none, or if several backbones have one.
    """
    found = {}
    for backbone in backbones:
        saved = Run(backbone, dataset, exp).saved()
        at_epoch = [each for each in saved if epoch is None or (each.epoch, each.iteration) == (epoch, 0)]
        if at_epoch:
            found[backbone] = at_epoch[-1].path
    if len(found) > 1:
        raise UserError(f"--exp {exp} has {' and '.join(found.values())}: choose one by --backbone")
    if not found:
        path = Run(backbones[0] if len(backbones) == 1 else "*", dataset, exp).checkpoint(epoch or 0)
        path = path if epoch else path.replace("_epoch0.pth", "_epoch*.pth")
        raise UserError(f"there is no {path}: train it by --train, or name another file by --checkpoint")
    return next(iter(found.values()))


class Best(NamedTuple):
    """The epoch of the highest validation mean IoU so far."""

    epoch: int
    mean_iou: float


class Place(NamedTuple):
    """Where a run is: whole epochs, iterations, the best epoch so far, and the checkpoint it goes on from."""

    epoch: int = 0
    iteration: int = 0
    best: Best | None = None
    resumed: str | None = None


class Length(NamedTuple):
    """What the numbers of iterations follow from: an epoch's images and iterations."""

    images: int
    per_epoch: int


def save_checkpoint(
    path: str,
    model_entries: dict,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    place: Place,
    length: Length,
    flags: dict,
) -> None:
    """Write a checkpoint: a model's entries, as deeplab.py names them, and what `load_progress` needs.

    Raises:
        UserError: if the disk is full, say; the checkpoint before is untouched.
    """
    progress = {
        "epoch": place.epoch,
        "iteration": place.iteration,
        **length._asdict(),
        "best": tuple(place.best) if place.best else None,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "flags": flags,
    }
    write_whole(path, partial(torch.save, {**model_entries, **progress}))


# Flags whose change in a resumed run is worth a word.
RUN_FLAGS = (
    *("dataset", "data_root", "crop_size", "epochs", "batch_size", "base_lr", "last_mult", "freeze_bn"),
    *("seed", "class_weights"),
)


def load_progress(
    checkpoint: dict,
    path: str,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    length: Length,
    flags: dict,
) -> Place:
    """Take the state of optimizer and scaler from a checkpoint, and return the place to go on from.

    If an epoch has another number of iterations now, the list or the batches being others, that is the same
    share of the epoch; and never an epoch that is done. No random state is needed: what is drawn for a sample
    follows from (seed, epoch, index).

    Raises:
        UserError: if the checkpoint has no such state.
    """
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group.update(optimizer.defaults)  # only the momentum is the checkpoint's, not "fused", say
            for parameter in group["params"]:
                match_layout(parameter, optimizer.state[parameter])
        if scaler.is_enabled() and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        epoch, before = int(checkpoint["epoch"]), checkpoint.get("flags", {})
        changed = [key for key in RUN_FLAGS if key in before and flags[key] != before[key]]
        length_before = Length(*(int(checkpoint.get(key, now)) for key, now in length._asdict().items()))
        iteration = int(checkpoint.get("iteration", 0)) * length.per_epoch // length_before.per_epoch
        best = checkpoint.get("best") and Best(int(checkpoint["best"][0]), float(checkpoint["best"][1]))
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{path} cannot be resumed, only evaluated: {error}") from error
    if changed:
        shown = ", ".join(f"--{key} {before[key]} to {flags[key]}" for key in changed)
        print(f"the run goes on with other flags: {shown}")
    if length_before != length:
        now, then = (f"{images} images in {steps} iterations" for images, steps in (length, length_before))
        print(f"an epoch is {now}, not {then} as before: the run goes on at the same share of its schedule")
    return Place(epoch, max(iteration, epoch * length.per_epoch), best, path)


def match_layout(parameter: torch.Tensor, state: dict) -> None:
    """Give the momentum the strides of its parameter, by which the fused step reads it.

    A checkpoint keeps the strides of the machine that wrote it, contiguous or channels_last.

    Raises:
        ValueError: if it is of another shape.
    """
    if state.get("momentum_buffer") is None:
        return
    if state["momentum_buffer"].shape != parameter.shape:
        raise ValueError("the momentum of the optimizer is of another shape")
    state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])


class RunLog:
    """The rows of data/NAME.csv, and with `tensorboard` the same for TensorBoard in data/runs/NAME.

    `best` is the epoch of the highest mean IoU so far, None before the first.

    Raises:
        UserError: if another process writes this log, or TensorBoard is wanted and not installed.
    """

    columns = ("epoch", "iteration", "lr", "loss", "val_mean_iou", "images_per_second")

    def __init__(self, run: Run, place: Place, tensorboard: bool):
        """A run keeps the rows up to its place; what an earlier one left beyond it is set aside."""
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        self.run, self.board, self.best = run, None, place.best
        self.iteration = self.offset = 0  # of the last row
        os.makedirs("data", exist_ok=True)
        self.file = open(f"data/{run.name}.csv", "ab+")  # noqa: SIM115, open for as long as the run
        self.lock()
        for path in glob(f"data/{escape(run.name)}_epoch*.tmp"):
            os.remove(path)  # a kill left it
        self.file.seek(0)
        data = self.file.read()
        rows = read_rows(data, self.columns)
        whole = self.text(rows)
        cut = b"\n" not in data[len(whole) :]  # a kill can leave a part of a line
        if data and not (cut and (data.rstrip(b"\r\n") + b"\r\n").startswith(whole)):
            kept_as = free_name(f"{self.file.name}.bak")
            write_whole(kept_as, lambda file: file.write(data))
            print(f"{self.file.name} was edited: its {len(rows)} rows are taken over, the file is {kept_as}")
        run.set_aside(place, data)
        rows = [row for row in rows if row["iteration"] <= place.iteration]
        for row in rows:
            self.note(row)
        kept = self.text(rows)
        self.file.truncate(len(kept) if data.startswith(kept) else 0)
        self.file.write(b"" if data.startswith(kept) else kept)
        self.file.flush()
        if tensorboard:
            self.board = SummaryWriter(f"data/runs/{run.name}", purge_step=place.iteration + 1)

    def lock(self) -> None:
        """Hold the file for as long as this process lives, so that no two runs write the same checkpoints."""
        if fcntl is None:
            return
        try:
            # Not flock: the loader's workers would inherit that, and outlive a killed run by seconds.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            other = f"--exp {self.run.exp} is being trained by another process"
            raise UserError(f"{other}: choose another name") from error
        except OSError as error:
            print(f"{self.file.name} cannot be locked ({error.strerror}): let no other run use it")

    def note(self, row: dict) -> None:
        if row.get("val_mean_iou") and float(row["val_mean_iou"]) > (self.best.mean_iou if self.best else -1):
            self.best = Best(int(row["epoch"]), float(row["val_mean_iou"]))

    def text(self, rows: list[dict], header: bool = True) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    def write(self, row: dict, samples: Image.Image | None = None) -> None:
        """Add a row; written again with its validation, it takes its own place.

        Raises:
            UserError: if the disk is full.
        """
        self.note(row)
        again = row["iteration"] == self.iteration
        if again:
            self.file.truncate(self.offset)
        self.iteration, self.offset = row["iteration"], self.file.seek(0, os.SEEK_END)
        try:
            self.file.write(self.text([row], header=False))
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}") from error
        if self.board:
            for name in ["val_mean_iou"] if again else ["lr", "loss", "images_per_second"]:
                if row.get(name) is not None:
                    self.board.add_scalar(name, row[name], row["iteration"])
            if samples:
                self.board.add_image("samples", np.array(samples), row["iteration"], dataformats="HWC")
            self.board.flush()

    def rows(self) -> list[dict]:
        """All rows so far, those of the run that this one resumed, too; see `read_rows`."""
        self.file.seek(0)
        return read_rows(self.file.read(), self.columns)

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def read_rows(data: bytes, columns: tuple[str, ...]) -> list[dict]:
    """The rows of a log in the order of their iterations, also from what editors and spreadsheets make of it.

    They add a byte order mark, other line ends, semicolons with decimal commas, quotes, notes.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = text.replace("\0", "").splitlines()
    header = next((i for i, line in enumerate(lines) if "epoch" in line and "iteration" in line), len(lines))
    delimiter = ";" if header < len(lines) and ";" in lines[header] else ","
    names, rows = None, []
    for line in lines[header:]:
        try:
            # Line by line: a quote that somebody left open must not take in those that follow.
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
            names = names or cells
            row = dict(zip(names, cells, strict=False))
            values = {name: row.get(name, "").replace(",", ".") for name in columns}
            numbers = [values[name] for name in columns if name != "val_mean_iou" or values[name]]
            if all(math.isfinite(float(number)) for number in numbers):
                rows.append({**values, "epoch": int(values["epoch"]), "iteration": int(values["iteration"])})
        except (ValueError, csv.Error):
            continue  # the header, a note, or a line cut short
    return sorted(rows, key=lambda row: row["iteration"])

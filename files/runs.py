"""What a run leaves on disk: the names of its checkpoints, what is kept and moved aside, its log and lock."""

import csv
import io
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from glob import glob
from typing import NamedTuple

import numpy as np
from PIL import Image

from files.pictures import plot_run
from files.training import Training, find_best
from files.whole import free_name, lock, write_whole
from utils import WORLD, Stopped, UserError

COLUMNS = ["epoch", "iteration", "lr", "loss", "val_mean_iou", "images_per_second", "per_epoch", "val_set"]


class Saved(NamedTuple):
    """A checkpoint file; their order is that of training. `iteration` is 0 at an epoch's end."""

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
        """The checkpoints in data/, ordered by the numbers in their names: clocks jump."""
        return self.named_after_checkpoints("data", r"\.pth")

    def named_after_checkpoints(self, folder: str, ending: str) -> list[Saved]:
        """What a folder holds under the names of checkpoints and an `ending`, a regular expression."""
        pattern = re.escape(self.name) + r"_epoch(\d+)(?:_iter(\d+))?" + ending
        names = os.listdir(folder) if os.path.isdir(folder) else []
        found = [match for name in names if (match := re.fullmatch(pattern, name))]
        return sorted(Saved(int(match[1]), int(match[2] or 0), f"{folder}/{match[0]}") for match in found)

    def prune(self, newest: str, keep: int | None, training: Training) -> None:
        """Delete the checkpoints within epochs, which `newest` replaces, and with `keep` all but the `keep`
        newest, the best that is there, and those of `training.kept`."""
        others = [saved for saved in self.saved() if saved.path != newest]  # none is newer: see `RunLog`
        old = [saved for saved in others if saved.iteration]
        if keep:
            whole = [saved for saved in others if not saved.iteration]
            there = {saved.epoch for saved in whole} | {checkpoint_place(newest)[0]}
            best = find_best({e: value for e, value in training.validations.items() if e in there})
            stay = training.kept | ({best.epoch} if best else set())
            old += [saved for saved in whole[: max(0, len(whole) + 1 - keep)] if saved.epoch not in stay]
        for saved in old:
            with suppress(FileNotFoundError):
                os.remove(saved.path)

    def best(self) -> Saved:
        """The checkpoint of the best validation in the log. Raises UserError if there is none, or the log is
        of another run."""
        log, rows = f"data/{self.name}.csv", []
        if os.path.exists(log):
            with open(log, "rb") as file:
                rows = parse_rows(file.read())[0]
        newest = self.saved()[-1:]
        if newest and not reaches(rows, newest[0].epoch):
            found = f"{log} ends before {newest[0].path}, so it is the log of another run"
            raise UserError(f"--best: {found}: name a file by --checkpoint")
        rows = [row for row in rows if row["val_mean_iou"]]
        if rows and (passed := sum(row["val_set"] not in ("", rows[-1]["val_set"]) for row in rows)):
            print(f"{passed} validations on other images, masks or in another way: --best passes them over")
        if newest and not newest[0].iteration and newest[0].epoch not in {row["epoch"] for row in rows}:
            print(f"{newest[0].path} was not validated: --best passes it over")
        if not rows:
            raise UserError(f"--best: no validation is in {log}; without --best the newest is taken")
        rows = [row for row in rows if row["val_set"] in ("", rows[-1]["val_set"])]  # others do not compare
        rows.sort(
            key=lambda row: float(row["val_mean_iou"]), reverse=True
        )  # of equal ones the first stays first
        paths = [self.checkpoint(row["epoch"]) for row in rows]
        found = next((saved for path in paths for saved in self.saved() if saved.path == path), None)
        if not found:
            raise UserError(f"--best: {paths[0]} had the best validation, and is not there, nor are others")
        if found.path != paths[0]:
            print(f"{paths[0]} had the best validation, and is not there: --best takes {found.path}")
        return found


def until_stopped(batches: Iterable, run: Run, training: Training, keep: int | None) -> Iterator:
    """The batches. If a stop signal ended the waiting for one, what has been trained is saved.
    Raises Stopped with a line that says so."""
    try:
        yield from batches
    except Stopped:
        if WORLD > 1 or training.iteration == training.saved:  # of several processes, the others took no part
            raise
        if not all(parameter.isfinite().all() for parameter in training.model.parameters()):
            raise
        path = run.checkpoint(training.epoch, training.iteration)
        training.save(path)
        run.prune(path, keep, training)
        raise Stopped(f"{path} is saved: the same command with --resume auto continues it") from None


def backbones(dataset: str, exp: str) -> list[str]:
    """The backbones on which an experiment has checkpoints."""
    pattern = rf"data/deeplab_(.+)_{dataset}_v3_{re.escape(exp)}_epoch\d+(_iter\d+)?\.pth"
    matches = (re.fullmatch(pattern, path) for path in glob("data/*.pth"))
    return sorted({match[1] for match in matches if match})


def find_checkpoint(
    backbone: str | None, dataset: str, exp: str, epoch: int | None, best: bool = False
) -> str:
    """The checkpoint of an experiment after `epoch` epochs, or that of the best validation, or the newest;
    without `backbone`, on any. Raises UserError if there is none, or if several backbones have one."""
    found, names = [], [backbone] if backbone else backbones(dataset, exp)
    if best and len(names) > 1:
        raise UserError(f"--exp {exp} has runs on {' and '.join(names)}: choose one by --backbone")
    for name in names:
        run = Run(name, dataset, exp)
        saved = [run.best()] if best else run.saved()
        found += [item.path for item in saved if epoch is None or item[:2] == (epoch, 0)][-1:]
    if len(found) > 1:
        raise UserError(f"--exp {exp} has {' and '.join(found)}: choose one by --backbone")
    if not found:
        path = Run(backbone or "*", dataset, exp).checkpoint(epoch or 0)
        path = path if epoch else path.replace("_epoch0.pth", "_epoch*.pth")
        hint = "train it by --train, or name another file by --checkpoint"
        pattern = rf"data/deeplab_.+_v3_{re.escape(exp)}_epoch\d+(_iter\d+)?\.pth"
        if others := [other for other in sorted(glob("data/*.pth")) if re.fullmatch(pattern, other)]:
            hint = f"but there is {others[-1]}: add its --dataset, or name it by --checkpoint"
        raise UserError(f"there is no {path}: {hint}")
    return found[0]


def log_beside(checkpoint: str) -> str | None:
    """The log of the run that wrote a checkpoint, if it lies beside it."""
    log = re.sub(r"_epoch\d+(_iter\d+)?\.pth$", ".csv", checkpoint)
    return log if log != checkpoint and os.path.isfile(log) else None


def checkpoint_place(path: str) -> tuple[int, int]:
    """The epochs and the iteration in the name of a checkpoint, see `Run.checkpoint`."""
    match = re.search(r"_epoch(\d+)(?:_iter(\d+))?\.pth$", path)
    return int(match[1]), int(match[2] or 0)


class RunLog:
    """The rows of data/NAME.csv; with `plots` their curves in data/NAME.png after each validation, and with
    `tensorboard` the same for TensorBoard in data/runs/NAME.

    What lies in data/ under the name of a run is that run's: its start moves to data/old/EXP-N what an
    earlier run has left, and what lies beyond the checkpoint that it continues. A row tells its place in the
    run by `iteration` / `per_epoch`, whatever the batch size and the list were before. Raises UserError if
    another process writes this log, the disk takes its name for another run's, or TensorBoard is asked for
    and not installed."""

    def __init__(self, run: Run, training: Training, tensorboard: bool, plots: bool = False):
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs a package: pip install tensorboard") from error
        self.run, self.training, self.plots, self.board = run, training, plots, None
        self.iteration = self.offset = 0  # of the last row
        os.makedirs("data", exist_ok=True)
        self.file = open(f"data/{run.name}.csv", "ab+")  # noqa: SIM115, open for as long as the run
        lock(self.file, f"--exp {run.exp} is being trained by another process: choose another name")
        if os.path.basename(self.file.name) not in os.listdir("data"):
            raise UserError(f"--exp {run.exp}: to this disk another run has the same name: choose another")
        for saved in run.named_after_checkpoints("data", r"\.pth\.\d+\.\d+\.tmp"):
            os.remove(saved.path)  # a kill left it
        rows = self.set_aside()
        self.match_validations(rows)
        text = to_text(rows)
        self.file.seek(0)
        same = self.file.read(len(text)) == text
        self.file.truncate(len(text) if same else 0)
        self.file.write(b"" if same else text)
        self.file.flush()
        if tensorboard:
            self.board = SummaryWriter(
                f"data/runs/{run.name}", purge_step=training.iteration + training.offset + 1
            )

    def match_validations(self, rows: list[dict]) -> None:
        """Let the rows and the checkpoint that the run continues tell of the same validations: each can have
        some that the other lacks."""
        training, own, others, last = self.training, ("", self.training.val_set), {}, ""
        for row in (row for row in rows if row["val_mean_iou"]):
            row["val_set"] = row["val_set"] or training.val_set_before  # of an earlier version
            epoch, value, last = row["epoch"], float(row["val_mean_iou"]), row["val_set"]
            if last in own:
                training.note_validation(epoch, value)
            else:
                others.setdefault(last, {})[epoch] = value
        training.others |= {} if last in own else others[last]
        training.kept |= {find_best(found).epoch for found in (*others.values(), training.others) if found}
        if best := find_best(training.others):
            found = "validates other images or masks, or in another way: the mean IoUs before do not count"
            print(f"{found} any more (--keep leaves the best of them, that of epoch {best.epoch})")
        validated = {row["epoch"] for row in rows if row["val_mean_iou"]}
        at_end = training.resumed and re.search(r"_epoch\d+\.pth$", training.resumed.path)
        if at_end and training.epoch not in {*validated, *training.validations}:  # a stop came between
            print(f"{training.resumed.path} was not validated: --best, --keep and --patience pass it over")
        for epoch in training.validations.keys() - validated:  # as the log was not copied, say
            row = {"epoch": epoch, "iteration": epoch * training.per_epoch, "per_epoch": training.per_epoch}
            rows.append({**row, "val_mean_iou": training.validations[epoch], "val_set": training.val_set})
        rows.sort(key=place)

    def set_aside(self) -> list[dict]:
        """Move what is not this run's to data/old; returns the rows that are, up to where it continues."""
        run, resumed, saved = self.run, self.training.resumed, self.run.saved()
        self.file.seek(0)
        data = self.file.read()
        rows = read_rows(data, self.file.name, resumed and resumed.per_epoch)
        continued = [item for item in saved if resumed and os.path.samefile(item.path, resumed.path)]
        for split in ("train", "val", "test"):
            saved += run.named_after_checkpoints(f"data/{split}", "")  # results of evaluation
        beyond = [item.path for item in saved if not continued or item[:2] > continued[0][:2]]
        end = Fraction(resumed.iteration, resumed.per_epoch) if resumed else 0
        own, lost, what = [], rows, f"what an earlier run of --exp {run.exp} left"
        if continued and reaches(rows, end):
            what = f"what --exp {run.exp} had beyond {resumed.path}"
            own, lost = rows, [row for row in rows if place(row) > end]
            # The rows of a killed run, which come before a validation, are not lost if this one writes them
            # again.
            if all(r["per_epoch"] == self.training.per_epoch and not r["val_mean_iou"] for r in lost):
                lost = [row for row in lost if place(row) > self.training.flags["epochs"]]
        elif continued:
            what = f"the log of another run of --exp {run.exp}, which does not reach {resumed.path},"
        else:
            beyond += filter(os.path.exists, [f"data/{run.name}.png", f"data/runs/{run.name}"])
            if log := resumed and log_beside(resumed.path):  # another run's
                with open(log, "rb") as file:
                    own = read_rows(file.read(), log, resumed.per_epoch)
        if beyond or lost:
            folder = free_name(f"data/old/{run.exp}-")
            if data:  # before the checkpoints: a kill between them loses nothing
                write_whole(f"{folder}/{run.name}.csv", lambda file: file.write(data))
            for path in beyond:
                target = os.path.dirname(f"{folder}{path.removeprefix('data')}")
                os.makedirs(target, exist_ok=True)
                shutil.move(path, target)
            print(f"moved {what} to {folder}")
        return [row for row in own if place(row) <= end]

    def write(self, row: dict, samples: Image.Image | None = None) -> None:
        """Add a row; written again with its validation, it takes its own place. Raises UserError if the disk
        is full."""
        again = row["iteration"] == self.iteration
        if again:
            self.file.truncate(self.offset)
        self.iteration, self.offset = row["iteration"], self.file.seek(0, os.SEEK_END)
        try:
            self.file.write(to_text([row], header=False))
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.file.name}: {error.strerror}") from error
        if self.board:
            step = row["iteration"] + self.training.offset
            for name in ["val_mean_iou"] if again else ["lr", "loss", "images_per_second"]:
                if row.get(name) is not None:
                    self.board.add_scalar(name, row[name], step)
            if samples:
                self.board.add_image("samples", np.array(samples), step, dataformats="HWC")
            self.board.flush()
        if self.plots and again:
            self.file.seek(0)
            plot_run(f"data/{self.run.name}.png", read_rows(self.file.read(), self.file.name))

    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def place(row: dict) -> Fraction:
    """Where in the run a row of the log is: the number of epochs that were done."""
    return Fraction(row["iteration"], row["per_epoch"])


def reaches(rows: list[dict], end: Fraction | float) -> bool:
    """Whether rows, if any, can be of a run that has saved a checkpoint there: each epoch has a row, and a
    kill can lose the last."""
    return not rows or place(rows[-1]) + 1 >= end


def to_text(rows: list[dict], header: bool = True, columns: list[str] = COLUMNS) -> bytes:
    """Rows of the log as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read_rows(data: bytes, path: str, per_epoch: int | None = None) -> list[dict]:
    """The rows of a log, see `parse_rows`. A file that something else has written, a spreadsheet say, is kept
    beside it as .bak."""
    rows, edited = parse_rows(data, per_epoch)
    if edited:
        copy = free_name(f"{path}.bak")
        write_whole(copy, lambda file: file.write(data))
        print(f"{path} was edited: its {len(rows)} rows are taken over, and {copy} is a copy of it")
    return rows


def parse_rows(data: bytes, per_epoch: int | None = None) -> tuple[list[dict], bool]:
    """The rows of a log in their order, those that can be read as CSV, and whether something else than this
    code has written it.

    `per_epoch` is for the logs of earlier versions, which do not tell it.
    """
    whole = data[: data.rfind(b"\n") + 1]  # a kill can leave a part of a line
    lines = whole.decode("utf-8-sig", errors="replace").replace("\0", "").splitlines()
    reader, rows = csv.DictReader(lines, restval=""), []
    try:
        for row in reader:
            try:
                row = {name: row.get(name) or "" for name in COLUMNS}
                row["per_epoch"] = max(1, int(row["per_epoch"] or per_epoch or 1))
                row.update(epoch=int(row["epoch"]), iteration=int(row["iteration"]))
                numbers = [row["lr"], row["loss"], row["val_mean_iou"] or 0]
                if row["val_mean_iou"]:  # a validation that a checkpoint alone told has no loss
                    numbers = [number or 0 for number in numbers]
                if all(math.isfinite(float(number)) for number in numbers):
                    rows.append(row)
            except ValueError:
                continue  # a note, or a line cut short
    except csv.Error:
        pass  # what follows is no CSV
    rows.sort(key=place)
    written = to_text(rows, columns=[name for name in reader.fieldnames or () if name in COLUMNS])
    return rows, bool(data) and whole != written

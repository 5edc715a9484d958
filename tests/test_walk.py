"""A random walk of runs that are trained, stopped, killed and resumed: nothing that was saved is lost."""

import csv
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from processes import narrow

import deeplab
import main
from files import runs, training
from files.runs import Run, RunLog, find_checkpoint
from utils import end_if_stopped

RUN = Run("tiny", "custom", "x")
LOG = Path(f"data/{RUN.name}.csv")


class Killed(BaseException):
    """Ends a command without saving or tidying up anything, as a kill does."""


class Checkpoint(NamedTuple):
    """What is known of a checkpoint; its step is its name here."""

    path: str
    epoch: int
    within: bool  # an epoch
    steps: list[int]  # that led to it
    rows: list[int]  # of the log, by their steps, that belong to it
    validated: dict[int, float]  # the mean IoU of checkpoints, by their steps


class Walk:
    """Commands of one --exp with random flags, ends and checkpoints to resume.

    A step of training writes its number, which counts the steps of all commands, into the weights and gives
    it as the loss. So a checkpoint and a row of the log tell when they were trained.
    """

    def __init__(self, cli: Callable, data: list[object], patch: pytest.MonkeyPatch, seed: int):
        self.cli, self.data, self.random = cli, data, random.Random(seed)
        self.step, self.stops_at, self.calls_left = 0, 0, 0
        self.known: dict[int, Checkpoint] = {}
        self.kept: set[int] = set()  # checkpoints that must exist, in data/ or data/old
        self.rows: dict[int, dict] = {}  # that must exist
        self.newest: set[int | None] = {None}  # what --resume auto may continue; None is a new run
        # Saved by a run that was killed before it could delete the older ones. Within an epoch of another
        # length such a one can have the smaller number; nothing has been printed of it yet.
        self.unpruned: set[int] = set()
        self.steps: list[int] = []  # of the run that data/ belongs to
        self.logged: list[int] = []  # rows of its log
        self.validated: dict[int, float] = {}
        self.flags: dict = {}
        self.counts = dict.fromkeys(("killed", "stopped", "ended", "nothing left"), 0)
        self.patch_all(patch.setattr)

    def patch_all(self, patch: Callable) -> None:
        """Let what touches the disk tell this walk, and die when a kill is to come."""
        patch(os, "fsync", lambda descriptor: None)
        patch(deeplab.DeepLabv3, "fuse", lambda model: model)
        patch(main, "train_step", self.train_step)
        patch(main, "evaluate", self.evaluate)
        patch(shutil, "move", self.before(shutil.move))
        patch(runs, "write_whole", self.before(runs.write_whole))
        for owner, name, function in (
            (training, "write_whole", self.save),
            (Run, "prune", self.prune),
            (RunLog, "__init__", self.begin),
            (RunLog, "write", self.write_row),
        ):
            original = getattr(owner, name)
            patch(owner, name, lambda *args, f=function, o=original: f(o, *args))

    def moment(self) -> None:
        """A moment at which a kill may come."""
        self.calls_left -= 1
        if self.calls_left == 0:
            raise Killed

    def before(self, function: Callable) -> Callable:
        def call(*args):
            self.moment()
            return function(*args)

        return call

    def stop_here(self) -> None:
        if self.stops_at and self.step >= self.stops_at:
            self.stops_at = 0
            signal.raise_signal(signal.SIGTERM)

    # What main.py calls

    def train_step(self, net, *args) -> torch.Tensor:
        self.moment()
        self.step += 1
        self.steps = [*self.steps, self.step]
        self.stop_here()
        with torch.no_grad():
            list(net.parameters())[-1][0] = self.step
        return torch.tensor(float(self.step))

    def evaluate(self, *args) -> tuple[dict, None]:
        self.moment()
        if self.random.random() < 0.1:
            self.stops_at = self.step
        self.stop_here()
        end_if_stopped()
        return {"mean_iou": self.random.random(), "confusion": np.eye(3).tolist()}, None

    def save(self, original: Callable, path: str, write: Callable) -> None:
        self.moment()
        replaced = {step for step in self.kept if self.find(step) == {path}}
        assert all(self.known[step].within for step in replaced)
        assert replaced <= {*self.steps, *self.unpruned}
        original(path, write)
        self.kept = self.kept - replaced | {self.step}
        (saved,) = [item for item in RUN.saved() if item.path == path]
        self.validated = dict(self.validated)
        state = self.steps, list(self.logged), self.validated
        self.known[self.step] = Checkpoint(path, saved.epoch, saved.iteration > 0, *state)
        self.newest = self.newest | {self.step}
        self.unpruned.add(self.step)
        self.moment()

    def prune(self, original: Callable, run: Run, newest: str, keep: int | None, training) -> None:
        self.moment()
        known = self.known
        there = {step_of(item.path) for item in run.saved()}
        true_best = max(self.validated, key=self.validated.get, default=None)
        assert training.best == (true_best and (known[true_best].epoch, self.validated[true_best]))
        original(run, newest, keep, training)
        left = {step_of(item.path) for item in run.saved()}
        whole = sorted(step for step in there if step == self.step or not known[step].within)
        best_there = max((s for s in self.validated if s in there), key=self.validated.get, default=None)
        expected = {best_there, *whole[-keep:]} & there if keep else set(whole)
        assert left == expected, (newest, keep, training.best)
        self.kept -= there - left
        self.newest, self.unpruned = {self.step}, set()
        self.moment()

    def write_row(self, original: Callable, log: RunLog, row: dict, *args) -> None:
        self.moment()
        original(log, row, *args)
        self.rows[self.step] = dict(row)
        if self.step not in self.logged:
            self.logged.append(self.step)
        if row.get("val_mean_iou") is not None:
            self.validated[self.step] = row["val_mean_iou"]  # of the checkpoint, too
        self.moment()

    def begin(self, original: Callable, log: RunLog, run: Run, training, *args) -> None:
        """A run sets aside what is not its own, and nothing is lost."""
        resumed = training.resumed and step_of(training.resumed.path)
        known = self.known.get(resumed)
        if self.flags["resume"] == "auto":
            assert resumed in self.newest
        continued = resumed and Path(training.resumed.path).parent == Path("data")
        newest = RUN.saved()[-1].path if RUN.saved() else None
        before, beyond = self.read_logs(), set()
        beside = continued or (resumed and list(Path(training.resumed.path).parent.glob("*.csv")))
        if continued and newest == training.resumed.path:  # rows that this run writes again
            place = Fraction(training.resumed.iteration, training.resumed.per_epoch)
            for step, row in self.rows.items():
                again = row["per_epoch"] == training.per_epoch and runs.place(row) > place
                if again and runs.place(row) <= self.flags["epochs"] and step not in known.rows:
                    beyond.add(step)
        # A kill within this leaves a part of it to do for the next command.
        self.newest = {*self.newest, resumed, *(step_of(item.path) for item in RUN.saved()), None}
        self.moment()
        try:
            original(log, run, training, *args)
        finally:
            gone = before.keys() - self.read_logs().keys()
            assert gone <= beyond
            for step in gone:
                del self.rows[step]
        self.newest = {resumed if continued else None}
        self.steps = known.steps if known else []
        self.validated = dict(known.validated) if known else {}
        if known and not beside:
            self.validated.pop(resumed, None)  # nothing tells of it
        self.logged = list(self.read_logs([LOG]))
        assert self.logged == (known.rows if beside else [])
        assert {step_of(item.path) for item in RUN.saved()} <= {*self.steps, *self.unpruned}
        self.moment()

    # What is on the disk

    def find(self, step: int) -> set[str]:
        return {str(path) for path in Path("data").rglob("*.pth") if step_of(path) == step}

    def read_logs(self, paths: list[Path] | None = None) -> dict[int, dict]:
        """The rows of all logs by their steps."""
        rows = {}
        for path in paths or Path("data").rglob("*.csv"):
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    if not row["loss"]:
                        continue  # a validation that a checkpoint alone told
                    step = int(float(row["loss"]))
                    if not rows.get(step, {}).get("val_mean_iou"):
                        rows[step] = row
        return rows

    def check(self) -> None:
        there = {step_of(path) for path in Path("data").rglob("*.pth")}
        assert self.kept <= there
        rows = self.read_logs()
        assert rows.keys() == self.rows.keys()
        for step, row in self.rows.items():
            assert rows[step]["val_mean_iou"] == str(row.get("val_mean_iou") or "")
        assert not list(Path(".").rglob("*.bak*"))
        saved = RUN.saved()
        newest = step_of(saved[-1].path) if saved else None
        assert newest in self.newest
        if saved:
            assert find_checkpoint(None, "custom", "x", None) == saved[-1].path
        assert newest is None or newest == max(
            {step_of(item.path) for item in saved} - (self.unpruned - {newest})
        )

    # One command

    def choose_resume(self) -> list[str]:
        others = sorted(str(path) for path in Path("data").rglob("*.pth"))
        if others and self.random.random() < 0.3:
            path = self.random.choice(others)
            if self.random.random() < 0.2:
                path = shutil.copy(path, "copy.pth")
            return ["--resume", path]
        return ["--resume", "auto"] if self.random.random() < 0.85 else []

    def command(self) -> None:
        pick = self.random.choice
        images = pick((4, 6, 6, 6, 9))
        lines = [f"/images/train{i % 6}.jpg /masks/train{i % 6}.png\n" for i in range(images)]
        (self.data[0] / "list/train.txt").write_text("".join(lines))
        self.flags = {"resume": "", "epochs": pick((1, 2, 3, 4, 6)), "batch_size": pick((1, 2, 2, 3, 4))}
        words = ["--epochs", self.flags["epochs"], "--batch_size", self.flags["batch_size"]]
        words += ["--save_every", pick((1, 1, 2, 10)), "--log_every", 1]
        words += pick(([], [], ["--save_every_iters", pick((1, 2, 3))]))
        words += pick(([], [], ["--keep", pick((1, 2, 3))]))
        resume = self.choose_resume()
        self.flags["resume"] = resume[1] if resume else ""
        self.stops_at = self.step + self.random.randint(1, 15) if self.random.random() < 0.4 else 0
        self.calls_left = self.random.randint(1, 60) if self.random.random() < 0.5 else -1
        streams, first = (sys.stdout, sys.stderr), self.step
        print(words, resume, self.stops_at, self.calls_left)
        try:
            status, out, err = self.cli("--train", "--exp", "x", *self.data[1:], *words, *resume)
        except Killed:
            self.counts["killed"] += 1
        else:
            if status:
                assert status == 143 and f"{find_checkpoint(None, 'custom', 'x', None)} is saved" in err
                assert self.newest == {self.step}
                self.counts["stopped"] += 1
            elif "nothing is left to train" in out:
                assert self.step == first
                self.counts["nothing left"] += 1
            else:
                assert self.newest == {self.step} and self.step > first
                self.counts["ended"] += 1
        finally:
            sys.stdout, sys.stderr = streams
        self.check()


steps_by_file: dict[tuple, int] = {}


def step_of(path: str | Path) -> int:
    """The step at which a checkpoint was saved."""
    status = os.stat(path)
    key = status.st_ino, status.st_mtime_ns, status.st_size
    if key not in steps_by_file:
        state = torch.load(path, weights_only=True)["state_dict"]
        steps_by_file[key] = int(list(state.values())[-1][0])
    return steps_by_file[key]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 11))])
def test_nothing_is_lost_on_a_random_walk(cli, smallest, tmp_path, monkeypatch, seed):
    narrow(monkeypatch.setattr)
    walk = Walk(cli, [tmp_path / "set", *smallest], monkeypatch, seed)
    for _ in range(50 if seed == 0 else 100):
        walk.command()
    assert min(walk.counts.values()) > 0

"""Errors, stop signals, files that are whole or absent, measures: what the other modules share."""

import csv
import io
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import BinaryIO, TextIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

IGNORE_INDEX = 255
# Set by torchrun: the number of this process, of all, on this machine. Rank 0 prints and writes files.
RANK, WORLD = int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
noted_signals: list[int] = []  # the stop signals that have come


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what and how."""

    def __init__(self, message: str):
        # A loader's worker hands on its whole traceback as the message, which ends with the message proper.
        message = message.rpartition("utils.UserError: ")[2]
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))


class Stopped(Exception):
    """A stop signal ended the command. The message, if any, says how to go on."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Within this context a stop signal is noted, and whoever works in a loop looks at it.

    The handler does no more: what it raised could get lost in a callback of Python's, or cut a write in two.
    A second signal ends the process at once; but torchrun passes on what its processes have had from the
    terminal, so there it does not. A signal that is ignored already stays so (`nohup`).
    """

    def note(number: int, frame) -> None:
        noted_signals.append(number)
        if WORLD == 1:
            for each in before:
                signal.signal(each, signal.SIG_DFL)

    noted_signals.clear()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_if_stopped() -> None:
    """Raises:
    Stopped: if a stop signal has come.
    """
    if noted_signals:
        raise Stopped


def outlive_stop_signals(worker: int) -> None:
    """In a worker of a loader: a terminal or a cluster sends signals to all processes, but the main one still
    has an iteration to end and a checkpoint to write, for which there are 30 seconds."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


class Output:
    """A standard stream that nobody need read: once it cannot be written, what it is given is dropped.

    So a closed pipe or a lost terminal does not end a training run, and characters that the stream cannot
    encode are escaped.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115, until the end
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        # The descriptor, too: Python flushes what is left in the stream's buffer as it exits.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


def progress(items: Iterable, what: str, total: int, unit: str = "img") -> Iterator:
    """The items, with a bar on the terminal once they have taken two seconds, or, where the output is no
    terminal, a line every 30 seconds.

    Raises:
        Stopped: if a stop signal has come.
    """
    said = time.perf_counter()
    hide = True if RANK else None  # None: where the output is no terminal
    with tqdm(
        total=total, desc=what, unit=unit, delay=2, disable=hide, leave=False, dynamic_ncols=True
    ) as bar:
        for done, item in enumerate(items, 1):
            end_if_stopped()
            yield item
            bar.update()
            if bar.disable and time.perf_counter() - said > 30:
                said = time.perf_counter()
                print(f"{what}: {done} of {total}", flush=True)


def ahead(pool: Executor, function: Callable, items: Iterable, most: int = 16) -> Iterator:
    """`function` of each item in their order; the pool computes at most `most` of them before their turn."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def write_whole(path: str, write: Callable[[BinaryIO], None]) -> None:
    """Let `write(file)` make a file that appears at `path` only when it is whole and on the disk.

    A kill at any moment leaves the old file or the new one.

    Raises:
        UserError: if the file cannot be written; what stood at `path` before is untouched.
    """
    temporary = f"{path}.{os.getpid()}.{threading.get_native_id()}.tmp"  # two may write at once
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


def read_lines(path: str, remedy: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Raises:
        UserError: if there are none, or the file cannot be read.
    """
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read {path} ({getattr(error, 'strerror', 'not UTF-8')}): {remedy}"
        ) from error
    if empty:
        raise UserError(f"{path} is empty: {remedy}")


def save_json(path: str, value: dict) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_csv(path: str, rows: Iterable[Sequence]) -> None:
    """Write rows, the first of them the columns' names, as CSV, whole or not at all."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


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

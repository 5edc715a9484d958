"""Files that appear whole or not at all, and text files read line by line."""

import csv
import io
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import IO, BinaryIO

from utils import UserError

FORMULA = ("=", "+", "-", "@")  # what the first character of one can be

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_whole(path: str, write: Callable[[BinaryIO], None], sync: bool = True) -> None:
    """Let `write(file)` make a file that appears at `path` only when it is whole and on the disk.

    A kill at any moment leaves the old file or the new one. Without `sync` a loss of power may leave neither;
    that saves milliseconds, which count for thousands of small files. Raises UserError if the file cannot be
    written; a file that stood at `path` before is untouched."""
    folder, name = os.path.split(path)
    # Two threads or processes may write one file at once. A name has 255 bytes at most.
    end = f".{os.getpid()}.{threading.get_native_id()}.tmp"
    temporary = os.path.join(folder, os.fsdecode(os.fsencode(name)[: 255 - len(end)]) + end)
    try:
        os.makedirs(folder or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                if sync:
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


def free_name(start: str) -> str:
    """The first path of `start`1, `start`2, ... that does not exist."""
    return next(path for number in count(1) if not os.path.exists(path := f"{start}{number}"))


def lock(file: IO, busy: str, start: int = 0) -> None:
    """Lock one byte of an open file for as long as it is open, so that no two processes do the same. Raises
    UserError with the message `busy`, if another process has locked it."""
    if fcntl is None:
        return
    try:
        # Not flock: the loader's workers would inherit that, and outlive a killed run by seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, start)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(busy) from error
    except OSError as error:
        print(f"{file.name} cannot be locked ({error.strerror}): let no other process do the same meanwhile")


@contextmanager
def locked_folder(folder: str) -> Iterator[None]:
    """Within this context no other process writes results to the folder, which would replace each other.
    Raises UserError if one does already, or the folder cannot be written to."""
    path = f"{folder}/.lock"
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(path, "ab")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    with file:
        lock(file, f"another process writes its results to {folder}: wait until it has ended")
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps open files
                os.remove(path)


def read_lines(path: str, hint: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1. Raises UserError if there are
    none, or the file cannot be read; the message ends with the hint."""
    empty = True
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    empty = False
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8")
        raise UserError(f"cannot read {path} ({reason}): {hint}") from error
    if empty:
        raise UserError(f"{path} is empty: {hint}")


def save_json(path: str, value: dict) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def read_csv(path: str) -> list[list[str]]:
    """The rows of a file that `save_csv` wrote."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    return [[c[1:] if c[:1] == "'" and c[1:].startswith(FORMULA) else c for c in row] for row in rows]


def save_csv(path: str, rows: Iterable[Sequence]) -> None:
    """Write rows, the first of them the columns' names, as CSV, whole or not at all. Text that a spreadsheet
    would take for a formula gets an apostrophe."""
    text = io.StringIO(newline="")
    for row in rows:
        csv.writer(text).writerow([f"'{cell}" if str(cell).startswith(FORMULA) else cell for cell in row])
    write_whole(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))

"""Errors, what is printed, stop signals, ranks, threads.

torch is imported only where it is needed: flags and downloads do without it, and it takes seconds.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from traceback import clear_frames, format_exception
from typing import NoReturn, TextIO

from tqdm import tqdm

IGNORE_INDEX = 255
# Set by torchrun: the number of this process, of all, on this machine. Rank 0 prints and writes files.
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK = int(os.environ.get("RANK") or 0) if WORLD > 1 else 0  # another job may have left it
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)
MESSAGE_LIMIT = 2000  # characters of an error message: a list can hold a line of megabytes


class UserError(Exception):
    """An error that the user can mend; the message is one line: the file or the flag, and what to do."""

    def __init__(self, message: str):
        # A loader's worker hands on its whole traceback as the message, which ends with the message proper.
        message = message.rpartition("utils.UserError: ")[2]
        message = escape(" ".join(line.strip() for line in message.splitlines() if line.strip()))
        if len(message) > MESSAGE_LIMIT:
            message = f"{message[: MESSAGE_LIMIT // 2]} ... {message[-MESSAGE_LIMIT // 2 :]}"
        super().__init__(message)


def escape(text: str) -> str:
    """The text with its control characters escaped, which could move the cursor of a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\r\t" else ascii(c)[1:-1] for c in text)


class Output:
    """stdout or stderr that drops its output once its pipe or terminal is closed.

    So neither ends a training run. Characters that the stream cannot encode are escaped.
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream if stream is not None else open(os.devnull, "w")  # noqa: SIM115, until the end
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            # stderr is tqdm's, which moves the cursor; an error message is escaped already.
            return self.stream.write(escape(text) if self is sys.stdout else text)
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


def percent(value: float | None) -> str:
    """A share in 0..1 as in `75.36`, or `-` for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def progress(items: Iterable, title: str, total: int, unit: str = "img") -> Iterator:
    """The items, with a bar once they have taken two seconds; without a terminal a line every 30 seconds.
    Raises Stopped if a stop signal has come."""
    printed = time.perf_counter()
    hide = True if RANK else None  # None: where the output is no terminal
    options = {"unit": unit, "delay": 2, "disable": hide, "leave": False, "dynamic_ncols": True}
    with tqdm(total=total, desc=title, **options) as bar:
        for done, item in enumerate(items, 1):
            end_if_stopped()
            yield item
            bar.update()
            if bar.disable and time.perf_counter() - printed > 30:
                printed = time.perf_counter()
                print(f"{title}: {done} of {total}", flush=True)


def ahead(pool: Executor, function: Callable, items: Iterable, limit: int = 16) -> Iterator:
    """`function` of each item, in order; the pool computes up to `limit` of them in advance."""
    pending: deque[Future] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > limit:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
noted_signals: list[int] = []  # the stop signals that have come


class Stopped(Exception):
    """A stop signal ended the command. The message, if any, says how to continue."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Within this context a stop signal is noted, for loops to ask `end_if_stopped` or `stop_asked`.

    The handler does no more: what it raised could get lost in a callback of Python's, or cut a write in two.
    A second signal ends the process at once; but torchrun passes on what its processes have had from the
    terminal, so there it does not. A signal that is ignored already stays so (`nohup`).
    """

    def note(number: int, frame) -> None:
        noted_signals.append(number)
        if hasattr(signal, "SIGCHLD"):  # torch's handler would raise within a step, as soon as a worker ends
            earlier = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            before.setdefault(signal.SIGCHLD, earlier or signal.SIG_DFL)
        for worker in multiprocessing.active_children() if hasattr(signal, "SIGCONT") else ():
            os.kill(worker.pid, signal.SIGCONT)  # a process of a loader that is stopped would be waited for
        if len(noted_signals) == 1:
            timer.start()
        if WORLD == 1:
            for handled in before:
                signal.signal(handled, signal.SIG_DFL)

    def kill_workers() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    timer = threading.Timer(20, kill_workers)  # those that do not answer
    timer.daemon = True
    noted_signals.clear()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_if_stopped() -> None:
    """Raises Stopped if a stop signal has come."""
    if noted_signals:
        raise Stopped


def ignore_stop_signals(worker: int) -> None:
    """In a worker of a loader: signals reach all processes of a terminal or a job, but the main one still has
    an iteration to end and a checkpoint to write, for which there are 30 seconds."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def prepare_threads() -> None:
    """Before torch is imported: fit its threads to the machine, unless the user has set a variable of OpenMP.

    A container gets as many as its CPU quota. On a busy machine they do not spin while they wait: a spinning
    thread keeps a core from the others, and steps take several times their share."""
    if any(name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_")) for name in os.environ):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if (limit := math.ceil(int(quota) / int(period))) < cores:
            os.environ["OMP_NUM_THREADS"] = str(limit)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > cores / 2:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def stop_asked() -> bool:
    """Whether a stop signal has come to any of the processes."""
    if WORLD == 1:
        return bool(noted_signals)
    import torch
    import torch.distributed as dist

    asked = torch.tensor(len(noted_signals))  # on the CPU: the GPUs are not waited for
    dist.all_reduce(asked)
    return asked.item() > 0


def run_command(
    command: Callable[[], int | None], explain: Callable[[Exception], str | None] = lambda error: None
) -> NoReturn:
    """Run a command and exit with its status, or with one line on stderr that says what has ended it.

    `explain` returns what to print of an error that is no `UserError`, or None for the traceback.
    """
    sys.stdout, sys.stderr = Output(None if RANK else sys.stdout), Output(sys.stderr)
    line = None
    try:
        with stop_signals():
            status = command() or 0
    except Stopped as stopped:
        clear_all_frames(stopped)
        number = signal.Signals(noted_signals[0] if noted_signals else signal.SIGTERM)
        status = 128 + number
        line = None if RANK else "; ".join([f"\nmain.py: stopped by {number.name}", *stopped.args])
    except Exception as error:
        message = str(error) if isinstance(error, UserError) else explain(error)
        if message is None and isinstance(error, OSError):
            message = f"{error.filename or 'a file'}: {error.strerror or error}"
        if message is None and WORLD == 1:
            raise
        clear_all_frames(error)
        status, message = 1, message or "".join(format_exception(error))
        line = f"main.py: rank {RANK}: error: {message}" if WORLD > 1 else f"main.py: error: {message}"
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()  # a loader's that did not end when told to; Python would wait for it
    if WORLD > 1:
        # The tidy way out of NCCL waits for the other processes, which may be gone; that of gloo, in torch
        # 2.6, for a thread that may wait for Python's lock.
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def clear_all_frames(error: BaseException | None) -> None:
    """Drop what the frames of an error hold: a loader, whose workers would hold up the exit."""
    while error:
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

"""Real processes of main.py that start at once: a server that has imported torch forks them.

Each imports the project's own modules anew, by its own environment.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(
    ["pytest", "torch", "torchvision", "torch.distributed", "torch.utils.data", "tqdm"]
)


def narrow(patch: Callable[[object, str, object], None] = setattr) -> None:
    """Make every stage of the trunk 32 wide: for what holds at any width, at a tenth of the time."""
    import deeplab
    from files import checkpoints

    stage = deeplab.ResNet._make_layer
    patch(deeplab.ResNetTrunk, "_make_layer", lambda net, block, _, *a, **k: stage(net, block, 8, *a, **k))
    patch(deeplab.ResNetTrunk, "channels", (32, 32))
    checkpoints.BACKBONES[1, 8, 8] = "tiny"


def run(argv: list[str]) -> None:
    """main.py with these flags, and the narrow network."""
    import tiny

    narrow()
    tiny.run(argv)


def child(environment: dict[str, str], module: str, function: str, args: tuple, folder: str) -> None:
    """Call `module.function(*args)` as a process of its own does: in a folder, its output in files there."""
    os.setsid()  # a signal to its group reaches its workers and no test
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name + environment.get("RANK", ""), os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than processors
    multiprocessing.set_start_method("fork", force=True)
    getattr(importlib.import_module(module), function)(*args)


def start(
    folder: Path,
    *flags: object,
    module: str = "processes",
    function: str = "run",
    environment: dict[str, str] | None = None,
) -> ForkServerProcess:
    """main.py with these flags on the tiny backbone, or `module.function(flags)`, in `folder`."""
    folder.mkdir(exist_ok=True)
    for name in ("out", "err"):
        (folder / (name + (environment or {}).get("RANK", ""))).write_text("")
    words = [str(flag) for flag in flags]
    args = (environment or {}, module, function, (words,), str(folder))
    process = servers.Process(target=child, args=args)
    process.start()
    return process


def start_ranks(folders: list[Path], *flags: object, **options: str) -> list[ForkServerProcess]:
    """As many processes as folders, with what torchrun sets for each of them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(folder, *flags, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank, folder in enumerate(folders)
    ]


def end(*processes: ForkServerProcess, seconds: float = 120) -> list[int | None]:
    """Wait for processes to end; returns their exit statuses."""
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def wait_until(happened: Callable[[], object], process: ForkServerProcess) -> bool:
    """Whether it happened before the process ended."""
    while not (found := happened()) and process.is_alive():
        time.sleep(0.002)
    return bool(found)

"""What the tests share: the command line run in-process, the golden weights, a small data set, the shared
images."""

import copy
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401, registers --backbone tiny
import torch
from PIL import Image

import deeplab
import main
import utils
from commands.flags import parse_args
from files import checkpoints

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup pytest` ignores it, and so would what tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each core has a process of tests
    os.environ["OMP_NUM_THREADS"] = "1"
GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real images stand beside the project")

spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(weights)

TINY = Path(__file__).parent / "tiny.py"
ASPP = ["--aspp_rates", 6, "--no_image_pooling"]  # the smallest there is
NETWORK = ["--groups", 32, "--weight_std", *ASPP]
SMALL = ["--backbone", "tiny", "--scratch", "--crop_size", 33, "--batch_size", 4, "--workers", 0]
NORMS = {"bn": {}, "gn_ws": {"num_groups": 32, "weight_std": True}, "beta": {"beta": True}}


def golden_state(kind: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(x) for key, x in weights.state_dict(GOLDEN / f"keys_{kind}.json").items()}


def file_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a DeepLabv3 under their names in files."""
    return {checkpoints.file_name(key): tensor for key, tensor in model.state_dict().items()}


def load_file_state(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.load_state_dict({key: state[checkpoints.file_name(key)] for key in model.state_dict()})


def golden_keys(kind: str) -> dict[str, list[int]]:
    return json.loads((GOLDEN / f"keys_{kind}.json").read_text())


def make_list_dataset(
    root: Path, train: int = 6, val: int = 3, size=(80, 60), classes=("a", "b", "c")
) -> Path:
    """A custom data set: each image is a grey ground with one bright block of class 1 or a dark one of class
    2."""
    rng = np.random.RandomState(0)
    for folder in ("images", "masks", "list"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, count in (("train", train), ("val", val)):
        lines = []
        for i in range(count):
            image = np.full((size[1], size[0], 3), 128, np.uint8)
            mask = np.zeros((size[1], size[0]), np.uint8)
            label, y, x = 1 + i % 2, rng.randint(size[1] // 2), rng.randint(size[0] // 2)
            block = np.s_[y : y + size[1] // 2, x : x + size[0] // 2]
            image[block], mask[block] = (250 if label == 1 else 5), label
            Image.fromarray(image).save(root / f"images/{split}{i}.jpg")
            Image.fromarray(mask).save(root / f"masks/{split}{i}.png")
            lines.append(f"/images/{split}{i}.jpg /masks/{split}{i}.png\n")
        (root / f"list/{split}.txt").write_text("".join(lines))
    return root


@pytest.fixture(autouse=True)
def no_signals():
    """A stop signal that an earlier test has sent stops nothing here."""
    utils.noted_signals.clear()


@pytest.fixture(autouse=True)
def no_accelerators(request, monkeypatch):
    """Tests are of the CPU, where the numbers are exact, but for those of test_cuda.py."""
    if request.module.__name__ != "test_cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def small(tmp_path):
    """Flags of a run on a small data set of 6 training images, with a network of one block a stage."""
    return ["--dataset", "custom", "--data_root", make_list_dataset(tmp_path / "set"), *SMALL]


@pytest.fixture
def smallest(small):
    """The same with the smallest network."""
    return [*small, *NETWORK]


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_line(err):
    return err.startswith("main.py: error: ") and err.count("\n") == 1


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run `main.py ARGS` in an empty working directory; gives (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        before, args = multiprocessing.active_children(), None
        with pytest.raises(SystemExit) as stop:
            args = parse_args([str(word) for word in argv])
            flags = copy.deepcopy(vars(args))
            main.main(args)
        assert args is None or vars(args) == flags  # nothing writes into them
        assert multiprocessing.active_children() == before  # whatever went wrong, the loader's workers ended
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A data set of 3 classes and a checkpoint that has learnt its training images."""
    folder = tmp_path_factory.mktemp("trained")
    root = make_list_dataset(folder / "set", train=8, val=2)
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK]
    flags += ["--crop_size", 65, "--epochs", 20, "--base_lr", 0.02, "--save_every", 20, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit):
            main.main(parse_args([str(word) for word in flags]))
    return folder / "data/deeplab_tiny_custom_v3_x_epoch20.pth", root


def spoil(kind: str, path: Path) -> None:
    """Write a checkpoint with this flaw."""
    model = deeplab.build(
        "tiny", False, 3, num_groups=32, weight_std=True, aspp_rates=[6], image_pooling=False
    )
    state = file_state(model)
    key = "layer4.0.conv2.weight"
    if kind == "nan":
        state[key].view(-1)[7] = torch.nan
    elif kind == "integers":
        state[key] = state[key].int()
    elif kind == "float8":
        state[key] = state[key].to(torch.float8_e4m3fn)
    elif kind == "sparse":
        state[key] = state[key].to_sparse()
    elif kind == "no values":
        state[key] = state[key].to("meta")
    elif kind == "lacks one":
        del state[key]
    elif kind == "one too many":
        state["more"] = torch.zeros(3)
    elif kind == "another shape":
        state[key] = state[key][1:]
    elif kind == "no tensor":
        state[key] = 3
    config = {"model": {"backbone": [1], "num_classes": {}}} if kind == "no model" else {}
    torch.save(
        {"epoch": 1, "state_dict": state, **config},
        path,
        _use_new_zipfile_serialization="legacy" not in kind,
    )
    if "cut" in kind:
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif kind == "text":
        path.write_text("404: Not Found\n" * 100)
    elif kind == "empty":
        path.write_bytes(b"")


def bomb(path: Path) -> None:
    """A PNG of a few bytes whose header promises 40,000 x 40,000 pixels."""
    header = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))


def damage(kind: str, path: Path) -> None:
    image = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("<html>")
    elif kind == "bomb":
        bomb(path)
    elif kind == "cut":
        path.write_bytes(image[: len(image) // 2])
    elif kind == "other size":
        Image.new("RGB", (10, 10)).save(path)


def move_to_the_end(path: Path, kind: bytes) -> None:
    """Move the first chunk of this kind behind the pixels of a PNG."""
    data = path.read_bytes()
    start = data.index(kind) - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[start + len(chunk) : end] + chunk + data[end:])


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> list[tuple[str, str]]:
    """10,000 tiny images and their masks, of three sizes."""
    folder, rng, pairs = tmp_path_factory.mktemp("many"), np.random.RandomState(0), []
    for i in range(10_000):
        side = 7 + i % 3
        pairs.append((f"{folder}/{i}.ppm", f"{folder}/{i}.pgm"))
        Image.fromarray(rng.randint(0, 256, (side, 9, 3), dtype=np.uint8)).save(pairs[-1][0])
        Image.fromarray(rng.randint(0, 3, (side, 9), dtype=np.uint8)).save(pairs[-1][1])
    return pairs


def memory() -> float:
    """What this process holds, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="tells memory by /proc")


def torchrun(folder: Path, script: Path, *argv: object, processes: int = 2) -> subprocess.Popen:
    """Processes of a script; what they print goes to `folder`/out and `folder`/err."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TINY.parents[1])}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env=environment)


def wait_for(path: Path, run: subprocess.Popen) -> None:
    while not path.exists() or "iteration" not in path.read_text():
        assert run.poll() is None
        time.sleep(0.05)


def children(run: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    if not path.exists():
        run.kill()
        pytest.skip("no /proc here to find the processes by")
    return [int(word) for word in path.read_text().split()]

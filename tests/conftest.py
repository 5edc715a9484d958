"""What the tests share: the command line run in-process, the golden weights, a small data set, the shared
images."""

import importlib.util
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deeplab
import main

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real images stand beside the project")

spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(weights)

TINY = Path(__file__).parent / "tiny.py"
SMALL = ["--backbone", "resnet50", "--scratch", "--crop_size", 33, "--batch_size", 4, "--workers", 0]
NORMS = {"bn": {}, "gn_ws": {"num_groups": 32, "weight_std": True}, "beta": {"beta": True}}


def golden_state(kind: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(x) for key, x in weights.state_dict(GOLDEN / f"keys_{kind}.json").items()}


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


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Flags of a run on a small data set of 6 training images; a resnet50 has one block a stage meanwhile."""
    monkeypatch.setitem(deeplab.LAYERS, "resnet50", (1, 1, 1, 1))
    return ["--dataset", "custom", "--data_root", make_list_dataset(tmp_path / "set"), *SMALL]


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
        status, before = 0, multiprocessing.active_children()
        try:
            main.main([str(word) for word in argv])
        except SystemExit as stop:
            status = stop.code
            if isinstance(status, str):  # sys.exit("message") prints it and exits with 1
                print(status, file=sys.stderr)
                status = 1
        assert multiprocessing.active_children() == before  # whatever went wrong, the loader's workers ended
        out, err = capsys.readouterr()
        return status, out, err

    return run

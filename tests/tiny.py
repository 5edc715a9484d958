"""main.py with a network so small that a test can start it many times: `python tests/tiny.py FLAGS`.

Its backbone, `--backbone tiny`, is a ResNet of one block a stage. It runs on the CPU, unless --device says
otherwise.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import deeplab
import main
from commands import flags
from files import checkpoints

deeplab.BACKBONES["tiny"] = {"layers": (1, 1, 1, 1)}
checkpoints.BACKBONES[1, 64, 64] = "tiny"
flags.BACKBONES.append("tiny")


def run(argv: list[str], folder: str = ".") -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    words = [str(word) for word in argv]
    main.main(flags.parse_args(words + (["--device", "cpu"] if "--device" not in words else [])))


if __name__ == "__main__":
    run(sys.argv[1:])

"""main.py with a network so small that a test can start it many times: `python tests/tiny.py FLAGS`.

It runs on the CPU, unless --device says otherwise.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import deeplab
import main


def run(argv: list[str], folder: str = ".") -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    deeplab.LAYERS["resnet50"] = (1, 1, 1, 1)
    main.main([str(word) for word in argv] + (["--device", "cpu"] if "--device" not in argv else []))


if __name__ == "__main__":
    run(sys.argv[1:])

"""Counts against a slow exact reference, the schedule, files that are whole or absent."""

import numpy as np
import pytest
import torch
from PIL import Image

from files.pictures import save_mask, voc_palette
from utils import UserError, confusion_matrix, metrics, write_whole


def test_confusion_matrix():
    rng = np.random.RandomState(0)
    for classes in (1, 3, 255):
        truth, prediction = rng.randint(0, classes, (2, 5, 7, 4))
        truth[rng.rand(*truth.shape) < 0.3] = 255
        expected = np.zeros((classes, classes), int)
        for t, p in zip(truth.flatten(), prediction.flatten(), strict=True):
            if t != 255:
                expected[t, p] += 1
        counts = confusion_matrix(torch.from_numpy(prediction), torch.from_numpy(truth).byte(), classes)
        assert counts.tolist() == expected.tolist()


def test_metrics():
    result = metrics(torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert result["iou"] == [6 / 9, 3 / 6, None, None]
    assert result["mean_iou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert result["pixel_accuracy"] == pytest.approx(9 / 12)
    assert result["mean_accuracy"] == pytest.approx((6 / 8 + 3 / 4) / 2)
    # A class that is only predicted counts, with 0.
    assert metrics(torch.tensor([[1, 1], [0, 0]]))["iou"] == [0.5, 0.0]
    nothing = metrics(torch.zeros(2, 2, dtype=torch.int64))
    assert nothing == {"mean_iou": None, "iou": [None, None], "pixel_accuracy": None, "mean_accuracy": None}


def test_mask_reads_back_as_its_labels(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    save_mask(str(tmp_path / "a" / "mask.png"), mask, voc_palette())
    image = Image.open(tmp_path / "a" / "mask.png")
    assert image.mode == "P" and np.array_equal(np.array(image), mask)
    colors = np.array(image.convert("RGB")).reshape(-1, 3)
    assert colors[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [224, 224, 192],
    ]


def test_write_whole_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_whole(str(path), lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*file: No space left on device"):
        write_whole(str(path), fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]

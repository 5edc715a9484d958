"""Measures of a matrix of counts, files that are whole or absent, and what is printed."""

import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from commands.evaluate import metrics
from files.pictures import save_mask, voc_palette
from files.whole import free_name, lock, save_csv, save_json, write_whole
from utils import MESSAGE_LIMIT, Output, UserError, ahead, escape, percent, prepare_threads


def test_metrics():
    result = metrics(torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    assert result["iou"] == [6 / 9, 3 / 6, None, None]
    assert result["mean_iou"] == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert result["pixel_accuracy"] == pytest.approx(9 / 12)
    assert result["mean_accuracy"] == pytest.approx((6 / 8 + 3 / 4) / 2)
    # A class that is only predicted counts, with 0.
    assert metrics(torch.tensor([[1, 1], [0, 0]]))["iou"] == [0.5, 0.0]
    nothing = metrics(torch.zeros(2, 2, dtype=torch.int64))
    means = dict.fromkeys(("mean_iou", "pixel_accuracy", "mean_accuracy"))
    assert nothing == means | dict.fromkeys(("iou", "precision", "recall", "f1"), [None, None])


def test_mask_reads_back_as_its_labels(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    save_mask(str(tmp_path / "a" / "mask.png"), mask, voc_palette(), "ab")
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("of the writer")])
def test_write_whole_leaves_the_old_file_or_the_new_one(tmp_path, error):
    path = tmp_path / "file"
    write_whole(str(path), lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise error

    expected = UserError if isinstance(error, OSError) else ValueError
    with pytest.raises(expected, match=r"cannot write .*file: No space left on device|of the writer"):
        write_whole(str(path), fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]

    def look(file):
        file.write(b"new")
        assert path.read_bytes() == b"old"

    write_whole(str(path), look)
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_threads_write_one_file(tmp_path):
    """It is one of the two, whole."""
    both = threading.Barrier(2)

    def write(content: bytes) -> None:
        def half_and_half(file):
            file.write(content[:5])
            both.wait(10)
            file.write(content[5:])

        write_whole(str(tmp_path / "file"), half_and_half)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, [10 * b"a", 10 * b"b"]))
    assert (tmp_path / "file").read_bytes() in (10 * b"a", 10 * b"b") and len(list(tmp_path.iterdir())) == 1


def test_name_as_long_as_a_name_can_be(tmp_path):
    path = tmp_path / (127 * "ä")  # 254 bytes
    save_json(str(path), {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n' and len(list(tmp_path.iterdir())) == 1


def test_csv_of_names_that_are_not_utf8(tmp_path):
    save_csv(str(tmp_path / "x.csv"), [["name", "a"], [os.fsdecode(b"\xff.png"), 'b,"c"']])
    assert (tmp_path / "x.csv").read_bytes() == b'name,a\r\n\xff.png,"b,""c"""\r\n'


def test_free_name(tmp_path):
    for name in ("x1", "x2", "x4"):
        (tmp_path / name).touch()
    assert free_name(f"{tmp_path}/x") == f"{tmp_path}/x3"


def test_lock_is_of_one_byte(tmp_path):
    pytest.importorskip("fcntl")
    code = "import sys; from files.whole import lock; lock(open(sys.argv[1], 'ab'), 'busy', int(sys.argv[2]))"
    with open(tmp_path / "file", "ab") as file:
        lock(file, "busy", 1)
        for start, busy in ((0, False), (1, True)):
            command = [sys.executable, "-c", code, file.name, str(start)]
            result = subprocess.run(command, cwd=Path(utils.__file__).parent, capture_output=True, text=True)
            assert (result.returncode, result.stderr.endswith("utils.UserError: busy\n")) == (busy, busy)


def test_message_is_one_short_line():
    worker = (
        'Traceback:\n  File "x.py", line 1\nutils.UserError: a.png is damaged:\n   fetch it\x1b[2J again\n'
    )
    assert str(UserError(worker)) == "a.png is damaged: fetch it\\x1b[2J again"
    message = str(UserError("list.txt, line 1: " + 9_000_000 * "x" + ": one pair a line"))
    assert message.startswith("list.txt, line 1: xxx") and message.endswith("xxx: one pair a line")
    assert len(message) == MESSAGE_LIMIT + 5


def test_control_characters_are_escaped():
    assert escape("a\x1b[2J\x9b\x7f\u202eb") == "a\\x1b[2J\\x9b\\x7f\\u202eb"
    assert escape("ä 語\n\tb\r") == "ä 語\n\tb\r"


def test_output_escapes_what_the_stream_cannot_show(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output = Output(stream)
    monkeypatch.setattr(sys, "stdout", output)
    print("bär\x1b[2J")
    output.flush()
    assert stream.buffer.getvalue() == b"b\\xe4r\\x1b[2J\n"
    error = Output(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    error.write("\x1b[A")  # as tqdm moves the cursor
    error.flush()
    assert error.stream.buffer.getvalue() == b"\x1b[A"


def test_output_of_a_closed_pipe_is_dropped():
    reader, writer = os.pipe()
    os.close(reader)
    output = Output(os.fdopen(writer, "w"))
    assert output.write("a") == 1
    output.flush()
    print("b", file=output, flush=True)
    output.stream.close()


def test_percent():
    assert [percent(value) for value in (0.75358, 1, 0, None)] == ["75.36", "100.00", "0.00", "-"]


def test_ahead_keeps_the_order_and_the_limit():
    started = []

    def work(item: int) -> int:
        started.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    with ThreadPoolExecutor(4) as pool:
        results = ahead(pool, work, range(50), limit=5)
        for item in range(50):
            assert next(results) == item
            assert len(started) <= item + 6
        assert next(results, None) is None


@pytest.mark.parametrize(
    ("variables", "load", "quota", "expected"),
    [
        ({}, 3.9, "max 100000", {}),
        ({}, 4.1, "max 100000", {"GOMP_SPINCOUNT": "1000"}),
        ({"OMP_NUM_THREADS": "3"}, 100.0, "100000 100000", {"OMP_NUM_THREADS": "3"}),
        ({"KMP_AFFINITY": "x"}, 100.0, "100000 100000", {"KMP_AFFINITY": "x"}),
        ({}, 0.0, "150000 100000", {"OMP_NUM_THREADS": "2"}),
        ({}, 5.0, "150000 100000", {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"}),
        ({}, 0.0, "900000 100000", {}),
    ],
)
def test_threads_fit_the_machine_of_eight_cores(monkeypatch, variables, load, quota, expected):
    """They do not spin on a busy one, and are as many as a container may use."""
    monkeypatch.setattr(os, "environ", dict(variables))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(utils, "open", lambda path: io.StringIO(quota), raising=False)
    prepare_threads()
    assert os.environ == expected


def test_rank_that_another_job_has_left(tmp_path):
    """A single process prints and writes, whatever its number was."""
    program = "from utils import RANK, WORLD; print(RANK, WORLD)"
    for more, expected in (({"RANK": "1"}, "0 1"), ({"RANK": "1", "WORLD_SIZE": "2"}, "1 2")):
        environment = {**os.environ, "PYTHONPATH": str(Path(utils.__file__).parent), **more}
        run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert run.stdout.strip() == expected

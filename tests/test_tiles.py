"""Images that are segmented in tiles: blending, borders, the same measures, bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, needs_proc, one_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import deeplab
from commands.predict import segment_tiles
from deeplab import Inference
from files.tiles import blend, windows


class Network:
    """Something whose scores are a function of the uint8 images (N, 3, H, W) that it sees."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def segment(self, images):
        self.seen.append(tuple(images.shape))
        return self.function(images)

    def segment_tiles(self, image, inference, finish):
        return blend(self.segment, image, inference.tile, inference.overlap, inference.batch_size, finish)


def in_tiles(model, image, inference):
    """Labels and their probabilities (H, W) of a uint8 image (3, H, W)."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return tuple(map(torch.from_numpy, segment_tiles(model, picture, inference, True)))


def constant(images):
    return torch.tensor([0.2, 0.51, 0.29])[:, None, None].expand(len(images), 3, *images.shape[2:]).clone()


def position(images):
    """The score of class 1 grows with the position in the window, from 0 to 1."""
    n, _, height, width = images.shape
    share = (torch.arange(height)[:, None] / height + torch.arange(width) / width) / 2
    return torch.stack([1 - share, share]).expand(n, 2, height, width).clone()


def pixels(images):
    """Scores that depend on a pixel alone: red of all colours."""
    scores = images.float()
    return scores / scores.sum(1, keepdim=True)


SIZES = [(1, 1), (65, 65), (66, 65), (64, 66), (3, 500), (500, 3), (66, 200), (201, 130), (97, 333)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_constant_network_gives_a_constant(size, overlap):
    network, image = Network(constant), torch.zeros(3, *size, dtype=torch.uint8)
    labels, best = in_tiles(network, image, Inference(tile=65, overlap=overlap))
    assert labels.shape == best.shape == size and (labels == 1).all() and (best == 130).all()
    assert all(max(shape[2:]) <= 65 for shape in network.seen)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 0.1, 0.5])
def test_every_pixel_gets_its_own_score(size, overlap):
    """A network without context gives what it gives for the whole image, pixel by pixel."""
    image = torch.randint(1, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, best = in_tiles(Network(pixels), image, Inference(tile=65, overlap=overlap, batch_size=3))
    expected, label = pixels(image[None])[0].max(0)
    tied = image.float().sort(0).values.diff(dim=0)[1] == 0  # rounding decides
    assert torch.equal(labels.long()[~tied], label[~tied])
    # Rounded to a byte; what two rows of windows share is kept in 16 bits.
    assert (best.float() - 255 * expected).abs().max() <= 0.51 + 255 / 4096


@given(st.integers(1, 400), st.integers(1, 200), st.floats(0, 0.5))
def test_windows_share_out_every_pixel(length, size, overlap):
    total, found = torch.zeros(length), windows(length, size, overlap)
    assert found[0].start == found[0].first == 0 and found[-1].stop == found[-1].last == length
    for window in found:
        assert window.stop - window.start == min(size, length)
        assert window.start <= window.first < window.last <= window.stop
        assert window.before + window.after <= window.last - window.first == len(window.weights)
        total[window.first : window.last] += window.weights
    for one, other in zip(found, found[1:], strict=False):
        assert other.first == one.last - one.after and one.after == other.before
        assert one.stop - other.start >= round(min(size, length) * overlap)
        # In the middle of what both see.
        assert abs((one.stop - one.last) - (other.first - other.start)) <= 1
    assert (total - 1).abs().max() < 1e-6
    step = min(size, length) - round(min(size, length) * overlap)
    assert len(found) == 1 or (len(found) - 2) * step < length - size  # not one more than it takes


def test_network_that_sees_position_shows_no_seam():
    """The scores jump by 1 / overlap at most where one window takes over from another."""
    size, shared = (300, 260), 24
    inference = Inference(tile=97, overlap=0.25)
    labels, best = in_tiles(Network(position), torch.zeros(3, *size, dtype=torch.uint8), inference)
    score = torch.where(labels == 1, best, 255 - best).float() / 255
    for axis in (0, 1):
        jumps = score.diff(dim=axis).abs()
        assert jumps.max() < 1 / shared + 2 / 97 + 2 / 255, axis
    # Without an overlap they jump from the end of one window to the start of the next.
    labels, best = in_tiles(
        Network(position), torch.zeros(3, *size, dtype=torch.uint8), inference._replace(overlap=0)
    )
    score = torch.where(labels == 1, best, 255 - best).float() / 255
    assert score.diff(dim=1).abs().max() > 0.2


def make_model(**options):
    torch.manual_seed(0)
    model = deeplab.build("tiny", False, 3, num_groups=32, weight_std=True, aspp_rates=[6], **options).eval()
    model.classes, model.palette = "abc", [(0, 0, 0), (9, 9, 9), (200, 9, 9)]
    return model


@pytest.mark.parametrize("flip", [False, True])
def test_tile_as_large_as_the_image_is_the_whole_pass(flip):
    model, image = make_model(), torch.randint(0, 256, (3, 70, 90), dtype=torch.uint8)
    inference = Inference(flip=flip)
    with torch.inference_mode():
        expected, label = model.segment(image[None], inference, softmax=True)[0].max(0)
    for tile in (90, 1000):
        labels, best = in_tiles(model, image, inference._replace(tile=tile))
        assert torch.equal(labels.long(), label)
        assert torch.equal(best, (255 * expected).round().byte())


def test_batches_of_windows_are_as_single_ones():
    model, image = make_model(), torch.randint(0, 256, (3, 70, 190), dtype=torch.uint8)
    one, four = (in_tiles(model, image, Inference(batch_size=n, tile=65)) for n in (1, 4))
    assert torch.equal(one[0], four[0]) or (one[0] == four[0]).float().mean() > 0.999
    assert (one[1].int() - four[1].int()).abs().max() <= 1


def test_evaluation_by_tiles(cli, trained):
    """Tiles as large as the images change no file; smaller ones write the same files."""
    checkpoint, root = trained
    flags = ["--checkpoint", checkpoint, "--dataset", "custom", "--data_root", root, "--workers", 0]
    results = {}
    for tile in (None, 200, 33):
        status, out, _ = cli(*flags, *(["--tile", tile] if tile else []))
        assert status == 0 and "Mean IoU" in out
        folder = next(Path("data/val").iterdir())
        results[tile] = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}
    assert results[None].keys() == results[200].keys() == results[33].keys()
    changed = {name for name in results[None] if results[200][name] != results[None][name]}
    assert changed <= {"metrics.json", "report.html"}  # which tell the flags
    whole, same, tiled = (json.loads(found["metrics.json"]) for found in results.values())
    assert whole["confusion"] == same["confusion"] != tiled["confusion"]
    assert np.sum(whole["confusion"]) == np.sum(tiled["confusion"])
    assert abs(whole["pixel_accuracy"] - tiled["pixel_accuracy"]) < 0.3


def test_prediction_by_tiles(cli, trained, tmp_path):
    """At full size, with the same files, whatever the order of sizes; without --tile the line names it."""
    checkpoint, root = trained
    (tmp_path / "in").mkdir()
    scene = np.tile(np.array(Image.open(root / "images/train0.jpg")), (3, 2, 1))  # 160 x 180
    Image.fromarray(scene).save(tmp_path / "in/large.png")
    Image.fromarray(scene[:40, :30]).save(tmp_path / "in/small.png")
    flags = ["--predict", "in", "--checkpoint", checkpoint, "--confidence", "--max_side", 100]
    status, out, _ = cli(*flags, "--out", "shrunk")
    assert status == 0 and "1 images are longer than --max_side 100" in out and "--tile" in out
    status, out, _ = cli(*flags, "--out", "tiled", "--tile", 65, "--eval_batch_size", 3)
    assert status == 0 and "--max_side" not in out
    model = deeplab.load(checkpoint).fuse()
    image = torch.from_numpy(scene).permute(2, 0, 1)
    expected, best = in_tiles(model, image, Inference(tile=65, batch_size=3))
    found = np.array(Image.open(tmp_path / "tiled/large_mask.png"))
    assert np.array_equal(found, expected.numpy())
    assert np.array_equal(np.array(Image.open(tmp_path / "tiled/large_confidence.png")), best.numpy())
    shrunk, tiled = (
        np.array(Image.open(tmp_path / f"{name}/small_mask.png")) for name in ("shrunk", "tiled")
    )
    assert np.array_equal(shrunk, tiled)
    assert Image.open(tmp_path / "tiled/large_overlay.jpg").width == 160


def test_tiles_from_python(trained):
    """Labels as of the command; probabilities of all classes; tiles as large as the image are the whole pass,
    which shrinks nothing."""
    model, scene = deeplab.load(trained[0]), Image.open(trained[1] / "images/train0.jpg").resize((150, 170))
    assert model.train() is model  # its mode comes back
    labels = model.predict(scene, tile=65, overlap=0.5)
    assert model.training and labels.dtype == np.uint8 and labels.shape == (170, 150)
    expected, best = segment_tiles(model.eval(), scene, Inference(tile=65, overlap=0.5), True)
    assert np.array_equal(labels, expected)
    scores = model.predict(scene, probabilities=True, tile=65, overlap=0.5)
    assert scores.shape == (3, 170, 150) and scores.dtype == np.float32
    assert np.abs(scores.sum(0) - 1).max() < 1e-3 and np.array_equal(scores.argmax(0), labels)
    assert np.array_equal(np.rint(255 * scores.max(0)), best)
    whole = model.predict(scene)
    assert not np.array_equal(whole, labels)
    for one in model.predict([scene, np.asarray(scene)], tile=170, max_side=100):
        assert np.array_equal(one, whole)
    for wrong in ({"tile": 0}, {"tile": 65, "overlap": 0.6}, {"tile": 65, "overlap": -1}):
        with pytest.raises(ValueError, match="tile"):
            model.predict(scene, **wrong)


def test_wrong_flags(cli):
    for flags in (["--overlap", 0.6], ["--overlap", -0.1], ["--tile", 0]):
        status, _, err = cli("--predict", "a.png", "--checkpoint", "x.pth", *flags)
        assert status == 2 and one_line(err) and flags[0] in err


# Draws an image of 150 megapixels, or predicts it by scores of 21 classes that take no network, and prints
# the peak of the memory in MiB.
LARGE = """
import sys
import numpy as np
from PIL import Image

sys.path.insert(0, {tests!r})
import tiny
import torch
from deeplab import DeepLabv3


def segment(self, images, inference, softmax):
    scores = torch.zeros(len(images), 21, *images.shape[2:])
    scores[:, :3] = images
    return scores.softmax(1)


DeepLabv3.segment = segment
if sys.argv[1] == "draw":
    rows = np.random.default_rng(0).integers(0, 256, (100, 12500, 3), dtype=np.uint8)
    Image.fromarray(np.tile(rows, (120, 1, 1))).save("large.png", compress_level=1)
else:
    try:
        tiny.run(sys.argv[1:])
    finally:
        # Not ru_maxrss: that begins with what the process had that started this one.
        print("peak", int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024)
"""


@pytest.mark.slow
@needs_proc
def test_memory_of_a_large_image(trained, tmp_path):
    """Of 150 megapixels the image, as Pillow has it, and the labels are 715 MiB, and what two rows of windows
    share 130; torch and a network are 850, the scores of a window 85, of which there are two at a time."""
    (tmp_path / "large.py").write_text(LARGE.format(tests=str(TINY.parent)))
    command = [sys.executable, "large.py"]
    subprocess.run([*command, "draw"], cwd=tmp_path, check=True)
    flags = ["--predict", "large.png", "--checkpoint", trained[0], "--out", "out", "--tile", 1025]
    flags += ["--eval_batch_size", 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run(
        [*command, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split("peak ")[1])
    with Image.open(tmp_path / "out/large_mask.png") as mask:
        assert mask.size == (12500, 12000)
    with Image.open(tmp_path / "out/large_overlay.jpg") as overlay:
        assert overlay.width == 6250
    assert peak < 2400, peak  # another copy of the image would be 430 or 570 more, all scores 12,000

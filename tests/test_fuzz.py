"""Whatever comes in: no exception but the project's own, and no wrong count."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from commands.evaluate import confusion_matrices, metrics
from commands.flags import parse_args
from datasets import SegmentationDataset, TrainBatches, random_crop
from files.lists import read_list, unique_names
from files.masks import IGNORE, Labels, read_classes
from files.pictures import voc_palette
from utils import UserError

settings.register_profile("tests", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("tests")

SAMPLES = ["a", "a b c", "road 1 2 3", "/a /a", "a a", "a 1 2 256", "ignore = 0", "b = 255", "c 1 2 3 = 7 8"]
names = st.text(st.characters(codec="utf-8"), max_size=12)
lines = st.lists(st.one_of(names, st.sampled_from(SAMPLES)))
contents = st.one_of(st.binary(max_size=60), lines.map(lambda rows: "\n".join(rows).encode()))


@given(content=contents)
def test_classes_file(tmp_path_factory, content):
    path = Path(tmp_path_factory.getbasetemp()) / "classes.txt"
    path.write_bytes(content)
    try:
        labels = read_classes(str(path))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        count = len(labels.classes)
        assert 2 <= count == len(set(labels.classes)) == len(labels.palette) <= 255
        assert IGNORE not in labels.classes
        assert all(len(color) == 3 and min(color) >= 0 and max(color) <= 255 for color in labels.palette)
        assert set(labels.values.values()) - {255} == set(range(count))
        assert set(labels.colors.values()) - {255} <= set(range(count))


@given(content=contents)
def test_list_file(tmp_path_factory, content):
    root = Path(tmp_path_factory.getbasetemp()) / "lists"
    (root / "list").mkdir(parents=True, exist_ok=True)
    (root / "list/val.txt").write_bytes(content)
    try:
        pairs = read_list(str(root), "val", "hint")
    except UserError as error:
        assert "val.txt" in str(error) and "\n" not in str(error)
    else:
        assert pairs and all(path.startswith(f"{root}/") for pair in pairs for path in pair)


values = st.one_of(
    st.integers(-3, 600).map(str),
    st.floats().map(str),
    st.sampled_from(["x", "auto", "", "shapes", "custom", "pascal", "resnet50", "bf16", "val", "8"]),
)
flags = st.one_of(values, st.sampled_from(sorted({f"--{key}" for key in vars(parse_args(["--exp", "x"]))})))


@given(words=st.lists(flags, max_size=8))
def test_flags(words, capsys):
    try:
        args = parse_args(["--exp", "x", *words])
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 2 and err.startswith("main.py: error: ") and err.count("\n") == 1
    else:
        assert args.batch_size > 0 and args.crop_size > 0 and args.workers >= 0


sizes = st.tuples(st.integers(1, 600), st.integers(1, 600))


@settings(max_examples=60)
@given(size=sizes, crop_size=st.integers(1, 600), seed=st.integers(0, 2**32), labels=st.integers(1, 255))
def test_crop_of_any_size(size, crop_size, seed, labels):
    rng = np.random.default_rng(seed)
    image = torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).permute(2, 0, 1)
    mask = torch.from_numpy(rng.integers(0, labels, size, dtype=np.uint8))
    crop, cut = random_crop(image, mask, crop_size, rng)
    assert (
        crop.shape[1:] == cut.shape and max(cut.shape) <= crop_size and crop.dtype == cut.dtype == torch.uint8
    )
    assert set(cut.unique().tolist()) <= set(mask.unique().tolist())
    for size in (crop_size, None):
        dataset = SegmentationDataset([], Labels("a", voc_palette(1)), size)
        height, width = dataset.padded_size(*cut.shape)
        assert height >= cut.shape[0] and width >= cut.shape[1]
        assert size or (height % 16 == width % 16 == 1 and height - cut.shape[0] < 16 > width - cut.shape[1])
        images, masks, (shape,) = dataset.collate([(crop, cut)])
        h, w = shape.tolist()
        assert torch.equal(images[0, :, :h, :w], crop) and torch.equal(masks[0, :h, :w], cut)
        assert images[0, :, h:].sum() == images[0, :, :, w:].sum() == 0
        assert (masks[0, h:] == 255).all() and (masks[0, :, w:] == 255).all()


@given(
    length=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    epochs=st.integers(1, 3),
    min_last=st.integers(1, 4),
    world=st.integers(1, 4),
    start=st.integers(0, 50),
)
def test_batches_of_any_size(length, batch_size, epochs, min_last, world, start):
    """Each epoch has each sample once, but for too small a last batch; processes share every batch."""
    whole = list(TrainBatches(length, batch_size, epochs, 0, min_last))
    dropped = length % batch_size if length % batch_size < min_last else 0
    for epoch in range(epochs):
        seen = [index for batch in whole for e, index in batch if e == epoch]
        assert len(seen) == len(set(seen)) == length - dropped and set(seen) <= set(range(length))
    ranks = [
        list(TrainBatches(length, batch_size, epochs, 0, min_last, rank, world)) for rank in range(world)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(sum(parts, []))
    resumed = TrainBatches(length, batch_size, epochs, 0, min_last)
    resumed.start = min(start, len(whole))
    assert list(resumed) == whole[start:]


@st.composite
def labels(draw):
    classes = draw(st.integers(1, 255))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12)))
    truth = draw(arrays(np.uint8, shape, elements=st.one_of(st.integers(0, classes - 1), st.just(255))))
    return classes, truth, draw(arrays(np.uint8, shape, elements=st.integers(0, classes - 1)))


def mean(values):
    values = [value for value in values if value is not None]
    return pytest.approx(float(sum(values) / len(values)) if values else None)


@given(labels())
def test_counts_and_measures_against_a_slow_exact_reference(drawn):
    classes, truth, prediction = drawn
    counts = confusion_matrices(torch.from_numpy(prediction), torch.from_numpy(truth), classes)
    assert counts.dtype == torch.int64 and counts.shape == (len(truth), classes, classes)
    for confusion, *image in zip(counts, truth, prediction, strict=True):
        pairs = [(t, p) for t, p in zip(*(labels.flat for labels in image), strict=True) if t != 255]
        assert confusion.sum() == len(pairs)
        assert all(confusion[t, p] == pairs.count((t, p)) for t, p in set(pairs))
        iou, accuracy = [], []
        for label in range(classes):
            hits = pairs.count((label, label))
            union = sum(label in pair for pair in pairs)
            total = sum(label == t for t, _ in pairs)
            iou.append(Fraction(hits, union) if union else None)
            accuracy.append(Fraction(hits, total) if total else None)
        result = metrics(confusion)
        assert result["iou"] == pytest.approx([None if value is None else float(value) for value in iou])
        assert result["mean_iou"] == mean(iou) and result["mean_accuracy"] == mean(accuracy)
        assert result["pixel_accuracy"] == mean(Fraction(int(t == p)) for t, p in pairs)


folders = st.lists(st.sampled_from(["a", "A", "b", "samples", "..", "."]), max_size=3)
files = st.sampled_from(["a.jpg", "A.png", "a.jpg.jpg", "a-1.jpg", "a.jpg-1.png", "samples.png", ".jpg"])
paths = st.lists(st.tuples(folders, files).map(lambda path: "/".join([*path[0], path[1]])), max_size=12)


@given(paths=paths)
def test_names_of_results(paths):
    """One for each file, whatever the case, beside those that are taken, in no other folder."""
    found = unique_names(paths, taken=("samples",))
    assert len({name.lower() for name in found} - {"", "samples"}) == len(found) == len(paths)
    assert not any(name.startswith("/") or ".." in name.split("/") for name in found)

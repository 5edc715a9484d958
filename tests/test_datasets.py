"""Reading samples, the augmentation's distribution, batches, the embedded data set, and what is wrong with
lists."""

import colorsys
import os
import shutil
import zlib

import numpy as np
import PIL
import pytest
import torch
from conftest import damage, make_list_dataset, memory, move_to_the_end, needs_proc, one_line
from PIL import Image, PngImagePlugin
from torchvision.transforms.v2 import functional

from commands.check import drop_bad
from datasets import (
    Cityscapes,
    ListSegmentation,
    SegmentationDataset,
    Shapes,
    TrainBatches,
    VOCSegmentation,
    jitter_colors,
    load_batches,
    random_crop,
)
from files import shapes
from files.images import open_image
from files.masks import VOC_CLASSES, Labels
from files.pictures import voc_palette
from utils import UserError


@pytest.fixture
def folder(tmp_path):
    return make_list_dataset(tmp_path / "set")


def test_sample(folder):
    image, mask = ListSegmentation(str(folder), "val")[1]
    assert image.dtype == mask.dtype == torch.uint8
    assert image.shape == (3, 60, 80) and mask.shape == (60, 80)
    assert set(mask.unique().tolist()) == {0, 2}
    assert image[:, mask == 2].float().mean() < 20 < 120 < image[:, mask == 0].float().mean()


def test_training_sample_follows_from_seed_epoch_and_index(folder):
    def draw(seed, key):
        return ListSegmentation(str(folder), "train", 33, seed)[key]

    for other, same in (((0, (0, 0)), True), ((1, (0, 0)), False), ((0, (1, 0)), False)):
        first, second = draw(0, (0, 0)), draw(*other)
        assert (first[0].shape == second[0].shape and torch.equal(first[0], second[0])) is same


def test_random_crop_is_uniform_in_log_scale_position_and_flip():
    """Measured on an image whose colours are its coordinates, against the distributions of the paper's
    recipe."""
    height, width, crop = 120, 200, 65
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).byte()
    mask = torch.ones(height, width, dtype=torch.uint8)
    scales, flips, places = [], [], []
    for i in range(2000):
        out, labels = random_crop(image, mask, crop, np.random.default_rng(i))
        assert out.shape[1:] == labels.shape and max(labels.shape) <= crop and labels.min() == 1
        x = out[1, 0].float()
        step = ((x[-5] - x[4]) / (len(x) - 9)).item()  # source columns per output column, negative if flipped
        scales.append(1 / abs(step))
        flips.append(step < 0)
        window = round(crop / scales[-1])
        if window < height - 40:
            places.append((x.min().item() / (width - window), out[0].min().item() / (height - window)))
    log_scales = np.log2(scales)
    for values, low, high in ((log_scales, -1, 1), *((np.array(p), 0, 1) for p in zip(*places, strict=True))):
        uniform = np.linspace(low, high, len(values))  # Kolmogorov-Smirnov against the uniform distribution
        assert np.abs(np.sort(values) - uniform).max() < 0.06 * (high - low)
    assert 0.46 < np.mean(flips) < 0.54


def test_random_crop_keeps_image_and_mask_together():
    """Where the image is white the mask is 1: the two are cut, scaled and flipped alike."""
    mask = torch.zeros(90, 120, dtype=torch.uint8)
    mask[20:60, 30:100] = 1
    image = (mask * 255).expand(3, -1, -1)
    agree = total = 0
    for i in range(100):
        out, labels = random_crop(image, mask, 65, np.random.default_rng(i))
        agree += ((out[0] > 127) == labels.bool()).sum().item()
        total += labels.numel()
    assert agree / total > 0.99


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise with the spectrum of photos, amplitudes as 1/f; uint8 (height, width, 3)."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / frequency
    values = np.fft.ifft2(spectrum).real
    return (values / values.std() * 50 + 128).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def test_crops_are_as_sharp_as_the_published_ones():
    """The published training resizes whole photos by Lanczos, and crops then. Sharpness is the mean
    |Laplacian|: on this noise bicubic reaches 0.89 of it, bilinear 0.69."""

    def sharpness(image: np.ndarray) -> float:
        x = image.astype(float)
        center = x[1:-1, 1:-1]
        return np.abs(4 * center - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]).mean()

    crops, whole, rng = [], [], np.random.default_rng(0)
    for seed in range(60):
        image = photo(rng, 150, 200)
        mask = torch.zeros(150, 200, dtype=torch.uint8)
        crop, _ = random_crop(torch.from_numpy(image).permute(2, 0, 1), mask, 97, np.random.default_rng(seed))
        crops.append(sharpness(crop.permute(1, 2, 0).numpy()))
        scale = 2 ** np.random.default_rng(seed).uniform(-1, 1)
        size = round(200 * scale), round(150 * scale)
        whole.append(sharpness(np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))))
    assert 0.85 < np.mean(crops) / np.mean(whole) < 1.02


def test_crop_from_a_larger_image_is_whole():
    """Not a pixel short by rounding, which would be padded and ignored."""
    mask = torch.zeros(375, 500, dtype=torch.uint8)
    image = mask.expand(3, -1, -1)
    for seed in range(500):
        scale = 2 ** np.random.default_rng(seed).uniform(-1, 1)
        _, labels = random_crop(image, mask, 321, np.random.default_rng(seed))
        assert list(labels.shape) == [min(321, round(side * scale)) for side in (375, 500)]


def test_training_reads_images_as_prediction_does(folder):
    """16 bits, transparency, EXIF orientation: a mask goes by the upright image."""
    mask = np.zeros((60, 80), np.uint8)
    mask[:20] = 2
    tags = Image.Exif()
    for turned, orientation, stored in (("ROTATE_90", 6, (60, 80)), ("ROTATE_180", 3, (80, 60))):
        upright = Image.fromarray(np.where(mask[..., None] == 2, 5, 128).astype(np.uint8).repeat(3, 2))
        tags[0x0112] = orientation
        picture = upright.transpose(Image.Transpose[turned])
        assert picture.size == stored
        for ending in ("jpg", "png"):
            picture.save(folder / f"images/val0.{ending}", exif=tags, quality=95)
            Image.fromarray(mask).save(folder / "masks/val0.png")
            (folder / "list/val.txt").write_text(f"images/val0.{ending} masks/val0.png\n")
            dataset = ListSegmentation(str(folder), "val")
            assert drop_bad(dataset) == [] and dataset.sizes.tolist() == [[60, 80]]
            image, labels = dataset[0]
            assert labels.shape == (60, 80)
            assert image[:, labels == 2].float().mean() < 20 < 110 < image[:, labels == 0].float().mean()
        # The mask may be a turned one, too.
        Image.fromarray(mask).transpose(Image.Transpose[turned]).save(folder / "masks/val0.png", exif=tags)
        assert drop_bad(dataset) == [] and torch.equal(dataset[0][1], torch.from_numpy(mask))
    Image.fromarray(np.full((60, 80), 128 * 257, np.uint16)).save(folder / "images/val0.png")
    assert (ListSegmentation(str(folder), "val")[0][0] == 128).all()
    Image.new("RGBA", (80, 60), (0, 0, 0, 0)).save(folder / "images/val0.png")
    assert (ListSegmentation(str(folder), "val")[0][0] == 255).all()


def exif_of(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags.update({0x0112: orientation, 0x010F: "a maker", 0x011A: 72.5})
    return tags


def png_text(keyword: str, text: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(keyword, text) if keyword.startswith("XML") else info.add_text(keyword, text, zip=True)
    return info


def profile(orientation: int) -> str:
    data = exif_of(orientation).tobytes()
    return f"\nexif\n{len(data):8}\n{data.hex()}\n"


ORIENTATIONS = {
    **{ending: lambda n: {"exif": exif_of(n)} for ending in ("jpg", "png", "webp", "tif")},
    "ImageMagick.png": lambda n: {"pnginfo": png_text("Raw profile type exif", profile(n))},
    "Adobe.png": lambda n: {"pnginfo": png_text("XML:com.adobe.xmp", f'<tiff:Orientation="{n}"/>')},
}


def one_image(path) -> SegmentationDataset:
    return SegmentationDataset([(str(path), None)], Labels(["a"], [(0, 0, 0)]))


@pytest.mark.parametrize("kind", ORIENTATIONS)
def test_headers_tell_the_size_of_the_upright_image(tmp_path, kind):
    path = tmp_path / f"a.{kind.rpartition('.')[2]}"
    for orientation in range(1, 9):
        Image.new("RGB", (30, 20)).save(path, **ORIENTATIONS[kind](orientation))
        dataset = one_image(path)
        assert drop_bad(dataset) == []
        size = [30, 20] if orientation > 4 else [20, 30]
        assert dataset.sizes.tolist() == [size] == [list(dataset[0][1].shape)], orientation


PNG_CHUNKS = {"png": b"eXIf", "ImageMagick.png": b"zTXt", "Adobe.png": b"iTXt"}


@pytest.mark.parametrize("kind", PNG_CHUNKS)
def test_orientation_behind_the_pixels_of_a_png_is_known_by_reading_it(tmp_path, kind):
    path = tmp_path / "a.png"
    for orientation in range(1, 9):
        Image.new("RGB", (30, 20)).save(path, **ORIENTATIONS[kind](orientation))
        move_to_the_end(path, PNG_CHUNKS[kind])
        dataset = one_image(path)
        assert drop_bad(dataset, decode=True) == []
        size = [30, 20] if orientation > 4 else [20, 30]
        assert dataset.sizes.tolist() == [size] == [list(dataset[0][1].shape)], orientation
    assert drop_bad(dataset) == [] and dataset.sizes.tolist() == [[20, 30]]
    with pytest.raises(UserError, match=f"{path} .*EXIF.*--skip_bad"):
        dataset[0]


@pytest.mark.parametrize("kind", PNG_CHUNKS)
def test_cut_file_with_an_orientation_is_named(tmp_path, kind):
    """Headers alone do not tell that it is cut; reading it does."""
    path, rng = tmp_path / "a.png", np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8))
    noise.save(path, **ORIENTATIONS[kind](6))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset = one_image(path)
    assert drop_bad(dataset) == [] and dataset.sizes.tolist() == [[300, 200]]
    (fault,) = drop_bad(dataset, decode=True)
    assert fault.startswith(f"cannot read {path}: ") and len(dataset) == 0


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged tags
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_damaged_exif_does_not_spoil_the_image(tmp_path, kind):
    path, rng = tmp_path / f"a.{kind}", np.random.default_rng(0)
    mask = tmp_path / ("a.png" if kind == "jpg" else path.name)
    dataset = SegmentationDataset([(str(path), str(mask))], Labels(["a"], [(0, 0, 0)], colors={(0, 0, 0): 0}))
    for count in range(500):
        data = np.frombuffer(b"Exif\0\0" + exif_of(6).tobytes().removeprefix(b"Exif\0\0"), np.uint8).copy()
        places = rng.integers(len(data), size=1 + count % 6)
        data[places] = rng.integers(256, size=len(places))
        for name in {path, mask}:
            Image.new("RGB", (30, 20)).save(name, exif=data.tobytes())
        dataset.sizes = np.zeros((0, 2))
        assert drop_bad(dataset) == [] and sorted(dataset[0][1].shape) == [20, 30]


def test_image_that_has_changed_its_size(folder):
    dataset = ListSegmentation(str(folder), "val")
    drop_bad(dataset)
    for name in ("images/val1.jpg", "masks/val1.png"):
        Image.new("L", (300, 200)).save(folder / name)
    with pytest.raises(UserError, match=r"val1.jpg has another size than its header told .it has changed"):
        dataset[1]


def test_only_cuda_copies_without_waiting(folder, monkeypatch):
    """On MPS such a copy can read memory that is freed."""
    to, asked = torch.Tensor.to, []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *args, **kwargs: asked.append(kwargs) or to(self, *args, **kwargs)
    )
    dataset = ListSegmentation(str(folder), "val")
    for _ in load_batches(dataset, [[0]], 0, torch.device("meta")):
        assert asked == 3 * [{"non_blocking": False}]


def test_random_crop_of_tiny_images():
    for height, width in ((1, 1), (1, 50), (3, 2)):
        for i in range(20):
            image = torch.zeros(3, height, width, dtype=torch.uint8)
            out, labels = random_crop(image, image[0], 33, np.random.default_rng(i))
            assert out.shape[1:] == labels.shape and min(labels.shape) >= 1 and max(labels.shape) <= 33


def test_collate_pads_on_the_right_and_below(folder):
    dataset = ListSegmentation(str(folder), "val")
    samples = [dataset[0], (dataset[1][0][:, :50, :70], dataset[1][1][:50, :70])]
    images, masks, sizes = dataset.collate(samples)
    assert images.shape == (2, 3, 65, 81) and masks.shape == (2, 65, 81)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert sizes.tolist() == [[60, 80], [50, 70]]
    for (image, mask), padded, labels in zip(samples, images, masks, strict=True):
        h, w = mask.shape
        assert torch.equal(padded[:, :h, :w], image) and torch.equal(labels[:h, :w], mask)
        assert (labels[h:] == 255).all() and (labels[:, w:] == 255).all()


def test_eval_batches_hold_everything_once_and_one_size_each(folder):
    for i, size in enumerate([(10, 10), (40, 20), (10, 12), (40, 30)]):
        Image.new("RGB", size).save(folder / f"images/val{i}.jpg")
        Image.new("L", size).save(folder / f"masks/val{i}.png")
    (folder / "list/val.txt").write_text("".join(f"images/val{i}.jpg masks/val{i}.png\n" for i in range(4)))
    dataset = ListSegmentation(str(folder), "val")
    assert drop_bad(dataset) == [] and dataset.sizes.tolist() == [[10, 10], [20, 40], [12, 10], [30, 40]]
    assert dataset.eval_batches(4) == [[0, 2], [1, 3]]
    assert dataset.eval_batches(1) == [[0], [2], [1], [3]]


def test_train_batches():
    batches = TrainBatches(7, 3, epochs=2, seed=0)
    keys = list(batches)
    assert batches.per_epoch == 3 and batches.max_iter == len(batches) == len(keys) == 6
    for epoch in (0, 1):
        flat = [key for batch in keys[3 * epoch : 3 * epoch + 3] for key in batch]
        assert sorted(flat) == [(epoch, i) for i in range(7)]
    assert [i for _, i in sum(keys[:3], [])] != [i for _, i in sum(keys[3:], [])]
    assert keys != list(TrainBatches(7, 3, epochs=2, seed=1))
    for start in range(7):  # resuming anywhere gives the rest
        assert list(TrainBatches(7, 3, epochs=2, seed=0, start=start)) == keys[start:]
    assert [len(batch) for batch in TrainBatches(7, 3, 1, 0, min_last=2)] == [3, 3]  # no batch of one image
    assert [len(batch) for batch in TrainBatches(8, 3, 1, 0, min_last=2)] == [3, 3, 2]


def test_shapes_are_the_same_on_every_machine(tmp_path, monkeypatch):
    """The pixels as they are drawn; what JPEG makes of them is near, and depends on the codec. Pillow before
    11.2 draws 90 pixels at edges of shapes in another way."""
    draw_scene, drawn = shapes.draw_scene, []

    def noting(rng):
        drawn.append(draw_scene(rng))
        return drawn[-1]

    monkeypatch.setattr(shapes, "draw_scene", noting)
    root = tmp_path / "data" / "shapes"
    sets = [Shapes(str(root), split) for split in ("train", "val")]
    assert [len(dataset) for dataset in sets] == [240, 60] and len(drawn) == 300  # drawn once
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]
    checksums, counts, difference = [0, 0], 0, []
    for (image, _), (stored, labels) in zip(drawn, (sample for part in sets for sample in part), strict=True):
        for i, pixels in enumerate((np.asarray(image), labels.numpy())):
            checksums[i] = zlib.crc32(np.ascontiguousarray(pixels), checksums[i])
        counts = counts + np.bincount(labels.flatten(), minlength=5)
        difference.append(np.abs(np.asarray(image).astype(int) - stored.permute(1, 2, 0).numpy()).mean())
    assert max(difference) < 8
    assert counts.tolist() == pytest.approx([4570512, 559770, 374647, 223100, 415971], rel=0, abs=90)
    if tuple(map(int, PIL.__version__.split(".")[:2])) >= (11, 2):
        assert checksums == [1164826489, 1231417462]
    assert sets[1].classes == ["background", "circle", "square", "triangle", "cross"]
    assert Image.open(sets[1].pairs[0][0]).format == "JPEG"


def test_of_two_that_draw_shapes_the_first_wins(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "draw_scene", lambda rng: (Image.new("RGB", (4, 3)), Image.new("L", (4, 3))))
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/first").touch()
    shapes.draw_shapes(f"{tmp_path}/shapes/")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["first", "shapes"]
    monkeypatch.setattr(os, "rename", lambda *paths: os.listdir(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):  # another reason: nothing is at the place
        shapes.draw_shapes(f"{tmp_path}/other")
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


def write_png(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(path)


def test_voc_layout(folder, tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    shutil.copytree(folder, voc)
    (voc / "list/train.txt").rename(voc / "list/train_aug.txt")
    for split, count in (("train", 6), ("val", 3)):
        dataset = VOCSegmentation(str(tmp_path / "VOCdevkit"), split)
        assert len(dataset) == count and dataset.classes == VOC_CLASSES and len(dataset.palette) == 21
    assert dataset.palette[15] == [192, 128, 128]  # person, as in the devkit
    assert dataset.padded_size(375, 500) == (513, 513)
    with pytest.raises(UserError, match="train_aug.txt.*--download pascal"):
        VOCSegmentation(str(tmp_path / "elsewhere"))


def test_cityscapes_layout(tmp_path):
    ids = np.array([[0, 7, 11], [33, 29, 24]], np.uint8)
    train_ids = [[255, 0, 2], [18, 255, 11]]
    for city in ("aachen", "bochum"):
        stem = f"{city}/{city}_000000_000019"
        write_png(tmp_path / f"leftImg8bit/val/{stem}_leftImg8bit.png", np.zeros((2, 3, 3), np.uint8))
        write_png(tmp_path / f"gtFine/val/{stem}_gtFine_labelIds.png", ids)
    dataset = Cityscapes(str(tmp_path), "val")
    assert [dataset[i][1].tolist() for i in range(2)] == [train_ids] * 2
    prepared = np.array([[255, 1, 2], [3, 4, 5]], np.uint8)  # the preparation script's file comes first
    write_png(tmp_path / f"gtFine/val/{stem}_gtFine_labelTrainIds.png", prepared)
    dataset = Cityscapes(str(tmp_path), "val")
    assert [dataset[i][1].tolist() for i in range(2)] == [train_ids, prepared.tolist()]
    assert len(dataset.classes) == len(dataset.palette) == 19
    assert (dataset.classes[0], dataset.palette[0]) == ("road", (128, 64, 128))
    assert (dataset.classes[18], dataset.palette[18]) == ("bicycle", (119, 11, 32))
    assert dataset.padded_size(1024, 2048) == (1025, 2049)
    (tmp_path / f"gtFine/val/{stem}_gtFine_labelTrainIds.png").unlink()
    (tmp_path / f"gtFine/val/{stem}_gtFine_labelIds.png").unlink()
    with pytest.raises(UserError, match="bochum.*labelIds.png is missing"):
        Cityscapes(str(tmp_path), "val")
    with pytest.raises(UserError, match="leftImg8bit_trainvaltest.zip"):
        Cityscapes(str(tmp_path), "train")


def test_lists(folder):
    path = folder / "list/val.txt"
    for text, message in (
        ("/images/val0.jpg\n", r"val.txt:1: expected `/image /mask` \(a tab between them"),
        ("/images/my photo.jpg /masks/val0.png\n", r"val.txt:1: expected"),
        ("\n", "val.txt is empty"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            ListSegmentation(str(folder), "val")
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"cannot read .*val.txt \(not UTF-8\)"):
        ListSegmentation(str(folder), "val")
    path.write_text("\ufeff/images/val0.jpg /masks/val0.png\r\n\r\nimages/val1.jpg masks/val1.png")
    assert len(ListSegmentation(str(folder), "val")) == 2
    (folder / "images/my photo.jpg").write_bytes((folder / "images/val0.jpg").read_bytes())
    path.write_text("/images/my photo.jpg\t/masks/val0.png\nimages/val1.jpg masks/val1.png\t\n")
    assert len(ListSegmentation(str(folder), "val")) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "images/val0.jpg").write_bytes(b""), r"cannot read .*val0.jpg"),
        (lambda f: (f / "masks/val0.png").write_bytes(b"not a picture"), r"cannot read .*val0.png"),
        (
            lambda f: (f / "images/val0.jpg").write_bytes((f / "images/val0.jpg").read_bytes()[:300]),
            "val0.jpg",
        ),
        (
            lambda f: Image.new("L", (80, 61)).save(f / "masks/val0.png"),
            r"val0.png is 80x61, but its image .* 80x60",
        ),
        (lambda f: Image.new("RGB", (80, 60)).save(f / "masks/val0.png"), "give each a colour of its own"),
        (lambda f: (f / "images/val0.jpg").unlink(), "val0.jpg: No such file"),
        (lambda f: Image.new("L", (80, 60), 3).save(f / "masks/val0.png"), "value 3 at x 0, y 0, 4800"),
    ],
)
def test_samples_that_cannot_be_used(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        ListSegmentation(str(folder), "val")[0]
    assert "\n" not in str(error.value)


def test_ignored_label_is_accepted(folder):
    Image.new("L", (80, 60), 255).save(folder / "masks/val0.png")
    assert (ListSegmentation(str(folder), "val")[0][1] == 255).all()


@pytest.mark.parametrize("kind", ["empty", "text", "bomb", "other size"])
def test_bad_images_end_the_run_before_it_starts(cli, smallest, tmp_path, kind):
    for name in ("train1.jpg", "train4.jpg"):
        damage(kind, tmp_path / "set/images" / name)
    status, _, err = cli("--train", "--exp", "x", *smallest)
    assert status == 1 and one_line(err) and not (tmp_path / "data").exists()
    assert "train1.jpg" in err and "2 of the train samples" in err and "--skip_bad" in err


def test_image_cut_short_is_named(cli, smallest, tmp_path):
    """What no header tells ends the run when a worker reads it, or is found at the start with --skip_bad."""
    damage("cut", tmp_path / "set/images/train1.jpg")
    flags = ["--train", "--exp", "x", "--epochs", 1, *smallest]
    status, _, err = cli(*flags, "--workers", 2)
    assert status == 1 and one_line(err) and "train1.jpg" in err
    status, out, _ = cli(*flags, "--skip_bad")
    assert status == 0 and "left out 1 of the train samples" in out and "5 images to train on" in out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UserError, match=r"a.png: Permission denied"):
        open_image(str(tmp_path / "a.png"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 8")
@needs_proc
def test_10000_images_by_any_number_of_workers(many):
    """The same batches, memory that stays, and no file left open."""
    dataset = SegmentationDataset(many, Labels("abc", voc_palette(3)), 9)
    hashes, growth = [], {}
    for workers in (0, 2, 8):
        files = len(os.listdir("/proc/self/fd"))
        batches = TrainBatches(len(dataset), 16, 1, 0)
        loader = load_batches(dataset, batches, workers, torch.device("cpu"))
        total, early = 0, None
        for i, tensors in enumerate(loader):
            for tensor in tensors:
                total = zlib.crc32(tensor.numpy().tobytes(), total)
            early = memory() if i == 100 else early
        growth[workers] = memory() - early
        hashes.append(total)
        del loader, tensors, tensor
        assert len(os.listdir("/proc/self/fd")) < files + 10  # and 625 batches have come
    assert i == 624 and len(set(hashes)) == 1
    assert all(grown < 20 for grown in growth.values()), growth


class Draws:
    """A random generator that draws these: brightness, contrast, saturation, turn of the hue."""

    def __init__(self, *factors):
        self.factors = factors

    def uniform(self, low, high, size=None):
        return np.array(self.factors[:3]) if size else self.factors[3]


@pytest.mark.parametrize(
    ("factors", "largest", "mean"),
    [
        ((1, 1, 1, 0), 0, 0),
        ((1.2, 1, 1, 0), 1, 0.7),
        ((1, 0.7, 1, 0), 2, 1),  # of a mean that a 64th of the pixels tells
        ((1, 1, 0.5, 0), 1, 0.7),
        ((0.8, 1.2, 1.3, 0), 3, 1.5),  # torchvision rounds three times
    ],
)
def test_colors_are_jittered_as_by_torchvision(factors, largest, mean):
    coarse = np.random.default_rng(0).integers(90, 150, (6, 7, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(coarse).resize((97, 83), Image.Resampling.BICUBIC))
    image = torch.from_numpy(image).permute(2, 0, 1)
    expected, (brightness, contrast, saturation, _) = image, factors
    expected = functional.adjust_brightness(expected, brightness)
    expected = functional.adjust_contrast(expected, contrast)
    expected = functional.adjust_saturation(expected, saturation)
    difference = (jitter_colors(image, 0.5, Draws(*factors)).int() - expected.int()).abs()
    assert difference.max() <= largest and difference.float().mean() <= mean


@pytest.mark.parametrize(
    "color", [(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (150, 140, 80)]
)
@pytest.mark.parametrize("turn", [-0.9, -0.3, 0.3, 0.9])
def test_hue_is_turned_as_in_hsv(color, turn):
    """To a hundredth of the circle; as in HSV, grey stays grey."""
    image = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    hues = []
    for turned in (functional.adjust_hue(image, turn / 10), jitter_colors(image, 0.5, Draws(1, 1, 1, turn))):
        hues.append(colorsys.rgb_to_hsv(*turned[:, 0, 0].tolist())[0])
    assert abs((hues[1] - hues[0] + 0.5) % 1 - 0.5) < 0.01
    grey = torch.full((3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(jitter_colors(grey, 0.5, Draws(1, 1, 1, turn)), grey)


def test_color_jitter_changes_colors_alone(tmp_path):
    """Drawn after the crop, within the factors, another one for each epoch; grey stays grey but for its
    contrast and brightness."""
    root = make_list_dataset(tmp_path / "set")
    plain, jittered = (ListSegmentation(root, "train", 33, seed=3) for _ in range(2))
    jittered.color_jitter = 0.4
    for epoch in range(3):
        (image, mask), (varied, same) = plain[epoch, 0], jittered[epoch, 0]
        assert torch.equal(mask, same) and image.shape == varied.shape and not torch.equal(image, varied)
        assert torch.equal(varied, jittered[epoch, 0][0])
        assert not torch.equal(varied, jittered[epoch + 1, 0][0])
    grey = torch.arange(0, 200, dtype=torch.uint8).view(1, 10, 20).expand(3, -1, -1)
    for seed in range(20):
        varied = jitter_colors(grey, 0.4, np.random.default_rng(seed)).int()
        assert (varied.amax(0) - varied.amin(0)).max() <= 1 and (varied[0].diff() >= 0).all()
    white = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    found = {jitter_colors(white, 0.3, np.random.default_rng(s))[0, 0, 0].item() for s in range(300)}
    assert 70 <= min(found) < 74 and 126 < max(found) <= 130

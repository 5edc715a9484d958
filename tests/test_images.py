"""Images of every number format and any bands, to the last pixel; which files are images; large ones."""

import json
import re
import shutil
import struct
import sys
import warnings
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NETWORK, SMALL, make_list_dataset, one_line
from PIL import Image

import deeplab
import main
from commands.check import prepare
from datasets import ListSegmentation
from files import images, lists
from files.images import Reading, open_image, read_header
from files.pixels import read_image, to_rgb
from utils import UserError

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(0)
LOW, HIGH = 100.0, 900.0


def scaled(values, low=LOW, high=HIGH):
    """What a value range makes of samples."""
    shares = (np.asarray(values, np.float64) - low) / (high - low)
    return np.rint(255 * np.clip(shares, 0, 1)).astype(np.uint8)


def draw(dtype, *shape):
    """Samples on both sides of the range and within it."""
    low = 0 if np.dtype(dtype).kind == "u" else -300
    values = RNG.uniform(low, 1500, shape)
    return values.astype(dtype)


def pixels(path, **reading):
    return np.asarray(read_image(str(path), Reading(**reading)))


DTYPES = ["uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
LAYOUTS = {
    "one strip": {},
    "strips": {"rowsperstrip": 7, "compression": "deflate"},
    "tiles": {"tile": (16, 32), "compression": "deflate"},
    "big-endian": {"byteorder": ">"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bands", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_formats_and_bands_of_tiffs(tmp_path, dtype, bands, layout):
    values = draw(dtype, 45, 70, bands)
    kind = {"photometric": "rgb" if bands in (3, 4) else "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "a.tif", values if bands > 1 else values[..., 0], **kind, **LAYOUTS[layout])
    header = read_header(str(tmp_path / "a.tif"), Reading(bands=(1, 2, 3)))
    assert (header.size, header.kind, header.bands) == ((70, 45), dtype, bands)
    expected = scaled(values)
    orders = [(1, 2, 3)] + ([(4, 1, 2)] if bands > 3 else []) + ([(3, 2, 1)] if bands > 1 else [])
    for order in orders:
        chosen = expected[..., [0 if bands == 1 else band - 1 for band in order]]
        assert np.array_equal(pixels(tmp_path / "a.tif", value_range=(LOW, HIGH), bands=order), chosen)
    if bands in (1, 3):
        assert np.array_equal(
            pixels(tmp_path / "a.tif", value_range=(LOW, HIGH)), np.broadcast_to(expected, (45, 70, 3))
        )


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("bands", [2, 4, 5, 13])
def test_bands_without_a_range(tmp_path, dtype, planar, bands):
    values = RNG.integers(0, np.iinfo(dtype).max, (45, 70, bands), dtype=dtype, endpoint=True)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar)
    high = values if dtype == "uint8" else (values >> 8).astype(np.uint8)
    for order in [(1, 2, 1), *([(4, 1, 2)] if bands > 3 else [(2, 1, 1)])]:
        assert np.array_equal(pixels(tmp_path / "a.tif", bands=order), high[..., [b - 1 for b in order]])
    with pytest.raises(UserError, match=f"a.tif has {bands} bands.*--bands"):
        read_header(str(tmp_path / "a.tif"))
    with pytest.raises(UserError, match=f"a.tif has {bands} bands; --bands 1 2 {bands + 1} asks for more"):
        read_header(str(tmp_path / "a.tif"), Reading(bands=(1, 2, bands + 1)))


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_fourth_band_of_a_tiff_is_no_transparency(tmp_path, extra):
    """Whatever the file calls it: writers call infrared so, too."""
    values = RNG.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=[extra])
    with pytest.raises(
        UserError, match="a.tif has 4 bands; say which are red, green and blue by --bands 1 2 3"
    ):
        pixels(tmp_path / "a.tif")
    assert np.array_equal(pixels(tmp_path / "a.tif", bands=(1, 2, 3)), values[..., :3])
    model = deeplab.build("tiny", False, 3, aspp_rates=[6]).eval()
    with pytest.raises(UserError, match="--bands"):
        model.predict(Image.open(tmp_path / "a.tif"))


def test_turned_tiff(tmp_path):
    """EXIF's orientation is a tag of TIFF, for tifffile's pixels and for Pillow's."""
    values = draw("float32", 20, 30)
    for bands in (1, 3):
        stored = np.repeat(values[..., None], bands, 2) if bands > 1 else values
        kind = {"photometric": "rgb" if bands > 1 else "minisblack", "metadata": None}
        tifffile.imwrite(tmp_path / "a.tif", stored, extratags=[(274, 3, 1, 6, True)], **kind)
        assert read_header(str(tmp_path / "a.tif")).size == (20, 30)
        found = pixels(tmp_path / "a.tif", value_range=(LOW, HIGH))
        assert np.array_equal(found[..., 0], np.rot90(scaled(values), -1))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "I;16", "RGB", "LA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_turn_of_a_tiff_without_compression(tmp_path, mode, orientation):
    """Pillow maps some of them into memory by the width that they have once they are turned."""
    values = RNG.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    stored = Image.fromarray(values[..., :3]).convert("L" if mode == "I;16" else mode)
    stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257) if mode == "I;16" else stored
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / "a.tif", exif=exif)
    stored.save(tmp_path / "plain.tif")
    bands = {"bands": (1, 1, 1)} if mode == "LA" else {}
    expected = Image.fromarray(pixels(tmp_path / "plain.tif", **bands))
    if orientation in images.TURNS:
        expected = expected.transpose(images.TURNS[orientation])
    assert np.array_equal(pixels(tmp_path / "a.tif", **bands), expected)
    if mode != "LA":
        assert np.array_equal(to_rgb(Image.open(tmp_path / "a.tif")), expected)
        assert open_image(str(tmp_path / "a.tif")).filename == str(tmp_path / "a.tif")


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16)}, {"compression": "deflate"}])
def test_planes_of_16_bits(tmp_path, options, byteorder):
    """Pillow takes each byte of them for a number, if they are not compressed."""
    values = RNG.integers(0, 1 << 16, (20, 30, 4), dtype=np.uint16)
    path, planes = str(tmp_path / "a.tif"), values.transpose(2, 0, 1)
    options = {**options, "byteorder": byteorder, "planarconfig": "separate"}
    tifffile.imwrite(path, planes[:3], photometric="rgb", **options)
    assert np.array_equal(pixels(path), values[..., :3] >> 8)
    assert np.array_equal(pixels(path, value_range=(LOW, HIGH)), scaled(values[..., :3]))
    if "compression" in options:
        assert np.array_equal(to_rgb(Image.open(path)), values[..., :3] >> 8)
        return
    with pytest.raises(
        UserError, match="a.tif has 3 bands of uint16, which Pillow shows only in part: give its path"
    ):
        to_rgb(Image.open(path))
    with pytest.raises(UserError, match="a.tif: Pillow reads other numbers than it has; save it as a PNG"):
        open_image(path, is_mask=True)
    tifffile.imwrite(path, planes, photometric="separated", **options)
    with pytest.raises(UserError, match="a.tif has uint16 values, photometric .*; save it as grey or RGB"):
        pixels(path)
    Image.fromarray(values[..., 0]).save(path, tiffinfo={284: 2})  # GDAL writes grey so, too
    assert np.array_equal(pixels(path)[..., 1], values[..., 0] >> 8)


@pytest.mark.parametrize("compression", [None, "deflate", "lzw"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_big_endian_numbers(tmp_path, dtype, compression):
    if compression == "lzw":
        pytest.importorskip("imagecodecs")
    values, path = draw(dtype, 20, 30), str(tmp_path / "a.tif")
    tifffile.imwrite(path, values, photometric="minisblack", compression=compression, byteorder=">")
    assert np.array_equal(pixels(path, value_range=(LOW, HIGH))[..., 0], scaled(values))
    if compression and dtype in ("int16", "int32", "float32"):
        with pytest.raises(UserError, match="give its path"):
            to_rgb(Image.open(path), Reading((LOW, HIGH)))


def write_png16(path, values):
    """A PNG of 16 bits, of every filter, as Pillow writes none in colour."""
    import struct
    import zlib

    height, width, channels = values.shape
    data = values.astype(">u2").view(np.uint8).reshape(height, -1).astype(np.int32)
    rows, before = [], np.zeros_like(data[0])
    for y, row in enumerate(data):
        left = np.concatenate([np.zeros(2 * channels, np.int32), row[: -2 * channels]])
        corner = np.concatenate([np.zeros(2 * channels, np.int32), before[: -2 * channels]])
        p = left + before - corner
        a, b, c = abs(p - left), abs(p - before), abs(p - corner)
        paeth = np.where((a <= b) & (a <= c), left, np.where(b <= c, before, corner))
        guess = [0 * row, left, before, (left + before) // 2, paeth][y % 5]
        rows.append(bytes([y % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes())
        before = row
    color = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks:
            file.write(
                struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
            )


def test_png_of_16_bits(tmp_path):
    """At full depth with a range, by the high byte without."""
    values = RNG.integers(0, 1200, (300, 33, 4), dtype=np.uint16)
    for channels in (1, 3):
        write_png16(tmp_path / "a.png", values[..., :channels])
        assert read_header(str(tmp_path / "a.png")).kind == "uint16"
        wide = np.broadcast_to(values[..., :channels], (300, 33, 3))
        assert np.array_equal(pixels(tmp_path / "a.png"), wide >> 8)
        assert np.array_equal(pixels(tmp_path / "a.png", value_range=(LOW, HIGH)), scaled(wide))
        swapped = pixels(tmp_path / "a.png", value_range=(LOW, HIGH), bands=(3, 2, 1))
        assert np.array_equal(swapped, scaled(wide)[..., ::-1])
    values[..., 3] = np.where(values[..., 3] < 600, 0, 65535)
    write_png16(tmp_path / "a.png", values)
    expected = np.where(values[..., 3:] > 0, scaled(values[..., :3]), 255)
    assert np.array_equal(pixels(tmp_path / "a.png", value_range=(LOW, HIGH)), expected)  # on white
    write_png16(tmp_path / "a.png", values[..., :2])
    with pytest.raises(UserError, match="a.png: --value_range"):
        pixels(tmp_path / "a.png", value_range=(LOW, HIGH))


def test_pil_images_of_16_bits_in_colour(tmp_path):
    """Pillow has their high bytes alone, also once they are decoded, where the file alone tells it."""
    for name, deep in (("deep.png", True), ("plain.png", False)):
        path = tmp_path / name
        values = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint16)
        write_png16(path, values << 8) if deep else Image.fromarray(values.astype(np.uint8)).save(path)
        for decoded in (False, True):
            image = Image.open(path)
            if decoded:
                image.load()
            assert np.array_equal(to_rgb(image), values)
            if deep:
                with pytest.raises(UserError, match="deep.png has 3 bands of uint16, .*: give its path"):
                    to_rgb(image, Reading((LOW, HIGH)))
            else:
                assert np.array_equal(to_rgb(image, Reading((LOW, HIGH))), values)
    path.unlink()
    assert np.array_equal(to_rgb(image, Reading((LOW, HIGH))), values)


def test_8_bits_have_no_use_for_a_range(tmp_path):
    values = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for name in ("a.png", "a.tif", "a.bmp"):
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name, value_range=(0, 1)), values)


def test_tiff_whose_0_is_white(tmp_path):
    """Pillow turns 8 bits around, and more bits not: one of the two would be a negative."""
    path, pixels = str(tmp_path / "x.tif"), np.array([[0, 255], [7, 99]], np.uint8)
    tifffile.imwrite(path, pixels, photometric="miniswhite")
    assert np.array_equal(np.array(read_image(path))[..., 0], 255 - pixels)
    for dtype in (np.uint16, np.int16, np.uint32):
        tifffile.imwrite(path, pixels.astype(dtype), photometric="miniswhite")
        with pytest.raises(UserError, match="x.tif has u?int.. values.*0 (is white|as black|is black)"):
            read_image(path, Reading(value_range=(0, 255)))


def test_values_that_are_no_numbers(tmp_path):
    values = np.array([[np.nan, np.inf, -np.inf, 500]], np.float32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    assert pixels(tmp_path / "a.tif", value_range=(LOW, HIGH))[0, :, 0].tolist() == [0, 255, 0, 128]
    with pytest.raises(UserError, match="a.tif has float32 values from 500 to 500: --value_range"):
        pixels(tmp_path / "a.tif")


def test_range_is_asked_for(tmp_path):
    for dtype in DTYPES[1:]:
        tifffile.imwrite(tmp_path / "a.tif", np.array([[3, 7], [5, 1]], dtype))
        with pytest.raises(UserError, match=f"a.tif has {dtype} values from 1 to 7: --value_range"):
            pixels(tmp_path / "a.tif")


def test_tifffile_is_asked_for(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", draw("uint16", 20, 30, 5), planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(UserError, match="a.tif.*pip install tifffile imagecodecs"):
        pixels(tmp_path / "a.tif", bands=(1, 2, 3))


def test_damaged_tiff(tmp_path):
    """One line for each cut of a file, and no other error."""
    tifffile.imwrite(
        tmp_path / "a.tif", draw("uint16", 40, 50, 5), planarconfig="contig", **LAYOUTS["strips"]
    )
    data = (tmp_path / "a.tif").read_bytes()
    for length in range(0, len(data), 61):
        (tmp_path / "b.tif").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"b\.tif"):
            pixels(tmp_path / "b.tif", bands=(1, 2, 3))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 30}])
def test_jpeg_without_its_end(tmp_path, options):
    """Used if no pixel is missing, and an error at any earlier cut."""
    image, file = Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)), BytesIO()
    image.save(file, "JPEG", **options)
    data, path = file.getvalue(), tmp_path / "a.jpg"
    path.write_bytes(data)
    expected = pixels(path)
    assert not images.lacks_end(data) and not images.lacks_end(data + 100 * b"\0")
    for cut in [*range(1, 40), *range(40, len(data) - 700, 37)]:
        path.write_bytes(data[:-cut])
        try:
            found = pixels(path)
        except UserError as error:
            assert "a.jpg" in str(error)
            assert cut > 2
        else:
            assert cut <= 2 or options.get("progressive")  # whose last scans only sharpen
            assert images.lacks_end(data[:-cut])
            assert np.array_equal(found, expected) or options.get("progressive")
    path.write_bytes(data[:-2])
    assert np.array_equal(pixels(path), expected) and images.lacks_end(data[:-2])


def test_first_frame_of_several(tmp_path):
    first, second = (Image.new("RGB", (20, 10), color) for color in ("red", "blue"))
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
        assert read_header(str(tmp_path / name)).frames == 2
        assert abs(pixels(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 2
        first.save(tmp_path / name)
        assert read_header(str(tmp_path / name)).frames == 1
    # What GDAL calls an overview is a smaller copy, and no second page.
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(np.zeros((64, 64), np.uint8), subifds=0)
        file.write(np.zeros((32, 32), np.uint8), subfiletype=1)
    assert read_header(str(tmp_path / "a.tif")).frames == 1


def test_images_of_too_many_pixels(tmp_path):
    Image.new("1", (1000, 1001)).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((1001, 1000, 5), np.uint8), planarconfig="contig")
    for name in ("a.png", "b.tif"):
        with pytest.raises(
            UserError, match=f"{name}: Image of 1000x1001 pixels, more than --max_pixels 1000000"
        ):
            pixels(tmp_path / name, max_pixels=1_000_000, bands=(1, 2, 3))
        assert pixels(tmp_path / name, bands=(1, 2, 3)).shape == (1001, 1000, 3)
    assert open_image(str(tmp_path / "a.png")).size == (1000, 1001)


def test_format_that_pillow_does_not_know(tmp_path):
    """It raises what no other format raises: a DDS of pixels of its own."""
    header = struct.pack("<7I44x2I4s5I20x", 124, 0x1007, 4, 4, 16, 0, 0, 32, 4, b"ZZZZ", 0, 0, 0, 0, 0)
    (tmp_path / "a.dds").write_bytes(b"DDS " + header + bytes(64))
    for read in (read_header, read_image):
        with pytest.raises(UserError, match="cannot read .*a.dds: Unimplemented pixel format"):
            read(str(tmp_path / "a.dds"))


def test_what_a_folder_leaves_out():
    names = ["a.JPG", "b.jfif", "c.avif", "d.mpo", "e.tif", ".DS_Store", "._a.jpg"]
    readable = [name for name in names if lists.is_image_name(name)]
    assert {"a.JPG", "b.jfif", "e.tif"} <= set(readable) and not {".DS_Store", "._a.jpg"} & set(readable)
    assert lists.describe_left_out(readable + [".DS_Store"]) == ""
    others = [*(f"{i}.txt" for i in range(3)), "a.h5", "README"]
    assert lists.describe_left_out([*readable, *others]) == "left out 5: 3 .txt, 1 .h5, 1 without an ending"
    if images.pillow_heif is None:
        assert lists.describe_left_out(["a.HEIC"]) == "left out 1: 1 .heic (pip install pillow-heif)"


def test_photos_of_a_phone(cli, trained, tmp_path):
    """HEIC, which phones write, upright and turned by EXIF."""
    pytest.importorskip("pillow_heif")
    photo, exif = Image.open(trained[1] / "images/train0.jpg").convert("RGB"), Image.Exif()
    exif[274] = 6
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in/a.heic", quality=95)
    photo.save(tmp_path / "in/b.HEIF", quality=95, exif=exif.tobytes())
    expected = np.asarray(photo).astype(int)
    for name, turned in (("a.heic", expected), ("b.HEIF", np.rot90(expected, -1))):
        path = tmp_path / "in" / name
        assert read_header(str(path)).size == turned.shape[1::-1]
        assert np.abs(pixels(path) - turned).mean() < 5
    status, out, _ = cli("--predict", "in", "--checkpoint", trained[0], "--out", "out")
    assert status == 0 and "left out" not in out and "2 of 2 images" in out


def infrared(root: Path, bits: int = 12) -> Path:
    """The small data set as TIFFs of four bands, red, green, blue and infrared, of `bits` in 16."""
    make_list_dataset(root)
    for path in list(root.glob("images/*.jpg")):
        rgb = np.array(Image.open(path)).astype(np.uint16)
        values = np.concatenate([rgb, 255 - rgb[..., :1]], 2) << (bits - 8)
        tifffile.imwrite(path.with_suffix(".tif"), values, photometric="rgb")
        path.unlink()
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace(".jpg", ".tif"))
    return root


RANGE, BANDS = ["--value_range", 0, 4080], ["--bands", 4, 1, 2]


def test_aerial_images_from_check_to_prediction(cli, tmp_path):
    """--check names what to give, training keeps it, and the other commands need no flag."""
    root = infrared(tmp_path / "set")
    data = ["--dataset", "custom", "--data_root", root]
    status, _, err = cli("--check", *data)
    assert status == 1 and "has 4 bands" in err and "--bands 1 2 3" in err
    status, out, err = cli("--check", *data, *BANDS)
    assert status == 1 and one_line(err) and "--value_range 0 4095" in err
    assert "train: 6 images of uint16, 0 to 4095" in out
    status, out, err = cli("--check", *data, *BANDS, *RANGE)
    assert (status, err) == (0, "") and "no fault was found" in out

    train = ["--train", "--exp", "x", *data, *SMALL, *NETWORK, "--epochs", 2, "--save_every_iters", 1]
    status, _, err = cli(*train, *BANDS)
    assert status == 1 and one_line(err) and "--value_range 0 4095" in err
    status, _, err = cli(*train, *RANGE)
    assert status == 1 and one_line(err) and "--bands" in err
    assert cli(*train, *BANDS, *RANGE)[0] == 0
    checkpoint = "data/deeplab_tiny_custom_v3_x_epoch2.pth"
    model = deeplab.load(checkpoint)
    assert model.reading == Reading((0, 4080), (4, 1, 2))

    # A resumed run keeps both, and does not go on without.
    half = "data/deeplab_tiny_custom_v3_x_epoch1_iter2.pth"
    longer = [*train, "--epochs", 3, "--resume", checkpoint]
    status, _, err = cli(*longer, *BANDS, "--value_range", 0, 4000)
    assert status == 1 and one_line(err) and "--value_range (checkpoint: 0 4080, here: 0 4000)" in err
    assert cli(*longer, *BANDS, *RANGE)[0] == 0, half
    resumed = deeplab.load("data/deeplab_tiny_custom_v3_x_epoch3.pth")
    assert resumed.reading == model.reading

    status, out, _ = cli("--checkpoint", checkpoint, *data)
    assert status == 0 and "Mean IoU" in out
    assert cli("--predict", root / "images", "--checkpoint", checkpoint, "--out", "out")[0] == 0
    path = root / "images/val0.tif"
    values = tifffile.imread(path)[..., [3, 0, 1]]
    expected = model.predict(scaled(values, 0, 4080))
    assert np.array_equal(model.predict(path), expected)
    mask = np.array(Image.open("out/val0_mask.png"))
    assert (mask == expected).mean() > 0.99
    # A model of weights alone has them, too, and hands them on to a run that begins with it, which says so.
    assert cli("--export", "w.pth", "--checkpoint", checkpoint)[0] == 0
    assert deeplab.load("w.pth").reading == model.reading
    start = [*train, "--exp", "y", "--init", "w.pth", "--base_lr", 0]
    told = "w.pth was trained with {}: images are read so; give other flags to change that\n"
    for given, kept in (([], "--value_range 0 4080 --bands 4 1 2"), (BANDS, "--value_range 0 4080")):
        assert told.format(kept) in cli(*start, *given)[1]
    assert "was trained with" not in cli(*start, *BANDS, *RANGE)[1]


def test_bright_images_of_16_bits_need_no_range(cli, tmp_path):
    """As they were: by the high byte. And dark ones among them stay dark."""
    root = infrared(tmp_path / "set", bits=16)
    values = tifffile.imread(root / "images/train0.tif")
    tifffile.imwrite(root / "images/train0.tif", values >> 6, photometric="rgb")
    data = ["--dataset", "custom", "--data_root", root, "--bands", 1, 2, 3]
    status, out, err = cli("--check", *data)
    assert (status, err) == (0, "") and "images of uint16, 0 to" in out
    assert cli("--train", "--exp", "x", *data, *SMALL, *NETWORK, "--epochs", 1)[0] == 0
    checkpoint = "data/deeplab_tiny_custom_v3_x_epoch1.pth"
    status, out, _ = cli("--predict", root / "images", "--checkpoint", checkpoint, "--out", "out")
    assert status == 0 and "1 images of more than 8 bits were nearly black" in out


def as_tiffs(root: Path, convert, **options) -> Path:
    """The small data set as grey TIFFs of what `convert` makes of its grey levels."""
    make_list_dataset(root)
    for path in list(root.glob("images/*.jpg")):
        values = convert(np.array(Image.open(path).convert("L")).astype(np.int64))
        tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", **options)
        path.unlink()
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace(".jpg", ".tif"))
    return root


def no_data(text: str) -> dict:
    return {"extratags": [(42113, "s", 0, text, True)]}


def test_what_means_that_there_is_nothing_is_no_value(cli, tmp_path):
    """A GeoTIFF's nodata: -9999 in heights, 65535 in 16 bits, the lowest float of all."""

    def holes(values: np.ndarray, dtype: type, low: float, step: float, hole: float) -> np.ndarray:
        values = (low + step * values).astype(dtype)
        values[:9, :9] = hole
        return values

    lowest = "-3.4028234663852886e+38"
    for name, hole in (("a", "-9999"), ("b", lowest)):
        convert = partial(holes, dtype=np.float32, low=300, step=1, hole=np.float32(hole))
        root = as_tiffs(tmp_path / name, convert, **no_data(hole))
        status, _, err = cli("--check", "--dataset", "custom", "--data_root", root)
        assert status == 1 and re.search(r"--value_range 3\d\d(\.\d+)? 5\d\d(\.\d+)? makes", err), err
    root = as_tiffs(
        tmp_path / "c", partial(holes, dtype=np.uint16, low=200, step=10, hole=65535), **no_data("65535")
    )
    status, _, err = cli("--check", "--dataset", "custom", "--data_root", root)
    assert status == 1 and "--value_range 0 4095 makes" in err
    assert (
        cli("--check", "--dataset", "custom", "--data_root", root, "--value_range", "-1e-05", "3e3")[0] == 0
    )


def test_16_bits_within_a_narrow_band_need_a_range(cli, tmp_path):
    """As thermal cameras give them, 29,000 to 31,000: of these the high bytes are eight levels."""
    root = as_tiffs(tmp_path / "set", lambda values: (29000 + 7 * values).astype(np.uint16))
    data = ["--dataset", "custom", "--data_root", root]
    for flags in (["--check"], ["--train", "--exp", "x", *SMALL, *NETWORK]):
        status, _, err = cli(*flags, *data)
        found = re.search(r"which as 8 bits would be lost: --value_range (\d+) (\d+) makes", err)
        assert status == 1 and 28900 < int(found[1]) < 29512 and 30000 < int(found[2]) < 31232, err
    assert cli("--check", *data, "--value_range", 29000, 31000)[0] == 0


def test_dark_images_of_a_run_that_goes_on_are_told(tmp_path, capsys):
    """It cannot change how they are read."""
    root = make_list_dataset(tmp_path / "set")
    for path in (root / "images").glob("*.jpg"):
        tifffile.imwrite(path.with_suffix(".tif"), np.full((60, 80), 900, np.uint16))
    for path in (root / "list").iterdir():
        path.write_text(path.read_text().replace(".jpg", ".tif"))
    with pytest.raises(UserError, match="which as 8 bits would be lost"):
        prepare(ListSegmentation(str(root), "train"), "train", skip_bad=False)
    prepare(ListSegmentation(str(root), "train"), "train", skip_bad=False, resumes=True)
    assert "which as 8 bits would be lost" in capsys.readouterr().out


def test_dark_images_to_validate_are_told(cli, tmp_path):
    """12 bits in 16 in val alone, 8 bits in train."""
    root = make_list_dataset(tmp_path / "set")
    for path in list(root.glob("images/val*.jpg")):
        values = np.array(Image.open(path).convert("L")).astype(np.uint16) << 4
        Image.fromarray(values).save(path.with_suffix(".png"))
    path = root / "list/val.txt"
    path.write_text(path.read_text().replace(".jpg", ".png"))
    data = ["--dataset", "custom", "--data_root", root]
    status, out, _ = cli("--train", "--exp", "x", *data, *SMALL, *NETWORK, "--epochs", 1)
    assert status == 0 and "images of uint16 hold" in out and "--value_range 0 4095" in out
    status, out, _ = cli("--exp", "x", *data)
    assert status == 0 and "--value_range 0 4095" in out


@pytest.mark.parametrize(("convert", "status"), [((20_000, 180), 1), ((0, 16), 0), ((0, 0.05), 1)])
def test_range_that_leaves_little_of_most_images(cli, tmp_path, convert, status):
    """Nearly all values lie beyond it, or are as good as one within it; one image is as it should be."""
    low, step = convert
    root = as_tiffs(tmp_path / "set", lambda values: (low + step * values).astype(np.uint16))
    tifffile.imwrite(root / "images/train0.tif", np.tile(np.arange(80, dtype=np.uint16) * 50, (60, 1)))
    data = ["--dataset", "custom", "--data_root", root, "--value_range", 0, 4080]
    found, out, err = cli("--check", *data)
    told = "images are nearly black, white or of one grey for the network by --value_range 0 4080: "
    assert found == status and err.count(told) == 2 * status
    if status:
        assert f"5 of 6 {told}{root}/images/train1.tif has values from" in err
    found, out, _ = cli("--train", "--exp", "x", *data, *SMALL, *NETWORK, "--epochs", 1)
    assert found == 0 and out.count(told) == 2 * status
    found, out, _ = cli("--exp", "x", *data[:4])
    assert found == 0 and out.count(told) == status
    checkpoint = "data/deeplab_tiny_custom_v3_x_epoch1.pth"
    found, out, _ = cli("--predict", root / "images", "--checkpoint", checkpoint, "--out", "out")
    assert found == 0 and ("8 images of more than 8 bits were nearly black, white or" in out) == status


def test_black_images_with_few_objects_suit_their_range(cli, tmp_path):
    """As under a fluorescence microscope: the values are all within the range."""
    root = as_tiffs(tmp_path / "set", lambda values: np.where(values > 200, 4000, 3).astype(np.uint16))
    for path in root.glob("images/*.tif"):
        values = np.full((60, 80), 3, np.uint16)
        values[:9, :9] = 4000
        tifffile.imwrite(path, values)
    data = ["--dataset", "custom", "--data_root", root, "--value_range", 0, 4095]
    assert cli("--check", *data)[0] == 0


def test_bright_pixels_of_one_image_hide_no_dark_ones(cli, tmp_path):
    """12 bits in 16, of which one in ten has a hot pixel; of two in ten the set is taken to be so."""
    root = make_list_dataset(tmp_path / "set", train=10, val=1)
    for path in root.glob("images/*.jpg"):
        values = np.array(Image.open(path).convert("L")).astype(np.uint16) << 4
        values[0, 0] = 65535 if path.stem in ("train3", "val0") else 0
        Image.fromarray(values).save(path.with_suffix(".png"))
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace(".jpg", ".png"))
    data = ["--dataset", "custom", "--data_root", root]
    told = "9 of 10 images of uint16 hold 0 to 4095, which as 8 bits would be lost: --value_range 0 4095"
    train = ["--train", "--exp", "x", *data, *SMALL, *NETWORK, "--epochs", 1]
    status, _, err = cli(*train)
    assert status == 1 and one_line(err) and told in err
    status, _, err = cli("--check", *data)
    assert status == 1 and one_line(err) and told in err
    shutil.copy(root / "images/train3.png", root / "images/train4.png")
    told = "8 of 10 images of uint16 that were looked at hold 0 to 40"  # a part of them
    for flags in (train, ["--check", *data]):
        status, out, _ = cli(*flags)
        assert status == 0 and told in out


def test_colours_that_are_not_rgb_are_refused(tmp_path):
    """CIELab of 16 bits, which Pillow cannot open, radar's complex numbers, FITS, whose zero it ignores."""
    values = np.arange(600, dtype=np.uint16).reshape(10, 20, 3)
    tifffile.imwrite(tmp_path / "lab.tif", values, photometric="cielab")
    tifffile.imwrite(tmp_path / "radar.tif", values[..., 0].astype(np.complex64), photometric="minisblack")
    for name in ("lab.tif", "radar.tif"):
        with pytest.raises(UserError, match=f"{name} has .* save it as grey or RGB"):
            read_header(str(tmp_path / name), Reading(value_range=(0, 600)))
    cards = [
        "SIMPLE  = T",
        "BITPIX  = 16",
        "NAXIS   = 2",
        "NAXIS1  = 4",
        "NAXIS2  = 3",
        "BZERO   = 32768",
        "END",
    ]
    header = "".join(f"{card:80}" for card in cards).ljust(2880).encode()
    (tmp_path / "a.fits").write_bytes(header + bytes(2880))
    with pytest.raises(UserError, match="a.fits is FITS, which is not read right"):
        read_header(str(tmp_path / "a.fits"))


def test_masks_of_several_pages_are_refused(cli, tmp_path):
    """A page for each class, of which the first would be read; a thumbnail counts for none."""
    root = make_list_dataset(tmp_path / "set")
    for path in root.glob("masks/*.png"):
        mask = np.array(Image.open(path))
        tifffile.imwrite(path.with_suffix(".tif"), np.stack([mask, mask]), photometric="minisblack")
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace(".png", ".tif"))
    data = ["--dataset", "custom", "--data_root", root]
    for flags in (["--check"], ["--train", "--exp", "x", *SMALL, *NETWORK]):
        status, _, err = cli(*flags, *data)
        assert status == 1 and "a mask of several frames or pages" in err
    for path in root.glob("masks/*.png"):
        with tifffile.TiffWriter(path.with_suffix(".tif")) as file:
            file.write(np.array(Image.open(path)), photometric="minisblack", subifds=0)
            file.write(np.zeros((6, 8), np.uint8), photometric="minisblack", subfiletype=1)
    assert cli("--check", *data)[0] == 0


def test_dark_images_of_16_bits_are_told_in_python(trained, tmp_path):
    model = deeplab.load(trained[0])
    for name, low, high in (("dark.png", 0, 4095), ("bright.png", 0, 65535), ("white.png", 62000, 65535)):
        values = np.linspace(low, high, 2000).astype(np.uint16).reshape(40, 50)
        Image.fromarray(values).save(tmp_path / name)
    for image in (tmp_path / "dark.png", Image.open(tmp_path / "dark.png"), tmp_path / "white.png"):
        with pytest.warns(UserWarning, match="nearly black"):
            model.predict(image)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.predict(tmp_path / "bright.png")
        model.reading = Reading(value_range=(0, 4095))
        model.predict(tmp_path / "dark.png")
    with pytest.warns(UserWarning, match="nearly black, white"):
        model.predict(tmp_path / "bright.png")


def pgm(highest: int, values: np.ndarray, letter: str = "5") -> bytes:
    """A PGM, or a PPM with the letter 6."""
    height, width = values.shape[:2]
    header = f"P{letter}\n{width} {height}\n{highest}\n".encode()
    return header + values.astype(">u2" if highest > 255 else "u1").tobytes()


def test_images_whose_values_pillow_scales_take_no_range(tmp_path):
    """12 bits in a PGM or in JPEG 2000: a value is another as Pillow reads it."""
    imagecodecs = pytest.importorskip("imagecodecs")
    values = np.arange(0, 4000, 2, np.uint16).reshape(40, 50)
    files = {"12.pgm": pgm(4095, values), "colour.ppm": pgm(65535, np.dstack([values] * 3), "6")}
    files |= {"right.pgm": pgm(65535, values), "bytes.pgm": pgm(255, values % 256)}
    for bits, kind in ((12, np.uint16), (16, np.uint16), (8, np.uint8)):
        options = {"bitspersample": bits, "codecformat": "jp2"}
        files[f"{bits}.jp2"] = imagecodecs.jpeg2k_encode((values % 256).astype(kind), **options)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        read_header(str(tmp_path / name))
        if name in ("12.pgm", "colour.ppm", "12.jp2"):
            with pytest.raises(UserError, match=f"{name}: its values go to .*save it as PNG or TIFF"):
                read_header(str(tmp_path / name), Reading(value_range=(0, 4095)))
        else:
            read_header(str(tmp_path / name), Reading(value_range=(0, 4095)))


def test_masks_whose_values_pillow_scales(cli, tmp_path):
    """The objects, 1 of 1, would be read as 255, and ignored."""
    root = make_list_dataset(tmp_path / "set")
    for path in root.glob("masks/*.png"):
        path.with_suffix(".pgm").write_bytes(pgm(1, np.array(Image.open(path)) > 0))
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace(".png", ".pgm"))
    for flags in (["--train", "--exp", "x", *SMALL, *NETWORK, "--epochs", 1], ["--check"]):
        status, _, err = cli(*flags, "--dataset", "custom", "--data_root", root)
        assert status == 1 and "its values go to 1, which is not what Pillow reads" in err


def test_float_images_name_the_range_of_the_set(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set")
    for path in root.glob("images/*.jpg"):
        grey = np.array(Image.open(path).convert("L")).astype(np.float32) / 255
        tifffile.imwrite(path.with_suffix(".tif"), grey)
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace(".jpg", ".tif"))
    greys = [tifffile.imread(path) for path in root.glob("images/*.tif")]
    low, high = (f"{value:.6g}" for value in (np.min(greys), np.max(greys)))
    data = ["--dataset", "custom", "--data_root", root]
    for command in (["--check"], ["--train", "--exp", "x", *SMALL, *NETWORK]):
        status, _, err = cli(*command, *data)
        assert status == 1 and one_line(err) and "float32" in err and "--value_range" in err
    status, out, err = cli("--check", *data)
    assert f"--value_range {low} {high}" in err and (tmp_path / "data/check/set.png").exists()
    assert cli("--check", *data, "--value_range", 0, 1)[0] == 0


def test_exported_file_tells_how_images_are_read(cli, tmp_path, monkeypatch):
    model = deeplab.build("tiny", False, 2, num_groups=32, weight_std=True, aspp_rates=[6])
    model.classes, model.palette, model.reading = ["a", "b"], [[0, 0, 0], [1, 1, 1]], Reading((0, 1))
    torch.save(main.checkpoints.model_entries(model), tmp_path / "x.pth")
    told = {}
    monkeypatch.setattr(main, "export", lambda model, path, about: told.update(about))
    assert cli("--export", "x.pt2", "--checkpoint", "x.pth")[0] == 0
    assert json.loads(json.dumps(told["value_range"])) == [0, 1] and told["bands"] is None


@pytest.mark.parametrize("reading", [{"value_range": [1, 0]}, {"value_range": 3}, {"bands": [0, 1, 2]}, 7])
def test_checkpoint_whose_reading_has_no_meaning(tmp_path, reading):
    model = deeplab.build("tiny", False, 2, aspp_rates=[6])
    model.classes, model.palette = ["a", "b"], [[0, 0, 0], [1, 1, 1]]
    entries = {**main.checkpoints.model_entries(model), "reading": reading}
    torch.save(entries, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth does not say how its images were read"):
        deeplab.load(tmp_path / "x.pth")


def test_check_counts_what_it_uses_all_the_same(cli, tmp_path):
    root = make_list_dataset(tmp_path / "set")
    path = root / "images/train0.jpg"
    path.write_bytes(path.read_bytes()[:-2])
    first = Image.open(root / "images/train1.jpg")
    first.save(root / "images/train1.tif", save_all=True, append_images=[first])
    for path in root.glob("list/*.txt"):
        path.write_text(path.read_text().replace("train1.jpg", "train1.tif"))
    status, out, err = cli("--check", "--dataset", "custom", "--data_root", root)
    assert (status, err) == (0, "")
    assert "train: 1 JPEGs lack their end" in out and "train: 1 images have several frames" in out
    train = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK]
    status, out, _ = cli(*train, "--epochs", 1)
    assert status == 0 and "1 of the train images have several frames or pages: the first is used" in out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_of_tiffs_that_pillow_cannot_open(tmp_path, orientation):
    """Those that keep the size leave it unclear whether a mask is of the upright image."""
    values, tag = RNG.integers(0, 256, (5, 7, 13), dtype=np.uint8), [(274, "H", 1, orientation, True)]
    tifffile.imwrite(
        tmp_path / "a.tif", values, photometric="minisblack", planarconfig="contig", extratags=tag
    )
    header = read_header(str(tmp_path / "a.tif"), Reading(bands=(1, 2, 3)))
    assert header.size == ((5, 7) if orientation > 4 else (7, 5))
    assert header.unclear == (orientation in (2, 3, 4))

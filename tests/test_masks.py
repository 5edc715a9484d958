"""What the pixels of masks mean: classes.txt, every kind of mask file, and the faults of both."""

import zlib

import numpy as np
import pytest
import torch
from conftest import make_list_dataset, one_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import deeplab
from commands.check import unseen_classes
from datasets import ListSegmentation, load_batches
from files.images import open_image
from files.masks import Labels, describe_pixels, read_classes
from files.pictures import save_mask, voc_palette
from utils import UserError


def write(folder, text: str) -> str:
    path = folder / "classes.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(tmp_path, classes: str, picture: Image.Image, name: str = "mask.png") -> np.ndarray:
    """The labels of a picture that is saved and opened again."""
    picture.save(tmp_path / name)
    path = str(tmp_path / name)
    labels = read_classes(write(tmp_path, classes)).read(open_image(path, is_mask=True), path)
    assert labels.dtype == np.uint8
    return labels


def grey(*rows, dtype=np.uint8) -> Image.Image:
    return Image.fromarray(np.array(rows, dtype))


@pytest.mark.parametrize(
    ("text", "classes", "values"),
    [
        ("sky\ntraffic light\nroad 7\n", ["sky", "traffic light", "road 7"], {0: 0, 1: 1, 2: 2, 255: 255}),
        ("\ufeffa 1 2 3\r\n\r\nb\r\n", ["a", "b"], {0: 0, 1: 1, 255: 255}),
        ("background\nthing = 255\n", ["background", "thing"], {0: 0, 255: 1}),
        ("ignore = 0\nwall\nbuilding\n", ["wall", "building"], {0: 255, 1: 0, 2: 1, 255: 255}),  # ADE20K
        ("a\nignore = 1 254\nb\nc", ["a", "b", "c"], {0: 0, 2: 1, 3: 2, 1: 255, 254: 255, 255: 255}),
        ("ignore = 255\na\nb", ["a", "b"], {0: 0, 1: 1, 255: 255}),
        ("a = 7 8\nb 1 2 3 = 11\n", ["a", "b"], {7: 0, 8: 0, 11: 1, 255: 255}),
        ("ids = 70000\nmore = 70001 3", ["ids", "more"], {70000: 0, 70001: 1, 3: 1, 255: 255}),
        ("a 1 1 1\nignore 224 224 192\nb 2 2 2", ["a", "b"], {0: 0, 1: 1, 255: 255}),
        ("lane 1\nlane 2\n", ["lane 1", "lane 2"], {0: 0, 1: 1, 255: 255}),
        ("1_road\nsky\n", ["1_road", "sky"], {0: 0, 1: 1, 255: 255}),
        ("2_wheeler\n4_wheeler\n", ["2_wheeler", "4_wheeler"], {0: 0, 1: 1, 255: 255}),
        ("2.5D road (1)\n3-way\n", ["2.5D road (1)", "3-way"], {0: 0, 1: 1, 255: 255}),
        ("0_a = 0\n1_b = 1\n", ["0_a", "1_b"], {0: 0, 1: 1, 255: 255}),
        ("__ignore__\n_background_\na\n", ["_background_", "a"], {0: 0, 1: 1, 255: 255}),  # labelme
    ],
)
def test_classes_and_their_values(tmp_path, text, classes, values):
    labels = read_classes(write(tmp_path, text))
    assert labels.classes == classes and labels.values == values and len(labels.palette) == len(classes)


@pytest.mark.parametrize("text", ["0-25%\n25-50%\n50-100%", "1990-old\n2000-new", "bg 0 0 0\n1_road 9 9 9"])
def test_names_that_look_like_numbering(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    assert len(read_classes(str(tmp_path / "classes.txt")).classes) == len(text.splitlines())


def test_names_that_look_like_headings(tmp_path):
    """An export's classes have colours, and may be called anything."""
    names = ["id card", "identity", "name", "class"]
    assert read_classes(write(tmp_path, "".join(f"{name}\n" for name in names))).classes == names
    names = ["id name", "r g b", "a:", "b #804080", "c (1, 2, 3)"]
    assert (
        read_classes(write(tmp_path, "".join(f"{n} {i} 0 0\n" for i, n in enumerate(names)))).classes == names
    )


def test_colours(tmp_path):
    labels = read_classes(write(tmp_path, "sky 1 2 3\nb\n"))
    assert labels.palette == [[1, 2, 3], [128, 0, 0]]  # the VOC palette's where none is given


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\na\n", ":2: 'a': at most 255 different names"),
        ("".join(f"c{i}\n" for i in range(256)), ":256: 'c255': at most 255 different names"),
        ("a 1 2 256\n", ":1: 'a 1 2 256': a colour is three numbers of 0 to 255"),
        ("bg,0,0,0\n", ":1: 'bg,0,0,0': leave a space between name and numbers"),
        ("bg; 0\n", "leave a space between name and numbers"),
        ("bg: 0\n", "leave a space between name and numbers"),
        ("bg\n0 thing\n", ":2: '0 thing': the name comes first"),
        ("0,bg\n", "the name comes first"),
        ("0: bg\n", "the name comes first"),
        ("a =\n", "expected pixel values after `=`"),
        ("a = x\n", "expected pixel values after `=`"),
        ("a = 1.5\n", "expected pixel values after `=`"),
        ("a = 99999999999\n", "expected pixel values after `=`"),
        ("= 5\n", "a line begins with the name of a class"),
        ("name r g b\nroad 1 2 3\n", ":1: 'name r g b': leave out headings"),
        ("id\tname\nroad\nsky\n", "leave out headings"),
        ("classes:\nroad\nsky\n", "leave out headings"),
        ("road:128,64,128::\nsky\n", "leave out headings"),
        ("road #804080\nsky\n", "a colour is three numbers: `name 128 64 128`"),
        ("road (128, 64, 128)\nsky\n", "a colour is three numbers"),
        ("a\n# the others\n", ":2: '# the others': a line begins with the name of a class"),
        ("1 2 3\n", "the name comes first"),
        ("a = 1\nb = 2 1\n", ":2: 'b': the value 1 is 'a' already"),
        ("a\nb = 0\n", ":2: 'b': the value 0 is 'a' already"),
        ("a = 3\nignore = 3\n", ":2: 'ignore': the value 3 is 'a' already"),
        ("ignore = 3\na = 3\n", ":2: 'a': the value 3 is 'ignore' already"),
        ("a = 5\nb\n", ":2: 'b' needs values, too, as 'a' has: `= V`"),
        (
            "a = -1\nb = 0\n",
            ":1: 'a = -1': the values of classes are from 0; less is for what is not learned",
        ),
        ("Ignore\na\n", ":1: 'Ignore': say what is ignored: `ignore = 0`"),
        (
            "bg 0\nthing 255\n",
            "classes.txt: all names have numbers; for those of pixels in masks, write `bg = 0`",
        ),
        ("0_bg\n1_thing\n", "all names have numbers; for those of pixels in masks, write `bg = 0`"),
        ("bg (0)\nthing(255)\n", "all names have numbers; for those of pixels in masks, write `bg = 0`"),
        ("// classes\na\nb\n", ":1: '// classes': a line begins with the name of a class"),
        ("; classes\na\nb\n", "a line begins with the name of a class"),
        ("a\n% b\n", "a line begins with the name of a class"),
        ("1. road\n2. car\n", ":1: '1. road': the name comes first"),
        ("1) road\n2) car\n", "the name comes first"),
        ("bg 0 0\nthing 1 255\n", "write `bg 0 = 0`"),
        ("bg 0 0 0 0\nthing 1 9 9 9\n", "write `bg = 0`"),
        ("ignore = 0\n", "names no class"),
        ("crack = 255\nignore = 0\n", "names one class, 'crack', and nothing to tell it from: name the"),
        ("", "classes.txt is empty"),
    ],
)
def test_wrong_classes(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        read_classes(write(tmp_path, text))
    assert message in str(error.value) and "classes.txt" in str(error.value) and "\n" not in str(error.value)


def test_masks_of_every_kind(tmp_path):
    """Grey, palette, bits, grey with alpha, RGB, RGBA, 16 and 32 bits."""
    assert read(tmp_path, "a\nb\nc", grey([0, 1], [2, 255])).tolist() == [[0, 1], [2, 255]]
    palette = grey([0, 1], [2, 255])
    palette.putpalette([9, 9, 9] * 256)  # the colours say nothing
    assert read(tmp_path, "a\nb\nc", palette).tolist() == [[0, 1], [2, 255]]
    assert read(tmp_path, "a\nb", grey([0, 255], [255, 0]).convert("1")).tolist() == [[0, 1], [1, 0]]
    assert read(tmp_path, "a\nb = 255", grey([0, 255]), "mask.bmp").tolist() == [[0, 1]]
    alpha = Image.merge("LA", (grey([0, 1]), grey([0, 200])))
    assert read(tmp_path, "a\nb", alpha).tolist() == [[0, 1]]
    colors = "a 1 2 3\nb 3 2 1\nignore 9 9 9\nignore 8 8 8"
    rgb = Image.fromarray(np.array([[[1, 2, 3], [3, 2, 1], [9, 9, 9], [8, 8, 8]]], np.uint8))
    assert read(tmp_path, colors, rgb).tolist() == [[0, 1, 255, 255]]
    rgba = rgb.copy()
    rgba.putalpha(grey([0, 128, 255, 7]))
    assert read(tmp_path, colors, rgba).tolist() == [[0, 1, 255, 255]]
    ids = "a = 0 300\nb = 65535\nignore = 7"
    many = grey([0, 300, 65535, 7, 255], dtype=np.uint16)
    assert read(tmp_path, ids, many).tolist() == [[0, 0, 1, 255, 255]]
    ids = "a = 0 300\nb = 100000\nignore = 7"
    big = grey([0, 300, 100000, 7, 255], dtype=np.int32)
    assert read(tmp_path, ids, big, "mask.tif").tolist() == [[0, 0, 1, 255, 255]]
    small = grey([0, 300, 7], dtype=np.int32)
    assert read(tmp_path, ids, small, "mask.tif").tolist() == [[0, 0, 255]]


def palette_mask(colors: dict[int, tuple], *rows) -> Image.Image:
    mask = grey(*rows)
    palette = [9, 9, 9] * 256
    for index, color in colors.items():
        palette[3 * index : 3 * index + 3] = color
    mask.putpalette(palette)
    return mask


SKY, ROAD, CAR = (70, 130, 180), (128, 64, 128), (0, 0, 142)
COLORED = "sky 70 130 180\nroad 128 64 128\ncar 0 0 142\nignore 1 1 1\n"


@pytest.mark.parametrize(
    ("classes", "colors", "labels"),
    [
        (COLORED, {0: SKY, 1: ROAD, 2: CAR}, [0, 1, 2]),  # values and colours agree
        (COLORED, {0: ROAD, 1: CAR, 2: SKY}, [1, 2, 0]),  # an RGB mask that was made smaller
        (COLORED, {0: CAR, 1: (1, 1, 1), 2: SKY}, [2, 255, 0]),
        (COLORED, {i: (i, i, i) for i in range(3)}, [0, 1, 2]),  # grey levels mean nothing
        (COLORED, {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0)}, [0, 1, 2]),  # nor do VOC's colours
        ("sky\nroad\ncar\n", {0: ROAD, 1: CAR, 2: SKY}, [0, 1, 2]),  # nor any, if classes have none
        ("sky = 2\nroad = 1\ncar = 0\n", {0: CAR, 1: ROAD, 2: SKY}, [2, 1, 0]),
    ],
)
def test_palettes(tmp_path, classes, colors, labels):
    assert read(tmp_path, classes, palette_mask(colors, [0, 1, 2])).tolist() == [labels]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ("a\nb\nc\n", [0, 1, 2]),
        ("ignore = 0\na = 1\nb = 2\nc = 3\n", [0, 1, 2]),  # as the masks were that it was trained on
        ("c\na\nx\nb\n", [1, 3, 0]),
        ("a 0 0 0\nb 9 9 9\nc 1 2 3\n", [0, 1, 2]),  # other colours than at the time
    ],
)
def test_predictions_that_become_masks(tmp_path, classes, expected):
    """They say what their numbers are, whatever classes.txt says of the masks that people drew."""
    labels = np.repeat(np.arange(3, dtype=np.uint8), 4).reshape(3, 4)
    save_mask(str(tmp_path / "m.png"), labels, [(0, 0, 0), (9, 9, 9), (1, 2, 3)], ["a", "b", "c"])
    (tmp_path / "classes.txt").write_text(classes)
    found = read_classes(str(tmp_path / "classes.txt")).read(Image.open(tmp_path / "m.png"), "m.png")
    np.testing.assert_array_equal(found, np.array(expected, np.uint8)[labels])


def prediction(tmp_path, pixels):
    """A prediction of the classes a, b and c, as a picture."""
    path = tmp_path / "m.png"
    save_mask(str(path), np.array([pixels], np.uint8), [(0, 0, 0), (9, 9, 9), (1, 2, 3)], ["a", "b", "c"])
    return Image.open(path)


@pytest.mark.parametrize(
    "classes",
    ["d\ne\nf\n", "a\nc\nx\n", "a\nx\n", "a 0 0 0\nc 9 9 9\nx 1 2 3\n", "ignore = 0\na = 1\nc = 2 3\n"],
)
def test_prediction_of_a_class_that_is_not_there(tmp_path, classes):
    """Its numbers are another model's."""
    (tmp_path / "classes.txt").write_text(classes)
    labels = read_classes(str(tmp_path / "classes.txt"))
    unknown = "0 is 'a'" if classes.startswith("d") else "1 is 'b'"
    with pytest.raises(UserError, match=f"m.png: it says that {unknown}, which .*classes.txt does not name"):
        labels.read(prediction(tmp_path, [0, 1]), "m.png")
    if "c" in labels.classes:  # that b is not there matters to masks that have some
        assert labels.read(prediction(tmp_path, [0, 2]), "m.png").tolist() == [[0, labels.classes.index("c")]]


def test_prediction_that_somebody_has_painted_in(tmp_path):
    mask = prediction(tmp_path, [0, 1, 2, 2, 2])
    mask.putpixel((3, 0), 255)
    assert Labels([*"cab"], voc_palette(3)).read(mask, "m.png").tolist() == [[1, 2, 0, 255, 0]]
    mask.putpixel((4, 0), 3)
    assert Labels([*"abcd"], voc_palette(4)).read(mask, "m.png").tolist() == [[0, 1, 2, 255, 3]]
    with pytest.raises(UserError, match="m.png: 3 is none of the classes that it names"):
        Labels([*"cabd"], voc_palette(4)).read(mask, "m.png")


def test_prediction_that_an_optimiser_has_renumbered(tmp_path):
    """The text stays in the file, but its palette is another: it goes by its colours."""
    palette, classes = [[0, 0, 0], [9, 9, 9], [1, 2, 3]], ["a", "b", "c"]
    save_mask(str(tmp_path / "m.png"), np.array([[0, 2, 2]], np.uint8), palette, classes)
    text = Image.open(tmp_path / "m.png").info["classes"]
    picture = Image.fromarray(np.array([[0, 1, 1]], np.uint8))
    picture.putpalette([0, 0, 0, 1, 2, 3])
    picture.info["classes"] = text
    for colors in (None, {(0, 0, 0): 0, (9, 9, 9): 1, (1, 2, 3): 2}):
        assert Labels(classes, palette, colors=colors).read(picture, "m.png").tolist() == [[0, 2, 2]]


@pytest.mark.parametrize(
    "text", ['["a", "b"]', '{"a": 0, "b": 1}', '[[0, "a"], [1, "b"]]', "a, b", "3", "[[], []]"]
)
def test_text_of_another_program_means_nothing(tmp_path, text):
    mask = prediction(tmp_path, [2, 1, 0])
    mask.info["classes"] = text
    assert Labels([*"xyz"], voc_palette(3)).read(mask, "m.png").tolist() == [[2, 1, 0]]


def test_prediction_whose_palette_is_not_that_of_its_text(tmp_path):
    """Its numbers may be anything."""
    mask = prediction(tmp_path, [0, 1, 2])
    mask.putpalette([0, 0, 0, 1, 2, 3, 255, 255, 255])
    with pytest.raises(
        UserError, match="m.png: its palette has not the colours.*as --predict has written it"
    ):
        Labels([*"abc"], voc_palette(3)).read(mask, "m.png")


def test_palette_that_contradicts_the_classes(tmp_path):
    mask = palette_mask({0: SKY, 1: (5, 6, 7), 2: ROAD}, [0, 1, 2])
    with pytest.raises(
        UserError, match="mask.png: its palette has the colour 5 6 7 at 1, which .*classes.txt"
    ):
        read(tmp_path, COLORED, mask)


@pytest.mark.parametrize(
    ("classes", "picture", "message"),
    [
        ("a\nb", grey([0, 0, 1], [0, 7, 7]), "mask.png: value 7 at x 1, y 1, 2 pixels of it; "),
        ("a\nb", grey([0, 0, 1], [0, 7, 7]), "classes.txt names no such: write `NAME = 7` for its class, or"),
        ("a\nb", grey([0, 300], dtype=np.uint16), "value 300 at x 1, y 0, 1 pixels of it"),
        ("a 1 1 1\nb 2 2 2", Image.new("RGB", (3, 2), (1, 2, 3)), "colour 1 2 3 at x 0, y 0, 6 pixels"),
        ("a 1 1 1\nb 2 2 2", Image.new("RGB", (3, 2), (1, 2, 3)), "write `NAME 1 2 3` for its class, or"),
        ("a 1 1 1\nb", Image.new("RGB", (3, 2)), "must tell all classes apart: give each a colour"),
        ("a 1 1 1\nb 1 1 1", Image.new("RGB", (3, 2)), "must tell all classes apart"),
        ("a 1 1 1\nb 2 2 2\nignore 2 2 2", Image.new("RGB", (3, 2)), "must tell all classes apart"),
        ("a\nb", Image.new("CMYK", (3, 2)), "a mask of Pillow's mode CMYK"),
        ("a\nb", Image.new("F", (3, 2)), "a mask of Pillow's mode F"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path, classes, picture, message):
    name = "mask.tif" if picture.mode in ("CMYK", "F") else "mask.png"
    with pytest.raises(UserError) as error:
        read(tmp_path, classes, picture, name)
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


def test_colour_that_is_transparent_in_places(tmp_path):
    """White things on a ground that is white, too, but transparent; on black ground all is clear."""
    (tmp_path / "classes.txt").write_text("ground 0 0 0\nthing 255 255 255\n")
    labels = read_classes(str(tmp_path / "classes.txt"))
    pixels = np.full((2, 3, 4), 255, np.uint8)
    pixels[0] = (255, 255, 255, 0)
    with pytest.raises(UserError, match="x.png: the colour 255 255 255 is transparent in places"):
        labels.read(Image.fromarray(pixels), "x.png")
    pixels[0] = 0
    assert labels.read(Image.fromarray(pixels), "x.png").tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_value_that_is_transparent_in_places(tmp_path, mode):
    """The same of grey with alpha, and of values of a palette."""
    labels = read_classes(write(tmp_path, "ground\nthing\n"))
    values, alpha = grey([0, 1, 1]), grey([9, 255, 0])
    picture = Image.merge(mode, (values, alpha))
    with pytest.raises(UserError, match="x.png: the value 1 is transparent in places; save the mask without"):
        labels.read(picture, "x.png")
    picture.putalpha(grey([0, 255, 9]))
    assert labels.read(picture, "x.png").tolist() == [[0, 1, 1]]


def test_palette_in_which_a_colour_is_transparent_in_places(tmp_path):
    """Going by colours 1 and 2 are one; by the pixels' values they are two."""
    mask = palette_mask({0: (0, 0, 0), 1: (255, 0, 0), 2: (255, 0, 0)}, [0, 1, 2])
    mask.info["transparency"] = bytes([255, 255, 0])
    with pytest.raises(UserError, match="mask.png: the colour 255 0 0 is transparent in places"):
        read(tmp_path, "a 0 0 0\nb 255 0 0", mask)
    assert read(tmp_path, "a\nb\nc", mask).tolist() == [[0, 1, 2]]


def test_palette_of_greys_and_a_colour_that_does_not_occur(tmp_path):
    """Colours to look at: other masks of the set have the third class."""
    mask = grey([0, 1])
    mask.putpalette([0, 0, 0, 255, 255, 255, 255, 0, 0])
    assert read(tmp_path, "a\nb\nc", mask).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("classes", "levels", "expected"),
    [
        ("a\nb = 7\nc = 9", [0, 9, 7], [0, 2, 1]),  # only the greys are classes
        ("a\nb = 255", [0, 255], [0, 1]),
        ("a\nb", [0, 255], [0, 1]),  # as white of one bit
        ("a\nb\nc", [0, 1, 255], [0, 1, None]),
        ("a\nb\nc", [0, 127, 255], [0, 1, 2]),  # a ramp, to look at
        ("a\nb\nc", [0, 1, 2], [0, 1, 2]),
        ("a\nb\nc", [0, 0, 0], [0, 1, 2]),
        ("a = 0\nb = 2\nc = 40\nd = 90", [0, 40, 90], [0, 2, 3]),
        ("a\nb\nc\nd", [0, 2, 3], None),  # either
        ("a\nb\nc", [0, 255], None),
        ("a 0 0 0\nb 1 0 0\nc 2 0 0\nd 3 0 0", [0, 2, 3], None),
    ],
)
@pytest.mark.parametrize("name", ["mask.png", "mask.gif"])
def test_palettes_of_greys(tmp_path, classes, levels, expected, name):
    """A GIF's palette numbers the levels that occur, each file's in its own way."""
    mask = grey([*range(len(levels))])
    mask.putpalette([level for level in levels for _ in "rgb"])
    if expected is None or None in expected:
        with pytest.raises(UserError, match=f"{name}: .*; save .* as grey, without a palette$"):
            read(tmp_path, classes, mask, name)
    elif name == "mask.png" or len({*levels}) == len(levels):  # Pillow's GIFs have each level once
        assert read(tmp_path, classes, mask, name).tolist() == [expected]


def test_colours_that_smoothing_has_mixed(tmp_path):
    classes = np.array([[0, 0, 0], [200, 20, 30], [10, 90, 220]], np.uint8)
    rows, columns = np.mgrid[:90, :90]
    mask = Image.fromarray(classes[np.add(rows**2 + columns**2 < 3000, rows + 2 * columns > 200, dtype=int)])
    text = "a 0 0 0\nb 200 20 30\nc 10 90 220"
    for turned in (mask.rotate(7, Image.Resampling.BICUBIC), mask.resize((47, 41))):
        with pytest.raises(UserError, match="colours of no class, such as .*smoothing .antialiasing. or res"):
            read(tmp_path, text, turned)
    others = np.random.RandomState(0).randint(0, 256, (5, 9, 3)).astype(np.uint8)
    with pytest.raises(UserError, match="names no such: write `NAME "):
        read(tmp_path, text, Image.fromarray(others))


def test_minus_one_is_ignored_where_it_is_named(tmp_path):
    (tmp_path / "classes.txt").write_text("a\nb\nignore = -1\n")
    Image.fromarray(np.array([[-1, 0, 1]], np.int32)).save(tmp_path / "m.tif")
    labels = read_classes(str(tmp_path / "classes.txt"))
    assert labels.read(Image.open(tmp_path / "m.tif"), "m.tif").tolist() == [[255, 0, 1]]
    assert labels.read(Image.fromarray(np.array([[0, 1]], np.uint8)), "m.png").tolist() == [[0, 1]]
    with pytest.raises(UserError, match="value 255"):  # not the last of the table
        labels.values.pop(255)
        labels.tables.clear()
        labels.read(Image.fromarray(np.array([[0, 255]], np.uint8)), "m.png")


def test_negative_values_can_only_be_ignored(tmp_path):
    """As the values without data of maps; the lines that are proposed can be pasted."""
    mask = Image.fromarray(np.array([[-9999, 0, 1, 2147483647]], np.int32))
    assert describe_pixels([mask]).startswith("`ignore = -9999` (25.0%), `NAME = 0`")
    with pytest.raises(UserError, match="names no such: write `ignore = -9999`$"):
        read(tmp_path, "a\nb\nignore = 2147483647", mask, "mask.tif")
    text = "a\nb\nignore = -9999 2147483647"
    assert read(tmp_path, text, mask, "mask.tif").tolist() == [[255, 0, 1, 255]]


def test_white_of_one_bit_is_1_or_255(tmp_path):
    """What makes PNGs smaller turns grey masks of 0 and 255 into such, also where 255 is ignored."""
    bits = grey([0, 255]).convert("1")
    assert read(tmp_path, "a\nb", bits).tolist() == [[0, 1]]
    assert read(tmp_path, "a\nb = 255", bits).tolist() == [[0, 1]]
    assert read(tmp_path, "a\nb = 9\nc = 3\nignore = 255", bits).tolist() == [[0, 255]]
    for text in ("a\nb\nc", "a\nb\nignore = 255"):
        with pytest.raises(UserError, match="a mask of 1 bit, of which white can be the value 1 or 255"):
            read(tmp_path, text, bits)
        assert read(tmp_path, text, grey([0, 0]).convert("1")).tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_tiff_whose_0_is_white(tmp_path, dtype):
    """tifffile writes arrays of bool so, ImageJ inverted ones; Pillow turns them around, others do not."""
    tifffile = pytest.importorskip("tifffile")
    photometric = {} if dtype is bool else {"photometric": "miniswhite"}
    tifffile.imwrite(tmp_path / "m.tif", np.array([[0, 1]]).astype(dtype), **photometric)
    write(tmp_path, "a\nb")
    with pytest.raises(UserError, match="m.tif: a mask in a TIFF whose 0 is white; programs disagree"):
        read_classes(str(tmp_path / "classes.txt")).read(Image.open(tmp_path / "m.tif"), "m.tif")


@pytest.mark.parametrize("name", ["mask.jpg", "mask.png", "mask.tif"])
def test_mask_that_jpeg_has_blurred(tmp_path, name):
    """Whatever its ending, and also where all that JPEG has made of it are values of classes."""
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 2
    options = {"compression": "jpeg"} if name == "mask.tif" else {"format": "JPEG", "quality": 50}
    Image.fromarray(mask).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=f"{name}: a mask in a JPEG, .*; save masks as PNGs"):
        open_image(str(tmp_path / name), load=False, is_mask=True)


@pytest.mark.parametrize(("kind", "bands"), [(2, 3), (4, 2), (6, 4)])  # PNG's types RGB, LA, RGBA
def test_colours_of_16_bits_are_refused(tmp_path, kind, bands):
    """Pillow reads their high bytes, which make one of two colours."""
    rows = b"".join(b"\0" + bytes(2 * bands * 5) for _ in range(4))
    header = (5).to_bytes(4, "big") + (4).to_bytes(4, "big") + bytes([16, kind, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        sum_ = zlib.crc32(name + content).to_bytes(4, "big")
        data += len(content).to_bytes(4, "big") + name + content + sum_
    (tmp_path / "mask.png").write_bytes(data)
    assert Image.open(tmp_path / "mask.png").size == (5, 4)
    with pytest.raises(UserError, match="mask.png: a mask of 16 bits with colours or alpha.*save it with 8"):
        open_image(str(tmp_path / "mask.png"), is_mask=True)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(["grey", "rgb", "ids"]), ignored=st.booleans())
def test_mapping_against_a_slow_reference(data, kind, ignored, tmp_path_factory):
    byte = st.integers(0, 255)
    keys = {"grey": byte, "rgb": st.tuples(byte, byte, byte), "ids": st.integers(0, 10**6)}[kind]
    names = data.draw(st.lists(keys, min_size=2 + ignored, max_size=30, unique=True))
    pixels = data.draw(arrays(np.int64, (7, 9), elements=st.integers(0, len(names) - 1)))
    lines = []
    for i, key in enumerate(names):
        name = "ignore" if ignored and i == 1 else f"c{i}"
        lines.append(f"{name} {' '.join(map(str, key))}" if kind == "rgb" else f"{name} = {key}")
    dtype = {"grey": np.uint8, "rgb": np.uint8, "ids": np.int32}[kind]
    picture = Image.fromarray(np.array(names, dtype)[pixels])
    folder = tmp_path_factory.getbasetemp()
    found = read(folder, "\n".join(lines), picture, "mask.tif" if kind == "ids" else "mask.png")
    for y in range(7):
        for x in range(9):
            i = pixels[y, x]
            expected = i - (ignored and i > 1)
            assert found[y, x] == (255 if ignored and i == 1 else expected)


def test_pixels_of_masks_without_a_description():
    pictures = [grey([0, 0, 0, 255]), grey([0, 0, 0, 7])]
    assert describe_pixels(pictures) == "`NAME = 0` (75.0%), `NAME = 255` (12.5%), `NAME = 7` (12.5%)"
    assert describe_pixels([Image.new("RGBA", (2, 2), (1, 2, 3, 4))]) == "`NAME 1 2 3` (100.0%)"
    assert describe_pixels([grey(range(200))]).endswith(" and 170 more")
    palettes = grey([0, 1, 1, 1]), grey([1, 0, 0, 0])  # the same picture, its colours in another order
    palettes[0].putpalette([0, 0, 0, 9, 8, 7])
    palettes[1].putpalette([9, 8, 7, 0, 0, 0])
    assert describe_pixels(palettes) == "`NAME 9 8 7` (75.0%), `NAME 0 0 0` (25.0%)"
    assert describe_pixels([palettes[0]] * 2) == "`NAME = 1` (75.0%), `NAME = 0` (25.0%)"
    assert describe_pixels([grey([0, 1]).convert("1")]).startswith("`NAME = 0`")
    noise = np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8)
    assert "look like photos and not like masks" in describe_pixels([Image.fromarray(noise)])


def only_zero_and_255(root) -> None:
    for path in (root / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8)).save(path)


def test_objects_that_would_be_ignored_end_the_run(cli, smallest, tmp_path):
    only_zero_and_255(tmp_path / "set")
    write(tmp_path / "set", "background\nthing\n")
    model = deeplab.build("tiny", False, 2, 32, True, aspp_rates=[6], image_pooling=False)
    torch.save(model.state_dict(), "x.pth")
    for flags in (["--train", "--exp", "x"], ["--checkpoint", "x.pth"]):
        status, _, err = cli(*flags, *smallest)
        assert status == 1 and one_line(err) and not (tmp_path / "data").exists()
        assert "the masks hold only 'background' and 255, and 255 is ignored: if it is 'thing', write" in err
        assert "`thing = 255` in " in err
    write(tmp_path / "set", "background\nthing = 255\n")
    status, out, _ = cli("--train", "--exp", "x", "--epochs", 1, *smallest)
    assert status == 0 and "have no pixel" not in out
    status, out, _ = cli("--exp", "x", *smallest[:4])
    assert status == 0 and "IoU thing: " in out and "IoU thing: -" not in out

    # 255 is ignored on purpose, so the run begins, with a word about the class that has no pixel.
    write(tmp_path / "set", "background\nthing\nother = 2\nignore = 255\n")
    mask = np.array(Image.open(tmp_path / "set/masks/train0.png"))
    mask[0] = 2
    Image.fromarray(mask).save(tmp_path / "set/masks/train0.png")
    status, out, _ = cli("--train", "--exp", "y", "--epochs", 1, *smallest)
    assert status == 0 and "of these classes the train masks that were looked at have no pixel: thing" in out


@pytest.mark.parametrize(
    ("ignored", "found"), [("255", "of all classes 'background' alone"), ("0 255", "none")]
)
def test_masks_that_show_nothing_to_learn(cli, smallest, tmp_path, ignored, found):
    """The loss would be 0, and the mean IoU 100 or none."""
    only_zero_and_255(tmp_path / "set")
    first = "background = 0" if ignored == "255" else "background = 7"
    write(tmp_path / "set", f"{first}\nthing = 1\nignore = {ignored}\n")
    status, out, err = cli("--train", "--exp", "y", "--epochs", 1, *smallest)
    assert status == 1 and one_line(err) and f"the masks to train on show {found}" in err
    status, _, err = cli("--check", *smallest[:4])
    assert status == 1 and one_line(err) and f"the masks to train on show {found}" in err
    assert cli("--predict", "set/images/val0.jpg", "--exp", "y", *smallest[:2])[0] == 1  # nothing is saved


def test_colours_to_ignore_say_nothing_of_values(tmp_path):
    """255 in grey masks may be a class all the same; what RGB masks ignore by a colour is none."""
    root = make_list_dataset(tmp_path / "set", classes=())
    only_zero_and_255(root)
    write(root, "background 0 0 0\nthing 9 9 9\nignore 255 255 255\n")
    with pytest.raises(UserError, match="write `thing = 255`"):
        unseen_classes(ListSegmentation(str(root), "val"), "val")
    for path in (root / "masks").iterdir():
        Image.open(path).convert("RGB").save(path)
    assert unseen_classes(ListSegmentation(str(root), "val"), "val") == ["thing"]


def test_table_of_labels_is_seen_when_it_is_full():
    """Threads share it."""

    class Tables(dict):
        def __setitem__(self, bound, table):
            assert table[[0, 47, 48]].tolist() == [0, 1, 255]
            super().__setitem__(bound, table)

    labels = Labels("ab", [[0, 0, 0]] * 2, {0: 0, 47: 1})
    labels.tables = Tables()
    assert labels.read(grey([0, 47]), "mask.png").tolist() == [[0, 1]] and list(labels.tables) == [256]


def test_labels_travel_to_workers(tmp_path):
    """Sets with masks of colours are read alike by 0 and 2 processes."""
    root = make_list_dataset(tmp_path / "set")
    for path in (root / "masks").iterdir():
        colors = np.array([[5, 5, 5], [250, 1, 2], [3, 4, 250]], np.uint8)
        Image.fromarray(colors[np.array(Image.open(path))]).save(path)
    write(root, "a 5 5 5\nb 250 1 2\nc 3 4 250\n")
    dataset = ListSegmentation(str(root), "val")
    assert set(np.unique(dataset[0][1])) == {0, 1}
    batches = [
        [masks for _, masks, _ in load_batches(dataset, [[0], [1, 2]], workers, torch.device("cpu"))]
        for workers in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))

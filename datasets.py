"""Data sets: lists of image and mask files, read as uint8 tensors, and the joint augmentation of training.

A sample is (image, mask): uint8 (3, H, W) RGB and uint8 (H, W) labels with 255 to ignore. Evaluation gives it
whole, training gives a random crop. `collate` pads samples to one size; normalising is the model's, on its
device.
"""

import colorsys
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from utils import IGNORE_INDEX, Palette, UserError, save_image, save_mask, voc_palette, write_whole

VOC_CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
]
# name, label in _labelIds.png, colour; the position is the label that is trained on (trainId)
CITYSCAPES_CLASSES = [
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
]


class SegmentationDataset(Dataset):
    """Pairs of image and mask files.

    Indexed by an integer, or by (epoch, index): the randomness of a training sample follows from (seed,
    epoch, index) alone, so it does not depend on which worker draws it, or when.

    Args:
        pairs: (image path, mask path); without a mask every pixel is to be ignored.
        classes, palette: name and colour of each class.
        train: give random crops instead of whole samples.
        crop_size: height and width of the crops.
        eval_size: (height, width) to which evaluation pads what fits into it.
    """

    labels: np.ndarray | None = None  # table from the mask file's labels to the classes, where they differ
    label_ids: np.ndarray | None = None  # and back, for the test server

    def __init__(
        self,
        pairs: list[tuple[str, str | None]],
        classes: list[str],
        palette: Palette,
        train: bool,
        crop_size: int,
        seed: int = 0,
        eval_size: tuple[int, int] = (0, 0),
    ):
        self.pairs, self.classes, self.palette = pairs, classes, palette
        self.train, self.crop_size, self.seed, self.eval_size = train, crop_size, seed, eval_size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.read(index)
        if self.train:
            image, mask = random_crop(
                image, mask, self.crop_size, np.random.default_rng((self.seed, epoch, index))
            )
        return image, mask

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The whole sample.

        Raises:
            UserError: if a file cannot be read, the sizes differ, or a label is not one of the classes.
        """
        image_path, mask_path = self.pairs[index]
        image_picture = open_image(image_path)
        image = torch.from_numpy(np.array(image_picture.convert("RGB"))).permute(2, 0, 1)
        if mask_path is None:
            return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
        picture = open_image(mask_path)
        if picture.mode not in ("P", "L", "1"):
            raise UserError(f"{mask_path}: a mask has one byte of label a pixel, but this is {picture.mode}")
        check_sizes(image_picture, picture)
        mask = np.array(picture, dtype=np.uint8)
        if self.labels is not None and not mask_path.endswith("_labelTrainIds.png"):
            mask = self.labels[mask]
        mask = torch.from_numpy(mask)
        # One more wraps 255 to 0, so that what is to be ignored needs no mask of its own.
        if (mask.numpy() + np.uint8(1)).max() > len(self.classes):
            label = int(mask[mask != IGNORE_INDEX].max())
            raise UserError(
                f"{mask_path}: label {label}, but the classes are 0 to {len(self.classes) - 1} (255: ignore)"
            )
        return image, mask

    def drop_bad(self, decode: bool) -> list[str]:
        """Leave out the samples that cannot be used, and return what is wrong with each.

        Looks at the files' headers: their format and sizes; with `decode`, at every pixel.
        """

        def fault(index: int) -> str | None:
            try:
                if decode:
                    self.read(index)
                else:
                    image, mask = (path and open_image(path, load=False) for path in self.pairs[index])
                    check_sizes(image, mask)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            faults = list(pool.map(fault, range(len(self.pairs))))
        self.pairs = [pair for pair, found in zip(self.pairs, faults, strict=True) if not found]
        return [found for found in faults if found]

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which `collate` pads a sample: the crop's, `eval_size`, or the next multiples of 32,
        plus 1."""
        if self.train:
            return self.crop_size, self.crop_size
        if height <= self.eval_size[0] and width <= self.eval_size[1]:
            return self.eval_size
        return (height + 30) // 32 * 32 + 1, (width + 30) // 32 * 32 + 1

    def name(self, index: int) -> str:
        """The name of the sample's mask file, or without one that of its image, without the ending."""
        return os.path.splitext(os.path.basename(self.pairs[index][1] or self.pairs[index][0]))[0]

    def save(self, folder: str, index: int, labels: np.ndarray, split: str) -> None:
        """Write predicted labels (H, W) as a palette PNG, those of the split test as and where its server
        wants them."""
        name = self.result_name(index) if split == "test" else self.name(index)
        if split == "test" and self.label_ids is not None:
            save_image(f"{folder}/{name}.png", Image.fromarray(self.label_ids[labels]))
        else:
            save_mask(f"{folder}/{name}.png", labels, self.palette)

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Samples to a batch, padded on the right and below: images with 0, masks with `IGNORE_INDEX`.

        Returns:
            images uint8 (N, 3, H, W) in channels_last order, masks uint8 (N, H, W), and the sizes of the
            samples within, int64 (N, 2).
        """
        height, width = self.padded_size(*samples[0][1].shape)
        images = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        masks = torch.full((len(samples), height, width), IGNORE_INDEX, dtype=torch.uint8)
        for i, (image, mask) in enumerate(samples):
            h, w = mask.shape
            images[i, :, :h, :w] = image
            masks[i, :h, :w] = mask
        batch = images, masks, torch.tensor([mask.shape for _, mask in samples])
        if get_worker_info():
            # The loader would do it after this, in a thread whose errors nobody hears: too little shared
            # memory would leave the training waiting for ever.
            for tensor in batch:
                tensor.share_memory_()
        return batch

    def eval_batches(self, batch_size: int) -> list[list[int]]:
        """All indices once, in batches of samples that pad to the same size (read from the files'
        headers)."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, (image_path, _) in enumerate(self.pairs):
            width, height = open_image(image_path, load=False).size
            groups.setdefault(self.padded_size(height, width), []).append(index)
        return [
            group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)
        ]


class VOCSegmentation(SegmentationDataset):
    """PASCAL VOC 2012 under `root`/VOC2012, by the lists train_aug.txt and val.txt, or the images of the test
    server.

    Raises:
        UserError: if the lists or files that they name are missing.
    """

    classes, palette = VOC_CLASSES, voc_palette(21)

    def __init__(
        self, root: str, train: bool = True, crop_size: int = 513, seed: int = 0, split: str | None = None
    ):
        folder = os.path.join(root, "VOC2012")
        if split == "test":
            names = read_lines(
                os.path.join(folder, "ImageSets/Segmentation/test.txt"), "unpack VOC2012test.tar there"
            )
            pairs = [(os.path.join(folder, "JPEGImages", f"{name.strip()}.jpg"), None) for _, name in names]
        else:
            split = split or ("train" if train else "val")
            list_name = "train_aug" if split == "train" else split
            pairs = read_list(folder, list_name, "`python main.py --download pascal` fetches the data set")
        super().__init__(pairs, self.classes, self.palette, train, crop_size, seed, (513, 513))

    def result_name(self, index: int) -> str:
        """Where the test server looks for a prediction."""
        return f"results/VOC2012/Segmentation/comp6_test_cls/{self.name(index)}"


class Cityscapes(SegmentationDataset):
    """Cityscapes under `root`/leftImg8bit and `root`/gtFine, 19 classes.

    The masks are the _labelTrainIds.png of the preparation script where they exist, else made from
    _labelIds.png; the split test has none.

    Raises:
        UserError: if there are no images, or an image has no mask.
    """

    classes = [name for name, _, _ in CITYSCAPES_CLASSES]
    palette = [color for _, _, color in CITYSCAPES_CLASSES]
    label_ids = np.array([label for _, label, _ in CITYSCAPES_CLASSES], np.uint8)
    labels = np.full(256, IGNORE_INDEX, np.uint8)
    labels[label_ids] = range(len(CITYSCAPES_CLASSES))

    def __init__(
        self, root: str, train: bool = True, crop_size: int = 769, seed: int = 0, split: str | None = None
    ):
        split = split or ("train" if train else "val")
        folder = os.path.join(root, "leftImg8bit", split)
        names = sorted(glob("*/*_leftImg8bit.png", root_dir=folder))
        if not names:
            raise UserError(
                f"no images under {folder}: unzip leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
                f"(from cityscapes-dataset.com) in {root}, or name another place by --data_root"
            )
        pairs = []
        for name in names:
            stem = os.path.join(root, "gtFine", split, name.removesuffix("leftImg8bit.png"))
            masks = [f"{stem}gtFine_labelTrainIds.png", f"{stem}gtFine_labelIds.png"]
            mask = None if split == "test" else next(filter(os.path.exists, masks), "")
            if mask == "":
                raise UserError(f"{masks[1]} is missing: unzip gtFine_trainvaltest.zip in {root}")
            pairs.append((os.path.join(folder, name), mask))
        super().__init__(pairs, self.classes, self.palette, train, crop_size, seed, (1025, 2049))

    def result_name(self, index: int) -> str:
        """Where the test server looks for a prediction: the frame's name begins the file's."""
        return f"results/{self.name(index).removesuffix('_leftImg8bit')}_pred_labelIds"


class ListSegmentation(SegmentationDataset):
    """A folder with list/train.txt, list/val.txt and classes.txt (`name` or `name r g b` a line).

    Raises:
        UserError: if one of these, or a file that the list names, is missing or malformed.
    """

    def __init__(
        self, root: str, train: bool = True, crop_size: int = 513, seed: int = 0, split: str | None = None
    ):
        classes, palette = read_classes(os.path.join(root, "classes.txt"))
        split = split or ("train" if train else "val")
        pairs = read_list(root, split, "--data_root names the folder that holds it")
        super().__init__(pairs, classes, palette, train, crop_size, seed)


class Shapes(ListSegmentation):
    """The embedded data set: small scenes of coloured shapes, drawn at `root` when first asked for."""

    def __init__(self, root: str, *args, **kwargs):
        if not os.path.exists(root):
            draw_shapes(root)
        super().__init__(root, *args, **kwargs)


def open_image(path: str, load: bool = True) -> Image.Image:
    """The image in a file, decoded if `load`.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        picture = Image.open(path)
        if load:
            picture.load()
        return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).replace(repr(path), "it").split())
        raise UserError(f"cannot read {path}: {reason}") from error


def check_sizes(image: Image.Image, mask: Image.Image | None) -> None:
    """Raises:
    UserError: if an image and its mask, as `open_image` gives them, differ in size.
    """
    if mask and mask.size != image.size:
        sizes = ["x".join(map(str, picture.size)) for picture in (mask, image)]
        raise UserError(f"{mask.filename} is {sizes[0]}, but its image {image.filename} is {sizes[1]}")


def read_lines(path: str, remedy: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1.

    Raises:
        UserError: if there are none, or the file cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [
                (number, line) for number, line in enumerate(file.read().splitlines(), 1) if line.strip()
            ]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', 'not text')}): {remedy}") from error
    if not lines:
        raise UserError(f"{path} is empty: {remedy}")
    return lines


def read_list(root: str, split: str, remedy: str) -> list[tuple[str, str]]:
    """Pairs of paths from `root`/list/`split`.txt: `/image /mask` a line, relative to `root`.

    Raises:
        UserError: if the list or a file that it names is missing, or a line is malformed.
    """
    path = os.path.join(root, "list", f"{split}.txt")
    pairs = []
    for number, line in read_lines(path, f"{remedy}; --dataset shapes needs no files"):
        names = line.split()
        if len(names) != 2:
            raise UserError(f"{path}:{number}: expected `/image /mask`, got {line!r}")
        pair = tuple(os.path.join(root, name.lstrip("/")) for name in names)
        for name in pair:
            if not os.path.isfile(name):
                raise UserError(f"{path}:{number} names {name}, which is not there")
        pairs.append(pair)
    return pairs


def make_voc_lists(root: str) -> None:
    """Write `root`/VOC2012/list/val.txt and train_aug.txt from what is there: the validation images of VOC
    2012, and every other mask of SegmentationClassAug (10,582 of them).

    Raises:
        UserError: if the masks or VOC's own list are missing.
    """
    folder = os.path.join(root, "VOC2012")
    path = os.path.join(folder, "ImageSets", "Segmentation", "val.txt")
    masks = os.path.join(folder, "SegmentationClassAug")
    try:
        with open(path, encoding="utf-8") as file:
            val = file.read().split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not text")
        raise UserError(
            f"cannot read {path} ({reason}): it is part of VOCtrainval_11-May-2012.tar"
        ) from error
    train = sorted({name.removesuffix(".png") for name in glob("*.png", root_dir=masks)} - set(val))
    if not val or not train:
        raise UserError(f"no lists can be made from {masks} and {path}: one of them holds too little")
    for split, names in (("val", val), ("train_aug", train)):
        lines = "".join(f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names)
        write_whole(
            os.path.join(folder, "list", f"{split}.txt"), lambda file, text=lines: file.write(text.encode())
        )


def read_classes(path: str) -> tuple[list[str], Palette]:
    """Names and colours from a file with `name` or `name r g b` a line; the VOC palette gives colours not
    named.

    Raises:
        UserError: if the file is missing or a line is malformed.
    """
    classes, palette = [], voc_palette()
    for number, line in read_lines(path, "it names the classes, one a line"):
        words, color = line.split(), []
        if len(words) >= 4 and all(word.isdecimal() for word in words[-3:]):
            words, color = words[:-3], [int(word) for word in words[-3:]]
        name = " ".join(words)
        if name in classes or max(color, default=0) > 255 or len(classes) == IGNORE_INDEX:
            expected = "at most 255 different names, each with a colour of 0 to 255 or with none"
            raise UserError(f"{path}:{number}: {line!r}, expected {expected}")
        if color:
            palette[len(classes)] = color
        classes.append(name)
    return classes, palette[: len(classes)]


def random_crop(
    image: Tensor, mask: Tensor, crop_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random scale (log-uniform in 0.5..2), crop and left-right flip of a sample (paper, section 4).

    The window of the source is cut out first and only that is resized, the image antialiased, the mask to the
    nearest. The result is at most `crop_size` in each direction, and smaller where the scaled image is.
    """
    scale = 2 ** rng.uniform(-1, 1)
    height, width = (min(side, max(1, round(crop_size / scale))) for side in mask.shape)
    top, left = (
        int(rng.integers(whole - part + 1)) for whole, part in zip(mask.shape, (height, width), strict=True)
    )
    size = [min(crop_size, max(1, round(side * scale))) for side in (height, width)]
    image = image[:, top : top + height, left : left + width]
    mask = mask[top : top + height, left : left + width]
    # Batched so that torch sees channels_last: that resizes in half the time.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    image = F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    labels = Image.fromarray(mask.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    mask = torch.from_numpy(np.array(labels))
    if rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    return image, mask


class TrainBatches(Sampler):
    """The batches of a whole training run, as lists of (epoch, index), from iteration `start` to `max_iter`.

    One sampler for all epochs keeps the loader's workers busy across their borders, and makes resuming a
    matter of `start`. Each epoch is a permutation drawn from (seed, epoch). Its last batch is kept unless
    smaller than `min_last`. Of several processes, each has its own `rank` in `world` and part of every batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        epochs: int,
        seed: int,
        min_last: int = 1,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ):
        self.length, self.batch_size, self.seed, self.start = length, batch_size, seed, start
        self.rank, self.world = rank, world
        self.per_epoch = length // batch_size + (length % batch_size >= min_last)
        self.max_iter = epochs * self.per_epoch

    def __len__(self) -> int:
        return self.max_iter - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_of = None
        for iteration in range(self.start, self.max_iter):
            epoch, batch = divmod(iteration, self.per_epoch)
            if order_of != epoch:
                order, order_of = np.random.default_rng((self.seed, epoch)).permutation(self.length), epoch
            first = batch * self.batch_size
            mine = order[first : first + self.batch_size][self.rank :: self.world]
            yield [(epoch, int(index)) for index in mine]


def draw_shapes(root: str) -> None:
    """Draw the `shapes` data set at `root`: 240 scenes to train, 60 to validate, JPEG and PNG files of
    160x128.

    numpy's frozen RandomState makes them the same on every machine. They appear at `root` all at once.
    """

    def ring(count: int) -> np.ndarray:
        return np.exp(2j * np.pi * np.arange(count) / count)

    cross = np.outer(ring(4), [1 - 1j / 3, 1 + 1j / 3, 1 / 3 + 1j / 3]).flatten()
    outlines = {
        "circle": ring(48),
        "square": ring(4),
        "triangle": ring(3),
        "cross": cross,
    }  # in the complex plane
    hues = {"circle": 0.0, "square": 0.6, "triangle": 0.3, "cross": 0.13}  # a class's typical colour
    classes = ["background", *outlines]
    palette = [(0, 0, 0), (220, 50, 50), (60, 90, 230), (60, 180, 75), (240, 190, 40)]

    temporary = f"{root.rstrip('/')}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    rng = np.random.RandomState(0)
    for split, count in (("train", 240), ("val", 60)):
        lines = []
        for i in range(count):
            ground = rng.randint(50, 190, (5, 6)).astype(np.uint8)
            image = Image.fromarray(ground).resize((160, 128), Image.BICUBIC).convert("RGB")
            mask = Image.new("L", image.size)
            for _ in range(rng.randint(2, 4)):
                name = classes[rng.randint(1, len(classes))]
                center = complex(rng.uniform(16, 144), rng.uniform(16, 112))
                outline = center + outlines[name] * rng.uniform(22, 44) * np.exp(2j * np.pi * rng.uniform())
                points = list(zip(outline.real.tolist(), outline.imag.tolist(), strict=True))
                hue = (hues[name] + rng.uniform(-0.06, 0.06)) % 1
                color = colorsys.hsv_to_rgb(hue, rng.uniform(0.5, 0.9), rng.uniform(0.5, 0.95))
                ImageDraw.Draw(image).polygon(points, fill=tuple(round(255 * value) for value in color))
                ImageDraw.Draw(mask).polygon(points, fill=classes.index(name))
            noise = rng.normal(0, 8, (128, 160, 3))
            image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
            names = f"JPEGImages/{split}_{i:03}.jpg", f"SegmentationClass/{split}_{i:03}.png"
            for name in names:
                os.makedirs(os.path.dirname(os.path.join(temporary, name)), exist_ok=True)
            image.save(os.path.join(temporary, names[0]), quality=90)
            save_mask(os.path.join(temporary, names[1]), np.asarray(mask), palette)
            lines.append("/{} /{}\n".format(*names))
        os.makedirs(os.path.join(temporary, "list"), exist_ok=True)
        with open(os.path.join(temporary, "list", f"{split}.txt"), "w") as file:
            file.writelines(lines)
    with open(os.path.join(temporary, "classes.txt"), "w") as file:
        file.writelines(f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(classes, palette, strict=True))
    os.rename(temporary, root)

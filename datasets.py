"""Data sets: lists of image and mask files, read as uint8 tensors, and the joint augmentation of training.

A sample is (image, mask): uint8 (3, H, W) RGB and uint8 (H, W) labels with 255 to ignore. Evaluation gives it
whole, training gives a random crop. `collate` pads samples to one size; normalising is the model's, on its
device.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from glob import glob
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from deeplab import to_rgb, upright
from files.images import check_sizes, header_sizes, open_image
from files.lists import Pairs, find_samples, read_list
from files.masks import COLOR_MODES, Labels, describe_pixels, read_classes
from files.pictures import Palette, save_image, save_mask, voc_palette
from files.shapes import draw_shapes
from utils import IGNORE_INDEX, UserError, ahead, end_if_stopped, outlive_stop_signals, progress, read_lines

VOC_CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
]
# name, id in _labelIds.png, colour; the position is the label that is trained on (trainId)
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


class LabelCounts(NamedTuple):
    """Of each label, int64 (256,): its pixels, and the labelled pixels of all images that have it."""

    pixels: np.ndarray
    pixels_of_images: np.ndarray

    def median_frequency(self, num_classes: int) -> list[float]:
        """Weights that balance the classes (Eigen & Fergus 2015, https://arxiv.org/abs/1411.4734, section
        6.3.2): the median of all frequencies over that of the class, its share of the pixels of the images
        that have it. 1 for a class that no image has."""
        pixels, pixels_of_images = (counts[:num_classes] for counts in self)
        seen = pixels > 0
        frequency = pixels[seen] / pixels_of_images[seen]
        weights = np.ones(num_classes)
        weights[seen] = np.median(frequency) / frequency
        return weights.tolist()


class SegmentationDataset(Dataset):
    """Pairs of image and mask files.

    Indexed by an integer, or by (epoch, index): the randomness of a training sample follows from (seed,
    epoch, index) alone, so it does not depend on which worker draws it, or when.

    Args:
        pairs: (image path, mask path); without a mask every pixel is to be ignored.
        labels: the classes, and what the pixels of the masks mean.
        crop_size: give random crops of this height and width, to train on, instead of whole samples.
        seed: of the random crops.
        eval_size: (height, width) to which whole samples that fit into it are padded.
    """

    default_root: str | None = None  # where the data set lies if no flag says otherwise

    def __init__(
        self,
        pairs: Pairs | list[tuple[str, str | None]],
        labels: Labels,
        crop_size: int | None = None,
        seed: int = 0,
        eval_size: tuple[int, int] = (0, 0),
    ):
        self.pairs = pairs if isinstance(pairs, Pairs) else Pairs("", pairs)
        self.labels, self.crop_size, self.seed, self.eval_size = labels, crop_size, seed, eval_size
        self.sizes = np.zeros((0, 2), np.int32)  # height and width of each image, once `drop_bad` has looked

    @property
    def classes(self) -> Sequence[str]:
        return self.labels.classes

    @property
    def palette(self) -> Palette:
        return self.labels.palette

    @property
    def has_masks(self) -> bool:
        return self.pairs.masked > 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.read(index)
        if self.crop_size:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, mask = random_crop(image, mask, self.crop_size, rng)
        return image, mask

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The whole sample.

        Raises:
            UserError: if a file cannot be read, the sizes differ, or a pixel of the mask is no class.
        """
        image_path, mask_path = self.pairs[index]
        image = torch.from_numpy(np.array(to_rgb(open_image(image_path)))).permute(2, 0, 1)
        if len(self.sizes) and tuple(self.sizes[index]) != image.shape[1:]:
            raise UserError(f"{image_path} has changed its size since all sizes were read")
        if mask_path is None:
            return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
        mask = torch.from_numpy(self.read_mask(index))
        check_sizes(image_path, image.shape[:0:-1], mask_path, mask.shape[::-1])
        return image, mask

    def read_mask(self, index: int) -> np.ndarray:
        """The labels, uint8 (H, W), of a sample.

        Raises:
            UserError: if the file cannot be read, or a pixel of it is no class.
        """
        path = self.pairs[index][1]
        return self.labels_of(path).read(upright(open_image(path)), path)

    def labels_of(self, mask_path: str) -> Labels:
        return self.labels

    def drop_bad(self, decode: bool = False) -> list[str]:
        """Note the `sizes` of the images, leave out the samples that cannot be used, and return what is wrong
        with each.

        Looks at the files' headers: their format and sizes; with `decode`, at every pixel.

        Raises:
            Stopped: if a stop signal has come.
        """

        def decoded_size(index: int) -> tuple[int, int] | str:
            try:
                return tuple(self.read(index)[1].shape)
            except UserError as error:
                return str(error)

        sizes, faults = np.zeros((len(self), 2), np.int32), {}
        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            decoded = ahead(pool, decoded_size, range(len(self)))
            found = decoded if decode else header_sizes(self.pairs)
            for index, size in enumerate(progress(found, "reading images", len(self))):
                if isinstance(size, str):
                    faults[index] = size
                else:
                    sizes[index] = size
        kept = [index for index in range(len(self)) if index not in faults]
        self.pairs, self.sizes = self.pairs.take(kept) if faults else self.pairs, sizes[kept]
        return list(faults.values())

    def count_labels(self, indices: Sequence[int], what: str) -> LabelCounts:
        """Counts of the masks of these samples; `what` is said beside the progress bar.

        Raises:
            UserError: if a mask cannot be read, or a pixel of it is no class.
            Stopped: if a stop signal has come.
        """
        counts = LabelCounts(*np.zeros((2, 256), np.int64))
        with ThreadPoolExecutor() as pool:
            count = ahead(pool, lambda i: np.bincount(self.read_mask(i).ravel(), minlength=256), indices)
            for pixels in progress(count, what, len(indices)):
                counts.pixels[:] += pixels
                counts.pixels_of_images[pixels > 0] += pixels[:IGNORE_INDEX].sum()
        return counts

    def unseen_classes(self, most: int = 200) -> list[str]:
        """The classes that none of up to `most` masks has, spread evenly.

        Raises:
            UserError: if a mask cannot be used, or if they hold nothing but the first class and 255, which is
            ignored: then 255 is probably a class.
        """
        indices = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int)).tolist()
        pixels = self.count_labels(indices, "looking at masks").pixels
        unseen = [name for name, count in zip(self.classes, pixels, strict=False) if not count]
        if trap := self.trap(pixels):
            raise UserError(trap)
        return unseen

    def trap(self, pixels: np.ndarray) -> str | None:
        """What to say of masks with so many pixels of each label if what they show seems to be ignored."""
        first, *others = self.classes
        if not others or pixels[1 : len(self.classes)].any() or not pixels[IGNORE_INDEX]:
            return None
        if not self.labels.by_default:
            return None  # somebody has said that it is to be ignored
        by_color = IGNORE_INDEX in self.labels.colors.values()
        if by_color and open_image(self.pairs[0][1], load=False).mode in COLOR_MODES:
            return None
        mend = f"if it is {others[0]!r}, write `{others[0]} = 255` in {self.labels.source or 'classes.txt'}"
        held = f"only {first!r} and 255" if pixels[0] else "only 255"
        return f"the masks hold {held}, and 255 is ignored: {mend}"

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which `collate` pads a sample: the crop's, `eval_size`, or the next multiples of 32,
        plus 1."""
        if self.crop_size:
            return self.crop_size, self.crop_size
        if height <= self.eval_size[0] and width <= self.eval_size[1]:
            return self.eval_size
        return (height + 30) // 32 * 32 + 1, (width + 30) // 32 * 32 + 1

    def name(self, index: int) -> str:
        """The name of the sample's mask file, or without one that of its image, without the ending; with its
        folders where files of different folders share a name."""
        image, mask = self.pairs.names(index)
        return self.long_names.get(index) or os.path.splitext(os.path.basename(mask or image))[0]

    @cached_property
    def long_names(self) -> dict[int, str]:
        """Paths below the root, for samples whose file's name is another's, or one that evaluation uses."""

        def path(index: int) -> str:
            image, mask = self.pairs.names(index)
            return mask or image

        def stem(index: int) -> str:
            return os.path.splitext(path(index))[0]

        _, files = np.unique(np.fromiter(map(hash, map(path, range(len(self)))), np.int64), return_index=True)
        shared = repeated(os.path.basename(stem(index)).lower() for index in files)  # some disks see no case
        ambiguous = repeated(map(stem, files))  # a.png and a.bmp in one folder
        names = {}
        for index in range(len(self)):
            name = os.path.basename(stem(index)).lower()
            if hash(name) in shared or name in ("samples", "worst", "confusion"):
                below = path(index) if hash(stem(index)) in ambiguous else stem(index)
                parts = os.path.relpath(below, ".").split(os.sep)
                names[index] = os.path.join(*(part for part in parts if part != os.pardir))
        return names

    def save(self, folder: str, index: int, labels: np.ndarray) -> None:
        """Write predicted labels (H, W), as a palette PNG."""
        save_mask(f"{folder}/{self.name(index)}.png", labels, self.palette)

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
            try:
                for tensor in batch:
                    tensor.share_memory_()
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                way_out = "lower --workers, or allow more shared memory (docker run --shm-size 8g)"
                raise UserError(
                    f"a batch cannot be shared between processes ({reason}): {way_out}"
                ) from error
        return batch

    def eval_batches(self, batch_size: int) -> list[list[int]]:
        """All indices once, in batches of samples that pad to the same size; known after `drop_bad`."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(self.sizes):
            groups.setdefault(self.padded_size(*size), []).append(index)
        return [
            group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)
        ]

    def eval_shapes(self, batch_size: int) -> set[tuple[int, int, int]]:
        """The (N, H, W) that `eval_batches` have."""
        batches = self.eval_batches(batch_size)
        return {(len(batch), *self.padded_size(*self.sizes[batch[0]])) for batch in batches}


class VOCSegmentation(SegmentationDataset):
    """PASCAL VOC 2012 under `root`/VOC2012, by the lists train_aug.txt and val.txt, or the images of the test
    server.

    Raises:
        UserError: if the lists are missing or malformed.
    """

    default_root = "data/VOCdevkit"
    labels = Labels(VOC_CLASSES, voc_palette(21))

    def __init__(self, root: str, split: str = "train", crop_size: int | None = None, seed: int = 0):
        self.split, folder = split, os.path.join(root, "VOC2012")
        if split == "test":
            path = os.path.join(folder, "ImageSets/Segmentation/test.txt")
            names = (name.strip() for _, name in read_lines(path, "unpack VOC2012test.tar there"))
            pairs = Pairs(folder, ((f"JPEGImages/{name}.jpg", None) for name in names))
        else:
            list_name = "train_aug" if split == "train" else split
            pairs = read_list(folder, list_name, "`python main.py --download pascal` fetches the data set")
        super().__init__(pairs, self.labels, crop_size, seed, (513, 513))

    def name(self, index: int) -> str:
        """As for all; for the split test with the folders in which its server looks for it."""
        name = super().name(index)
        return f"results/VOC2012/Segmentation/comp6_test_cls/{name}" if self.split == "test" else name


class Cityscapes(SegmentationDataset):
    """Cityscapes under `root`/leftImg8bit and `root`/gtFine, 19 classes.

    The masks are the _labelTrainIds.png of the preparation script where they exist, else made from
    _labelIds.png; the split test has none.

    Raises:
        UserError: if there are no images, or an image has no mask.
    """

    default_root = "data/cityscapes"
    ids = [number for _, number, _ in CITYSCAPES_CLASSES]
    names, colors = ([each[i] for each in CITYSCAPES_CLASSES] for i in (0, 2))
    labels = Labels(names, colors, {number: i for i, number in enumerate(ids)}, others_ignored=True)
    train_ids = Labels(names, colors)

    def __init__(self, root: str, split: str = "train", crop_size: int | None = None, seed: int = 0):
        self.split, folder = split, os.path.join(root, "leftImg8bit", split)
        names = sorted(glob("*/*_leftImg8bit.png", root_dir=folder))
        if not names:
            raise UserError(
                f"no images under {folder}: unzip leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
                f"(from cityscapes-dataset.com) in {root}, or name another place by --data_root"
            )
        pairs = []
        for name in names:
            stem = f"gtFine/{split}/{name.removesuffix('leftImg8bit.png')}gtFine_"
            masks = [f"{stem}labelTrainIds.png", f"{stem}labelIds.png"]
            there = [mask for mask in masks if os.path.exists(os.path.join(root, mask))]
            if not there and split != "test":
                raise UserError(f"{root}/{masks[1]} is missing: unzip gtFine_trainvaltest.zip in {root}")
            pairs.append((f"leftImg8bit/{split}/{name}", there[0] if split != "test" else None))
        super().__init__(Pairs(root, pairs), self.labels, crop_size, seed, (1025, 2049))

    def labels_of(self, mask_path: str) -> Labels:
        return self.train_ids if mask_path.endswith("_labelTrainIds.png") else self.labels

    def save(self, folder: str, index: int, labels: np.ndarray) -> None:
        """As for all; for the split test the ids that its server takes, under a name that begins with the
        frame's."""
        if self.split != "test":
            return super().save(folder, index, labels)
        name = self.name(index).removesuffix("_leftImg8bit")
        ids = np.array(self.ids, np.uint8)[labels]
        save_image(f"{folder}/results/{name}_pred_labelIds.png", Image.fromarray(ids))


class ListSegmentation(SegmentationDataset):
    """A folder with classes.txt (see `masks.read_classes`) and either lists of samples or the folders images
    and masks (see `lists.find_samples`).

    Raises:
        UserError: if one of these is missing or malformed.
    """

    def __init__(self, root: str, split: str = "train", crop_size: int | None = None, seed: int = 0):
        pairs, path = find_samples(root, split), os.path.join(root, "classes.txt")
        if 0 < pairs.masked < len(pairs):
            some = f"{pairs.masked} of the {len(pairs)} {split} images"
            raise UserError(f"{root}: {some} have a mask; all must have one, or none")
        if not os.path.exists(path) and pairs.masked:
            some = np.linspace(0, len(pairs) - 1, min(50, len(pairs))).astype(int).tolist()
            found = describe_pixels(open_image(pairs[index][1]) for index in some)
            raise UserError(f"{path} is missing: a class a line, with NAMEs for what the masks hold: {found}")
        super().__init__(pairs, read_classes(path), crop_size, seed)


class Shapes(ListSegmentation):
    """The embedded data set: small scenes of coloured shapes, drawn at `root` when first asked for."""

    default_root = "data/shapes"

    def __init__(self, root: str, split: str = "train", crop_size: int | None = None, seed: int = 0):
        if split == "test":
            raise UserError("--dataset shapes has no test part: evaluate --split val")
        if not os.path.exists(root):
            draw_shapes(root)
        super().__init__(root, split, crop_size, seed)


DATASETS = {"pascal": VOCSegmentation, "cityscapes": Cityscapes, "custom": ListSegmentation, "shapes": Shapes}


def class_labels(dataset: str, root: str | None) -> Labels:
    """The classes of one of `DATASETS` by themselves.

    Raises:
        UserError: if they stand in a file that cannot be read.
    """
    kind = DATASETS[dataset]
    if not issubclass(kind, ListSegmentation):
        return kind.labels
    if not root:
        raise UserError("the checkpoint does not name its classes: --data_root DIR has classes.txt")
    return read_classes(os.path.join(root, "classes.txt"))


def repeated(texts: Iterable[str]) -> set[int]:
    """The hashes of those texts that come more than once."""
    values, counts = np.unique(np.fromiter(map(hash, texts), np.int64), return_counts=True)
    return set(values[counts > 1].tolist())


def random_crop(
    image: Tensor, mask: Tensor, crop_size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Random scale (log-uniform in 0.5..2), crop and left-right flip of a sample (paper, section 4).

    The window of the source is cut out first and only that is resized, the image antialiased, the mask to the
    nearest. The result is `crop_size` in each direction, or smaller where the scaled image is.
    """
    scale = 2 ** rng.uniform(-1, 1)
    scaled = [max(1, round(side * scale)) for side in mask.shape]
    height, width = (min(side, max(1, round(crop_size / scale))) for side in mask.shape)
    top, left = (
        int(rng.integers(whole - part + 1)) for whole, part in zip(mask.shape, (height, width), strict=True)
    )
    size = [min(crop_size, side) for side in scaled]
    image = image[:, top : top + height, left : left + width]
    mask = mask[top : top + height, left : left + width]
    # Batched so that torch sees channels_last: that resizes in half the time. The published training has
    # Lanczos, from which, in grey levels of 255, antialiased bicubic differs by 0.5 on VOC's photos and
    # bilinear by 1.2, at a fifth of Pillow's time.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    image = F.interpolate(batch, size, mode="bicubic", antialias=True)[0]
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
        self.per_epoch = length // batch_size
        if length % batch_size >= min_last:
            self.per_epoch += 1
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


def load_batches(
    dataset: SegmentationDataset, batches: Iterable, workers: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """The (images, masks, sizes) of `SegmentationDataset.collate` on the device, for each list of indices.

    Raises:
        UserError: if a sample cannot be used, or a worker is killed.
    """
    cuda = device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=dataset.collate,
        pin_memory=cuda,
        worker_init_fn=outlive_stop_signals,
    )
    try:
        for batch in loader:
            yield [tensor.to(device, non_blocking=cuda) for tensor in batch]
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        end_if_stopped()  # a signal for all processes can reach a worker before it is prepared
        reason = " ".join(str(error).split()).rstrip(".")
        way_out = "lower --workers if memory lacks; in Docker, allow more shared memory (--shm-size 8g)"
        raise UserError(f"a process that loads images was killed ({reason}): {way_out}") from error

"""Data sets: lists of image and mask files, read as uint8 tensors, and the joint augmentation of training.

A sample is (image, mask): uint8 (3, H, W) RGB and uint8 (H, W) labels with 255 to ignore. Evaluation reads it
whole, training a random crop. `collate` pads samples to one size; the model normalises them on its device.
"""

import multiprocessing
import os
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import cached_property
from glob import glob

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.datasets import Cityscapes as CityscapesClasses

from files.exports import recognize
from files.images import AS_STORED, Header, Reading, check_sizes, open_image, upright
from files.lists import Pairs, find_samples, holds_samples, read_list, unique_names
from files.masks import VOC_CLASSES, Labels, describe_pixels, read_classes
from files.pictures import Palette, save_image, save_mask, voc_palette
from files.pixels import padded_side, read_image, to_array
from files.shapes import draw_shapes
from files.whole import read_lines
from utils import IGNORE_INDEX, UserError, end_if_stopped, ignore_stop_signals

# The weights of red, green and blue in Pillow's and torchvision's grey.
GREY = np.array([0.299, 0.587, 0.114])


class SegmentationDataset(Dataset):
    """Pairs of image and mask files.

    Indexed by an integer, or by (epoch, index): the randomness of a training sample follows from (seed,
    epoch, index) alone, so it does not depend on which worker draws it, or when.

    Args:
        pairs: (image path, mask path); without a mask every pixel is ignored.
        labels: the classes, and what the pixels of the masks mean.
        crop_size: give random crops of this height and width, to train on, instead of whole samples.
        seed: of the random crops.
        eval_size: (height, width) to which whole samples that fit into it are padded, as the published code
            pads; others are padded as `DeepLabv3.segment` pads them.
    """

    def __init__(
        self,
        pairs: Pairs,
        labels: Labels,
        crop_size: int | None = None,
        seed: int = 0,
        eval_size: tuple[int, int] = (0, 0),
    ):
        self.pairs, self.labels, self.crop_size = pairs, labels, crop_size
        self.seed, self.eval_size = seed, eval_size
        self.reading = AS_STORED  # how the images become RGB
        self.color_jitter = 0.0  # of the random crops, see `jitter_colors`
        self.stride = 16  # `DeepLabv3.padded_stride` of the model that whole samples are for
        self.sizes = np.zeros((0, 2), np.int32)  # height and width of each image, see `check.drop_bad`
        self.headers: list[Header] = []  # of the images, likewise

    @property
    def classes(self) -> Sequence[str]:
        return self.labels.classes

    @property
    def palette(self) -> Palette:
        return self.labels.palette

    @property
    def has_masks(self) -> bool:
        return any(mask for _, mask in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, mask = self.read(index)
        if self.crop_size:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, mask = random_crop(image, mask, self.crop_size, rng)
            if self.color_jitter:
                image = jitter_colors(image, self.color_jitter, rng)
        return image, mask

    def read(self, index: int, reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """The whole sample, its image read in another way than the others' if `reading` says so. Raises
        UserError if a file cannot be read, the sizes differ, or a pixel of the mask is no class."""
        image_path, mask_path = self.pairs[index]
        image = to_array(read_image(image_path, reading or self.reading))
        image = torch.from_numpy(image).permute(2, 0, 1)
        if len(self.sizes) and tuple(self.sizes[index]) != image.shape[1:]:
            reason = "it has changed, or EXIF behind its pixels turns it"
            hint = "--skip_bad reads whole files first"
            raise UserError(f"{image_path} has another size than its header told ({reason}): {hint}")
        if mask_path is None:
            return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
        mask = torch.from_numpy(self.read_mask(index))
        check_sizes(image_path, image.shape[:0:-1], mask_path, mask.shape[::-1])
        return image, mask

    def read_mask(self, index: int) -> np.ndarray:
        """The labels, uint8 (H, W), of a sample. Raises UserError if the file cannot be read, or a pixel of
        it is no class."""
        path = self.pairs[index][1]
        picture = open_image(path, max_pixels=self.reading.max_pixels, is_mask=True)
        return self.labels_of(path).read(upright(picture), path)

    def labels_of(self, mask_path: str) -> Labels:
        return self.labels

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size to which `collate` pads a sample: the crop's, `eval_size`, or the next multiples of the
        stride, plus 1. With a stride of 1, torchvision's head, nothing is padded."""
        if self.crop_size:
            return self.crop_size, self.crop_size
        if height <= self.eval_size[0] and width <= self.eval_size[1] and self.stride > 1:
            return self.eval_size
        return tuple(padded_side(side, self.stride) for side in (height, width))

    @cached_property
    def names(self) -> list[str]:
        """The name of each sample's results: that of its mask file, or of its image where there is no mask or
        several samples share it."""
        uses = Counter(mask for _, mask in self.pairs)
        paths = [mask if mask and uses[mask] == 1 else image for image, mask in self.pairs]
        return unique_names(paths, taken=("samples",))

    def fingerprint(self, with_masks: bool = True) -> str:
        """What tells the samples from others: a checksum of their names, the lengths of the images' files and
        the contents of the masks."""
        crc = 0
        for name, (image, mask) in sorted(zip(self.names, self.pairs, strict=True)):
            crc = zlib.crc32(os.fsencode(f"{name} {os.path.getsize(image)}"), crc)
            if mask and with_masks:
                with open(mask, "rb") as file:
                    crc = zlib.crc32(file.read(), crc)
        return f"{crc:08x}"

    def save(self, folder: str, index: int, labels: np.ndarray) -> str:
        """Write predicted labels (H, W), as a palette PNG; returns its path."""
        path = f"{folder}/{self.names[index]}.png"
        save_mask(path, labels, self.palette, self.classes)
        return path

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
            # The loader would do it after this, in a thread whose errors are lost: with too little shared
            # memory the training would wait for ever.
            try:
                for tensor in batch:
                    tensor.share_memory_()
            except (OSError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                hint = "lower --workers, or allow more shared memory (docker run --shm-size 8g)"
                raise UserError(f"a batch cannot be shared between processes ({reason}): {hint}") from error
        return batch

    def eval_batches(self, batch_size: int) -> list[list[int]]:
        """All indices once, in batches of samples that are padded to one size; known after `drop_bad`."""
        return batches_of_one_size([self.padded_size(*size) for size in self.sizes.tolist()], batch_size)

    def eval_shapes(self, batch_size: int) -> set[tuple[int, int, int]]:
        """The (N, H, W) of the `eval_batches`."""
        batches = self.eval_batches(batch_size)
        return {(len(batch), *self.padded_size(*self.sizes[batch[0]])) for batch in batches}


class VOCSegmentation(SegmentationDataset):
    """PASCAL VOC 2012 under `root`/VOC2012, by the lists train_aug.txt and val.txt, or the images of the test
    server. Another `train_list` is one of ImageSets/Segmentation, with the masks of SegmentationClass, whose
    borders are ignored. Raises UserError if the lists are missing or malformed."""

    labels = Labels(VOC_CLASSES, voc_palette(21))

    def __init__(
        self,
        root: str,
        split: str = "train",
        crop_size: int | None = None,
        seed: int = 0,
        train_list: str = "train_aug",
    ):
        self.split, folder = split, os.path.join(root, "VOC2012")
        if split == "train" and train_list != "train_aug":
            path = os.path.join(folder, "ImageSets/Segmentation", f"{train_list}.txt")
            names = [name.strip() for _, name in read_lines(path, "--train_list names one that is there")]
            files = ((f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names)
            pairs = [(os.path.join(folder, image), os.path.join(folder, mask)) for image, mask in files]
        elif split == "test":
            path = os.path.join(folder, "ImageSets/Segmentation/test.txt")
            names = (name.strip() for _, name in read_lines(path, "unpack VOC2012test.tar there"))
            pairs = [(os.path.join(folder, f"JPEGImages/{name}.jpg"), None) for name in names]
        else:
            list_name = "train_aug" if split == "train" else split
            pairs = read_list(folder, list_name, "`python main.py --download pascal` fetches the data set")
        super().__init__(pairs, self.labels, crop_size, seed, (513, 513))

    def save(self, folder: str, index: int, labels: np.ndarray) -> str:
        """As for all; for the split test in the folders in which its server looks for it."""
        results = "results/VOC2012/Segmentation/comp6_test_cls"
        return super().save(f"{folder}/{results}" if self.split == "test" else folder, index, labels)


class Cityscapes(SegmentationDataset):
    """Cityscapes under `root`/leftImg8bit and `root`/gtFine, 19 classes.

    The masks are the _labelTrainIds.png of the preparation script where they exist, else made from
    _labelIds.png; the split test has none. Raises UserError if there are no images, or an image has no mask.
    """

    ids, class_names, colors = map(
        list,
        zip(
            *((c.id, c.name, c.color) for c in CityscapesClasses.classes if not c.ignore_in_eval), strict=True
        ),
    )
    labels = Labels(class_names, colors, {number: i for i, number in enumerate(ids)}, others_ignored=True)
    train_ids = Labels(class_names, colors)

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
            stem = os.path.join(root, "gtFine", split, name.removesuffix("leftImg8bit.png") + "gtFine_")
            masks = [f"{stem}labelTrainIds.png", f"{stem}labelIds.png"]
            masks = [None] if split == "test" else [mask for mask in masks if os.path.exists(mask)]
            if not masks:
                raise UserError(f"{stem}labelIds.png is missing: unzip gtFine_trainvaltest.zip in {root}")
            pairs.append((os.path.join(folder, name), masks[0]))
        super().__init__(pairs, self.labels, crop_size, seed, (1025, 2049))

    def labels_of(self, mask_path: str) -> Labels:
        return self.train_ids if mask_path.endswith("_labelTrainIds.png") else self.labels

    def save(self, folder: str, index: int, labels: np.ndarray) -> str:
        """As for all; for the split test the ids that its server takes, under a name that begins with the
        frame's."""
        if self.split != "test":
            return super().save(folder, index, labels)
        name = self.names[index].removesuffix("_leftImg8bit")
        ids = np.array(self.ids, np.uint8)[labels]
        path = f"{folder}/results/{name}_pred_labelIds.png"
        save_image(path, Image.fromarray(ids))
        return path


class ListSegmentation(SegmentationDataset):
    """A folder with classes.txt (see `masks.read_classes`) and either lists of samples or the folders images
    and masks (see `lists.find_samples`). Raises UserError if one of these is missing or malformed."""

    def __init__(self, root: str, split: str = "train", crop_size: int | None = None, seed: int = 0):
        if os.path.isdir(root) and not holds_samples(root) and (found := recognize(root)):
            command = f"`python main.py --convert {root} --data_root NEW` makes a data set of it"
            raise UserError(f"{root} looks like an export, {found[0]}: {command}")
        pairs, path = find_samples(root, split), os.path.join(root, "classes.txt")
        masks = [mask for _, mask in pairs if mask]
        if 0 < len(masks) < len(pairs):
            found = f"{len(masks)} of the {len(pairs)} {split} images"
            raise UserError(f"{root}: {found} have a mask; all must have one, or none")
        if not os.path.exists(path) and masks:
            indices = np.linspace(0, len(masks) - 1, min(50, len(masks))).astype(int).tolist()
            found = describe_pixels(open_image(masks[index], is_mask=True) for index in indices)
            raise UserError(f"{path} is missing: a class a line, with NAMEs for what the masks hold: {found}")
        super().__init__(pairs, read_classes(path), crop_size, seed)


class Shapes(ListSegmentation):
    """The embedded data set: small scenes of coloured shapes, drawn at `root` when first asked for."""

    def __init__(self, root: str, split: str = "train", crop_size: int | None = None, seed: int = 0):
        if split == "test":
            raise UserError("--dataset shapes has no test part: evaluate --split val")
        if not os.path.exists(root):
            draw_shapes(root)
        super().__init__(root, split, crop_size, seed)


DATASETS = {"pascal": VOCSegmentation, "cityscapes": Cityscapes, "custom": ListSegmentation, "shapes": Shapes}


def class_labels(dataset: str, root: str | None) -> Labels:
    """The classes of one of `DATASETS` by themselves. Raises UserError if they stand in a file that cannot be
    read."""
    if not issubclass(DATASETS[dataset], ListSegmentation):
        return DATASETS[dataset].labels
    if not root:
        raise UserError("the checkpoint does not name its classes: --data_root DIR has classes.txt")
    return read_classes(os.path.join(root, "classes.txt"))


def batches_of_one_size(sizes: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """The indices of `sizes` in batches, of one size each."""
    groups: dict[Hashable, list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]


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


def jitter_colors(image: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation of a uint8 image (3, H, W) times 1 +- strength each, and its hue
    turned by up to strength / 10 of the circle.

    torchvision's ColorJitter as one linear map of the colours, with the hue as a rotation about the grey axis
    and what leaves 0..255 clipped at the end. It takes about a quarter of a sample's time; ColorJitter's four
    functions take three to four times a sample's, most of it for the hue in HSV.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    angle = 2 * np.pi * rng.uniform(-strength, strength) / 10
    axis = np.array([(0, -1, 1), (1, 0, -1), (-1, 1, 0)]) / 3**0.5
    hue = np.eye(3) + np.sin(angle) * axis + (1 - np.cos(angle)) * axis @ axis  # Rodrigues' formula
    colors = saturation * hue + (1 - saturation) * GREY @ hue
    pixels = image.permute(1, 2, 0).numpy()
    mean = GREY @ hue @ pixels[::8, ::8].mean((0, 1))  # a 64th of the pixels is enough
    offset = np.full((3, 1), brightness * (1 - contrast) * mean)
    matrix = np.hstack([brightness * contrast * colors, offset])
    picture = Image.fromarray(pixels).convert("RGB", tuple(matrix.ravel().tolist()))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


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
        self.length, self.batch_size = length, min(batch_size, length)
        self.seed, self.start, self.rank, self.world = seed, start, rank, world
        self.per_epoch = length // batch_size
        if length % batch_size >= min_last:
            self.per_epoch += 1
        self.max_iter = epochs * self.per_epoch

    def __len__(self) -> int:
        return self.max_iter - self.start

    def images(self, start: int, end: int) -> int:
        """The number of images in these iterations of all processes; an epoch's last batch can be smaller."""
        an_epoch = min(self.length, self.per_epoch * self.batch_size)
        places = (divmod(iteration, self.per_epoch) for iteration in (start, end))
        first, last = (epoch * an_epoch + within * self.batch_size for epoch, within in places)
        return last - first

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
    Raises UserError if a sample cannot be used."""
    cuda = device.type == "cuda"
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=dataset.collate,
        pin_memory=cuda,
        worker_init_fn=ignore_stop_signals,
    )
    try:
        if workers:
            multiprocessing.Lock()  # without /dev/shm the loader would fail in many lines
        for batch in loader:
            yield [tensor.to(device, non_blocking=cuda) for tensor in batch]
    except OSError as error:  # not of a sample's file, which is named
        reason = error.strerror or error
        raise UserError(
            f"processes that load images cannot be started ({reason}): use --workers 0"
        ) from error
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            end_if_stopped()  # a signal for all processes can reach a worker before it is prepared
        raise

"""What is in a data set, and what is wrong with it, before it is trained on."""

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from datasets import DATASETS, SegmentationDataset
from files.pictures import sample_row, sample_sheet, save_image
from utils import IGNORE_INDEX, UserError, ahead, percent, progress

MOST_ROWS = 40  # of the picture


class Part:
    """All that one look at every file of a split tells."""

    def __init__(self, split: str, dataset: SegmentationDataset):
        self.split, self.dataset = split, dataset
        count = len(dataset)
        self.sizes = np.zeros((count, 2), np.int64)  # height and width; 0 where a sample cannot be used
        self.hashes: dict[bytes, int] = {}  # of the image files, and the sample that has it
        self.pixels, self.images = np.zeros(256, np.int64), np.zeros(256, np.int64)  # of each label
        self.best = np.full(256, -1)  # the sample with the largest share of each label
        self.faults: list[str] = []
        shares = np.zeros(256)
        with ThreadPoolExecutor() as pool:  # Pillow decodes without Python's lock
            found = progress(ahead(pool, self.look, range(count)), f"decoding {split}", count)
            for index, result in enumerate(found):
                if isinstance(result, str):
                    self.faults.append(result)
                    continue
                self.sizes[index], pixels, digest = result
                self.hashes.setdefault(digest, index)
                self.pixels += pixels
                self.images += pixels > 0
                share = pixels / pixels.sum()
                self.best[share > shares] = index
                shares = np.maximum(shares, share)
        if dataset.has_masks and (trap := dataset.trap(self.pixels)):
            self.faults.append(trap)

    def look(self, index: int) -> tuple[tuple[int, int], np.ndarray, bytes] | str:
        """Size, pixels of each label and hash of the image file; or what is wrong."""
        try:
            _, mask = self.dataset.read(index)
        except UserError as error:
            return str(error)
        with open(self.dataset.pairs[index][0], "rb") as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).digest()
        return tuple(mask.shape), np.bincount(mask.numpy().ravel(), minlength=256), digest

    def describe(self) -> str:
        """Counts and sizes, in a line."""
        usable = self.sizes[self.sizes[:, 0] > 0]
        masks = f"{self.dataset.pairs.masked} masks" if self.dataset.has_masks else "no masks"
        line = f"{self.split}: {len(self.dataset)} images, {masks}"
        if len(usable):
            usable = usable[np.argsort(usable.prod(1), kind="stable")]
            sizes = (f"{w}x{h}" for h, w in (usable[0], usable[len(usable) // 2], usable[-1]))
            line += ", sizes from {} by {} (median) to {}".format(*sizes)
        return line


def check(name: str, root: str, splits: Sequence[str]) -> int:
    """Print what these splits of one of `DATASETS` hold, and what is wrong with them.

    Returns:
        the number of faults.
    """
    parts, faults = [], []
    for split in splits:
        try:
            parts.append(Part(split, DATASETS[name](root, split)))
        except UserError as error:
            faults.append(str(error))
    if parts:
        title = os.path.basename(os.path.abspath(root)) if name == "custom" else name
        faults += report(parts, f"data/check/{title}.png")
    each = {fault.partition(": ")[0]: fault for fault in reversed(faults)}  # once, if several parts have it
    for fault in reversed(each.values()):
        print(f"main.py: error: {fault}", file=sys.stderr)
    print(f"faults: {len(each)}" if each else "no fault was found")
    return len(each)


def report(parts: Sequence[Part], path: str) -> list[str]:
    """Print what the parts hold, draw samples that show every class to `path`, and return the faults."""
    for part in parts:
        print(part.describe())
    masked = [part for part in parts if part.dataset.has_masks]
    if masked:
        print(class_table(masked))
        draw(masked, path)
        print(f"samples that show the classes are in {path}")
    first, *others = parts
    for part in others:
        common = sorted(part.hashes[digest] for digest in first.hashes.keys() & part.hashes.keys())
        if common:
            example = part.dataset.pairs[common[0]][0]
            print(f"{len(common)} of the {part.split} images are {first.split} images, too: {example} is one")
    return [fault for part in parts for fault in part.faults]


def class_table(parts: Sequence[Part]) -> str:
    """A line for each class, and for what is ignored: its share of the pixels and its images in each part."""
    classes = parts[0].dataset.classes
    width = max(map(len, [*classes, "(ignored)"]))
    lines = [f"{'class':{width}}" + "".join(f"  {part.split + ' pixels':>12}  images" for part in parts)]
    for label, name in [*enumerate(classes), (IGNORE_INDEX, "(ignored)")]:
        line = f"{name:{width}}"
        for part in parts:
            share = percent(part.pixels[label] / max(1, part.pixels.sum()))
            line += f"  {share + ' %':>12}  {part.images[label]:6}"
        unseen = [part.split for part in parts if not part.images[label] and label != IGNORE_INDEX]
        lines.append(f"{line}  nowhere in {' and '.join(unseen)}" if unseen else line)
    return "\n".join(lines)


def draw(parts: Sequence[Part], path: str) -> None:
    """Rows of image, mask and overlay; for each class that no row has shown the sample with most of it."""
    rows, shown = [], set()
    for part in parts:
        dataset = part.dataset
        for label, index in enumerate(part.best[: len(dataset.classes)].tolist()):
            if index < 0 or label in shown or len(rows) == MOST_ROWS:
                continue
            image, mask = (tensor.numpy() for tensor in dataset.read(index))
            rows.append(sample_row(Image.fromarray(image.transpose(1, 2, 0)), mask, mask, dataset.palette))
            # What is smaller than this cannot be seen.
            shown |= {label, *np.flatnonzero(np.bincount(mask.ravel()) > 0.005 * mask.size).tolist()}
    legend = sorted(shown - {IGNORE_INDEX})
    save_image(path, sample_sheet(rows, legend, parts[0].dataset.classes, parts[0].dataset.palette))

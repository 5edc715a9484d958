"""--convert: what an annotation tool exports becomes a data set, whose images stay where they are."""

import multiprocessing
import os
import re
import shlex
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from files.coco import read_coco
from files.exports import (
    BACKGROUND,
    COCO,
    CVAT,
    LABELME,
    LOOKED_FOR,
    ROBOFLOW,
    VOC,
    VOC_BORDER,
    YOLO,
    Export,
    Notes,
    Sample,
    class_name,
    example,
    read_roboflow,
    read_voc,
    recognize,
)
from files.images import SIDEWAYS, UNCLEAR, is_unclear, open_image, stored_size
from files.lists import every_fifth, photo_of, unique_names
from files.masks import IGNORE, MAX_CLASSES, VOC_CLASSES, read_classes
from files.pictures import Palette, voc_palette
from files.polygons import read_labelme, read_yolo
from files.whole import lock, write_whole
from utils import IGNORE_INDEX, UserError, ahead, ignore_stop_signals, percent, progress

READERS = {COCO: read_coco, CVAT: read_voc, VOC: read_voc, ROBOFLOW: read_roboflow}
READERS |= {LABELME: read_labelme, YOLO: read_yolo}
MADE = ("masks", "classes.txt", "list")  # what a data set consists of; the last makes it one
PASCAL_PIXELS = 1000  # that a training image has of VOC's classes, as in torchvision's reference
# COCO's names for VOC's classes, where they differ.
COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


class Target(NamedTuple):
    """The classes of the data set with their colours, and the label that each class of the export gets."""

    classes: list[str]
    palette: Palette
    labels: list[int]


class Drawn(NamedTuple):
    """A mask that was drawn: its pixels of each label, int64 (256,), and whether its file was written."""

    pixels: np.ndarray
    written: bool
    notes: Notes


class Kept(NamedTuple):
    """An image of the data set: its split (None if the export has none), its path, its mask's name."""

    split: str | None
    image: str
    mask: str


class Result(NamedTuple):
    """The images of the data set, and of each label its pixels and the images that have it, int64 (256,)."""

    kept: list[Kept]
    pixels: np.ndarray
    images: np.ndarray


def convert(
    export: str,
    root: str,
    images: str | None = None,
    wanted: Sequence[str] | None = None,
    others: str = "background",
    skip_bad: bool = False,
) -> None:
    """Make a data set at `root` of an export, and print what was found; `root` appears whole or not at all.

    Args:
        images: the folder of the images, if they are not in the export.
        wanted: the classes to keep; ["pascal"] stands for VOC's, by COCO's names.
        others: what the other classes become, background or ignore.
        skip_bad: leave out images that cannot be used, instead of ending with an error.

    Raises:
        UserError: if the format is unknown, the export contradicts itself, or `root` holds a data set
            already.
        Stopped: if a stop signal has come.
    """
    found = recognize(export)
    if not os.path.exists(export):
        raise UserError(f"{export} is not there: --convert names the folder or file of an export")
    if not found:
        raise UserError(f"{export} is no export that is known: looked for {LOOKED_FOR}; unpack a .zip first")
    if images and not os.path.isdir(images):
        raise UserError(f"--images {images} is no folder")
    is_new = not os.path.exists(root)
    temporary, locked = prepare_folder(root)
    try:
        # On Linux processes begin as copies, before there is much in memory; elsewhere they import main.py.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
        options = {"mp_context": context, "initializer": start_worker}
        with ProcessPoolExecutor(cores := count_cores(), **options) as pool:
            list(pool.map(abs, range(cores)))
            data = READERS[found[0]](export, found[1], images)
            print(
                f"{export}: {found[0]}, {len(data.samples)} images, {len(data.classes)} classes", flush=True
            )
            check_samples(data.samples, data.notes)
            target, names = choose(data, wanted, others), unique_names([s.image for s in data.samples])
            minimum = PASCAL_PIXELS if wanted == ["pascal"] else 0
            make = partial(make_mask, data.draw, target, os.path.join(temporary, "masks"), minimum)
            jobs = zip(data.samples, names, strict=True)
            drawn = progress(ahead(pool, make, jobs, 8 * cores), "drawing masks", len(names))
            result = collect(zip(data.samples, names, drawn, strict=True), data.notes, skip_bad)
        folders = [images or export, export if os.path.isdir(export) else os.path.dirname(export)]
        result = result._replace(kept=assign_splits(result.kept, folders, data.notes))
        check_content(result, target, data.notes)
        write_lists(temporary, root, result, target)
        move(temporary, root)
    except BrokenProcessPool as error:
        raise UserError("a process that draws masks was killed: it may have had too little memory") from error
    finally:
        locked.close()  # Windows deletes no open file
        shutil.rmtree(temporary, ignore_errors=True)
        if is_new and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
    report(root, result, target, data.notes)


def count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker() -> None:
    """In a process that draws masks: the main one answers to stop signals; if that is killed, this ends."""
    ignore_stop_signals(0)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def prepare_folder(root: str) -> tuple[str, IO]:
    """The folder in which the data set is made, and an open file that locks it; what a conversion that was
    killed left there is deleted. Raises UserError if `root` holds a data set already, or another process
    makes one there."""
    temporary = os.path.join(root, ".converting")
    there = [name for name in MADE if os.path.lexists(os.path.join(root, name))]
    # A conversion that was killed as it moved them, the lists last, has moved what its own folder lacks.
    left = os.listdir(temporary) if os.path.isdir(temporary) else []
    if there and (MADE[-1] not in left or set(there) & set(left)):
        raise UserError(f"{root} has {there[0]} already: --data_root names a new folder")
    if os.path.lexists(root) and not os.path.isdir(root):
        raise UserError(f"{root} is no folder: --data_root names the one of the new data set")
    os.makedirs(temporary, exist_ok=True)
    locked = open(os.path.join(temporary, ".lock"), "ab")  # noqa: SIM115, open for as long as it is made
    lock(locked, f"another process makes a data set at {root}: wait until it has ended")
    left = [os.path.join(temporary, name) for name in os.listdir(temporary) if name != ".lock"]
    for path in [*left, *(os.path.join(root, name) for name in there)]:  # these were moved from there
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    return temporary, locked


def choose(export: Export, wanted: Sequence[str] | None, others: str) -> Target:
    """The classes that the data set gets. Raises UserError if the export lacks one that is wanted, or they
    are too many."""
    names = [safe_name(name) for name in export.classes]
    for i, name in enumerate(names):
        if name in names[:i]:
            alike = f"{export.classes[names.index(name)]!r} and {export.classes[i]!r}"
            raise UserError(f"classes.txt would have {name!r} for both {alike}: rename one of them")
        if name.lower() in map(str.lower, names[:i]):
            export.notes.add("classes differ from others in upper and lower case alone", name)
    renamed = [f"{old!r}, now {new!r}" for old, new in zip(export.classes, names, strict=True) if old != new]
    export.notes.add("classes are renamed, as classes.txt cannot hold their names", *example(renamed))
    palette = export.palette or [voc_palette()[i % 256] for i in range(len(names))]
    target = Target(names, palette, list(range(len(names))))
    if wanted:
        sources = [safe_name(class_name(name)) for name in wanted]
        sources = {name: name for name in sources if name != BACKGROUND}
        if list(wanted) == ["pascal"]:
            sources = {name: COCO_NAMES.get(name, name) for name in VOC_CLASSES[1:]}
            sources = {name: source if source in names else name for name, source in sources.items()}
        missing = [source for source in sources.values() if source not in names]
        if missing:
            raise UserError(f"--classes: the export has no {missing[0]!r}, but {', '.join(names)}")
        first = [BACKGROUND] if others == BACKGROUND or BACKGROUND in names else []
        classes = [*first, *sources]
        number = {source: i for i, source in enumerate(sources.values(), len(first))} | {BACKGROUND: 0}
        rest = IGNORE_INDEX if others == IGNORE else 0
        colors = [palette[names.index(source)] for source in sources.values()]
        colors = [(0, 0, 0), *colors][-len(classes) :] if export.palette else voc_palette(len(classes))
        target = Target(classes, colors, [number.get(name, rest) for name in names])
    if not 2 <= len(target.classes) <= MAX_CLASSES:
        hint = f"2 to {MAX_CLASSES} are possible: choose by --classes"
        raise UserError(f"the data set would have {len(target.classes)} classes: {hint}")
    return target


def safe_name(name: str) -> str:
    """A class' name in a form that a line of classes.txt can have."""
    name = " ".join(re.sub(r"[,;:](?=\s*\d+$)", " ", name.replace("=", "-")).split())
    if re.match(r"\d+([\s,;:]|[.)]\s)\s*\S|#|//|;|%|$", name) or name.lower() == IGNORE:
        return f"class {name}".strip()
    return name


def check_samples(samples: list[Sample], notes: Notes) -> None:
    """Raises UserError if there are too few images, or two entries are of one."""
    if len(samples) < 2:
        why = "".join(f"; {count} {reason} ({text})" for reason, (count, text) in notes.items())
        raise UserError(f"{len(samples)} images are too few to train on and to validate{why}")
    path, count = Counter(os.path.abspath(sample.image) for sample in samples).most_common(1)[0]
    splits = {sample.split for sample in samples if os.path.abspath(sample.image) == path} - {None}
    if len(splits) > 1:
        hint = "name other images for one of them, or leave out val: then every fifth image becomes val"
        raise UserError(f"{path} is in {' and in '.join(sorted(splits))} of the export: {hint}")
    if count > 1:
        raise UserError(f"{path} is {count} times in the export: take the others out")


def path_within(image: str, folders: list[str]) -> str:
    """The path of an image, without the ending, in the first of these folders that holds it, or else from the
    last: other images do not change it, nor does another place of the export, nor whether the export has its
    images or --images names them, the folder `images` itself, say."""
    image, *folders = (os.path.splitdrive(os.path.abspath(path))[1] for path in (image, *folders))
    folder = next((f for f in folders if image.startswith(os.path.join(f, ""))), folders[-1])
    path = os.path.splitext(os.path.relpath(image, folder))[0].replace(os.sep, "/")
    return re.sub(r"^((images|jpegimages|img|imgs|data|default)/)+", "", path, flags=re.IGNORECASE)


def assign_splits(kept: list[Kept], folders: list[str], notes: Notes) -> list[Kept]:
    """The images with a split each. Where the export has no train or no val, the hashes of the paths within
    these folders put every fifth of those images that are not its test part in val."""
    found = {item.split for item in kept}
    if {"train", "val"} <= found:
        lonely = [item.image for item in kept if not item.split]
        notes.add("images are in no split of the export: put in train", *example(lonely))
        return [item._replace(split=item.split or "train") for item in kept]
    free = [item for item in kept if item.split != "test" or found == {"test"}]
    names = {item: path_within(item.image, folders) for item in free}
    val, all_names = every_fifth(names.values()), set(names.values())
    if free and not 0 < len(val) < len(all_names):
        first = min(all_names)
        val = {name for name in all_names if photo_of(name) == photo_of(first)}
        val = val if val < all_names else {first}
    print("the export is not split into train and val: a hash of its path puts every fifth image in val")
    splits = {item: "val" if name in val else "train" for item, name in names.items()}
    return [item._replace(split=splits.get(item, item.split)) for item in kept]


def make_mask(draw, target: Target, folder: str, minimum: int, job: tuple[Sample, str]) -> Drawn | UserError:
    """Write the mask of a sample, unless a training image has fewer than `minimum` pixels of the classes."""
    (sample, name), notes = job, Notes()
    path = f"{folder}/{name}.png"
    try:
        stored, turn = stored_size(open_image(sample.image, load=False))
        upright = stored[::-1] if turn in SIDEWAYS else stored
        check_size(sample, sample.size or upright, stored, upright)
        if is_unclear(stored, turn):
            notes.add(f"{UNCLEAR.format('their labels')}: look at some by --check", "")
        mask = draw(sample.content, target.labels, sample.size or upright, notes)
        height, width = mask.shape
        check_size(sample, (width, height), stored, upright)
        picture = Image.fromarray(mask)
        if (width, height) != upright:
            picture = picture.transpose(turn)
    except UserError as error:
        known = sample.image in str(error)
        return error if known else UserError(f"{sample.image}: {error}")
    pixels = np.bincount(mask.ravel(), minlength=256)
    written = sample.split not in ("train", None) or pixels[1 : len(target.classes)].sum() >= minimum
    if written:
        picture.putpalette(full_palette(target.palette))
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            picture.save(path)
        except OSError as error:
            return UserError(f"cannot write {path}: {error.strerror or error}")
    notes = {reason: [count, text or sample.image] for reason, (count, text) in notes.items()}
    return Drawn(pixels, written, Notes(notes))


def check_size(
    sample: Sample, size: tuple[int, int], stored: tuple[int, int], upright: tuple[int, int]
) -> None:
    """Raises UserError if an image has another size than its labels, stored or upright."""
    if size not in (stored, upright):
        sizes = "x".join(map(str, size)), "x".join(map(str, upright))
        raise UserError(f"{sample.image} is {sizes[1]}, but in the export it is {sizes[0]}")


def full_palette(palette: Palette) -> bytes:
    """256 colours: the classes', and for 255 one that no class has, which is not to be taken for a class."""
    colors = voc_palette()
    colors[: len(palette)] = map(list, palette)
    taken = {tuple(color) for color in palette}
    greys = ((level, level, level) for level in range(255, -1, -1))
    colors[IGNORE_INDEX] = next(c for c in (VOC_BORDER, *greys) if c not in taken)
    return np.array(colors, np.uint8).tobytes()


def collect(drawn: Iterable[tuple[Sample, str, Drawn | UserError]], notes: Notes, skip_bad: bool) -> Result:
    """What was drawn, and of the notes the sum. Raises the first error, unless `skip_bad` leaves such images
    out."""
    result = Result([], np.zeros(256, np.int64), np.zeros(256, np.int64))
    for sample, name, found in drawn:
        if isinstance(found, UserError) and not skip_bad:
            raise UserError(f"{found}; --skip_bad leaves such images out")
        if isinstance(found, UserError):
            notes.add("images that cannot be used: left out", str(found))
            continue
        notes.merge(found.notes)
        if not found.written:
            reason = f"training images with fewer than {PASCAL_PIXELS} pixels of VOC's classes: left out"
            notes.add(reason, sample.image)
            continue
        result.kept.append(Kept(sample.split, sample.image, name))
        np.add(result.pixels, found.pixels, out=result.pixels)
        np.add(result.images, found.pixels > 0, out=result.images)
    return result


def check_content(result: Result, target: Target, notes: Notes) -> None:
    """Raises UserError if the masks show nothing, or a part is empty."""
    pixels = result.pixels
    if not pixels[1:IGNORE_INDEX].any() and (target.classes[0] == BACKGROUND or not pixels[0]):
        why = "".join(f"; {count} {reason}" for reason, (count, _) in notes.items())
        raise UserError(f"no object of {', '.join(target.classes[1:])} is in the export{why}")
    for split in ("train", "val"):
        if not any(part == split for part, *_ in result.kept):
            raise UserError(f"no image is left for {split}: a data set needs some in train and in val")


def write_lists(folder: str, root: str, result: Result, target: Target) -> None:
    """Write classes.txt, and the lists with the images' paths relative to `root`. Raises UserError if a name
    cannot stand in a list."""
    explicit = target.classes[0] != BACKGROUND  # then names that end in numbers would not be taken
    lines = []
    for label, (name, color) in enumerate(zip(target.classes, target.palette, strict=False)):
        lines.append(" ".join(map(str, [name, *color])) + (f" = {label}" if explicit else ""))
    write_text(os.path.join(folder, "classes.txt"), lines)
    if read_classes(os.path.join(folder, "classes.txt")).classes != target.classes:
        raise UserError(f"classes.txt cannot hold these names: {', '.join(target.classes)}")
    base = os.path.realpath(root)
    for split in ("train", "val", "test"):
        images = ((image, name) for part, image, name in result.kept if part == split)
        lines = [list_line(os.path.abspath(image), base, f"masks/{name}.png") for image, name in images]
        if lines:
            write_text(os.path.join(folder, "list", f"{split}.txt"), lines)


def list_line(image: str, base: str, mask: str) -> str:
    """A line of a list. Raises UserError if the image's path cannot stand in one."""
    try:
        image = os.path.relpath(image, base).replace(os.sep, "/")
    except ValueError as error:  # another drive of Windows
        raise UserError(
            f"{image} and {base} are on two drives: --data_root names a folder beside the images"
        ) from error
    if any(path != path.strip() or set(path) & set("\t\n\r") for path in (image, mask)):
        raise UserError(f"{image}: its name has a tab, a line end, or a space at its end: rename it")
    return ("\t" if any(map(str.isspace, image + mask)) else " ").join((image, mask))


def write_text(path: str, lines: list[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def move(temporary: str, root: str) -> None:
    """Move what was made to `root`, what makes it a data set last."""
    for name in MADE:
        os.replace(os.path.join(temporary, name), os.path.join(root, name))


def report(root: str, result: Result, target: Target, notes: Notes) -> None:
    """Print what was left out or is strange, each class' share, and the next command."""
    for reason, (count, text) in notes.items():
        print(f"{count} {reason}{f' (the first: {text})' if text else ''}")
    width = max(map(len, [*target.classes, "(ignored)"]))
    print(f"{'class':{width}}  {'pixels':>8}  images")
    for label, name in [*enumerate(target.classes), (IGNORE_INDEX, "(ignored)")]:
        share = percent(result.pixels[label] / result.pixels.sum())
        unseen = "" if result.images[label] or label == IGNORE_INDEX else "  nowhere"
        print(f"{name:{width}}  {share + ' %':>8}  {result.images[label]:6}{unseen}")
    splits = Counter(split for split, *_ in result.kept)
    counts = ", ".join(f"{splits[split]} in {split}" for split in ("train", "val", "test") if splits[split])
    print(f"{root} is a data set of {len(result.kept)} images: {counts}. Look at it:")
    print(f"python main.py --check --dataset custom --data_root {shlex.quote(root)}")

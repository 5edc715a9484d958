"""Which files are a data set's samples: lists of pairs, and folders whose images and masks have one name."""

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from glob import glob
from itertools import product
from unicodedata import normalize

from files.whole import read_lines, write_whole
from utils import UserError

SPLITS = ("train", "val", "test")
HEIC_ENDINGS = (".heic", ".heif")
# Names of folders, in lower case, that are splits.
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLIT_FOLDERS |= {"test": "test", "testing": "test"}
# Folders of masks, in lower case, where there is no folder masks.
MASK_FOLDERS = ("mask", "annotations", "annotation", "labels", "label", "gtfine", "gt", "segmentationclass")


Pairs = list[tuple[str, str | None]]  # the paths of the image and the mask of each sample


def find_samples(root: str, split: str) -> Pairs:
    """The samples of a split: of `root`/list/`split`.txt or, without a folder list, of images and masks.
    Raises UserError if there are none, or a line or a folder is not as it should be."""
    if os.path.isdir(os.path.join(root, "list")):
        return read_list(root, split, "--data_root names the folder that holds it")
    if os.path.isdir(os.path.join(root, "images")):
        return pair_folders(root, split, mask_folder(root) or "masks")
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}: --data_root names the one that holds the data set")
    hint = f"(or images/{split} and masks/{split})"
    raise UserError(f"{root} has neither list/{split}.txt nor the folders images and masks {hint}")


def holds_samples(root: str) -> bool:
    """Whether `find_samples` has where to look for images and masks. Raises UserError as `mask_folder`."""
    names = os.listdir(root)
    return "list" in names or ("images" in names and mask_folder(root) is not None)


def mask_folder(root: str) -> str | None:
    """The folder of masks beside `root`/images: masks, or one that other data sets have (`MASK_FOLDERS`) and
    that holds pictures. Raises UserError if there are several."""
    if os.path.isdir(os.path.join(root, "masks")):
        return "masks"
    names = [name for name in sorted(os.listdir(root)) if name.lower() in MASK_FOLDERS]
    names = [name for name in names if images_below(os.path.join(root, name))]
    if len(names) > 1:
        raise UserError(f"{root} has {names[0]} and {names[1]}: rename the one of masks to masks")
    return names[0] if names else None


def read_list(root: str, name: str, hint: str) -> Pairs:
    """The samples of `root`/list/`name`.txt: `/image /mask` a line, relative to `root`, or in test.txt
    `/image` alone; with a tab between the two, there may be spaces in their names. Raises UserError if the
    list is missing, or a line is malformed."""
    path, pairs = os.path.join(root, "list", f"{name}.txt"), []
    for number, line in read_lines(path, f"{hint}; --dataset shapes needs no files"):
        line = line.replace("\0", "?")  # which no path can have
        words = line.strip().split("\t" if "\t" in line.strip() else None)
        names = [word.strip().lstrip("/") for word in words]
        paths = [existing(os.path.join(root, name)) for name in names]
        if len(paths) == 1 and name == "test":
            pairs.append((paths[0], None))
        elif len(paths) == 2:
            pairs.append((paths[0], paths[1]))
        else:
            expected = "expected `/image /mask` (a tab between them, where names have spaces)"
            raise UserError(f"{path}:{number}: {expected}, got {line!r}")
    first = pairs[0][0]
    odd = "\\" in first or not os.path.isdir(os.path.dirname(first))
    if odd and not any(os.path.exists(image) for image, _ in pairs):
        form = f"paths are relative to {root}, with / between folders and without quotes"
        raise UserError(f"{path}:1: there is no {first}: {form}")
    return pairs


def make_voc_lists(folder: str) -> None:
    """Write list/val.txt and list/train_aug.txt from what is in the folder VOC2012: the validation images of
    VOC 2012, and every other mask of SegmentationClassAug (10,582 of them). Raises UserError if the masks or
    VOC's own list are missing."""
    path = os.path.join(folder, "ImageSets", "Segmentation", "val.txt")
    masks = os.path.join(folder, "SegmentationClassAug")
    try:
        with open(path, encoding="utf-8") as file:
            val = file.read().split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8")
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


def pair_folders(root: str, split: str, folder: str = "masks") -> Pairs:
    """The images below `root`/images with the masks of the same names below `root`/`folder`, whose names may
    end in something that is common to all, such as `_mask`.

    The folders train, val and test within both are the splits (see `SPLIT_FOLDERS`), or VOC's lists of these
    names in ImageSets/Segmentation. Without them a hash of its name puts each fifth image in val: it stays
    there on every machine, and when others come. Raises UserError if the two do not match."""
    images, masks = (images_below(os.path.join(root, name)) for name in ("images", folder))
    suffix = common_suffix(images, masks)
    stems = {name.removesuffix(suffix): path for name, path in masks.items()}
    if len(stems) < len(masks):
        one = next(path for name, path in masks.items() if stems[name.removesuffix(suffix)] != path)
        other = stems[os.path.splitext(one)[0].removesuffix(suffix)]
        raise UserError(f"{root}/{folder} has {one} and {other}: which of them is meant?")
    for name in sorted(stems.keys() - images.keys()):  # which a list may leave out
        ends = (i for i, letter in enumerate(name) if not letter.isalnum() and name[:i] in images)
        ends = (i for i in ends if not name[i + 1 :].isdigit())  # a frame's number
        if first := next((name[:i] for i in ends if name[:i] in stems), None):
            raise UserError(f"{root}/{folder} has {stems[first]} and {stems[name]}: which of them is meant?")
    masks = stems
    lists = {name: os.path.join(root, "ImageSets", "Segmentation", f"{name}.txt") for name in SPLITS}
    if any(map(split_of, images)):
        part = {name for name in {*images, *masks} if split_of(name) == split}
        if loose := sorted(name for name in images if not split_of(name)):
            where = f"are in no folder of a split, {images[loose[0]]} is one"
            print(f"{root}/images: {len(loose)} images {where}: left out")
    elif any(map(os.path.exists, lists.values())):  # without one of them, its images would be in others, too
        path = lists[split]
        part = {normalize("NFC", line.strip()) for _, line in read_lines(path, f"it names those of {split}")}
    else:
        print(f"{root} has no folders train and val: a hash of its name puts every fifth image in val")
        fifth = every_fifth({*images, *masks})
        part = {"train": {*images, *masks} - fifth, "val": fifth, "test": set()}[split]
    lonely = sorted(part & images.keys() - masks.keys()) if split != "test" else []
    if lonely:
        where = f"no mask of that name in {root}/{folder}"
        raise UserError(f"{root}/images/{images[lonely[0]]}: {where} ({len(lonely)} such images)")
    if lonely := sorted(part & masks.keys() - images.keys()):
        where = f"no image of that name in {root}/images"
        raise UserError(f"{root}/{folder}/{masks[lonely[0]]}: {where} ({len(lonely)} such masks)")
    if lonely := sorted(part - images.keys()):  # of VOC's list
        raise UserError(f"{path}: no image {lonely[0]} in {root}/images ({len(lonely)} such names)")
    if not part:
        hint = f"put some in images/{split} and {folder}/{split}, or write list/{split}.txt"
        raise UserError(f"{root} has no images of the {split} part ({len(images)} in all): {hint}")
    mask_of = {name: os.path.join(root, folder, path) for name, path in masks.items()}
    return [(os.path.join(root, "images", images[name]), mask_of.get(name)) for name in sorted(part)]


def every_fifth(names: Iterable[str]) -> set[str]:
    """The names that the hashes of their photos put in val, see `photo_of`."""
    return {name for name in names if zlib.crc32(os.fsencode(photo_of(name))) % 5 == 0}


def photo_of(name: str) -> str:
    """What Roboflow's augmented copies of one photo, x.rf.1 and x.rf.2, have in common."""
    return re.sub(r"\.rf\.\w+$", "", name)


def image_ids(pairs: Pairs) -> dict[int, str]:
    """The path of each image, by 64 bits of a hash of its real path and its length, which tell it from all
    others on this machine. Raises UserError if one is gone."""
    folders, found = {}, {}
    for path, _ in pairs:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)  # takes long
        real = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
        try:
            text = os.fsencode(f"{real} {os.path.getsize(path)}")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        digest = hashlib.blake2b(text, digest_size=8).digest()
        found[int.from_bytes(digest, "big", signed=True)] = path
    return found


def existing(path: str) -> str:
    """A path as the disk spells it: an accent can be a character of its own there, as on macOS, or not."""
    forms = [path] if path.isascii() else [path, normalize("NFC", path), normalize("NFD", path)]
    return next(filter(os.path.exists, forms), path)


def is_image_name(name: str) -> bool:
    """Whether a file of that name is an image, and not hidden, as macOS' `._a.jpg` beside `a.jpg`."""
    from files.images import image_endings  # not for the commands that do without images

    return os.path.splitext(name)[1].lower() in image_endings() and not name.startswith(".")


def describe_left_out(names: Iterable[str]) -> str:
    """What is no image among the names of a folder's files, as `left out 7: 5 .heic (pip install
    pillow-heif), 2 .txt`; hidden files are not counted. Empty if there is nothing."""
    others = [name for name in names if not is_image_name(name) and not name.startswith(".")]
    counts = Counter(os.path.splitext(name)[1].lower() or "without an ending" for name in others)
    hints = dict.fromkeys(HEIC_ENDINGS, " (pip install pillow-heif)")
    kinds = (f"{count} {ending}{hints.get(ending, '')}" for ending, count in counts.most_common())
    return f"left out {len(others)}: {', '.join(kinds)}" if others else ""


def split_of(name: str) -> str | None:
    """The split that the first folder of a relative path names, as `train2017` does, or None."""
    folder, slash, _ = name.partition("/")
    return SPLIT_FOLDERS.get(folder.lower().rstrip("0123456789")) if slash else None


def images_below(folder: str) -> dict[str, str]:
    """The image files in a folder and those in it that are not hidden, as Jupyter's are, by their paths
    relative to it without the endings, in Unicode's form NFC. Links that lead back are not followed. Raises
    UserError if two of them differ in their endings alone."""
    found, left_out, above = {}, [], {folder: {os.path.realpath(folder)}}
    for parent, folders, names in os.walk(folder, followlinks=True):
        for name in folders.copy():
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            above[path] = {*above[parent], real}
            leads_back = any(one == real or one.startswith(os.path.join(real, "")) for one in above[parent])
            if name.startswith(".") or leads_back:
                folders.remove(name)
        left_out += names
        for name in names:
            if not is_image_name(name):
                continue
            path = os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
            other = found.setdefault(normalize("NFC", os.path.splitext(path)[0]), path)
            if other != path:
                raise UserError(f"{folder} has {other} and {path}: which of them is meant?")
    if left_out := describe_left_out(left_out):
        print(f"{folder}: {left_out}")
    return found


def common_suffix(images: dict[str, str], masks: dict[str, str]) -> str:
    """What most names of masks have behind those of their images, by a look at some. Of several rather
    nothing, as `frame_10` is no mask of `frame_1`, then what begins with no letter or digit."""
    some = sorted(masks)[:100]
    behind = Counter(name[i:] for name in some for i in range(1, len(name) + 1) if name[:i] in images)
    return min(behind, key=lambda end: (-behind[end], end != "", end[:1].isalnum(), end), default="")


def unique_names(paths: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """A name for the result of each file: its own without the ending, with as many of its folders as tell it
    from the others, whatever their case. It leads out of no folder, and is none of `taken`."""
    parts = [[p for p in os.path.normpath(path).split(os.sep) if p not in ("", os.pardir)] for path in paths]
    stems = [[*folders, os.path.splitext(name)[0]] for *folders, name in parts]
    names, used, left = [""] * len(paths), set(taken), range(len(paths))
    depths = range(1, 1 + max(map(len, parts), default=0))
    for kept, depth in product((stems, parts), depths):  # the ending stays where no folder tells them apart
        if not left:
            break
        found = ["/".join(path[-depth:]) for path in kept]
        counts = Counter(map(str.lower, found))
        for i in left:
            if counts[found[i].lower()] == 1 and found[i].lower() not in used:
                names[i] = found[i]
        used.update(names[i].lower() for i in left)
        left = [i for i in left if not names[i]]
    copies: Counter = Counter()
    for i in left:  # a file that is given several times, or names that differ in their case alone
        path = "/".join(parts[i])
        while (name := f"{path}-{copies[path]}" if copies[path] else path).lower() in used:
            copies[path] += 1
        names[i] = name
        used.add(name.lower())
    return names

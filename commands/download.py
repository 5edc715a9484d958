"""The published files: fetched and unpacked, whole or not at all."""

import hashlib
import os
import re
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from files.lists import make_voc_lists
from utils import UserError, end_if_stopped, progress

TRIES, PAUSE, TIMEOUT = 5, 1.0, 30.0  # of a download: requests, seconds between them, seconds of silence


class Download(NamedTuple):
    """A file to fetch to `data/`, and, for an archive, where it unpacks."""

    url: str
    digest: str | None = None  # algorithm:hex, or the start of it
    folder: str | None = None  # where an archive unpacks
    subfolder: str = ""  # the folder in the archive whose contents go to `folder`
    marker: str = ""  # what comes last to `folder`: where it is, the archive is unpacked

    @property
    def name(self) -> str:
        return os.path.basename(self.url)

    @property
    def path(self) -> str:
        return os.path.join("data", self.name)


VOC2012 = "data/VOCdevkit/VOC2012"
# The names of --download.
DOWNLOADS = {
    "pascal": [
        Download(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            digest="md5:6cd6e144f989b92b3379bac3b3de84fd",
            folder=VOC2012,
            subfolder="VOCdevkit/VOC2012",
            marker="JPEGImages",
        ),
        Download(
            "http://cs.jhu.edu/~cxliu/data/SegmentationClassAug.zip",
            folder=VOC2012,
            marker="SegmentationClassAug",
        ),
        Download("http://cs.jhu.edu/~cxliu/data/list.zip", folder=VOC2012, marker="list/train_aug.txt"),
    ],
    "resnet101": [
        Download("https://download.pytorch.org/models/resnet101-63fe2227.pth", digest="sha256:63fe2227")
    ],
    "gn_ws_imagenet": [Download("https://cs.jhu.edu/~syqiao/WeightStandardization/R-101-GN-WS.pth.tar")],
    "bn_pascal": [
        Download("https://cs.jhu.edu/~cxliu/data/deeplab_resnet101_pascal_v3_bn_lr7e-3_epoch50.pth")
    ],
    "gn_ws_pascal": [
        Download("https://cs.jhu.edu/~cxliu/data/deeplab_resnet101_pascal_v3_gn_ws_lr7e-3_epoch50.pth")
    ],
}


def download_all(names: Sequence[str], mirror: str | None = None) -> None:
    """Fetch and unpack the files of these names of `DOWNLOADS`, from `mirror` if given (see `mirrored`).

    Raises:
        UserError: if one cannot be had or unpacked; but the lists of VOC 2012 are then made from its masks.
    """
    for name in names:
        for file, url in mirrored(DOWNLOADS[name], mirror):
            try:
                download(file, url)
            except UserError as error:
                if file.name != "list.zip":
                    raise
                print(f"{error}; without it, the lists are made from the masks")
                make_voc_lists(VOC2012)


def mirrored(files: Sequence[Download], mirror: str | None) -> list[tuple[Download, str]]:
    """Each file with the address to fetch it from.

    `mirror` is the address of one of the files, which then replaces that file's own, or else of a folder that
    holds all of them under their own names.
    """
    if mirror is None:
        return [(file, file.url) for file in files]
    named = os.path.basename(re.split("[?#]", mirror)[0])
    if named in [file.name for file in files]:
        return [(file, mirror if file.name == named else file.url) for file in files]
    return [(file, f"{mirror.rstrip('/')}/{file.name}") for file in files]


def download(file: Download, url: str) -> None:
    """Fetch a file from `url` and unpack it if it is an archive; what is there already is left alone.

    Raises:
        UserError: if it cannot be had or unpacked.
    """
    last = os.path.join(file.folder, file.marker) if file.folder else file.path
    if os.path.exists(last):
        print(f"{last} is there already")
        return
    if os.path.exists(file.path):
        print(f"{file.path} is there already")
    else:
        fetch(url, file.path, file.digest)
    if file.folder:
        print(f"unpacking {file.path} in {file.folder}")
        unpack(file)


def fetch(url: str, path: str, digest: str | None = None) -> None:
    """Download a file that appears at `path` only when it is whole.

    What has come is kept in `path`.part: after a cut, or a kill, the download goes on from there.

    Raises:
        UserError: if the file cannot be had, or does not have the `digest` (algorithm:hex, or the start of
        it).
        Stopped: if a stop signal has come.
    """
    # Not torch.hub.download_url_to_file: that starts anew after a cut, which 2 GB may never survive.
    part = f"{path}.part"
    print(f"downloading {url} to {path}")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        for attempt in range(TRIES):
            time.sleep(PAUSE if attempt else 0)
            if receive(url, part):
                break
        else:
            raise OSError(f"cut {TRIES} times; the same command goes on from there")
        if digest:
            algorithm, expected = digest.split(":")
            found = file_hash(part, algorithm)
            if not found.startswith(expected):
                os.remove(part)
                raise OSError(f"deleted, as its {algorithm} is {found}, not {expected}")
        os.replace(part, path)
    except (OSError, HTTPException, ValueError) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        reason = " ".join(str(getattr(reason, "strerror", None) or reason).split()) or type(error).__name__
        raise UserError(
            f"cannot download {url} ({reason}): put that file at {path} by hand, or name a mirror by --url"
        ) from error


def receive(url: str, part: str) -> bool:
    """One request for what the file `part` lacks, which is appended to it, or replaces it if the server sends
    the whole.

    Returns:
        whether `part` is whole now; if not, another request may help.

    Raises:
        OSError, HTTPException, ValueError: if there is no use in trying again.
        Stopped: if a stop signal has come.
    """
    size = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"User-Agent": "deeplab"}  # some hosts turn Python's away
    if size:
        headers["Range"] = f"bytes={size}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not size:
            raise
        # Nothing comes after `size`: `part` is whole, or it is of another file.
        if error.headers["Content-Range"] == f"bytes */{size}":
            return True
        os.remove(part)
        return False

    with response:
        if response.headers.get_content_type() == "text/html":
            raise OSError("a web page comes instead of the file")
        announced = response.headers["Content-Length"]
        if announced is None and not response.chunked:
            raise OSError("the server does not say how long it is")
        size = size if response.status == 206 else 0
        total = announced and size + int(announced)
        bar = tqdm(total=total, initial=size, unit="B", unit_scale=True, disable=None, dynamic_ncols=True)
        with open(part, "ab" if size else "wb") as file, bar:
            try:
                while block := response.read1(1 << 20):
                    end_if_stopped()
                    size += file.write(block)
                    bar.update(len(block))
            except (TimeoutError, ConnectionError, HTTPException):
                return False  # cut
    return total is None or size == total


def file_hash(path: str, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(file: Download) -> None:
    """Unpack a tar or zip archive; `file.marker` appears last, and only when everything is there.

    Members that would leave the folder are refused by tarfile's filter, and kept inside by zipfile.

    Raises:
        UserError: if the archive is damaged or not the right one, or the disk is full.
    """
    temporary = os.path.join(file.folder, f"{file.name}.tmp")  # inside, so that moving is only renaming
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        if file.name.endswith(".zip"):
            with zipfile.ZipFile(file.path) as archive:
                names = archive.namelist()
                archive.extractall(temporary, progress(names, "unpacking", len(names), "file"))
        elif not hasattr(tarfile, "data_filter"):
            way_out = "use 3.10.12, 3.11.4 or a newer one"
            raise UserError(f"this Python cannot unpack {file.path} safely: {way_out}")
        else:
            with tarfile.open(file.path, "r:") as archive:
                members = archive.getmembers()
                members = progress(members, "unpacking", len(members), "file")
                archive.extractall(temporary, members, filter="data")
        source = os.path.join(temporary, file.subfolder)
        if not os.path.exists(os.path.join(source, file.marker)):
            missing = os.path.join(file.subfolder, file.marker)
            raise UserError(f"{file.path} holds no {missing}: remove it, and name a mirror by --url")
        merge(source, file.folder, file.marker)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file.path} cannot be unpacked ({reason}): remove it and run the command again"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot unpack {file.path} in {file.folder}: {error.strerror or error}; mend that and run again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge(source: str, target: str, last: str) -> None:
    """Move what `target` does not have from `source` to it, and the path `last` after all else."""
    last, _, rest = last.partition("/")
    for name in sorted(os.listdir(source), key=lambda name: name == last):
        old, new = os.path.join(source, name), os.path.join(target, name)
        if os.path.isdir(old) and os.path.isdir(new):
            merge(old, new, rest if name == last else "")
        elif not os.path.lexists(new):
            os.rename(old, new)

"""--download: fetch the published files and unpack them, whole or not at all."""

import hashlib
import os
import re
import shutil
import tarfile
import time
import zipfile
import zlib
from http.client import IncompleteRead
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from files.lists import make_voc_lists
from files.whole import lock
from utils import Stopped, UserError, progress

TRIES, PAUSE, TIMEOUT = 5, 1.0, 30.0  # requests for a file, seconds between them, seconds of silence


class Download(NamedTuple):
    """A file to fetch to data/: a checkpoint, or an archive (.zip, .tar) to unpack in `folder`."""

    url: str
    digest: str = ""  # algorithm:hex, or the start of it
    folder: str = ""  # to where the folder of `marker` in the archive is unpacked
    marker: str = ""  # what comes last: where it is, the archive is unpacked
    name = property(lambda self: os.path.basename(self.url))


VOC2012 = "data/VOCdevkit/VOC2012"
VOC_TAR = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
TORCH, JHU = "https://download.pytorch.org/models", "cs.jhu.edu/~cxliu/data"
DOWNLOADS = {  # the names of --download
    "pascal": [
        Download(VOC_TAR, "md5:6cd6e144f989b92b3379bac3b3de84fd", VOC2012, "VOCdevkit/VOC2012/JPEGImages"),
        Download(f"http://{JHU}/SegmentationClassAug.zip", "", VOC2012, "SegmentationClassAug"),
        Download(f"http://{JHU}/list.zip", "", f"{VOC2012}/list", "list/train_aug.txt"),
    ],
    "coco_voc_mobilenet": [Download(f"{TORCH}/deeplabv3_mobilenet_v3_large-fc3c493d.pth", "sha256:fc3c493d")],
    "coco_voc_resnet50": [Download(f"{TORCH}/deeplabv3_resnet50_coco-cd0a2569.pth", "sha256:cd0a2569")],
    "coco_voc_resnet101": [Download(f"{TORCH}/deeplabv3_resnet101_coco-586e9e4e.pth", "sha256:586e9e4e")],
    "resnet101": [Download(f"{TORCH}/resnet101-63fe2227.pth", "sha256:63fe2227")],
    "gn_ws_imagenet": [Download("https://cs.jhu.edu/~syqiao/WeightStandardization/R-101-GN-WS.pth.tar")],
    "bn_pascal": [Download(f"https://{JHU}/deeplab_resnet101_pascal_v3_bn_lr7e-3_epoch50.pth")],
    "gn_ws_pascal": [Download(f"https://{JHU}/deeplab_resnet101_pascal_v3_gn_ws_lr7e-3_epoch50.pth")],
}


def download_all(names: list[str], mirror: str | None = None) -> None:
    """Fetch and unpack the files of these names; `mirror` is an address of one, or of a folder with all.
    Raises UserError if one cannot be had; but the lists of VOC 2012 are then made from its masks."""
    files = [file for name in names for file in DOWNLOADS[name]]
    last = os.path.basename(re.split("[?#]", mirror or "")[0])
    for file in files:
        url = mirror if last == file.name else file.url
        if mirror and last not in [file.name for file in files]:
            url = f"{mirror.rstrip('/')}/{file.name}"
        try:
            download(file, url)
        except UserError as error:
            if file.name != "list.zip":
                raise
            print(f"{error}; without it, the lists are made from the masks")
            make_voc_lists(VOC2012)


def download(file: Download, url: str) -> None:
    """Fetch a file and unpack it if it is an archive; what is there already is left alone."""
    path = f"data/{file.name}"
    last = f"{file.folder}/{os.path.basename(file.marker)}" if file.folder else path
    if os.path.exists(last):
        return print(f"{last} is there already")
    step, hint = f"download {url}", f"put that file at {path} by hand, or name a mirror by --url"
    try:
        os.makedirs("data", exist_ok=True)
        with open("data/.lock", "ab") as locks:
            busy = f"another process downloads {path}: wait until it has ended"
            lock(locks, busy, zlib.crc32(file.name.encode()))  # each name has a byte of its own
            if os.path.exists(path):
                print(f"{path} is there already")
            else:
                fetch(file, url, path)
            if file.folder:
                step, hint = f"unpack {path}", "mend that, or remove the file, and run the command again"
                unpack(file, path)
    except (Stopped, UserError):
        raise
    except Exception as error:  # the libraries raise all kinds for a bad address or a damaged archive
        reason = error.reason if type(error) is URLError else error
        raise UserError(f"cannot {step} ({str(reason) or type(error).__name__}): {hint}") from error


def fetch(file: Download, url: str, path: str) -> None:
    """Download a file, which appears at `path` when it is whole and checked. `path`.part.source holds its
    length, address and ETag: after a cut or a kill the download continues if the file is still the same."""
    print(f"downloading {url} to {path}")
    part, source = Path(f"{path}.part"), Path(f"{path}.part.source")
    for attempt in range(TRIES):
        time.sleep(PAUSE if attempt else 0)
        size = part.stat().st_size if part.exists() else 0
        known = source.read_text() if size and source.exists() else ""
        if known.startswith(f"{size} "):
            break
        headers = {"User-Agent": "deeplab", "Accept-Encoding": "identity"}  # some hosts refuse Python's agent
        headers |= {"Range": f"bytes={size}-"} if known and " W/" not in known else {}  # W/: a weak ETag
        try:
            with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
                answer, size = response.headers, size if response.status == 206 else 0
                length, kind = answer["Content-Length"], answer.get_content_type()
                encoding, etag = answer.get("Content-Encoding", "identity"), answer.get("ETag", "W/")
                if "html" in kind or encoding != "identity" or length in (None, "0"):
                    raise OSError(f"no file comes, but {kind} of length {length}, encoding {encoding}")
                total = size + int(length)
                found, span = f"{total} {url} {etag}", f"bytes {size}-{total - 1}/{total}"
                # Compared here: some servers ignore If-Range.
                if response.status == 206 and (found, answer["Content-Range"]) != (known, span):
                    source.unlink(missing_ok=True)
                    continue
                with open(part, "ab" if size else "wb") as stream:
                    source.write_text(found)
                    blocks = iter(lambda: response.read(1 << 20), b"")
                    for block in progress(blocks, file.name, 1 + (int(length) >> 20), "MB"):
                        size += stream.write(block)
            if size == total:
                break
        except HTTPError as error:
            if error.code != 416:
                raise
            source.unlink(missing_ok=True)  # the file there is shorter than `part`
        except (TimeoutError, ConnectionError, IncompleteRead):
            pass
    else:
        raise OSError(f"cut, or no answer, {TRIES} times; the same command continues from there")
    algorithm, _, expected = (file.digest or "sha256:").partition(":")
    with open(part, "rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
        head, digest = data[:512], hashlib.new(algorithm, data, usedforsecurity=False).hexdigest()
    starts = {"zip": head[:2] == b"PK", "tar": head[257:262] == b"ustar", "pickle": head[:1] == b"\x80"}
    right = starts[file.name[-3:]] if file.folder else any(starts.values())  # torch.save has used all three
    source.unlink()
    if not right or not digest.startswith(expected):
        part.unlink()
        raise OSError(f"deleted: {head[:9]!r}..., {algorithm} {digest}, is no {file.name} {expected}".strip())
    os.replace(part, path)


def unpack(file: Download, path: str) -> None:
    """Unpack an archive in its folder, and nowhere else: all of it, `file.marker` last, or nothing."""
    print(f"unpacking {path} in {file.folder}")
    temporary = Path(file.folder, f"{file.name}.tmp")  # inside, so that moving is only renaming
    zipped = file.name.endswith(".zip")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with zipfile.ZipFile(path) if zipped else tarfile.open(path, "r:") as archive:
            members = archive.infolist() if zipped else archive.getmembers()
            options = {} if zipped else {"filter": tarfile.data_filter}
            archive.extractall(temporary, progress(members, "unpacking", len(members), "file"), **options)
        marker = temporary / file.marker
        if not marker.exists():
            raise ValueError(f"it holds no {file.marker}")
        for item in sorted(marker.parent.iterdir(), key=lambda item: item == marker):
            if not os.path.lexists(f"{file.folder}/{item.name}"):
                item.rename(f"{file.folder}/{item.name}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

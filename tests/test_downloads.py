"""Downloads from a real server that cuts, lies and fails (a file is whole or absent), archives that climb."""

import hashlib
import io
import os
import re
import signal
import socket
import stat
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from torchvision.models import get_model_weights

import deeplab
import utils
from commands import download as downloads
from commands.download import DOWNLOADS, Download, download, fetch, mirrored
from datasets import VOCSegmentation
from files.lists import make_voc_lists
from files.pictures import save_mask
from utils import UserError

DATA = np.random.RandomState(0).bytes(300_001)
CLIMBERS = ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:/evil"]
SHA256 = "sha256:" + hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Serve the file, in ranges, too, but for the fault that the server's list has for this request."""
        self.server.ranges.append(self.headers["Range"])
        fault = self.server.faults.pop(0) if self.server.faults else None
        data = self.server.files.get(os.path.basename(self.path))
        if data is None or fault == "404":
            return self.send_error(404)
        first, total = 0, len(data)
        if self.headers["Range"] and fault != "no ranges":
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        if first >= total:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{total}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if fault == "web page":
            self.send_header("Content-Type", "text/html; charset=utf-8")
        body = data[first:]
        if fault and fault.startswith("chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            size = f"{len(body):x}\r\n".encode()
            body = size + (body[: len(body) // 2] if fault == "chunked cut" else body + b"\r\n0\r\n\r\n")
        elif fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault in ("cut", "no ranges, cut") else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `files`; `faults` are those of the next requests, `ranges` what was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "PAUSE", 0)
    monkeypatch.setattr(downloads, "TIMEOUT", 5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.faults, server.ranges = {"file": DATA}, [], []
        server.url = f"http://127.0.0.1:{server.server_port}/some/folder"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def refused(function, *args) -> str:
    """The one line with which `function` fails."""
    with pytest.raises(UserError) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_whole_file(server, capsys):
    fetch(f"{server.url}/file", "data/file", SHA256[:15])
    assert Path("data/file").read_bytes() == DATA and os.listdir("data") == ["file"]
    out, err = capsys.readouterr()
    assert out == f"downloading {server.url}/file to data/file\n" and err == ""


@pytest.mark.parametrize(
    "faults",
    [
        ["cut"],
        ["cut", "cut", "cut", "cut"],
        ["cut", "no ranges"],  # the second answer is the whole file again
        ["chunked"],
        ["chunked cut"],
    ],
)
@pytest.mark.parametrize("digest", [None, SHA256])
def test_goes_on_after_a_cut(server, faults, digest):
    server.faults = list(faults)
    fetch(f"{server.url}/file", "data/file", digest)
    assert Path("data/file").read_bytes() == DATA and os.listdir("data") == ["file"]
    if faults[0] == "cut":
        assert server.ranges[:2] == [None, f"bytes={len(DATA) // 2}-"]


@pytest.mark.parametrize("kept", [1, 1000, len(DATA), len(DATA) + 1])
def test_goes_on_after_a_kill(server, kept):
    """With a part, with all of it, and with more than there is."""
    Path("data").mkdir()
    Path("data/file.part").write_bytes((DATA + b"more")[:kept])
    fetch(f"{server.url}/file", "data/file")
    assert Path("data/file").read_bytes() == DATA and os.listdir("data") == ["file"]
    assert server.ranges == [f"bytes={kept}-", None][: 1 + (kept > len(DATA))]


@pytest.mark.parametrize(
    ("faults", "reason", "left"),
    [
        (["404"], "404", []),
        (["cut", "404"], "404", ["file.part"]),
        (["cut"] * 9, "cut 5 times; the same command goes on from there", ["file.part"]),
        (["cut"] + ["chunked cut"] * 9, "cut 5 times", ["file.part"]),
        (["no length"], "how long", []),
        (["web page"], "web page", []),
    ],
)
def test_no_file_that_is_not_whole(server, faults, reason, left):
    server.faults = list(faults)
    url = f"{server.url}/file"
    message = refused(fetch, url, "data/file")
    assert re.search(reason, message), message
    assert url in message and "data/file by hand" in message and "--url" in message
    assert os.listdir("data") == left


def test_wrong_hash(server):
    server.files["file"] = DATA[:-1] + b"?"
    message = refused(fetch, f"{server.url}/file", "data/file", SHA256)
    assert "its sha256 is" in message and os.listdir("data") == []
    # What was kept from another file is not mixed in for good.
    server.files["file"] = DATA
    Path("data/file.part").write_bytes(b"other")
    refused(fetch, f"{server.url}/file", "data/file", SHA256)
    fetch(f"{server.url}/file", "data/file", SHA256)
    assert Path("data/file").read_bytes() == DATA


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    path = str(tmp_path / "file")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        assert "refused" in refused(fetch, address, path)
        silent.listen()
        assert "timed out" in refused(fetch, address, path)
    for url in (
        "http://no-such-host.invalid/file",
        "http://a b/",
        "http:///file",
        "http://[",
        "http://é.invalid/é",
    ):
        message = refused(fetch, url, path)
        assert url in message and path in message and "--url" in message
    (tmp_path / "full").write_text("a file, not a folder")
    assert "--url" in refused(fetch, address, str(tmp_path / "full/file"))


def test_the_table():
    files = [file for files in DOWNLOADS.values() for file in files]
    assert len({file.path for file in files}) == len(files)
    assert DOWNLOADS["resnet101"][0].url == get_model_weights("resnet101").IMAGENET1K_V1.url
    assert DOWNLOADS["gn_ws_imagenet"][0].name == deeplab.IMAGENET_GN_WS


def test_mirror():
    """A folder, or the address of one file."""
    a, b = Download("http://old/a.zip"), Download("http://old/b.zip")
    assert mirrored([a, b], None) == [(a, "http://old/a.zip"), (b, "http://old/b.zip")]
    for folder in ("http://new/x", "http://new/x/"):
        assert mirrored([a, b], folder) == [(a, "http://new/x/a.zip"), (b, "http://new/x/b.zip")]
    one = "http://new/b.zip?download=1"
    assert mirrored([a, b], one) == [(a, "http://old/a.zip"), (b, one)]


def make_tar(path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                archive.addfile(info)


def make_zip(path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def zip_symlink(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        *((kind, name, b"x") for kind in ("tar", "zip") for name in CLIMBERS),
        ("tar", "link", special(tarfile.SYMTYPE, "..")),
        ("tar", "link", special(tarfile.SYMTYPE, "/etc/passwd")),
        ("tar", "link", special(tarfile.LNKTYPE, "../../outside")),
        ("tar", "null", special(tarfile.CHRTYPE)),
        ("tar", "pipe", special(tarfile.FIFOTYPE)),
        ("zip", zip_symlink("link"), b"../.."),
    ],
)
def test_archive_that_leaves_its_folder(kind, name, content, tmp_path, monkeypatch):
    """The library refuses such a member, or keeps it inside as a plain file."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("outside").write_text("untouched")
    file = Download(f"http://unused.invalid/x.{kind}", folder="data/set", marker="a")
    (make_tar if kind == "tar" else make_zip)(file.path, {"a/b": b"good", name: content})
    try:
        download(file, file.url)
    except UserError as error:
        assert f"data/x.{kind} cannot be unpacked" in str(error) and "\n" not in str(error)
        assert os.listdir("data/set") == []
    found = set(Path().rglob("*"))
    assert {path for path in found if not path.is_relative_to("data/set")} == {
        *(Path("data"), Path(f"data/x.{kind}"), Path("outside"))
    }
    assert all(path.is_dir() or path.is_file() for path in found) and not any(map(Path.is_symlink, found))
    assert Path("outside").read_text() == "untouched" and not Path("/tmp/evil").exists()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_stop_while_unpacking(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Download(f"http://unused.invalid/x.{kind}", folder="data/set", marker="a")
    os.mkdir("data")
    {"tar": make_tar, "zip": make_zip}[kind](file.path, {"a": b"1"})
    monkeypatch.setattr(utils, "noted_signals", [signal.SIGTERM])
    with pytest.raises(utils.Stopped):
        download(file, file.url)
    assert list(Path("data/set").iterdir()) == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_unpacking(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make = make_tar if kind == "tar" else make_zip
    file = Download(
        f"http://unused.invalid/x.{kind}", subfolder="one/two", folder="data/set", marker="list/a.txt"
    )
    Path("data/set/list").mkdir(parents=True)
    Path("data/set/list/own.txt").write_text("mine")
    Path("data/set/x.tmp").mkdir()
    make(file.path, {"one/two/other": b"1"})
    assert "holds no one/two/list/a.txt" in refused(download, file, file.url)
    members = {"one/two/list/a.txt": b"a", "one/two/list/own.txt": b"b", "one/two/sub/c": DATA}
    make(file.path, members)
    whole = Path(file.path).read_bytes()
    for damaged in (b"", b"nothing of the sort", whole[: len(whole) // 2]):
        Path(file.path).write_bytes(damaged)
        assert f"data/x.{kind}" in refused(download, file, file.url)
        assert os.listdir("data/set/list") == ["own.txt"]
    Path(file.path).write_bytes(whole)

    # Killed before the last move: the key is not there yet, and the next run ends the work.
    rename, moves = os.rename, []

    def killed(old, new):
        if moves:
            raise KeyboardInterrupt
        moves.append(new)
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            download(file, file.url)
    assert moves == ["data/set/sub"] and os.listdir("data/set/list") == ["own.txt"]
    download(file, file.url)
    assert Path("data/set/list/a.txt").read_bytes() == b"a" and Path("data/set/sub/c").read_bytes() == DATA
    assert Path("data/set/list/own.txt").read_text() == "mine"
    assert sorted(os.listdir("data/set")) == ["list", "sub", "x.tmp"]
    capsys.readouterr()
    download(file, file.url)
    assert capsys.readouterr().out == "data/set/list/a.txt is there already\n"


@pytest.fixture
def tiny_pascal(server, tmp_path, monkeypatch):
    """The three archives of VOC 2012, with five images, on the server."""
    picture = tmp_path / "picture.png"
    save_mask(str(picture), np.zeros((4, 5), np.uint8), [(0, 0, 0)])
    names = ["2007_3", "2007_1", "2008_2", "2009_5", "2009_4"]
    voc = {f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg": picture.read_bytes() for name in names}
    voc["VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"] = b"2007_1\n2009_4\n"
    make_tar("voc.tar", voc)
    make_zip("aug.zip", {f"SegmentationClassAug/{name}.png": picture.read_bytes() for name in names})
    pair = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n".format
    make_zip("list.zip", {"list/val.txt": pair(names[0]), "list/train_aug.txt": pair(names[1])})
    tar, aug, lists = DOWNLOADS["pascal"]
    for file, path in ((tar, "voc.tar"), (aug, "aug.zip"), (lists, "list.zip")):
        server.files[file.name] = Path(path).read_bytes()
        Path(path).unlink()
    picture.unlink()
    md5 = hashlib.md5(server.files[tar.name]).hexdigest()
    monkeypatch.setitem(DOWNLOADS, "pascal", [tar._replace(digest=f"md5:{md5}"), aug, lists])
    return server


def images(train: bool) -> list[str]:
    dataset = VOCSegmentation("data/VOCdevkit", "train" if train else "val")
    assert len(dataset[0]) == 2
    return [dataset.name(i) for i in range(len(dataset))]


@pytest.mark.parametrize("lists", ["served", "404", "cut", "damaged"])
def test_pascal(cli, tiny_pascal, lists):
    if lists == "404":
        del tiny_pascal.files["list.zip"]
    elif lists == "cut":
        tiny_pascal.faults = [None, None, *["cut"] * 5]
    elif lists == "damaged":
        tiny_pascal.files["list.zip"] = tiny_pascal.files["list.zip"][:-9]
    status, out, err = cli("--download", "pascal", "--url", tiny_pascal.url)
    assert (status, err) == (0, "") and ("made from the masks" in out) == (lists != "served")
    if lists == "served":
        assert images(False) == ["2007_3"] and images(True) == ["2007_1"]
    else:
        assert images(False) == ["2007_1", "2009_4"] and images(True) == ["2007_3", "2008_2", "2009_5"]
        text = Path("data/VOCdevkit/VOC2012/list/train_aug.txt").read_text()
        assert text.startswith("/JPEGImages/2007_3.jpg /SegmentationClassAug/2007_3.png\n")
    assert not list(Path("data").rglob("*.tmp"))

    asked = len(tiny_pascal.ranges)
    status, out, _ = cli("--download", "pascal")
    assert status == 0 and out.count("is there already\n") == 3 and len(tiny_pascal.ranges) == asked


def test_pascal_without_the_masks(cli, tiny_pascal):
    masks = tiny_pascal.files.pop("SegmentationClassAug.zip")
    status, _, err = cli("--download", "pascal", "--url", tiny_pascal.url)
    assert status == 1 and err.count("\n") == 1
    for text in (
        "404",
        f"{tiny_pascal.url}/SegmentationClassAug.zip",
        "data/SegmentationClassAug.zip by hand",
    ):
        assert text in err
    Path("data/SegmentationClassAug.zip").write_bytes(masks)
    status, out, _ = cli("--download", "pascal", "--url", tiny_pascal.url)
    assert status == 0 and "data/SegmentationClassAug.zip is there already" in out and images(True)


def test_voc_lists_need_masks_and_list(tmp_path):
    assert "val.txt (No such file" in refused(make_voc_lists, str(tmp_path / "VOC2012"))
    path = tmp_path / "VOC2012/ImageSets/Segmentation/val.txt"
    path.parent.mkdir(parents=True)
    path.write_text("a\n")
    assert "SegmentationClassAug" in refused(make_voc_lists, str(tmp_path / "VOC2012"))
    assert not (tmp_path / "VOC2012/list").exists()


def test_command(cli, server, monkeypatch):
    for name in ("one", "two"):
        server.files[f"{name}.pth"] = DATA
        monkeypatch.setitem(DOWNLOADS, name, [Download(f"{server.url}/{name}.pth", SHA256)])
    status, out, err = cli("--download", "one", "two")
    assert (status, err) == (0, "") and out.count("downloading") == 2
    assert sorted(os.listdir("data")) == ["one.pth", "two.pth"]
    Path("data/two.pth").write_bytes(b"mine")
    status, out, _ = cli("--download", "two", "--url", f"{server.url}/nowhere")
    assert (status, out) == (0, "data/two.pth is there already\n")
    assert Path("data/two.pth").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--download"], "--download"),
        (["--download", "imagenet"], "gn_ws_imagenet"),
        (["--download", "pascal", "resnet101", "--url", "http://x"], "one NAME"),
        (["--exp", "x", "--url", "http://x"], "--url"),
        (["--download", "resnet101", "--url", "/some/file"], "http://"),
        (["--download", "resnet101", "--train"], "--train"),
    ],
)
def test_wrong_flags(cli, argv, message):
    status, out, err = cli(*argv)
    assert status == 2 and message in err and err.count("\n") == 1 and out == ""

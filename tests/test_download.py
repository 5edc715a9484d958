"""Downloads from a server that cuts, lies and fails: a file is whole and right, or absent. Archives that
climb or are damaged: they unpack inside their folder, or not at all."""

import hashlib
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.models import get_model_weights

import utils
from commands import download as module
from commands.download import DOWNLOADS, VOC2012, Download, download, download_all
from files.lists import make_voc_lists
from utils import UserError

DATA = b"\x80" + np.random.RandomState(0).bytes(300_000)
OTHER = DATA[:100_000] + b"?" + DATA[100_001:]  # of the same length
HALF = len(DATA) // 2
SHA256 = "sha256:" + hashlib.sha256(DATA).hexdigest()
CLIMBERS = ["../evil", "a/../../evil", "/tmp/evil", "..\\evil", "C:/evil"]


# What a server can do to an answer, which has status, headers, body, and `sent`: how much of the body comes.
def cut(answer):
    answer.sent = len(answer.body) // 2


def header(name, value):
    def change(answer):
        answer.headers[name] = value

    return change


def body(data, kind="application/octet-stream"):
    def change(answer):
        answer.status, answer.body = 200, data
        answer.headers |= {"Content-Length": len(data), "Content-Type": kind}

    return change


def status(code):
    def change(answer):
        body(b"")(answer)
        answer.status = code

    return change


def chain(*changes):
    def change(answer):
        for one in changes:
            one(answer)

    return change


def shifted(answer):
    """A range that starts elsewhere than asked."""
    answer.body = DATA[HALF + 10 :]
    answer.headers |= {
        "Content-Range": f"bytes {HALF + 10}-{len(DATA) - 1}/{len(DATA)}",
        "Content-Length": len(answer.body),
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        """Serve the file, in ranges, too, but for the change that the server's list has for this request."""
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        assert self.headers["Accept-Encoding"] == "identity"
        change = server.changes.pop(0) if server.changes else None
        data = server.files.get(os.path.basename(self.path))
        if data is None:
            return self.send_error(404)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        answer = SimpleNamespace(status=206 if asked else 200, headers={}, body=data[first:], sent=None)
        answer.headers["Content-Length"] = len(answer.body)
        answer.headers["ETag"] = f'"{hashlib.md5(data).hexdigest()}"'
        if asked:
            answer.headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        if first >= len(data) > 0:
            answer.headers["Content-Range"] = f"bytes */{len(data)}"
            status(416)(answer)
        if change:
            change(answer)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(answer.body[: answer.sent])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of `files`; `changes` are those of the next answers, `ranges` what was asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(module, "TIMEOUT", 5)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.changes, server.ranges = {"file.pth": DATA}, [], []
        server.url = f"http://127.0.0.1:{server.server_port}/some/folder"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def get(server, name="file.pth", **more):
    url = f"{server.url}/{name}"
    download(Download(url, **more), url)


def left() -> list[str]:
    """What lies in data/ but the lock."""
    return sorted(set(os.listdir("data")) - {".lock"})


def refused(function, *args, **more) -> str:
    """The one line with which `function` fails."""
    with pytest.raises(UserError) as error:
        function(*args, **more)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("digest", ["", SHA256[:15], SHA256, f"md5:{hashlib.md5(DATA).hexdigest()}"])
def test_whole_file(server, capsys, digest):
    get(server, digest=digest)
    assert Path("data/file.pth").read_bytes() == DATA and left() == ["file.pth"]
    out, err = capsys.readouterr()
    assert out == f"downloading {server.url}/file.pth to data/file.pth\n" and err == ""


REST = f"bytes={HALF}-"
WEAK = header("ETag", 'W/"1"')


@pytest.mark.parametrize(
    ("changes", "ranges"),
    [
        ([cut], [None, REST]),
        ([cut] * 4, [None, REST, "bytes=225000-", "bytes=262500-", "bytes=281250-"]),
        ([cut, body(DATA)], [None, REST]),  # a server without ranges
        ([cut, shifted], [None, REST, None]),
        ([cut, header("Content-Range", None)], [None, REST, None]),
        ([cut, header("Content-Range", f"bytes {HALF}-{len(DATA)}/{len(DATA) + 1}")], [None, REST, None]),
        ([cut, header("ETag", '"changed"')], [None, REST, None]),
        ([cut, status(416)], [None, REST, None]),
        ([chain(WEAK, cut), WEAK], [None, None]),
        ([chain(header("ETag", None), cut)], [None, None]),
    ],
)
def test_after_a_cut_only_what_belongs_is_appended(server, changes, ranges):
    server.changes = list(changes)
    get(server)
    assert Path("data/file.pth").read_bytes() == DATA and left() == ["file.pth"]
    assert server.ranges == ranges


def kill_after(server, *changes):
    """Leave what a killed download leaves."""
    server.changes = list(changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TRIES", len(changes))
        assert "cut" in refused(get, server)
    assert left() == ["file.pth.part", "file.pth.part.source"]
    server.ranges.clear()


@pytest.mark.parametrize("now", [DATA, OTHER, DATA[: HALF - 9], DATA[:HALF], DATA + b"more"])
def test_after_a_kill_the_same_file_continues(server, now):
    """If the file has changed meanwhile (the same length, shorter, longer), it comes anew."""
    kill_after(server, cut)
    server.files["file.pth"] = now
    get(server)
    assert Path("data/file.pth").read_bytes() == now and left() == ["file.pth"]
    assert server.ranges == ([REST] if now == DATA else [REST, None])


def test_after_a_kill_a_changed_file_that_is_cut_continues(server):
    kill_after(server, cut)
    server.files["file.pth"] = OTHER
    server.changes = [chain(body(OTHER), cut)]  # the second answer is the whole of the other, cut
    get(server)
    assert Path("data/file.pth").read_bytes() == OTHER and server.ranges == [REST, REST]


def test_after_a_kill_another_address_does_not_continue(server):
    kill_after(server, cut)
    url = f"{server.url}/other/file.pth"
    server.files["file.pth"] = OTHER
    server.changes = [header("ETag", f'"{hashlib.md5(DATA).hexdigest()}"')] * 2
    download(Download(url), url)
    assert Path("data/file.pth").read_bytes() == OTHER


@pytest.mark.parametrize(("noted", "ranges"), [(True, []), (False, [None])])
def test_killed_when_all_had_come(server, noted, ranges):
    """A part without a note of where it is from is not trusted."""
    kill_after(server, cut)
    Path("data/file.pth.part").write_bytes(DATA if noted else OTHER)
    if not noted:
        Path("data/file.pth.part.source").unlink()
    get(server)
    assert Path("data/file.pth").read_bytes() == DATA and server.ranges == ranges


def test_stopped(server, monkeypatch):
    monkeypatch.setattr(utils, "noted_signals", [signal.SIGTERM])
    with pytest.raises(utils.Stopped):
        get(server)
    assert left() == ["file.pth.part", "file.pth.part.source"]
    monkeypatch.setattr(utils, "noted_signals", [])
    get(server)
    assert Path("data/file.pth").read_bytes() == DATA


PART = ["file.pth.part", "file.pth.part.source"]


@pytest.mark.parametrize(
    ("changes", "reason", "kept"),
    [
        ([status(404)], "404", []),
        ([cut, status(404)], "404", PART),
        ([cut] * 9, "5 times; the same command continues from there", PART),
        ([header("Content-Length", None)], "length None", []),
        ([body(b"")], "length 0", []),
        ([cut, body(b"")], "length 0", PART),
        ([header("Content-Encoding", "gzip")], "encoding gzip", []),
        ([cut, header("Content-Encoding", "gzip")], "encoding gzip", PART),
        ([body(DATA, "text/html; charset=utf-8")], "text/html", []),
        ([cut, body(DATA, "application/xhtml+xml")], "xhtml", PART),
        ([body(b"<!DOCTYPE html>")], "deleted: b'<!DOCTYPE'", []),
        ([chain(body(b"<html>" * 99), header("Content-Type", None))], "deleted: b'<html>", []),
    ],
)
def test_no_file_that_is_not_right(server, changes, reason, kept):
    server.changes = list(changes)
    message = refused(get, server)
    assert reason in message
    assert f"{server.url}/file.pth" in message and "data/file.pth by hand" in message and "--url" in message
    assert left() == kept


def start(kind: str) -> bytes:
    return {"zip": b"PK\3\4", "tar": b"a" * 257 + b"ustar", "pickle": b"\x80\2"}.get(
        kind, b"text"
    ) + b"0" * 300


@pytest.mark.parametrize("kind", ["zip", "tar", "pickle", "text"])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.zip", "a.tar"])
def test_first_bytes(server, kind, name):
    server.files[name] = start(kind)
    archive = name in ("a.zip", "a.tar")
    message = refused(get, server, name, folder="data/set", marker="m") if archive else ""
    if archive and name[-3:] == kind:
        assert "cannot unpack" in message and left() == [name, "set"]
    elif archive:
        assert "deleted" in message and left() == []
    elif kind != "text":
        get(server, name)
        assert left() == [name]
    else:
        assert "deleted" in refused(get, server, name) and left() == []


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_wrong_digest(server, algorithm):
    server.files["file.pth"] = OTHER
    expected = hashlib.new(algorithm, DATA).hexdigest()[:8]
    message = refused(get, server, digest=f"{algorithm}:{expected}")
    assert hashlib.new(algorithm, OTHER).hexdigest() in message and f"is no file.pth {expected}" in message
    assert left() == []


def test_two_downloads_of_one_file(server):
    """A second process is told of the first; other files can be downloaded meanwhile."""
    code = "import fcntl, zlib; f = open('data/.lock', 'ab'); n = zlib.crc32(b'file.pth')\n"
    code += "fcntl.lockf(f, fcntl.LOCK_EX, 1, n); print(flush=True); input()"
    pytest.importorskip("fcntl")
    server.files["other.pth"] = DATA
    os.mkdir("data")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        assert "another process downloads data/file.pth" in refused(get, server) and left() == []
        get(server, "other.pth")
        other.communicate(b"\n")
    get(server)
    assert left() == ["file.pth", "other.pth"]


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/file.pth"
        assert "refused" in refused(download, Download(address), address)
        silent.listen()
        assert "no answer, 5 times" in refused(download, Download(address), address)
    for url in (
        "http://no-such-host.invalid/f",
        "http://a b/",
        "http:///f",
        "http://[",
        "http://é.invalid/é",
    ):
        message = refused(download, Download(address), url)
        assert url in message and "data/file.pth" in message and "--url" in message
    (tmp_path / "data/.lock").unlink()
    (tmp_path / "data").rmdir()
    (tmp_path / "data").write_text("a file, not a folder")
    assert "File exists: 'data'" in refused(download, Download(address), address)


def test_the_table():
    files = [file for files in DOWNLOADS.values() for file in files]
    assert len({file.name for file in files}) == len(files)
    assert DOWNLOADS["resnet101"][0].url == get_model_weights("resnet101").IMAGENET1K_V1.url
    assert DOWNLOADS["pascal"][0].digest == f"md5:{DATASET_YEAR_DICT['2012']['md5']}"
    for file in files:
        if "pytorch.org" in file.url:
            assert file.digest == f"sha256:{file.name[-12:-4]}"


def test_mirror(monkeypatch):
    """A folder, or the address of one file."""
    monkeypatch.setitem(DOWNLOADS, "x", [Download("http://old/a.zip"), Download("http://old/b.zip")])
    asked = []
    monkeypatch.setattr(module, "download", lambda file, url: asked.append(url))
    for mirror, a, b in (
        (None, "http://old/a.zip", "http://old/b.zip"),
        ("http://new/x", "http://new/x/a.zip", "http://new/x/b.zip"),
        ("http://new/x/", "http://new/x/a.zip", "http://new/x/b.zip"),
        ("http://new/b.zip?download=1", "http://old/a.zip", "http://new/b.zip?download=1"),
    ):
        asked.clear()
        download_all(["x"], mirror)
        assert asked == [a, b]


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


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Write data/x.zip or x.tar, which unpacks one/two/ to data/set."""
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")

    def make(kind: str, members: dict) -> Download:
        file = Download(f"http://unused.invalid/x.{kind}", folder="data/set", marker="one/two/m")
        (make_tar if kind == "tar" else make_zip)(f"data/{file.name}", members)
        return file

    return make


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        *((kind, name, b"x") for kind in ("tar", "zip") for name in CLIMBERS),
        ("tar", "one/two/link", special(tarfile.SYMTYPE, "../../..")),
        ("tar", "one/two/link", special(tarfile.SYMTYPE, "/etc/passwd")),
        ("tar", "one/two/link", special(tarfile.LNKTYPE, "../../outside")),
        ("tar", "null", special(tarfile.CHRTYPE)),
        ("tar", "pipe", special(tarfile.FIFOTYPE)),
        ("zip", zip_symlink("one/two/link"), b"../.."),
    ],
)
def test_archive_that_leaves_its_folder(kind, name, content, archive):
    """The library refuses such a member, or keeps it inside as a plain file."""
    Path("outside").write_text("untouched")
    file = archive(kind, {"one/two/m": b"good", name: content})
    try:
        download(file, file.url)
    except UserError as error:
        assert f"cannot unpack data/x.{kind}" in str(error) and "\n" not in str(error)
        assert os.listdir("data/set") == []
    found = [path for path in Path().rglob("*") if not path.is_relative_to("data/set")]
    assert sorted(map(str, found)) == ["data", "data/.lock", f"data/x.{kind}", "outside"]
    inside = list(Path("data/set").rglob("*"))
    assert all(path.is_dir() or path.is_file() for path in inside) and not any(map(Path.is_symlink, inside))
    assert Path("outside").read_text() == "untouched" and not Path("/tmp/evil").exists()


def lzma_zip() -> bytes:
    """A zip whose member, packed by LZMA, is damaged."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("one/two/m", DATA[:1000])
    data = bytearray(stream.getvalue())
    start = data.index(b"one/two/m") + len("one/two/m")
    data[start + 9 : start + 200] = b"\xff" * 191
    return bytes(data)


def encrypted_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("one/two/m", b"secret")
    data = bytearray(stream.getvalue())
    data[6] |= 1
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def strange_time() -> tarfile.TarInfo:
    info = special(tarfile.REGTYPE)
    info.mtime = 1e30
    return info


@pytest.mark.parametrize(
    ("kind", "content", "reason"),
    [
        ("tar", {"one/two/m": b"", "x": strange_time()}, "timestamp"),
        ("tar", {"one/two/m": b"", "x": special(tarfile.LNKTYPE, "nothing")}, "'nothing' not found"),
        ("tar", {"one/two/other": b""}, "holds no one/two/m"),
        ("zip", {"one/two/other": b""}, "holds no one/two/m"),
        ("zip", lzma_zip(), "Corrupt input data"),
        ("zip", encrypted_zip(), "encrypted"),
        *((kind, data, "cannot unpack") for kind in ("tar", "zip") for data in (b"", b"nothing", 0.4)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,  # the bytes hold the time
)
def test_damaged_archives(kind, content, reason, archive):
    file = archive(kind, content if isinstance(content, dict) else {"one/two/m": DATA, "one/two/n": DATA})
    path = Path(f"data/x.{kind}")
    if not isinstance(content, dict):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * content)] if isinstance(content, float) else content)
    message = refused(download, file, file.url)
    assert f"cannot unpack data/x.{kind}" in message and reason in message and "remove the file" in message
    assert os.listdir("data/set") == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_stop_while_unpacking(kind, archive, monkeypatch):
    file = archive(kind, {"one/two/m": b"1"})
    monkeypatch.setattr(utils, "noted_signals", [signal.SIGTERM])
    with pytest.raises(utils.Stopped):
        download(file, file.url)
    assert os.listdir("data/set") == []


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_unpacking(kind, archive, capsys):
    file = archive(kind, {"one/two/m": b"m", "one/two/own": b"b", "one/two/sub/c": DATA, "more": b""})
    Path("data/set/x.tmp").mkdir(parents=True)
    Path("data/set/own").write_text("mine")

    # Killed before the last move: the marker is not there yet, and the next run ends the work.
    rename, moves = Path.rename, []

    def killed(old, new):
        if moves:
            raise KeyboardInterrupt
        moves.append(new)
        rename(old, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            download(file, file.url)
    assert moves == ["data/set/sub"] and sorted(os.listdir("data/set")) == ["own", "sub", "x.tmp"]
    download(file, file.url)
    assert Path("data/set/m").read_bytes() == b"m" and Path("data/set/sub/c").read_bytes() == DATA
    assert Path("data/set/own").read_text() == "mine"
    assert sorted(os.listdir("data/set")) == ["m", "own", "sub", "x.tmp"]
    capsys.readouterr()
    download(file, file.url)
    assert capsys.readouterr().out == "data/set/m is there already\n"


@pytest.fixture
def tiny_pascal(server, monkeypatch):
    """The three archives of VOC 2012, with five images, on the server."""
    names = ["2007_3", "2007_1", "2008_2", "2009_5", "2009_4"]
    voc = {f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg": b"" for name in names}
    voc["VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"] = b"2007_1\n2009_4\n"
    make_tar("voc", voc)
    make_zip("aug", {f"SegmentationClassAug/{name}.png": b"" for name in names})
    make_zip("list", {"list/val.txt": "the published", "list/train_aug.txt": "the published"})
    for file, path in zip(DOWNLOADS["pascal"], ("voc", "aug", "list"), strict=True):
        server.files[file.name] = Path(path).read_bytes()
        Path(path).unlink()
    tar, *zips = DOWNLOADS["pascal"]
    md5 = hashlib.md5(server.files[tar.name]).hexdigest()
    monkeypatch.setitem(DOWNLOADS, "pascal", [tar._replace(digest=f"md5:{md5}"), *zips])
    return server


@pytest.mark.parametrize("lists", ["served", "404", "cut", "damaged"])
def test_pascal(cli, tiny_pascal, lists):
    if lists == "404":
        del tiny_pascal.files["list.zip"]
    elif lists == "cut":
        tiny_pascal.changes = [None, None, *[cut] * 5]
    elif lists == "damaged":
        tiny_pascal.files["list.zip"] = tiny_pascal.files["list.zip"][:-9]
    status, out, err = cli("--download", "pascal", "--url", tiny_pascal.url)
    assert (status, err) == (0, "") and ("made from the masks" in out) == (lists != "served")
    val, train = (Path(VOC2012, f"list/{name}.txt").read_text() for name in ("val", "train_aug"))
    if lists == "served":
        assert val == train == "the published"
    else:
        pair = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n".format
        assert val == pair("2007_1") + pair("2009_4")
        assert train == pair("2007_3") + pair("2008_2") + pair("2009_5")
    assert sorted(os.listdir(VOC2012)) == ["ImageSets", "JPEGImages", "SegmentationClassAug", "list"]
    assert sorted(os.listdir(f"{VOC2012}/list")) == ["train_aug.txt", "val.txt"]

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
    assert status == 0 and "data/SegmentationClassAug.zip is there already" in out
    assert Path(VOC2012, "list/train_aug.txt").exists()


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
    assert left() == ["one.pth", "two.pth"]
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

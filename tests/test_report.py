"""The page of an evaluation and of a data set: its numbers, its previews, and what it does in a browser."""

import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import damage, make_list_dataset
from PIL import Image

import deeplab
import main
from commands.evaluate import metrics
from commands.flags import parse_args
from files.checkpoints import model_entries
from files.pictures import voc_palette
from files.report import TEMPLATE, Card, curves, save_page, save_preview

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = [
    "</script><script>alert(1)</script>",
    '"it\'s" & <b>',
    "<!--",
    "建物 السماء дорога",
    "a\u2028b",
    "\udcff",
]
LOG = """epoch,iteration,lr,loss,val_mean_iou,images_per_second,per_epoch
1,2,0.1,3.5,,9,2
2,4,0.05,2.5,0.25,9,2
3,6,0.01,1.5,0.5,9,2
"""


class Scripts(HTMLParser):
    """The scripts of a page, as a browser cuts them out."""

    def __init__(self, path: Path):
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts[-1] += data


def page_data(path: Path) -> dict:
    return json.loads(Scripts(path).scripts[0])


def test_measures_of_classes_are_those_of_a_plain_count():
    rng = np.random.RandomState(0)
    for _ in range(50):
        n = rng.randint(2, 6)
        truth, labels = rng.randint(n, size=30), rng.randint(n, size=30)
        truth[truth == 1], labels[labels == n - 1] = 0, 0  # a class without truth, one never predicted
        confusion = torch.zeros(n, n, dtype=torch.int64)
        for pair in zip(truth, labels, strict=True):
            confusion[pair] += 1
        result = metrics(confusion)
        for c in range(n):
            found = sum(t == p == c for t, p in zip(truth, labels, strict=True))
            of_truth, of_labels = sum(truth == c), sum(labels == c)
            recall = found / of_truth if of_truth else None
            precision = found / of_labels if of_labels else None
            assert result["recall"][c] == recall and result["precision"][c] == precision
            if of_truth + of_labels == 0:
                assert result["f1"][c] is None
            elif not found:
                assert result["f1"][c] == 0
            else:
                assert result["f1"][c] == pytest.approx(2 / (1 / precision + 1 / recall))
        recalls = [value for value in result["recall"] if value is not None]
        assert result["mean_accuracy"] == pytest.approx(np.mean(recalls))


def test_names_of_any_kind_stay_text(tmp_path):
    cards = [Card(name, f"{tmp_path}/page_files/{i}", (4, 3), [0, 0, 12]) for i, name in enumerate(NAMES)]
    cards[1] = cards[1]._replace(mask=f"{tmp_path}/a b#1?%20\udcff.png")
    save_page(f"{tmp_path}/page.html", {"title": NAMES[0]}, NAMES, voc_palette(len(NAMES)), cards)
    page, template = Scripts(tmp_path / "page.html"), Scripts(TEMPLATE)
    assert page.tags == template.tags and page.scripts[1] == template.scripts[1]
    data = json.loads(page.scripts[0])
    assert [entry["name"] for entry in data["classes"]] == NAMES and data["title"] == NAMES[0]
    assert [image["name"] for image in data["images"]] == NAMES
    assert data["images"][1]["stem"] == "page_files/1"
    assert data["images"][1]["mask"] == "a%20b%231%3F%2520%FF.png"


def test_page_needs_no_network():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert set(re.findall(r"\w+://[^\"]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.mark.parametrize("classes", [2, 21, 255])
def test_previews_show_the_masks(tmp_path, classes):
    rng = np.random.RandomState(0)
    image = Image.fromarray(rng.randint(0, 255, (300, 400, 3), dtype=np.uint8))
    masks = [rng.randint(0, classes, (300, 400)).astype(np.uint8) for _ in range(3)]
    masks[2][:150] = 255
    palette = [list(color) for color in voc_palette(classes)]
    save_preview(f"{tmp_path}/x", image, masks, palette)
    assert Image.open(tmp_path / "x.jpg").size == (256, 192)
    picture = Image.open(tmp_path / "x.png")
    assert picture.size == (256, 3 * 192)
    pixels = np.array(picture.convert("RGBA"))
    for mask, part in zip(masks, np.split(pixels, 3), strict=True):
        mask = np.array(Image.fromarray(mask).resize((256, 192), Image.Resampling.NEAREST))
        assert np.array_equal(part[..., 3] == 0, mask == 255)
        assert np.array_equal(part[mask < 255, :3], np.array(palette)[mask[mask < 255]])
    save_preview(f"{tmp_path}/thin", Image.new("RGB", (3000, 1)), [np.zeros((1, 3000), np.uint8)], palette)
    assert Image.open(tmp_path / "thin.png").size == (256, 1)


def test_curves_of_the_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert curves("x_epoch2.pth") is None and curves("other.pth") is None
    Path("x.csv").write_text(f"{LOG}a note of somebody\n")
    found = curves("x_epoch2.pth")
    assert found["here"] == 2 and found["loss"] == [(1, 3.5), (2, 2.5), (3, 1.5)]
    assert found["mean_iou"] == [(2, 0.25), (3, 0.5)]
    assert curves("x_epoch2_iter5.pth")["here"] == 2.5
    shutil.copy("x.csv", "y.csv")
    assert curves("y_epoch5.pth") is None  # the log of another run, which ended before
    with open("y.csv", "a") as file:  # resumed with batches of twice the size
        file.write("4,4,0.1,1.25,0.75,9,1,\n")
    assert curves("y_epoch4.pth")["loss"][-2:] == [(3, 1.5), (4, 1.25)]
    assert sorted(os.listdir()) == ["x.csv", "y.csv"]  # no copy: only training writes the log


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The folder of an evaluation of 7 images, moved away from its data; the network has learnt nothing."""
    folder, classes = tmp_path_factory.mktemp("evaluation"), ("ground", NAMES[0], NAMES[3])
    root = make_list_dataset(folder / "set", train=1, val=7, classes=classes)
    for i in range(7):
        mask = np.array(Image.open(root / f"masks/val{i}.png"))
        mask[: 5 * i] = 2
        mask[:, :9] = 255
        Image.fromarray(mask if i else np.full_like(mask, 255)).save(root / f"masks/val{i}.png")
    torch.manual_seed(1)
    options = {"num_groups": 32, "weight_std": True, "aspp_rates": [6], "image_pooling": False}
    model = deeplab.build("tiny", False, 3, **options)
    model.classes, model.palette = classes, voc_palette(3)
    checkpoint = folder / "x_epoch2.pth"
    torch.save(model_entries(model), checkpoint)
    (folder / "x.csv").write_text(LOG)
    flags = ["--checkpoint", checkpoint.name, "--dataset", "custom", "--data_root", "set", "--overlap", "0"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(folder)
        main.main(parse_args([*flags, "--workers", "0", "--device", "cpu"]))
    assert stop.value.code == 0
    return (folder / "data/val" / checkpoint.stem).rename(folder / "moved"), root


def test_page_tells_the_flags_of_the_training_not_their_defaults(cli, trained, tmp_path):
    checkpoint, root = trained
    assert cli("--checkpoint", checkpoint, "--dataset", "custom", "--data_root", root)[0] == 0
    folder = tmp_path / "data/val" / checkpoint.stem
    about = dict(page_data(folder / "report.html")["about"])
    for name, value in {
        "crop_size": 65,
        "epochs": 20,
        "base_lr": 0.02,
        "batch_size": 4,
        "scratch": True,
    }.items():
        assert about[f"trained with --{name}"] == str(value) and f"--{name}" not in about
    told = json.loads((folder / "metrics.json").read_text())
    assert told["training"]["crop_size"] == 65 and "crop_size" not in told["flags"]


def test_page_of_an_evaluation(evaluation):
    """Its counts are those of the files; all that it shows lies beside it."""
    folder, root = evaluation
    data, result = page_data(folder / "report.html"), json.loads((folder / "metrics.json").read_text())
    assert data["confusion"] == result["confusion"] and data["title"] == "set, val"
    columns = {column["name"]: column["values"] for column in data["columns"]}
    for name, key in (("IoU", "iou"), ("accuracy (recall)", "recall"), ("F1 (Dice)", "f1")):
        assert columns[name] == list(result[key].values())
    assert sum(columns["share of pixels"]) == pytest.approx(1)
    assert data["figures"][0] == ["Mean IoU", f"{100 * result['mean_iou']:.2f}"]
    assert ["--overlap", "0.0"] in data["about"] and "--flip" not in dict(data["about"])
    assert ["--dataset", "custom"] in data["about"] and data["curves"]["here"] == 2

    total, (_, *rows) = np.zeros((3, 3), int), csv.reader((folder / "per_image.csv").read_text().splitlines())
    for i, (image, row) in enumerate(zip(data["images"], rows, strict=True)):
        truth = np.array(Image.open(root / f"masks/val{i}.png"))
        labels = np.array(Image.open(folder / image["mask"]))
        counts = np.zeros((3, 3), int)
        np.add.at(counts, (truth[truth < 255], labels[truth < 255]), 1)
        cells = np.reshape(image["cells"], (-1, 3))
        assert np.array_equal(np.argwhere(counts), cells[:, :2]) and (counts[counts > 0] == cells[:, 2]).all()
        total += counts
        assert image["name"] == row[0] and image["size"] == [80, 60]
        assert (f"{image['score']:.6f}" if image["score"] is not None else "") == row[1]
        parts = np.split(np.array(Image.open(folder / f"{image['stem']}.png").convert("RGBA")), 3)
        errors = (truth != labels) & (truth != 255)
        shown = [part[..., 3] > 0 for part in parts]
        assert np.array_equal(shown[0], truth != 255) and shown[1].all()
        assert np.array_equal(shown[2], errors)
        assert np.array_equal(parts[2][errors], parts[0][errors])
        assert Image.open(folder / f"{image['stem']}.jpg").size == (80, 60)
    assert total.tolist() == data["confusion"] and (total - np.diag(total.diagonal())).sum() > 500


@pytest.fixture
def checked(cli, tmp_path):
    """The page of --check for a data set with two faults and an image in both splits."""
    root = make_list_dataset(tmp_path / "<set>")
    damage("cut", root / "images/train1.jpg")
    Image.new("L", (80, 60), 9).save(root / "masks/val1.png")
    shutil.copy(root / "images/train2.jpg", root / "images/val0.jpg")
    mask = np.array(Image.open(root / "masks/val2.png"))
    mask[:10] = 255
    Image.fromarray(mask).save(root / "masks/val2.png")
    assert cli("--check", "--dataset", "custom", "--data_root", root)[0] == 1
    return tmp_path / "data/check/<set>.html", root


def test_page_of_a_data_set(checked):
    page, root = checked
    data = page_data(page)
    assert [image["name"] for image in data["images"]] == [
        "train0",
        *(f"train{i}" for i in range(2, 6)),
        "val0",
        "val2",
    ]
    notes = data["notes"]
    assert len(notes) == 3 and "train1.jpg" in notes[0] and "val1.png" in notes[1] and "val0.jpg" in notes[2]
    assert ["Faults", "2"] in data["figures"] and data["title"] == "<set>"
    for image in data["images"]:
        mask = np.array(Image.open(root / f"masks/{image['name']}.png"))
        values, counts = np.unique(mask, return_counts=True)
        assert np.reshape(image["cells"], (-1, 3)).tolist() == [
            [v, v, n] for v, n in zip(values, counts, strict=True)
        ]
        stem = page.parent / image["stem"].replace("%3C", "<").replace("%3E", ">")
        assert Image.open(f"{stem}.png").size == Image.open(f"{stem}.jpg").size == (80, 60)
    columns = {column["name"]: column["values"] for column in data["columns"]}
    assert columns["train images"] == [5, 3, 2] and sum(columns["train pixels"]) == pytest.approx(1)


# ----------------------------------------------------------------------------------------------------------
# in a browser


def browse(page: Path, script: str, size: str = "1300,1000") -> dict:
    """What `script`, the body of an async function, returns at the end of the page; there must be no error in
    the console."""
    code = f"""<script>(async () => {{
        const wait = (ms = 50) => new Promise((done) => setTimeout(done, ms));
        const all = (selector) => [...document.querySelectorAll(selector)];
        const press = (key, target = document.activeElement) =>
            target.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true, cancelable: true }}));
        const choose = (selector, value) => {{
            document.querySelector(selector).value = value;
            document.querySelector(selector).dispatchEvent(new Event("change"));
        }};
        const cards = () => all("#cards .card").map((card) => card.title);
        const textOf = (selector) => document.querySelector(selector).textContent;
        const run = async () => {{ {script} }};
        const result = await run().catch((error) => ({{ error: String(error) }}));
        const pre = document.createElement("pre");
        pre.id = "result";
        pre.textContent = encodeURIComponent(JSON.stringify(result));
        document.body.append(pre);
    }})();</script>"""
    html = page.read_text(encoding="utf-8")
    copy = page.with_name("copy.html")
    copy.write_text(html.replace("</body>", f"{code}</body>"), encoding="utf-8")
    profile = page.parent / "profile"
    words = (
        "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update"
    )
    words += " --disable-background-networking --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    flags = [f"--user-data-dir={profile}", f"--window-size={size}", "--virtual-time-budget=10000"]
    run = subprocess.run([CHROMIUM, *words.split(), *flags, copy.as_uri()], capture_output=True, timeout=120)
    copy.unlink()
    shutil.rmtree(profile, ignore_errors=True)
    out, err = run.stdout.decode(errors="replace"), run.stderr.decode(errors="replace")
    assert not [line for line in err.splitlines() if "CONSOLE" in line], err
    found = re.search(r'<pre id="result">(.*?)</pre>', out)
    assert found, err
    return json.loads(unquote(found[1]))


needs_browser = pytest.mark.skipif(not CHROMIUM, reason="looks at the page in a browser: install chromium")


@needs_browser
def test_evaluation_in_a_browser(evaluation):
    """Sorting, filtering, looking at images; names of any kind are text."""
    folder, _ = evaluation
    seen = browse(
        folder / "report.html",
        """
        const names = () => all("#classes tbody tr").map((row) => row.querySelector("bdi").textContent);
        const result = { title: document.title, h1: textOf("h1"), cards: cards() };
        await wait(500);
        result.loaded = all("#cards img").every((image) => image.complete && image.naturalWidth > 0);
        result.figures = all("#figures dd").map((value) => value.textContent);
        result.charts = all(".charts svg").length;
        result.cells = all("#matrix rect[class^=cell]").length;

        const heads = all("#classes thead button");
        heads[1].click();
        result.ascending = names();
        heads[1].click();
        result.descending = names();
        result.sorted = heads[1].parentElement.getAttribute("aria-sort");

        choose("#truth", "2");
        result.missed = cards();
        result.count = textOf("#count");
        choose("#predicted", "0");
        result.pair = cards();
        document.querySelector("#clear").click();
        choose("#order", "best first");
        result.best = cards();
        const search = document.querySelector("#search");
        search.value = "VAL3";
        search.dispatchEvent(new Event("input"));
        result.search = cards();
        document.querySelector("#clear").click();
        all(".pairs button")[0].click();
        result.clicked = [document.querySelector("#truth").value, document.querySelector("#predicted").value];
        document.querySelector("#clear").click();

        const matrix = document.querySelector("#matrix svg"), box = matrix.getBoundingClientRect();
        const at = { clientX: box.right - 10, clientY: box.bottom - 10, bubbles: true };
        matrix.dispatchEvent(new MouseEvent("mousemove", at));
        result.tip = textOf("#tip");

        result.views = [];
        for (const key of "1234") {
            press(key, document.body);
            result.views.push(document.documentElement.dataset.view);
        }
        press("ArrowRight", document.body);
        result.first = document.activeElement.title;
        press("ArrowRight");
        result.second = document.activeElement.title;
        document.activeElement.click();
        const viewer = document.querySelector("#viewer");
        result.open = viewer.open && textOf("#viewer-name");
        press("ArrowRight");
        result.next = textOf("#viewer-name");
        press("2");
        result.large = getComputedStyle(document.querySelector("#stage .labels")).top;
        result.pressed = all("#thumbs [aria-pressed=true]").map((button) => button.dataset.key);
        result.link = viewer.querySelector("aside a").getAttribute("href");
        viewer.close();
        await wait();
        result.back = document.activeElement.title;
        const dark = () => getComputedStyle(document.body).backgroundColor;
        const before = dark();
        document.querySelector("#theme").click();
        result.themes = before !== dark();
        return result;
        """,
    )
    assert "error" not in seen, seen
    data = page_data(folder / "report.html")
    classes = [entry["name"] for entry in data["classes"]]
    order = [
        image["name"] for image in sorted(data["images"], key=lambda i: (i["score"] is None, i["score"]))
    ]
    assert seen["h1"] == "set, val" and seen["title"].startswith("set, val") and seen["loaded"]
    assert seen["figures"][0] == data["figures"][0][1] and seen["charts"] == 3
    assert seen["cards"] == order and order[-1] == "val0"
    confusion = np.array(data["confusion"])
    assert seen["cells"] == (confusion >= 0.0005 * confusion.sum(1, keepdims=True)).sum()
    by_iou = [classes[i] for i in np.argsort(data["columns"][0]["values"])]
    assert (seen["ascending"], seen["descending"], seen["sorted"]) == (by_iou, by_iou[::-1], "descending")

    def wrong(image, predicted):
        cells = np.reshape(image["cells"], (-1, 3))
        return sum(n for t, p, n in cells if t == 2 and p != 2 and predicted in (None, p))

    for key, predicted in (("missed", None), ("pair", 0)):
        counts = {image["name"]: wrong(image, predicted) for image in data["images"]}
        assert seen[key] == sorted((name for name in counts if counts[name]), key=lambda name: -counts[name])
        assert 0 < len(seen[key]) < 7
    assert seen["count"].startswith(
        f"{len(seen['missed'])} of 7 images: {NAMES[3]} predicted as another class"
    )
    assert seen["best"] == order[-2::-1] + ["val0"] and seen["search"] == ["val3"]
    shares = confusion / confusion.sum(1, keepdims=True)
    np.fill_diagonal(shares, 0)
    assert seen["clicked"] == [str(i) for i in np.unravel_index(shares.argmax(), (3, 3))]
    share = f"{100 * confusion[2, 2] / confusion[2].sum():.2f}"
    assert seen["tip"].startswith(f"{NAMES[3]}→{NAMES[3]}{share} % of what is {NAMES[3]}, ")
    assert seen["views"] == ["image", "truth", "prediction", "errors"] and seen["themes"]
    assert [seen[key] for key in ("first", "second", "open", "next")] == [*order[:2], order[1], order[2]]
    assert seen["large"] == "0px" and seen["pressed"] == ["truth"] and seen["back"] == order[2]
    assert seen["link"] == f"{order[2]}.png"


@needs_browser
def test_data_set_in_a_browser(checked):
    seen = browse(
        checked[0],
        """
        await wait(500);
        const result = { notes: all("#notes li").map((item) => item.textContent), cards: cards() };
        result.loaded = all("#cards img").every((image) => image.complete && image.naturalWidth > 0);
        result.sections = all("section:not([hidden])").map((section) => section.id);
        choose("#split", "val");
        result.val = cards();
        choose("#split", "");
        choose("#truth", "1");
        result.with_b = cards();
        choose("#truth", "255");
        result.ignored = cards();
        document.querySelector(".card").click();
        result.rows = all("#viewer tbody tr").map((row) => row.textContent);
        return result;
        """,
    )
    assert "error" not in seen, seen
    data = page_data(checked[0])
    assert seen["notes"] == data["notes"] and seen["loaded"]
    assert seen["sections"] == ["notes", "classes", "images"]
    assert seen["cards"] == [image["name"] for image in data["images"]] and seen["val"] == ["val0", "val2"]
    assert set(seen["with_b"]) == {"train0", "train2", "train4", "val0", "val2"} and seen["ignored"] == [
        "val2"
    ]
    assert "(ignored)16.67800" in seen["rows"]


@needs_browser
def test_150_classes_in_a_browser(tmp_path):
    """And more images than are drawn at once."""
    rng, classes = np.random.RandomState(0), [f"class {i} {NAMES[i % 4]}" for i in range(150)]
    confusion, cards = rng.randint(0, 9, (150, 150)), []
    for i in range(200):
        cards.append(Card(f"image {i}", f"{tmp_path}/x_files/0", (40, 30), [i % 150, i % 7, 5], i / 200))
    save_preview(
        f"{tmp_path}/x_files/0", Image.new("RGB", (40, 30)), 3 * [np.zeros((30, 40), np.uint8)], [[0, 0, 0]]
    )
    page = {
        "title": "many",
        "subtitle": "",
        "figures": [("Mean IoU", "1")],
        "about": [],
        "columns": [{"name": "IoU", "values": [None, *rng.rand(149)], "hint": ""}],
        "confusion": confusion.tolist(),
        "views": ["image", "truth", "prediction", "errors"],
        "orders": ["worst first", "most pixels"],
    }
    save_page(f"{tmp_path}/x.html", page, classes, voc_palette(150), cards)
    seen = browse(
        tmp_path / "x.html",
        """
        const result = { cards: all("#cards .card").length, rows: all("#classes tbody tr").length };
        all("#classes thead button")[1].click();
        result.last = all("#classes tbody tr")[149].dataset.label;
        result.width = document.documentElement.scrollWidth <= innerWidth;
        result.options = all("#truth option").length;
        all(".card")[59].click();
        for (let i = 0; i < 70; i++) press("ArrowRight");
        result.place = textOf("#viewer-place");
        result.more = all("#cards .card").length;
        return result;
        """,
    )
    assert "error" not in seen, seen
    assert seen["rows"] == 150 and seen["last"] == "0" and seen["options"] == 151 and seen["width"]
    assert 60 <= seen["cards"] < 200 and seen["place"] == "130 of 200" and seen["more"] >= 130

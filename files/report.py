"""The page of an evaluation or of a data set: an HTML file that needs no other, and previews beside it."""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

from files.pictures import Palette
from files.pixels import shrink
from files.runs import checkpoint_place, log_beside, parse_rows, place, reaches
from files.whole import write_whole
from utils import IGNORE_INDEX, percent

TEMPLATE = Path(__file__).with_name("report.html")
PREVIEW_SIDE = 256


class Card(NamedTuple):
    """An image on a page.

    `stem` is the path of its previews, `size` (width, height), and `cells` its confusion matrix: truth,
    prediction and pixels of each pair that occurs, one after the other. `score` is its mean IoU, `mask` the
    path of the predicted mask.
    """

    name: str
    stem: str
    size: tuple[int, int]
    cells: list[int]
    score: float | None = None
    mask: str | None = None
    split: str | None = None


def save_preview(stem: str, image: Image.Image, masks: Sequence[np.ndarray], palette: Palette) -> None:
    """Write an RGB image as `stem`.jpg, and masks of its size, uint8 (H, W), one below the other as
    `stem`.png. Both are shrunk to `PREVIEW_SIDE`; `IGNORE_INDEX` is transparent. Raises UserError if a file
    cannot be written."""
    image = shrink(image, PREVIEW_SIDE)
    write_whole(f"{stem}.jpg", lambda file: image.save(file, "JPEG", quality=80), sync=False)
    small = [np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)) for mask in masks]
    labels = np.concatenate(small)
    # The colour behind the last class is the transparent one: 255 would take 8 bits a pixel.
    picture = Image.fromarray(np.where(labels == IGNORE_INDEX, len(palette), labels).astype(np.uint8))
    picture.putpalette(np.array([*palette, (255, 255, 255)], np.uint8).tobytes())
    write_whole(f"{stem}.png", lambda file: picture.save(file, "PNG", transparency=len(palette)), sync=False)


def data_name(dataset: str, root: str) -> str:
    """What a data set is called: one of your own by its folder."""
    return os.path.basename(os.path.abspath(root)) if dataset == "custom" else dataset


def save_evaluation(
    path: str, classes: Sequence[str], palette: Palette, result: dict, cards: Sequence[Card], about: dict
) -> None:
    """Write the page of an evaluation: its `result`, one card an image, and `about`, as in metrics.json. The
    log of the run, if it lies beside the checkpoint, is drawn, too. Raises UserError if the page cannot be
    written."""
    flags, checkpoint, confusion = about["flags"], about["checkpoint"], np.array(result["confusion"])
    columns = [
        ("IoU", result["iou"], "of truth or prediction, the share that is both"),
        ("accuracy (recall)", result["recall"], "of the class's pixels, the share that was found"),
        ("precision", result["precision"], "of the pixels predicted as the class, the share that is right"),
        ("F1 (Dice)", result["f1"], "harmonic mean of precision and recall"),
        ("share of pixels", (confusion.sum(1) / max(1, confusion.sum())).tolist(), "of all labelled pixels"),
    ]
    given = {f"--{name}": value for name, value in flags.items()}
    given |= {f"trained with --{name}": value for name, value in about["training"].items()}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    means = [
        ("Mean IoU", "mean_iou"),
        ("Pixel accuracy", "pixel_accuracy"),
        ("Mean accuracy", "mean_accuracy"),
    ]
    figures = [(title, percent(result[name])) for title, name in means]
    page = {
        "title": f"{data_name(flags['dataset'], flags['data_root'])}, {flags['split']}",
        "subtitle": checkpoint,
        "figures": [*figures, ("Images", f"{len(cards):,}"), ("Classes", f"{len(classes):,}")],
        "about": [(name, as_text(value)) for name, value in {**about["model"], **given}.items()],
        "columns": [{"name": name, "values": values, "hint": hint} for name, values, hint in columns],
        "confusion": result["confusion"],
        "views": ["image", "truth", "prediction", "errors"],
        "orders": ["worst first", "best first", "most pixels", "by name"],
        "curves": curves(checkpoint),
    }
    save_page(path, page, classes, palette, cards)


def as_text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def curves(checkpoint: str) -> dict | None:
    """The log of the run that wrote a checkpoint, as points (epoch, value), and the checkpoint's own place;
    None without a log, or with one of another run, which does not reach it."""
    log = log_beside(checkpoint)
    rows = parse_rows(Path(log).read_bytes())[0] if log else []
    if not rows:
        return None
    epoch, iteration = checkpoint_place(checkpoint)
    lengths = [row["per_epoch"] for row in rows if row["epoch"] <= epoch + 1]
    here = iteration / lengths[-1] if iteration and lengths else epoch
    if not reaches(rows, here):
        return None

    def points(column: str) -> list[tuple[float, float]]:
        return [(round(float(place(row)), 4), float(row[column])) for row in rows if row[column]]

    return {"here": here, "loss": points("loss"), "lr": points("lr"), "mean_iou": points("val_mean_iou")}


def save_page(path: str, page: dict, classes: Sequence[str], palette: Palette, cards: Sequence[Card]) -> None:
    """Fill the template with what `page` holds, the classes and the images. Raises UserError if the page
    cannot be written."""
    links = ({"stem": relative(card.stem, path), "mask": relative(card.mask, path)} for card in cards)
    page = {
        **page,
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "classes": [{"name": name, "color": list(c)} for name, c in zip(classes, palette, strict=True)],
        "images": [{**card._asdict(), **link} for card, link in zip(cards, links, strict=True)],
    }
    # Names can have anything in them: without "<" nothing ends the element that the JSON stands in.
    data = json.dumps(page, separators=(",", ":")).replace("<", r"\u003c")
    html = TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", data)
    write_whole(path, lambda file: file.write(html.encode()))


def relative(file: str | None, page: str) -> str | None:
    """The address of a file as seen from the page."""
    # Names need not be text; these bytes are what the file system has.
    return file and quote(os.fsencode(os.path.relpath(file, os.path.dirname(page)).replace(os.sep, "/")))


def files_folder(page: str) -> str:
    """The folder of a page's previews, beside it as browsers have it."""
    return f"{os.path.splitext(page)[0]}_files"

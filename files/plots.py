"""The plots of --plots, by matplotlib, which is not needed otherwise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils import UserError, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW_CLASSES = 30  # so many, and the numbers stand in the cells


def make_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, without a window.

    Raises:
        UserError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plots needs a package: pip install matplotlib") from error
    return Figure((width, height), dpi=100, layout="constrained")


def save_figure(path: str, figure: "Figure") -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def plot_confusion(path: str, confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Write a confusion matrix, truth in rows, as a PNG: of each class' pixels the share that each was
    predicted as. The row of a class without pixels is grey.

    Raises:
        UserError: if the file cannot be written.
    """
    counts = np.array(confusion, float)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    few = len(classes) <= FEW_CLASSES
    cell, font = (0.42, 9) if few else (0.14, 7)
    side = max(4.0, cell * len(classes) + 2.5)  # inches, of which the names take some
    figure = make_figure(side + 0.5, side)
    axes = figure.add_subplot(facecolor="lightgrey")
    image = axes.imshow(shares, "Blues", vmin=0, vmax=1)
    ticks, style = range(len(classes)), {"fontsize": font, "parse_math": False}
    axes.set_xticks(ticks, classes, rotation=90, **style)
    axes.set_yticks(ticks, classes, **style)
    axes.set(xlabel="predicted as", ylabel="truth")
    figure.colorbar(image, shrink=0.6, label="share of the class's pixels")
    for row, column in zip(*np.nonzero(shares >= 0.005), strict=True) if few else ():
        share = shares[row, column]
        color = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    save_figure(path, figure)


def plot_run(path: str, rows: Sequence[dict]) -> None:
    """Write the loss, the learning rate and the validation mean IoU of a log's rows (see
    `runs.read_rows`) as a PNG.

    Raises:
        UserError: if the file cannot be written.
    """
    figure = make_figure(8, 8)
    panels = zip(figure.subplots(3, 1, sharex=True), ("loss", "lr", "val_mean_iou"), strict=True)
    for axes, column in panels:
        points = [(row["iteration"], float(row[column])) for row in rows if row[column]]
        axes.plot(*np.reshape(points, (-1, 2)).T, marker="." if len(points) < 50 else "")
        axes.set(ylabel=column)
        axes.grid(alpha=0.3)
    axes.set(xlabel="iteration")
    save_figure(path, figure)

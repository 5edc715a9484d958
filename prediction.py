"""Prediction: people's own images, without a truth to compare with."""

import os
import sys
from collections.abc import Sequence

import numpy as np

from datasets import open_image
from deeplab import DeepLabv3, autocast, to_rgb
from lists import IMAGE_ENDINGS
from pictures import add_legend, overlay, save_image, save_mask
from utils import UserError, progress


def image_files(paths: Sequence[str], out: str) -> list[str]:
    """The files of these paths, and for a folder the images in it; the results go to the folder `out`.

    Raises:
        UserError: if there are none, or one of the folders is `out`.
    """
    files = []
    for path in paths:
        if os.path.isdir(path):
            if os.path.realpath(path) == os.path.realpath(out):
                raise UserError(f"{path} is --out, too, and would be predicted with its masks: name another")
            names = sorted(os.listdir(path))
            files += [os.path.join(path, n) for n in names if os.path.splitext(n)[1].lower() in IMAGE_ENDINGS]
        else:
            files.append(path)
    if not files:
        raise UserError(f"no images in {', '.join(paths)}: --predict takes image files, and folders of them")
    return files


def predict_files(
    model: DeepLabv3,
    files: Sequence[str],
    out: str,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    max_side: int = 2049,
    amp: str | None = None,
) -> int:
    """Write a palette mask and an overlay with a legend for each image to the folder `out`.

    Arguments as for `DeepLabv3.predict`; what is wrong with an image is said, and the others are done.

    Returns:
        how many could not be predicted.
    """
    failed, taken = 0, set()
    for path in progress(files, "predicting", len(files)):
        stem = os.path.splitext(os.path.basename(path))[0]
        while stem in taken:  # images of one name, from several folders or in several formats
            stem += "_"
        taken.add(stem)
        try:
            image = to_rgb(open_image(path))
            with autocast(model.pixel_mean.device, amp):
                labels = model.predict(image, scales, flip, max_side)
            save_mask(f"{out}/{stem}_mask.png", labels, model.palette)
            picture = overlay(image, labels, model.palette)
            picture = add_legend(picture, np.unique(labels), model.classes, model.palette)
            save_image(f"{out}/{stem}_overlay.jpg", picture)
        except UserError as error:
            print(f"main.py: error: {error}", file=sys.stderr)
            failed += 1
    return failed

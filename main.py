"""Train DeepLabv3: `python main.py --train --exp NAME`. Evaluate it: the same command without `--train`."""

import argparse
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from glob import glob

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import deeplab
from datasets import (
    Cityscapes,
    ListSegmentation,
    SegmentationDataset,
    Shapes,
    TrainBatches,
    VOCSegmentation,
    make_voc_lists,
    open_image,
)
from deeplab import DeepLabv3, ModelError
from utils import (
    DOWNLOADS,
    IGNORE_INDEX,
    RunLog,
    UserError,
    add_legend,
    confusion_matrix,
    download,
    metrics,
    mirrored,
    overlay,
    percent,
    poly_lr,
    sample_sheet,
    save_image,
    save_json,
    save_mask,
    table,
    write_whole,
)

DATASETS = {"pascal": VOCSegmentation, "cityscapes": Cityscapes, "custom": ListSegmentation, "shapes": Shapes}
DATA_ROOTS = {"pascal": "data/VOCdevkit", "cityscapes": "data/cityscapes", "shapes": "data/shapes"}
# What --dataset shapes sets unless a flag says otherwise: a run of minutes on a CPU.
SHAPES_DEFAULTS = {
    "backbone": "resnet50",
    "scratch": True,
    "groups": 32,
    "weight_std": True,
    "crop_size": 81,
    "batch_size": 4,
    "epochs": 4,
    "base_lr": 0.02,
    "workers": 2,
}
# The flags that the order of the samples and the schedule follow from.
RUN_FLAGS = (
    "dataset",
    "data_root",
    "crop_size",
    "epochs",
    "batch_size",
    "base_lr",
    "last_mult",
    "freeze_bn",
    "seed",
)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"main.py: error: {message} (all flags: python main.py --help)\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Defaults come from here, then from the data set, then from the checkpoint that is
    evaluated."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("what to do").add_argument
    add("--train", action="store_true", help="train; without it, evaluate")
    add("--exp", metavar="NAME", help="name of the experiment, part of the checkpoints' names")
    add(
        "--resume",
        metavar="PATH",
        help="go on from this checkpoint; `auto` takes the newest of --exp, if any",
    )
    add(
        "--init",
        metavar="PATH",
        help="start from this checkpoint's weights, but the classifier if classes differ",
    )
    add("--checkpoint", metavar="PATH", help="evaluate this file instead of the one that the flags name")
    add("--predict", metavar="PATH", nargs="+", help="segment these images, and those in these folders")
    add("--out", metavar="DIR", default="data/predictions", help="where --predict writes masks and overlays")
    add(
        "--download",
        nargs="+",
        choices=DOWNLOADS,
        metavar="NAME",
        help=f"fetch to data/: {', '.join(DOWNLOADS)}",
    )
    add(
        "--url",
        help="where to --download one NAME from instead: a folder with its files under their own names, or "
        "one of these files",
    )

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="pascal", help="shapes is embedded and needs no files")
    add("--data_root", metavar="DIR", help="where the data set lies, if not under data/")
    add(
        "--split",
        choices=("train", "val", "test"),
        default="val",
        help="part to evaluate; test is for the servers",
    )
    add("--crop_size", type=positive, default=513, help="height and width of the training crops")
    add("--workers", type=int, default=4, help="processes that load images; 0 loads in the main one")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=deeplab.LAYERS, default="resnet101", help="torchvision ResNet to build on")
    add("--groups", type=int, help="GroupNorm with so many groups instead of BatchNorm (0)")
    add(
        "--weight_std",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="weight standardisation of the convs",
    )
    add("--beta", action="store_true", help="three 3x3 convs as the stem instead of one 7x7")
    add(
        "--output_stride",
        type=int,
        choices=(8, 16, 32),
        help="input size over feature map size; 16 if not given",
    )
    add("--multi_grid", type=positive, nargs=3, default=[1, 1, 1], help="relative rates in layer4")
    add(
        "--aspp_rates", type=positive, nargs="+", default=[6, 12, 18], help="atrous rates at output stride 16"
    )
    add("--no_image_pooling", action="store_true", help="leave out ASPP's image-level branch")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=30, help="passes over the training list")
    add("--batch_size", type=positive, default=16, help="images in one step")
    add("--base_lr", type=float, default=0.00025, help="initial learning rate")
    add("--last_mult", type=float, default=1.0, help="learning rate of ASPP over that of the trunk")
    add(
        "--scratch",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="do not start from ImageNet weights",
    )
    add("--freeze_bn", action="store_true", help="keep BatchNorm's statistics, scale and shift as they are")
    add("--seed", type=int, default=0, help="the same seed gives the same run")
    add(
        "--save_every", type=positive, default=10, help="epochs between checkpoints; the last is always saved"
    )
    add("--log_every", type=positive, default=10, help="iterations between looks at the loss")
    add("--tensorboard", action="store_true", help="write the log and samples for TensorBoard, too")

    add = parser.add_argument_group("evaluation and prediction").add_argument
    add("--eval_batch_size", type=positive, default=4, help="images in one forward pass")
    add(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        help="average the scores over these sizes of the image",
    )
    add("--flip", action="store_true", help="average them over the mirrored image, too")
    add("--samples", type=int, default=8, help="rows of samples.png: image, truth, prediction")
    add("--max_side", type=positive, default=2049, help="--predict shrinks longer images to this")

    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=int, help="number of the CUDA device, 0 if not given")
    add("--device", help="cuda, cuda:1, mps or cpu instead of the best there is")
    add(
        "--compile",
        action="store_true",
        help="evaluate by compiled code: faster after half a minute; needs a C++ compiler",
    )

    args = parser.parse_args(argv)
    if args.url and len(args.download or ()) != 1:
        parser.error("--url replaces the address of one --download NAME: give one NAME with it")
    if args.url and not args.url.lower().startswith(("http://", "https://")):
        parser.error(
            f"--url {args.url!r} does not begin with http:// or https://; a file at hand goes to data/"
        )
    if args.download and args.train:
        parser.error("--download only fetches: give --train to a second command")
    if args.download:
        return args
    if args.dataset == "shapes":
        parser.set_defaults(**SHAPES_DEFAULTS)
        args = parser.parse_args(argv)
        settings = {key: getattr(args, key) for key in SHAPES_DEFAULTS}
        shown = [
            f"--{key}" if value is True else f"--{key} {value}" for key, value in settings.items() if value
        ]
        print(f"shapes has defaults of its own; this run has {' '.join(shown)}")
    if args.predict and not args.checkpoint:
        parser.error("--predict needs --checkpoint FILE")
    if args.exp is None and not args.predict:
        parser.error("--exp NAME is needed: it names the checkpoints; to try it out, add --dataset shapes")
    if args.exp and os.path.basename(args.exp) != args.exp:
        parser.error(f"--exp {args.exp!r} becomes part of a file's name: leave out the slashes")
    if min(args.seed, args.workers, args.samples) < 0:
        parser.error("--seed, --workers and --samples cannot be negative")
    if not all(0.1 <= scale <= 4 for scale in args.scales):
        parser.error("--scales are between 0.1 and 4")
    if args.resume and args.init:
        parser.error("--resume goes on with a run and --init begins one: leave one of them out")
    if args.freeze_bn and args.groups:
        parser.error("--freeze_bn has nothing to freeze with --groups")
    if args.train and args.freeze_bn and args.scratch and not (args.resume or args.init):
        parser.error(
            "--freeze_bn with --scratch freezes statistics that were never taken: leave one of them out"
        )
    if not args.train and (args.resume or args.init):
        parser.error("--resume and --init go with --train; to evaluate a file, use --checkpoint")
    if args.dataset == "custom" and not args.data_root and not args.predict:
        parser.error(
            "--dataset custom needs --data_root DIR, with list/train.txt, list/val.txt and classes.txt in DIR"
        )
    args.data_root = args.data_root or DATA_ROOTS.get(args.dataset)
    return args


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def pick_device(args: argparse.Namespace) -> torch.device:
    """--device, else CUDA (--gpu picks), else Apple's MPS, else the CPU."""
    if args.device:
        name = args.device
    elif torch.cuda.is_available():
        name = f"cuda:{args.gpu or 0}"
    elif args.gpu is not None:
        raise UserError(
            f"--gpu {args.gpu}: there is no CUDA device here; leave the flag out to run without one"
        )
    else:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def make_model(args: argparse.Namespace, num_classes: int, pretrained: bool) -> DeepLabv3:
    return deeplab.build(
        args.backbone,
        pretrained,
        num_classes,
        num_groups=args.groups or None,
        weight_std=args.weight_std,
        beta=args.beta,
        output_stride=args.output_stride or 16,
        multi_grid=args.multi_grid,
        aspp_rates=args.aspp_rates,
        image_pooling=not args.no_image_pooling,
    )


def checkpoint_path(args: argparse.Namespace, epoch: int) -> str:
    return f"data/deeplab_{args.backbone}_{args.dataset}_v3_{args.exp}_epoch{epoch}.pth"


def newest_checkpoint(args: argparse.Namespace) -> str | None:
    """The furthest checkpoint of --exp, judged by the numbers in the names."""
    pattern = re.escape(checkpoint_path(args, 0)).replace("epoch0", r"epoch(\d+)")
    found = [match for path in glob("data/*.pth") if (match := re.fullmatch(pattern, path))]
    return max(found, key=lambda match: int(match[1]))[0] if found else None


def make_loader(
    dataset: SegmentationDataset, batches, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=args.workers,
        collate_fn=dataset.collate,
        pin_memory=device.type == "cuda",
    )


def make_optimizer(model: DeepLabv3) -> torch.optim.SGD:
    """SGD as in the paper, in two parameter groups, the trunk and ASPP; the loop sets their learning
    rates."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    aspp = [p for name, p in trained if name.startswith("aspp.")]
    trunk = [p for name, p in trained if not name.startswith("aspp.")]
    return torch.optim.SGD([{"params": trunk}, {"params": aspp}], lr=0.0, momentum=0.9, weight_decay=1e-4)


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, masks: Tensor
) -> Tensor:
    """One step on a batch of normalised images (N, 3, H, W) and uint8 masks (N, H, W).

    Returns the loss, the mean cross-entropy of the labelled pixels, as a scalar on their device.
    """
    # Not reduction="mean": that is NaN for a batch without a labelled pixel, and this is 0.
    labelled = (masks != IGNORE_INDEX).sum().clamp(min=1)
    loss = F.cross_entropy(model(images), masks.long(), ignore_index=IGNORE_INDEX, reduction="sum") / labelled
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The run of --train, from the first or the resumed iteration to the last checkpoint."""
    torch.manual_seed(args.seed)
    dataset = DATASETS[args.dataset](args.data_root, train=True, crop_size=args.crop_size, seed=args.seed)
    validation = DATASETS[args.dataset](args.data_root, train=False)
    print(f"{len(dataset)} images to train on, {len(validation)} to validate, {len(dataset.classes)} classes")

    # BatchNorm cannot take the variance of ASPP's image-level feature over a batch of one image.
    min_last = 1 if args.groups or args.freeze_bn else 2
    batches = TrainBatches(len(dataset), args.batch_size, args.epochs, args.seed, min_last=min_last)
    if not batches.max_iter or args.batch_size < min_last:
        have = f"--batch_size {args.batch_size}, {len(dataset)} in the training list"
        way_out = "use larger ones, --freeze_bn, or --groups 32 --weight_std"
        raise UserError(f"BatchNorm cannot train on batches of one image ({have}): {way_out}")

    resume = newest_checkpoint(args) if args.resume == "auto" else args.resume
    model = make_model(args, len(dataset.classes), pretrained=not (args.scratch or resume or args.init))
    if args.init:
        left_out = deeplab.init_weights(model, deeplab.read_checkpoint(args.init), args.init)
        print(f"starts from {args.init}{', but for ' * bool(left_out)}{' and '.join(left_out)}")
    model.fit_bn_momentum(batches.max_iter)
    if args.freeze_bn:
        model.freeze_bn()
    model.place(device)
    optimizer = make_optimizer(model)
    if resume:
        checkpoint = deeplab.read_checkpoint(resume)
        deeplab.load_weights(model, checkpoint, resume)
        batches.start = load_progress(checkpoint, optimizer, batches, args, resume)
        print(f"resumed from {resume}: iteration {batches.start} of {batches.max_iter}")

    if batches.start >= batches.max_iter:
        print(f"all {args.epochs} epochs are done: nothing is left to train")
        return

    log = RunLog(args.exp, batches.start, args.tensorboard)
    loader = make_loader(dataset, batches, args, device)
    bar = tqdm(
        loader, total=batches.max_iter, initial=batches.start, unit="it", disable=None, dynamic_ncols=True
    )
    mean_iou = None
    loss_sum, log_start, log_time = torch.zeros((), device=device), batches.start, time.perf_counter()
    model.train()
    for iteration, (images, masks, sizes) in enumerate(bar, batches.start):
        lr = poly_lr(args.base_lr, iteration, batches.max_iter)
        trunk, aspp = optimizer.param_groups
        trunk["lr"], aspp["lr"] = lr, lr * args.last_mult

        images, sizes = images.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
        masks = masks.to(device, non_blocking=True)
        loss_sum += train_step(model, optimizer, model.normalize(images, sizes), masks)

        # The loss is read from the device at intervals only, so that the device never waits for it.
        done = iteration + 1
        epoch_ends = done % batches.per_epoch == 0
        if epoch_ends or done % args.log_every == 0:
            loss_mean = loss_sum.item() / (done - log_start)
            saves = epoch_ends and (
                done // batches.per_epoch % args.save_every == 0 or done == batches.max_iter
            )
            if saves and not all(p.isfinite().all() for p in model.parameters()):
                loss_mean = math.nan  # the last step broke the weights, and its loss did not show it yet
            if not math.isfinite(loss_mean):
                raise UserError(
                    f"the loss is {loss_mean} at iteration {done}: lower --base_lr (now {args.base_lr}); "
                    "the last checkpoint is from before that"
                )
            rate = (done - log_start) * args.batch_size / (time.perf_counter() - log_time)
            epoch = iteration // batches.per_epoch + 1
            row = {"epoch": epoch, "iteration": done, "lr": lr, "loss": loss_mean, "images_per_second": rate}
            status = f"loss {loss_mean:.4f}, lr {lr:.2g}, {rate:.1f} img/s, mean IoU {percent(mean_iou)}"
            bar.set_postfix_str(status)
            if bar.disable:
                left = timedelta(seconds=round((batches.max_iter - done) * args.batch_size / rate))
                progress = f"epoch {epoch}/{args.epochs}, iteration {done}/{batches.max_iter}"
                print(f"{progress}, {status}, {left} left", flush=True)
            if saves:
                path = checkpoint_path(args, epoch)
                save_checkpoint(path, model, optimizer, epoch, done, args, dataset)
                result = evaluate(model, validation, args, device)
                mean_iou = row["val_mean_iou"] = result["mean_iou"]
                log.show(result["samples"], done)
                bar.write(f"epoch {epoch}: saved {path}, mean IoU {percent(mean_iou)}")
                model.train()
            log.write(row)
            loss_sum.zero_()
            log_start, log_time = done, time.perf_counter()
    log.close()


def save_checkpoint(path, model, optimizer, epoch, iteration, args, dataset) -> None:
    """Write the keys of the published format, and what ours adds to them."""
    checkpoint = {
        "epoch": epoch,
        "state_dict": {f"module.{key}": tensor for key, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "iteration": iteration,
        "model": model.config,
        "classes": list(dataset.classes),
        "palette": [list(color) for color in dataset.palette],
        "flags": vars(args),
    }
    write_whole(path, partial(torch.save, checkpoint))


def load_progress(
    checkpoint: dict, optimizer, batches: TrainBatches, args: argparse.Namespace, path: str
) -> int:
    """Take the optimizer's state from a checkpoint, and return the iteration to go on from."""
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, iteration = checkpoint["epoch"], checkpoint.get("iteration")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be resumed, only evaluated: {error}") from error
    changed = [
        f"--{key} {value} to {getattr(args, key)}"
        for key, value in checkpoint.get("flags", {}).items()
        if key in RUN_FLAGS and getattr(args, key) != value
    ]
    if changed:
        print(f"the run goes on with other flags: {', '.join(changed)}")
    return epoch * batches.per_epoch if changed or iteration is None else iteration


@torch.inference_mode()
def evaluate(
    model: DeepLabv3,
    dataset: SegmentationDataset,
    args: argparse.Namespace,
    device: torch.device,
    folder: str | None = None,
) -> dict:
    """Predict a whole data set and compare it with the truth.

    Returns the measures of `utils.metrics`, the `confusion` matrix, and a picture of some `samples`. Writes
    the predictions as PNGs of the images' own sizes to `folder`, if given: with the palette, or as the test
    server wants them.
    """
    model = model.fuse()
    if args.compile:
        from torch._inductor import config  # takes seconds, so only where it is of use

        config.freezing = True  # the weights are constants, packed once as the convs want them
        model.compile(dynamic=False)  # for each shape anew: there are few
    batches = dataset.eval_batches(args.eval_batch_size)
    loader = make_loader(dataset, batches, args, device)
    confusion = torch.zeros(len(dataset.classes), len(dataset.classes), dtype=torch.int64, device=device)
    wanted = set(np.linspace(0, len(dataset) - 1, min(args.samples, len(dataset))).astype(int).tolist())
    samples = {}
    bar = tqdm(
        total=len(dataset), desc="evaluating", unit="img", disable=None, leave=False, dynamic_ncols=True
    )
    with ThreadPoolExecutor() as writers, bar:
        writing = []
        for indices, (images, masks, sizes) in zip(batches, loader, strict=True):
            x = model.normalize(images.to(device, non_blocking=True), sizes.to(device, non_blocking=True))
            predictions = model.scores(x, args.scales, args.flip).argmax(1).byte()
            confusion += confusion_matrix(
                predictions, masks.to(device, non_blocking=True), len(dataset.classes)
            )
            for future in writing:
                future.result()  # raises what went wrong; and never more than a batch waits to be written
            writing = []
            for i, (index, prediction) in enumerate(zip(indices, predictions.cpu().numpy(), strict=True)):
                h, w = sizes[i].tolist()
                labels = prediction[:h, :w]
                if index in wanted:
                    image = Image.fromarray(images[i, :, :h, :w].permute(1, 2, 0).numpy())
                    samples[index] = (image, masks[i, :h, :w].numpy(), labels)
                if folder:
                    writing.append(
                        writers.submit(save_prediction, folder, dataset, index, labels, args.split)
                    )
            bar.update(len(indices))
        for future in writing:
            future.result()
    sheet = sample_sheet([samples[i] for i in sorted(samples)], dataset.classes, dataset.palette)
    return {**metrics(confusion), "confusion": confusion.tolist(), "samples": sheet}


def save_prediction(
    folder: str, dataset: SegmentationDataset, index: int, labels: np.ndarray, split: str
) -> None:
    """Write a palette PNG, for the split test where the server looks for it; Cityscapes' wants its own
    labels."""
    name = dataset.result_name(index) if split == "test" else dataset.name(index)
    if split == "test" and dataset.label_ids is not None:
        save_image(f"{folder}/{name}.png", Image.fromarray(dataset.label_ids[labels]))
    else:
        save_mask(f"{folder}/{name}.png", labels, dataset.palette)


def run_evaluation(args: argparse.Namespace, device: torch.device) -> None:
    """The command without --train: load the checkpoint, evaluate, print, write pictures and metrics.json."""
    path = args.checkpoint or checkpoint_path(args, args.epochs)
    dataset = DATASETS[args.dataset](args.data_root, train=False, split=args.split)
    checkpoint = deeplab.read_checkpoint(path)
    model = make_model(args, len(dataset.classes), pretrained=False)
    deeplab.load_weights(model, checkpoint, path)
    model.place(device)
    folder = os.path.join("data", args.split, os.path.splitext(os.path.basename(path))[0])
    result = evaluate(model, dataset, args, device, folder)
    if args.split == "test":
        print(f"the predictions for the test server are in {folder}/results")
        return
    iou = dict(zip(dataset.classes, result["iou"], strict=True))
    print(table(dataset.classes, result))
    for name, value in iou.items():
        print(f"IoU {name}: {percent(value)}")
    print(f"Mean IoU: {percent(result['mean_iou'])}")
    save_image(f"{folder}/samples.png", result.pop("samples"))
    save_json(f"{folder}/metrics.json", {**result, "iou": iou, "checkpoint": path, "flags": vars(args)})
    print(f"predictions, samples.png and metrics.json are in {folder}")


def run_prediction(args: argparse.Namespace, device: torch.device) -> int:
    """The command with --predict: a palette mask and an overlay for each image. Returns how many failed."""
    checkpoint = deeplab.read_checkpoint(args.checkpoint)
    if "model" in checkpoint:
        model = deeplab.load(args.checkpoint, device, args.output_stride)
    else:  # a published file says nothing beyond its weights
        dataset = DATASETS[args.dataset]
        model = make_model(args, len(dataset.classes), pretrained=False)
        deeplab.load_weights(model, checkpoint, args.checkpoint)
        model.classes, model.palette = dataset.classes, dataset.palette
        model.place(device).eval()

    paths = []
    for path in args.predict:
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            paths += [os.path.join(path, n) for n in names if os.path.splitext(n)[1].lower() in IMAGE_ENDINGS]
        else:
            paths.append(path)
    if not paths:
        raise UserError(
            f"no images in {', '.join(args.predict)}: --predict takes image files, and folders of them"
        )
    model, failed, taken = model.fuse(), 0, set()
    for path in tqdm(paths, desc="predicting", unit="img", disable=None):
        try:
            image = deeplab.to_rgb(open_image(path))
        except UserError as error:
            print(f"main.py: error: {error}", file=sys.stderr)
            failed += 1
            continue
        labels = model.predict(image, args.scales, args.flip, args.max_side)
        stem = os.path.splitext(os.path.basename(path))[0]
        while stem in taken:  # images of one name, from several folders or in several formats
            stem += "_"
        taken.add(stem)
        save_mask(f"{args.out}/{stem}_mask.png", labels, model.palette)
        picture = overlay(image, labels, model.palette)
        picture = add_legend(picture, np.unique(labels), model.classes, model.palette)
        save_image(f"{args.out}/{stem}_overlay.jpg", picture)
    print(f"{len(paths) - failed} of {len(paths)} images: masks and overlays are in {args.out}")
    return failed


def run_download(args: argparse.Namespace) -> None:
    """The command with --download."""
    for name in args.download:
        for file, url in mirrored(DOWNLOADS[name], args.url):
            try:
                download(file, url)
            except UserError as error:
                if file.name != "list.zip":
                    raise
                print(f"{error}; without it, the lists are made from the masks")
                make_voc_lists(DATA_ROOTS["pascal"])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.download:
            return run_download(args)
        device = pick_device(args)
        if args.train:
            train(args, device)
        elif args.predict:
            sys.exit(run_prediction(args, device) > 0)
        else:
            run_evaluation(args, device)
    except (UserError, ModelError) as error:
        # An error of a loader's worker arrives with the worker's traceback; the message is its last line.
        message = str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
        sys.exit(f"main.py: error: {message}")
    except torch.OutOfMemoryError:
        sizes = f"--batch_size {args.batch_size}, --crop_size {args.crop_size}, --eval_batch_size"
        sys.exit(f"main.py: error: out of memory on the GPU: lower {sizes} {args.eval_batch_size}")
    except OSError as error:
        sys.exit(f"main.py: error: {error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("\nmain.py: stopped; --resume auto goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

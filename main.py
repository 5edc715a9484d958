"""Train DeepLabv3: `python main.py --train --exp NAME`. Evaluate it: the same command without `--train`."""

import argparse
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from traceback import clear_frames

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
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
    STOP_SIGNALS,
    RunLog,
    Stopped,
    UserError,
    add_legend,
    checkpoint_path,
    confusion_matrix,
    download,
    metrics,
    mirrored,
    outlive_stop_signals,
    overlay,
    percent,
    poly_lr,
    prune_checkpoints,
    sample_sheet,
    save_image,
    save_json,
    save_mask,
    saved_checkpoints,
    stop_now,
    stop_signals,
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
# The flags that the order of the samples and the schedule follow from: with others, a resumed run goes on
# from an epoch's start.
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
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}
# Set by torchrun: the number of this process, of all, on this machine. Rank 0 prints and writes files.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"main.py: error: {message} (all flags: python main.py --help)\n" * (RANK == 0))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults that the data set brings."""
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("what to do").add_argument
    add("--train", action="store_true", help="train; without it, evaluate")
    add("--exp", metavar="NAME", help="name of the experiment, part of the checkpoints' names")
    add(
        "--resume",
        metavar="PATH",
        help="go on from this checkpoint; `auto` takes the newest of --exp, if any",
    )
    add("--init", metavar="PATH", help="start from these weights, but for the classifier if classes differ")
    add("--checkpoint", metavar="PATH", help="evaluate this file instead of the one that the flags name")
    add("--predict", metavar="PATH", nargs="+", help="segment these images, and those in these folders")
    add("--out", metavar="DIR", default="data/predictions", help="where --predict writes masks and overlays")
    names = ", ".join(DOWNLOADS)
    add("--download", nargs="+", choices=DOWNLOADS, metavar="NAME", help=f"fetch to data/: {names}")
    add(
        "--url",
        help="mirror for one --download NAME: the address of its file, or of the folder that holds it",
    )

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="pascal", help="shapes is embedded and needs no files")
    add("--data_root", metavar="DIR", help="where the data set lies, if not under data/")
    splits = ("train", "val", "test")
    add("--split", choices=splits, default="val", help="part to evaluate; test is for the servers")
    add("--crop_size", type=positive, default=513, help="height and width of the training crops")
    add("--workers", type=int, default=4, help="processes that load images; 0 loads in the main one")
    add(
        "--skip_bad",
        action="store_true",
        help="decode all files first, leave out the samples that are damaged",
    )

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=deeplab.LAYERS, default="resnet101", help="torchvision ResNet to build on")
    add("--groups", type=int, help="GroupNorm with so many groups instead of BatchNorm (0)")
    add("--weight_std", action=switch, default=False, help="weight standardisation of the convs")
    add("--beta", action="store_true", help="three 3x3 convs as the stem instead of one 7x7")
    strides = (8, 16, 32)
    add(
        "--output_stride", type=int, choices=strides, help="input size over feature map size; 16 if not given"
    )
    add("--multi_grid", type=positive, nargs=3, default=[1, 1, 1], help="relative rates in layer4")
    rates = [6, 12, 18]
    add("--aspp_rates", type=positive, nargs="+", default=rates, help="atrous rates at output stride 16")
    add("--no_image_pooling", action="store_true", help="leave out ASPP's image-level branch")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=30, help="passes over the training list")
    add("--batch_size", type=positive, default=16, help="images in one step, of all processes together")
    add("--accum", type=positive, default=1, help="compute a batch in so many parts, to need less memory")
    add("--base_lr", type=float, default=0.00025, help="initial learning rate")
    add("--last_mult", type=float, default=1.0, help="learning rate of ASPP over that of the trunk")
    add("--scratch", action=switch, default=False, help="do not start from ImageNet weights")
    add("--freeze_bn", action="store_true", help="keep BatchNorm's statistics, scale and shift as they are")
    add("--seed", type=int, default=0, help="the same seed gives the same run")
    add(
        "--save_every", type=positive, default=10, help="epochs between checkpoints; the last is always saved"
    )
    add("--save_every_iters", type=positive, help="iterations between further checkpoints, within epochs")
    add("--keep", type=positive, help="keep only so many of the newest checkpoints, and the best one")
    add("--log_every", type=positive, default=10, help="iterations between looks at the loss")
    add("--tensorboard", action="store_true", help="write the log and samples for TensorBoard, too")

    add = parser.add_argument_group("evaluation and prediction").add_argument
    add("--eval_batch_size", type=positive, default=4, help="images in one forward pass")
    add("--scales", type=float, nargs="+", default=[1.0], help="average the scores over these image sizes")
    add("--flip", action="store_true", help="average them over the mirrored image, too")
    add("--samples", type=int, default=8, help="rows of samples.png: image, truth, prediction")
    add("--max_side", type=positive, default=2049, help="--predict shrinks longer images to this")

    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=int, help="number of the CUDA device, 0 if not given")
    add("--device", help="cuda, cuda:1, mps or cpu instead of the best there is")
    add("--amp", choices=AMP, help="number format of convs; if not given, bf16 to train on a GPU that has it")
    add(
        "--compile",
        action="store_true",
        help="compile the model: minutes at first, then faster; needs a compiler",
    )

    args = parser.parse_args(argv)
    if args.url and len(args.download or ()) != 1:
        parser.error("--url replaces the address of one --download NAME: give one NAME with it")
    if args.url and not args.url.lower().startswith(("http://", "https://")):
        parser.error(f"--url {args.url!r} is no http:// or https:// address; a file at hand goes to data/")
    if args.download and args.train:
        parser.error("--download only fetches: give --train to a second command")
    if WORLD > 1 and (args.download or args.predict):
        parser.error("--download and --predict run in one process: leave out torchrun")
    if args.download:
        return args
    if args.dataset == "shapes":
        parser.set_defaults(**SHAPES_DEFAULTS)
        args = parser.parse_args(argv)
        settings = {key: getattr(args, key) for key in SHAPES_DEFAULTS}
        shown = [f"--{key}" if v is True else f"--{key} {v}" for key, v in settings.items() if v]
        print(f"shapes has defaults of its own; this run has {' '.join(shown)}")
    if args.predict and not args.checkpoint:
        parser.error("--predict needs --checkpoint FILE")
    if args.exp is None and not args.predict:
        parser.error("--exp NAME is needed: it names the checkpoints; to try it out, add --dataset shapes")
    if args.exp and os.path.basename(args.exp) != args.exp:
        parser.error(f"--exp {args.exp!r} becomes part of a file's name: leave out the slashes")
    if min(args.seed, args.workers, args.samples) < 0:
        parser.error("--seed, --workers and --samples cannot be negative")
    if not (0 <= args.base_lr < math.inf and 0 <= args.last_mult < math.inf):
        parser.error("--base_lr and --last_mult are numbers from 0")
    if not all(0.1 <= scale <= 4 for scale in args.scales):
        parser.error("--scales are between 0.1 and 4")
    if args.resume and args.init:
        parser.error("--resume goes on with a run and --init begins one: leave one of them out")
    if args.freeze_bn and args.groups:
        parser.error("--freeze_bn has nothing to freeze with --groups")
    if args.train and args.freeze_bn and args.scratch and not (args.resume or args.init):
        parser.error("--freeze_bn with --scratch freezes what was never learnt: leave one of them out")
    if not args.train and (args.resume or args.init):
        parser.error("--resume and --init go with --train; to evaluate a file, use --checkpoint")
    if WORLD > 1 and args.gpu is not None:
        parser.error(
            "--gpu is for one process: torchrun gives each its own; CUDA_VISIBLE_DEVICES narrows them"
        )
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
    """--device, else CUDA (--gpu picks, or torchrun), else Apple's MPS, else the CPU."""
    if args.device:
        name = args.device
    elif torch.cuda.is_available():
        name = f"cuda:{LOCAL_RANK if WORLD > 1 else args.gpu or 0}"
    elif args.gpu is not None:
        raise UserError(
            f"--gpu {args.gpu}: there is no CUDA device here; leave the flag out to run without one"
        )
    else:
        name = "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = f" (there are {torch.cuda.device_count()} GPUs)" if name.startswith("cuda") else ""
        raise UserError(f"device {name} cannot be used{there}: {str(error).splitlines()[0]}") from error
    if args.amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA device, and this is {device.type}: use bf16 or none")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Training and evaluation have few sizes: find the fastest convs for each. Photos may all differ.
        torch.backends.cudnn.benchmark = not args.predict
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convs have it by default
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


def open_dataset(args: argparse.Namespace, train: bool) -> SegmentationDataset:
    """The data set of the flags, to train on, or to validate or evaluate on.

    Raises:
        UserError: if a sample of it cannot be used, unless --skip_bad leaves it out.
    """
    split = "train" if train else "val" if args.train else args.split
    dataset = DATASETS[args.dataset](args.data_root, train, args.crop_size, args.seed, split)
    faults = dataset.drop_bad(decode=args.skip_bad)
    if faults and (not args.skip_bad or not len(dataset)):
        way_out = "" if args.skip_bad else "; --skip_bad leaves such samples out"
        raise UserError(f"{faults[0]} ({len(faults)} of the {split} samples cannot be used{way_out})")
    if faults:
        print(f"left out {len(faults)} of the {split} samples, the first because of: {faults[0]}")
    return dataset


def make_loader(
    dataset: SegmentationDataset, batches, args: argparse.Namespace, device: torch.device
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=args.workers,
        collate_fn=dataset.collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=outlive_stop_signals,
    )


def make_optimizer(model: DeepLabv3) -> torch.optim.SGD:
    """SGD as in the paper, in two parameter groups, the trunk and ASPP; the loop sets their learning
    rates."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    aspp = [p for name, p in trained if name.startswith("aspp.")]
    trunk = [p for name, p in trained if not name.startswith("aspp.")]
    groups = [{"params": trunk}, {"params": aspp}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)


def train_step(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    masks: Tensor,
    dtype: torch.dtype | None = None,
    accum: int = 1,
) -> Tensor:
    """One step on this process' part of a batch: normalised images (N, 3, H, W) and uint8 masks (N, H, W).

    The loss is the mean cross-entropy of the labelled pixels of the whole batch, so that neither the number
    of processes nor `accum`, the number of parts that are computed one after the other, changes it.

    Returns:
        this process' share of the loss, a scalar on its device; the shares add up.
    """
    # Not reduction="mean": that is NaN for a batch without a labelled pixel, and this is 0.
    labelled = (masks != IGNORE_INDEX).sum()
    if WORLD > 1:
        dist.all_reduce(labelled)
    labelled = labelled.clamp(min=1)
    optimizer.zero_grad()
    loss_sum = 0
    parts = min(accum, len(images))
    for i, (x, y) in enumerate(zip(images.tensor_split(parts), masks.tensor_split(parts), strict=True), 1):
        # The processes exchange gradients in the last part's backward pass, and average them: hence WORLD.
        with net.no_sync() if WORLD > 1 and i < parts else nullcontext():
            with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
                logits = net(x)
            loss = F.cross_entropy(logits, y.long(), ignore_index=IGNORE_INDEX, reduction="sum") / labelled
            scaler.scale(loss * WORLD).backward()
        loss_sum = loss_sum + loss.detach()
    scaler.step(optimizer)
    scaler.update()
    return loss_sum


def smallest_batch(args: argparse.Namespace, device: torch.device, length: int) -> int:
    """The number of images that a batch must have, of `length` in the training list.

    Raises:
        UserError: if --batch_size or the list has fewer.
    """
    if args.groups or args.freeze_bn:
        smallest, way_out = WORLD, "use a larger --batch_size or fewer processes"
    else:
        # BatchNorm cannot take the variance of ASPP's image-level feature over one image. Processes with GPUs
        # share their statistics, so that one image of each is enough.
        smallest = args.accum * (WORLD if WORLD > 1 and device.type == "cuda" else 2 * WORLD)
        way_out = "use larger ones, --freeze_bn, or --groups 32 --weight_std"
    if min(args.batch_size, length) < smallest:
        have = (
            f"--batch_size {args.batch_size}, --accum {args.accum}, {WORLD} processes, {length} in the list"
        )
        what = "a batch needs an image for each process"
        if smallest > WORLD:
            what = "BatchNorm cannot train on batches of one image"
        raise UserError(f"{what} ({have}): {way_out}")
    return smallest


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The run of --train, from the first or the resumed iteration to the last checkpoint."""
    torch.manual_seed(args.seed)
    dataset = open_dataset(args, train=True)
    validation = open_dataset(args, train=False)
    print(f"{len(dataset)} images to train on, {len(validation)} to validate, {len(dataset.classes)} classes")
    min_last = smallest_batch(args, device, len(dataset))
    batches = TrainBatches(len(dataset), args.batch_size, args.epochs, args.seed, min_last, RANK, WORLD)

    resume, saved = args.resume, saved_checkpoints(args)
    if resume == "auto":
        resume = saved[-1].path if saved else None
    elif saved and not resume:
        print(f"{saved[-1].path} is of an earlier run; without --resume, this one writes over such files")
    model = make_model(args, len(dataset.classes), pretrained=not (args.scratch or resume or args.init))
    if args.init:
        left_out = deeplab.init_weights(model, deeplab.read_checkpoint(args.init), args.init)
        print(f"starts from {args.init}{', but for ' * bool(left_out)}{' and '.join(left_out)}")
    model.fit_bn_momentum(batches.max_iter)
    if args.freeze_bn:
        model.freeze_bn()
    elif WORLD > 1 and not args.groups and device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif WORLD > 1 and not args.groups:
        print("BatchNorm takes statistics in each process by itself: only GPUs can share them")
    model.place(device)
    optimizer = make_optimizer(model)
    amp = args.amp or ("bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "none")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if resume:
        checkpoint = deeplab.read_checkpoint(resume)
        deeplab.load_weights(model, checkpoint, resume)
        batches.start = load_progress(checkpoint, optimizer, scaler, batches, args, resume)
        print(f"resumed from {resume}: iteration {batches.start} of {batches.max_iter}")

    if batches.start >= batches.max_iter:
        print(f"all {args.epochs} epochs are done: nothing is left to train")
        return

    log = RunLog(args.exp, batches.start, args.tensorboard) if RANK == 0 else None
    net = model
    if args.compile:
        model.compile(dynamic=False)
    if WORLD > 1:
        devices = [device] if device.type == "cuda" else None
        net = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    bar = tqdm(
        make_loader(dataset, batches, args, device),
        total=batches.max_iter,
        initial=batches.start,
        unit="it",
        disable=True if RANK else None,
        dynamic_ncols=True,
    )
    stop = []

    def stop_later(number: int, frame) -> None:
        """Let the iteration end, and a checkpoint be written; a second signal does not wait for that."""
        stop.append(number)
        if WORLD == 1:  # torchrun passes on what its processes have had from the terminal
            for each in STOP_SIGNALS:
                signal.signal(each, stop_now)

    mean_iou = None
    loss_sum, log_start, log_time = torch.zeros((), device=device), batches.start, time.perf_counter()
    model.train()
    with stop_signals(stop_later):
        for iteration, (images, masks, sizes) in enumerate(bar, batches.start):
            lr = poly_lr(args.base_lr, iteration, batches.max_iter)
            trunk, aspp = optimizer.param_groups
            trunk["lr"], aspp["lr"] = lr, lr * args.last_mult

            images, sizes = images.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
            masks = masks.to(device, non_blocking=True)
            x = model.normalize(images, sizes)
            loss_sum += train_step(net, optimizer, scaler, x, masks, AMP[amp], args.accum)

            done = iteration + 1
            epochs_done, within = divmod(done, batches.per_epoch)
            saves = not within and (epochs_done % args.save_every == 0 or done == batches.max_iter)
            saves_within = not saves and args.save_every_iters and done % args.save_every_iters == 0
            if within and done % args.log_every and not saves_within and not (stop and WORLD == 1):
                continue

            # The loss is read from the device only now, so that the device does not wait in every iteration.
            # Processes tell each other, too, whether one of them is to stop.
            report = torch.stack([loss_sum, torch.full_like(loss_sum, len(stop))])
            if WORLD > 1:
                dist.all_reduce(report)
            loss, stops = report.tolist()
            loss /= done - log_start
            writes = saves or saves_within or stops
            if writes and not all(p.isfinite().all() for p in model.parameters()):
                loss = math.nan  # the last step broke the weights, and its loss did not show it yet
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at iteration {done}: lower --base_lr (now {args.base_lr}); the last "
                    "checkpoint is from before that"
                )
            rate = (done - log_start) * args.batch_size / (time.perf_counter() - log_time)
            epoch = iteration // batches.per_epoch + 1
            row = {"epoch": epoch, "iteration": done, "lr": lr, "loss": loss, "images_per_second": rate}
            status = f"loss {loss:.4f}, lr {lr:.2g}, {rate:.1f} img/s, mean IoU {percent(mean_iou)}"
            bar.set_postfix_str(status)
            if bar.disable:
                left = timedelta(seconds=round((batches.max_iter - done) * args.batch_size / rate))
                progress = f"epoch {epoch}/{args.epochs}, iteration {done}/{batches.max_iter}"
                print(f"{progress}, {status}, {left} left", flush=True)
            path = checkpoint_path(args, epochs_done, None if saves else done)
            if log:
                log.write(row)  # before the checkpoint: a run resumed from it finds it there
            if writes and RANK == 0:
                save_checkpoint(path, model, optimizer, scaler, epochs_done, done, args, dataset)
            if saves and not stops:
                with stop_signals(stop_now):
                    result = evaluate(model, validation, args, device)
                model.train()
                mean_iou = row["val_mean_iou"] = result["mean_iou"]
                bar.write(f"epoch {epoch}: saved {path}, mean IoU {percent(mean_iou)}")
                if log:
                    log.write(row, result["samples"])
            if log and writes:
                prune_checkpoints(args, path, log.best_epoch)
            if stops:
                bar.close()
                number = stop[0] if stop else signal.SIGTERM
                raise Stopped(number, f"saved {path}: the same command with --resume auto goes on from there")
            loss_sum.zero_()
            log_start, log_time = done, time.perf_counter()
    if log:
        log.close()
    if device.type == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


def save_checkpoint(path, model, optimizer, scaler, epoch, iteration, args, dataset) -> None:
    """Write the keys of the published format, and what ours adds to them."""
    checkpoint = {
        "epoch": epoch,
        "state_dict": {f"module.{key}": tensor for key, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "iteration": iteration,
        "model": model.config,
        "classes": list(dataset.classes),
        "palette": [list(color) for color in dataset.palette],
        "flags": vars(args),
    }
    write_whole(path, partial(torch.save, checkpoint))


def load_progress(checkpoint, optimizer, scaler, batches, args, path) -> int:
    """Take the state of optimizer and scaler from a checkpoint, and return the iteration to go on from.

    No random state is needed: what is drawn for a sample follows from (seed, epoch, index).
    """
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint.get("scaler"):
            scaler.load_state_dict(checkpoint["scaler"])
        epoch, flags = int(checkpoint["epoch"]), dict(checkpoint.get("flags", {}))
        iteration = int(checkpoint.get("iteration", epoch * batches.per_epoch))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be resumed, only evaluated: {error}") from error
    changed = [
        f"--{key} {value} to {getattr(args, key)}"
        for key, value in flags.items()
        if key in RUN_FLAGS and getattr(args, key) != value
    ]
    if changed:
        print(f"the run goes on with other flags: {', '.join(changed)}")
    return epoch * batches.per_epoch if changed else iteration


@torch.inference_mode()
def evaluate(
    model: DeepLabv3,
    dataset: SegmentationDataset,
    args: argparse.Namespace,
    device: torch.device,
    folder: str | None = None,
) -> dict:
    """Predict a whole data set and compare it with the truth; several processes take turns with the batches.

    Returns the measures of `utils.metrics`, the `confusion` matrix, and a picture of some `samples`. Writes
    the predictions as PNGs of the images' own sizes to `folder`, if given: with the palette, or as the test
    server wants them.
    """
    model = model.fuse()
    if args.compile:
        from torch._inductor import config  # takes seconds, so only where it is of use

        config.freezing = True  # weights without gradients are constants, packed as the convs want them
        model.compile(dynamic=False)  # for each shape anew: there are few
    batches = dataset.eval_batches(args.eval_batch_size)
    own = batches[RANK::WORLD]
    loader = iter(make_loader(dataset, own, args, device))
    confusion = torch.zeros(len(dataset.classes), len(dataset.classes), dtype=torch.int64, device=device)
    wanted = set(np.linspace(0, len(dataset) - 1, min(args.samples, len(dataset))).astype(int).tolist())
    samples, writing, predicted = {}, [], None
    bar = tqdm(
        total=len(dataset),
        desc="evaluating",
        unit="img",
        disable=True if RANK else None,
        leave=False,
        dynamic_ncols=True,
    )
    with ThreadPoolExecutor() as writers, bar:
        for turn in range(math.ceil(len(batches) / WORLD) + 1):
            before, predicted = predicted, None
            if turn < len(own):
                images, masks, sizes = next(loader)
                x = model.normalize(images.to(device, non_blocking=True), sizes.to(device, non_blocking=True))
                with torch.autocast(
                    device.type, AMP[args.amp or "none"], enabled=args.amp in ("bf16", "fp16")
                ):
                    predictions = model.scores(x, args.scales, args.flip).argmax(1).byte()
                confusion += confusion_matrix(
                    predictions, masks.to(device, non_blocking=True), len(dataset.classes)
                )
                predicted = own[turn], images, masks, sizes, predictions

            # While a GPU works on that, the batch before it is brought home.
            results = []
            if before:
                indices, images, masks, sizes, predictions = before
                for i, (index, prediction) in enumerate(zip(indices, predictions.cpu().numpy(), strict=True)):
                    h, w = sizes[i].tolist()
                    sample = (images[i, :, :h, :w], masks[i, :h, :w]) if index in wanted else None
                    results.append((index, prediction[:h, :w], sample))
            if WORLD > 1:
                parts = [None] * WORLD
                dist.gather_object(results, parts if RANK == 0 else None)
                results = sum(parts, []) if RANK == 0 else []
            for future in writing:
                future.result()  # raises what went wrong; and never more than a batch waits to be written
            writing = []
            for index, labels, sample in results:
                if sample:
                    image, truth = sample
                    image = Image.fromarray(image.permute(1, 2, 0).numpy())
                    samples[index] = (image, truth.numpy(), labels)
                if folder:
                    writing.append(writers.submit(dataset.save, folder, index, labels, args.split))
            bar.update(len(results))
        for future in writing:
            future.result()
    if WORLD > 1:
        dist.all_reduce(confusion)
    sheet = sample_sheet([samples[i] for i in sorted(samples)], dataset.classes, dataset.palette)
    return {**metrics(confusion), "confusion": confusion.tolist(), "samples": sheet}


def run_evaluation(args: argparse.Namespace, device: torch.device) -> None:
    """The command without --train: load the checkpoint, evaluate, print, write pictures and metrics.json."""
    path = args.checkpoint or checkpoint_path(args, args.epochs)
    dataset = open_dataset(args, train=False)
    checkpoint = deeplab.read_checkpoint(path)
    model = make_model(args, len(dataset.classes), pretrained=False)
    deeplab.load_weights(model, checkpoint, path)
    model.place(device)
    folder = os.path.join("data", args.split, os.path.splitext(os.path.basename(path))[0])
    result = evaluate(model, dataset, args, device, folder)
    if RANK:
        return
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
        if issubclass(dataset, ListSegmentation):  # whose classes stand in a file
            if not args.data_root:
                raise UserError(
                    f"{args.checkpoint} does not name its classes: --data_root DIR has classes.txt"
                )
            dataset = dataset(args.data_root, train=False)
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
        with torch.autocast(device.type, AMP[args.amp or "none"], enabled=args.amp in ("bf16", "fp16")):
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


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """An error as one line for the user, or None if it is none of theirs."""
    message = " ".join(str(error).split())
    if isinstance(error, (UserError, ModelError)):
        # From a loader's worker it comes with the worker's traceback, and the message is its last line.
        return str(error).strip().splitlines()[-1].removeprefix("utils.UserError: ")
    if isinstance(error, torch.OutOfMemoryError):
        sizes = (
            f"--batch_size {args.batch_size} of --crop_size {args.crop_size} in --accum {args.accum} parts"
        )
        way_out = "raise --accum, or lower the others (in evaluation --eval_batch_size and --scales)"
        return f"out of memory on the GPU with {sizes}: {way_out}"
    if "shared memory" in message:
        return (
            "too little shared memory for batches: lower --workers, or allow more (docker run --shm-size 8g)"
        )
    if message.startswith("DataLoader worker (pid"):
        return f"{message.rstrip('.')}: lower --workers if the machine lacks memory"
    if WORLD > 1 and (isinstance(error, dist.DistError) or "gloo" in message):
        way_out = "--resume auto goes on from the last checkpoint"
        return f"another process has ended, see there; {way_out} ({message[:100]})"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process
    try:
        with stop_signals(stop_now):
            if args.download:
                return run_download(args)
            device = pick_device(args)
            if WORLD > 1:
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            if args.train:
                train(args, device)
            elif args.predict:
                sys.exit(run_prediction(args, device) > 0)
            else:
                run_evaluation(args, device)
            if WORLD > 1:
                dist.destroy_process_group()
    except Stopped as stopped:
        clear_frames(stopped.__traceback__)
        number, message = stopped.args
        if RANK == 0:
            print(f"\nmain.py: stopped by {signal.Signals(number).name}; {message}", file=sys.stderr)
        sys.exit(128 + number)
    except (UserError, ModelError, OSError, RuntimeError) as error:
        message = explain(error, args)
        if message is None:
            raise
        clear_frames(error.__traceback__)  # they hold the loader, whose workers would hold up the exit
        sys.exit(f"main.py: {f'rank {RANK}: ' * (WORLD > 1)}error: {message}")


if __name__ == "__main__":
    main()

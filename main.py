"""Train DeepLabv3: `python main.py --train --exp NAME`. Evaluate it: the same command without `--train`."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while torch is imported, which takes seconds: a line, no traceback.
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"main.py: stopped by SIGINT\n") and os._exit(130))

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from traceback import clear_frames, format_exception
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import datasets
import deeplab
import processes
import utils
from commands import check, export
from commands import predict as prediction
from commands.download import download_all
from commands.evaluate import ImageResult, evaluate
from commands.flags import parse_args
from datasets import SegmentationDataset
from deeplab import DeepLabv3, ModelError
from files import pictures, plots, runs
from utils import IGNORE_INDEX, LOCAL_RANK, RANK, WORLD, Stopped, UserError, percent

FEW_SHAPES = 16  # of batches in evaluation: to tune the convs for each, or to compile

# ----------------------------------------------------------------------------------------------------------
# device, data, model


def pick_device(args: argparse.Namespace) -> torch.device:
    """--device, else CUDA, else Apple's MPS, else the CPU; torchrun or --gpu number the CUDA device.

    Raises:
        UserError: if that device is not there, or cannot do what the flags ask for.
    """
    name = args.device or ("cuda" if args.gpu is not None or torch.cuda.is_available() else None)
    name = name or ("mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK if WORLD > 1 else args.gpu or 0}"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("choose cuda, cuda:1, mps or cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = f" (there are {torch.cuda.device_count()} GPUs)" if name.startswith("cuda") else ""
        raise UserError(f"device {name} cannot be used{there}: {str(error).splitlines()[0]}") from error
    if args.amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA device, and this is {device.type}: use bf16 or none")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convs have it by default
    return device


def open_dataset(args: argparse.Namespace, split: str) -> SegmentationDataset:
    """A part of the data set, in crops to train on if it is the part to train on.

    Raises:
        UserError: if a sample of it cannot be used, unless --skip_bad leaves it out.
    """
    crop_size = args.crop_size if args.train and split == "train" else None
    dataset = datasets.DATASETS[args.dataset](args.data_root, split, crop_size, args.seed)
    faults = dataset.drop_bad(decode=args.skip_bad)
    if faults and (not args.skip_bad or not len(dataset)):
        way_out = "" if args.skip_bad else "; --skip_bad leaves such samples out"
        raise UserError(f"{faults[0]} ({len(faults)} of the {split} samples cannot be used{way_out})")
    if faults:
        print(f"left out {len(faults)} of the {split} samples, the first because of: {faults[0]}")
    if dataset.has_masks and (unseen := dataset.unseen_classes()):
        print(f"of these classes the {split} masks that were looked at have no pixel: {', '.join(unseen)}")
    return dataset


def model_options(args: argparse.Namespace) -> dict:
    """The arguments of `DeepLabv3` that the flags give."""
    options = {
        "backbone": args.backbone,
        "num_groups": args.groups,
        "weight_std": args.weight_std,
        "beta": args.beta,
        "output_stride": args.output_stride,
        "multi_grid": args.multi_grid,
        "aspp_rates": args.aspp_rates,
        "image_pooling": None if args.no_image_pooling is None else not args.no_image_pooling,
    }
    return {key: value for key, value in options.items() if value is not None}


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[DeepLabv3, str]:
    """The model to evaluate or to predict with, and the path of its checkpoint, which tells what it holds.

    A published one tells its weights alone: the flags and their defaults say the rest, --dataset the classes.

    Raises:
        UserError, ModelError: if there is no such checkpoint, or it is of another model.
    """
    backbones = [args.backbone] if args.backbone else list(deeplab.LAYERS)
    path = args.checkpoint or runs.find_checkpoint(backbones, args.dataset, args.exp, args.epochs)
    checkpoint, options = deeplab.read_checkpoint(path), model_options(args)
    if not deeplab.published(checkpoint):
        model = deeplab.from_checkpoint(checkpoint, path, **options)
    else:
        labels = datasets.class_labels(args.dataset, args.data_root)
        model = DeepLabv3(**{"backbone": "resnet101", **options}, num_classes=len(labels.classes))
        deeplab.load_weights(model, checkpoint, path)
        model.classes, model.palette = labels.classes, labels.palette
    return model.place(device).eval(), path


def compare_classes(names: Sequence[str], path: str, dataset: SegmentationDataset) -> None:
    """Say it if the classes of a checkpoint have other names than those of the data set.

    Raises:
        UserError: if they are the same in another order, so that each would be taken for another.
    """
    if list(names) == list(dataset.classes):
        return
    other = f"{path} was trained with {{}}: {', '.join(names)}"
    if sorted(names) == sorted(dataset.classes):
        raise UserError(f"{other.format('the classes in another order')}; give them that order")
    print(other.format("other names of the classes"))


# ----------------------------------------------------------------------------------------------------------
# training


def poly_lr(base_lr: float, iteration: int, max_iter: int) -> float:
    """The paper's schedule: base_lr (1 - iteration / max_iter)^0.9, iterations counted from 0."""
    return base_lr * (1 - iteration / max_iter) ** 0.9


def make_optimizer(model: DeepLabv3, fused: bool = True) -> torch.optim.SGD:
    """SGD as in the paper, in two parameter groups, trunk and ASPP, whose learning rates the loop sets.

    Not `fused` with a loss scaler: the fused step spoils the momentum where the scaler skips a step.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    aspp = [p for name, p in trained if name.startswith("aspp.")]
    trunk = [p for name, p in trained if not name.startswith("aspp.")]
    groups = [{"params": trunk}, {"params": aspp}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=fused)


def train_step(
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    masks: Tensor,
    amp: str = "none",
    accum: int = 1,
    weights: Tensor | None = None,
) -> Tensor:
    """One step on this process' part of a batch: normalised images (N, 3, H, W) and uint8 masks (N, H, W).

    The loss is the mean cross-entropy of the labelled pixels of the whole batch, so that neither the number
    of processes nor `accum`, the number of parts that are computed one after the other, changes it. With the
    `weights` of the classes it is the weighted mean, as torch's own loss.

    Returns:
        this process' share of the loss, a scalar on its device; the shares add up.
    """
    # Not reduction="mean": that is NaN for a batch without a labelled pixel, and this is 0.
    labelled = (masks != IGNORE_INDEX).sum()
    if weights is not None:
        labelled = F.pad(weights, (0, 256 - len(weights)))[masks.int()].sum()
    if WORLD > 1:
        dist.all_reduce(labelled)
    labelled = labelled.where(labelled > 0, 1)
    optimizer.zero_grad()
    loss_sum = 0
    parts = min(accum, len(images))
    for i, (x, y) in enumerate(zip(images.tensor_split(parts), masks.tensor_split(parts), strict=True), 1):
        # The processes exchange gradients in the last part's backward pass, and average them: hence WORLD.
        with net.no_sync() if WORLD > 1 and i < parts else nullcontext():
            with deeplab.autocast(images.device, amp):
                logits = net(x)
            loss = F.cross_entropy(logits, y.long(), weights, ignore_index=IGNORE_INDEX, reduction="sum")
            loss = loss / labelled
            scaler.scale(loss * WORLD).backward()
        loss_sum = loss_sum + loss.detach()
    scaler.step(optimizer)
    scaler.update()
    return loss_sum


def loss_weights(
    args: argparse.Namespace, dataset: SegmentationDataset, device: torch.device
) -> Tensor | None:
    """The weights of the classes that --class_weights asks for; "auto" counts the pixels of all masks.

    Raises:
        UserError: if there is not a weight for each class.
    """
    if not args.class_weights:
        return None
    if args.class_weights == ["auto"]:
        counts = dataset.count_labels(range(len(dataset))[RANK::WORLD], "counting pixels")
        for count in counts if WORLD > 1 else ():
            dist.all_reduce(torch.from_numpy(count))
        args.class_weights = counts.median_frequency(len(dataset.classes))
    if len(args.class_weights) != len(dataset.classes):
        given = f"--class_weights has {len(args.class_weights)} numbers for {len(dataset.classes)} classes"
        raise UserError(f"{given}: {', '.join(dataset.classes)}")
    shown = (f"{name} {float(w):.3g}" for name, w in zip(dataset.classes, args.class_weights, strict=True))
    print(f"weights of the classes in the loss: {', '.join(shown)}")
    return torch.tensor([float(weight) for weight in args.class_weights], device=device)


def make_batches(args: argparse.Namespace, device: torch.device, length: int) -> datasets.TrainBatches:
    """The batches of the whole run, on a training list of that `length`.

    Raises:
        UserError: if a batch would have fewer images than training needs.
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
    return datasets.TrainBatches(length, args.batch_size, args.epochs, args.seed, smallest, RANK, WORLD)


def start_model(
    args: argparse.Namespace,
    device: torch.device,
    run: runs.Run,
    batches: datasets.TrainBatches,
    dataset: SegmentationDataset,
) -> tuple[DeepLabv3, torch.optim.SGD, torch.amp.GradScaler, runs.Place]:
    """Model, optimizer, scaler and place of a new run or of a resumed one.

    Raises:
        UserError, ModelError: if the weights or the checkpoint to start from cannot be used.
    """
    resume = args.resume
    if resume == "auto":
        saved = run.saved()
        resume = saved[-1].path if saved else None
        if not resume:
            print(f"--exp {run.exp} has no checkpoint to resume from: starts anew")
    options = {**model_options(args), "num_classes": len(dataset.classes)}
    model = deeplab.build(pretrained=not (args.scratch or resume or args.init), **options)
    model.classes, model.palette = dataset.classes, dataset.palette
    if args.init:
        checkpoint = deeplab.read_checkpoint(args.init)
        left_out = deeplab.init_weights(model, checkpoint, args.init)
        if not left_out:
            compare_classes(checkpoint.get("classes", dataset.classes), args.init, dataset)
        print(f"starts from {args.init}", *(["but for", " and ".join(left_out)] if left_out else []))
    model.fit_bn_momentum(batches.max_iter)
    if args.freeze_bn:
        model.freeze_bn()
    elif WORLD > 1 and not args.groups and device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif WORLD > 1 and not args.groups:
        print("BatchNorm takes statistics in each process by itself: only GPUs can share them")
    model.place(device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    optimizer, place = make_optimizer(model, fused=not scaler.is_enabled()), runs.Place()
    if resume:
        checkpoint = deeplab.read_checkpoint(resume)
        deeplab.load_weights(model, checkpoint, resume)
        compare_classes(checkpoint.get("classes", dataset.classes), resume, dataset)
        flags = vars(args)
        length = runs.Length(batches.length, batches.per_epoch)
        place = runs.load_progress(checkpoint, resume, optimizer, scaler, length, flags)
        print(f"resumed from {resume}: iteration {place.iteration} of {batches.max_iter}")
    return model, optimizer, scaler, place


def due(done: int, per_epoch: int, max_iter: int, args: argparse.Namespace) -> str | None:
    """What comes after iteration `done`, counted from 1: "validate" (and save), "save", "look" or nothing."""
    epochs_done, within = divmod(done, per_epoch)
    if done == max_iter or (not within and epochs_done % args.save_every == 0):
        return "validate"
    if args.save_every_iters and done % args.save_every_iters == 0:
        return "save"
    if not within or done % args.log_every == 0:
        return "look"
    return None


class Window:
    """The iterations since the last look at the loss."""

    def __init__(self, start: int, device: torch.device):
        self.start, self.began, self.loss_sum = start, time.perf_counter(), torch.zeros((), device=device)


def look(window: Window, done: int, batch_size: int, model: DeepLabv3 | None = None) -> dict:
    """The mean loss of the window and the images per second. Only here does the CPU wait for the device.

    Raises:
        UserError: if the loss is not finite, or a weight of `model`, which is about to be saved.
    """
    loss = window.loss_sum.cpu()
    if WORLD > 1:
        dist.all_reduce(loss)
    loss = loss.item() / (done - window.start)
    if model and not all(p.isfinite().all() for p in model.parameters()):
        loss = math.nan  # the last step broke the weights, and its loss did not show it yet
    if not math.isfinite(loss):
        way_out = "lower --base_lr; whatever is saved is from before that"
        raise UserError(f"the loss is {loss} at iteration {done}: {way_out}")
    rate = (done - window.start) * batch_size / (time.perf_counter() - window.began)
    return {"loss": loss, "images_per_second": rate}


def show(row: dict, mean_iou: float | None, bar: tqdm, args: argparse.Namespace) -> None:
    """A row of the log on the bar, or as a line of text where the output is no terminal."""
    rate = row["images_per_second"]
    status = f"loss {row['loss']:.4f}, lr {row['lr']:.2g}, {rate:.1f} img/s, mean IoU {percent(mean_iou)}"
    bar.set_postfix_str(status)
    if bar.disable:
        left = timedelta(seconds=round((bar.total - row["iteration"]) * args.batch_size / rate))
        progress = f"epoch {row['epoch']}/{args.epochs}, iteration {row['iteration']}/{bar.total}"
        print(f"{progress}, {status}, {left} left", flush=True)


def validate(
    model: DeepLabv3,
    dataset: SegmentationDataset,
    device: torch.device,
    args: argparse.Namespace,
    way_on: str,
) -> dict:
    """`evaluate` a model in training, whose checkpoint has just been saved; a stop says the `way_on`."""
    if WORLD > 1:
        for buffer in model.buffers():  # BatchNorm's statistics, which CPUs do not share in training
            dist.broadcast(buffer, 0)
    torch.backends.cudnn.benchmark = len(dataset.eval_shapes(args.eval_batch_size)) <= FEW_SHAPES
    try:
        return evaluate(model.fuse(), dataset, device, **evaluation_options(args))
    except Stopped:
        raise Stopped(way_on) from None
    finally:
        torch.backends.cudnn.benchmark = True


def go_on(saved: str, done: bool) -> str:
    """What to do with the checkpoint of a run that was stopped."""
    way_on = "without --train evaluates it" if done else "with --resume auto goes on from there"
    return f"{saved} is saved: the same command {way_on}"


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The run of --train, from the first or the resumed iteration to the last checkpoint."""
    # data
    torch.manual_seed(args.seed)
    train_set, val_set = open_dataset(args, "train"), open_dataset(args, "val")
    print(
        f"{len(train_set)} images to train on, {len(val_set)} to validate, {len(train_set.classes)} classes"
    )
    batches, weights = make_batches(args, device, len(train_set)), loss_weights(args, train_set, device)

    # model
    run = runs.Run(args.backbone, args.dataset, args.exp)
    model, optimizer, scaler, place = start_model(args, device, run, batches, train_set)
    batches.start = place.iteration
    if batches.start >= batches.max_iter:
        print(f"all {args.epochs} epochs are done: nothing is left to train")
        return
    net = model
    if args.compile:
        model.compile(dynamic=False)
    if WORLD > 1:
        processes.check_same_start(model, batches, val_set)
        net = processes.share_gradients(model)
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = args.amp or ("bf16" if has_bf16 else "none")

    # loop
    torch.backends.cudnn.benchmark = True  # finds the fastest convs, for the crops have one size
    log = runs.RunLog(run, place, args.tensorboard) if RANK == 0 else None
    window, mean_iou = Window(batches.start, device), None
    loaded = datasets.load_batches(train_set, batches, args.workers, device)
    span = {"total": batches.max_iter, "initial": batches.start, "unit": "it"}
    bar = tqdm(loaded, **span, disable=True if RANK else None, dynamic_ncols=True)
    model.train()
    for iteration, (images, masks, sizes) in enumerate(bar, batches.start):
        lr = poly_lr(args.base_lr, iteration, batches.max_iter)
        trunk, aspp = optimizer.param_groups
        trunk["lr"], aspp["lr"] = lr, lr * args.last_mult
        x = model.normalize(images, sizes)
        window.loss_sum += train_step(net, optimizer, scaler, x, masks, amp, args.accum, weights)

        done = iteration + 1
        task, stops = due(done, batches.per_epoch, batches.max_iter, args), processes.stop_asked()
        if not task and not stops:
            continue
        saves = stops or task in ("save", "validate")
        row = {"epoch": iteration // batches.per_epoch + 1, "iteration": done, "lr": lr}
        row.update(look(window, done, args.batch_size, model if saves else None))
        show(row, mean_iou, bar, args)
        if log:
            log.write(row)  # before the checkpoint: a run resumed from it finds it there
        epochs_done = done // batches.per_epoch
        path = run.checkpoint(epochs_done, 0 if task == "validate" else done)
        if saves and log:
            entries, place = deeplab.to_checkpoint(model), runs.Place(epochs_done, done, log.best)
            length = runs.Length(batches.length, batches.per_epoch)
            runs.save_checkpoint(path, entries, optimizer, scaler, place, length, vars(args))
        way_on = go_on(path, done == batches.max_iter)
        if stops:
            raise Stopped(way_on)
        if task == "validate":
            result = validate(model, val_set, device, args, way_on)
            mean_iou = row["val_mean_iou"] = result["mean_iou"]
            bar.write(f"epoch {epochs_done}: saved {path}, mean IoU {percent(mean_iou)}")
            if log:
                log.write(row, result["samples"])
                if args.plots:
                    plots.plot_run(f"data/{run.name}.png", log.rows())
        if saves and log:
            run.prune(path, args.keep, log.best.epoch if log.best else None)
        window = Window(done, device)
    if log:
        log.close()
    if device.type == "cuda":
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


# ----------------------------------------------------------------------------------------------------------
# evaluation


def evaluation_options(args: argparse.Namespace) -> dict:
    """The arguments of `evaluate` that are flags."""
    return {
        "batch_size": args.eval_batch_size,
        "workers": args.workers,
        "scales": args.scales,
        "flip": args.flip,
        "amp": args.amp,
        "samples": args.samples,
    }


def run_evaluation(args: argparse.Namespace, device: torch.device) -> None:
    """The command without --train: load the checkpoint, evaluate, write pictures and metrics.json, print."""
    model, path = open_model(args, device)
    dataset = open_dataset(args, args.split)
    if len(model.classes) != len(dataset.classes):
        counts = f"{len(model.classes)} classes, but --dataset {args.dataset} has {len(dataset.classes)}"
        raise UserError(f"{path} was trained with {counts}: name its own by --dataset and --data_root")
    compare_classes(model.classes, path, dataset)
    shapes = len(dataset.eval_shapes(args.eval_batch_size)) * len(args.scales)
    torch.backends.cudnn.benchmark = shapes <= FEW_SHAPES
    if args.compile and shapes > FEW_SHAPES:
        raise UserError(f"--compile would compile for {shapes} sizes of batches, too many: leave it out")
    model = model.fuse()
    folder = os.path.join("data", args.split, os.path.splitext(os.path.basename(path))[0])
    with ExitStack() as stack:
        if args.compile:
            from torch._dynamo import config as dynamo  # takes seconds, so only where it is of use
            from torch._inductor import config as inductor

            stack.enter_context(dynamo.patch(cache_size_limit=FEW_SHAPES))  # recompile_limit, since torch 2.7
            stack.enter_context(inductor.patch(freezing=True))  # the weights, packed as the convs want them
            model.compile(dynamic=False)  # for each shape anew
        result = evaluate(model, dataset, device, **evaluation_options(args), folder=folder)
    if RANK:
        return
    if not dataset.has_masks:
        print(f"without masks there is nothing to compare with: the predictions are in {folder}")
        return
    iou = dict(zip(dataset.classes, result["iou"], strict=True))
    for name in ("samples", "worst"):
        pictures.save_image(f"{folder}/{name}.png", result.pop(name))
    rows = ([f"{v:.6f}" if isinstance(v, float) else v for v in row] for row in result.pop("images"))
    if args.plots:
        plots.plot_confusion(f"{folder}/confusion.png", result["confusion"], dataset.classes)
    utils.save_csv(f"{folder}/per_image.csv", [ImageResult._fields, *rows])
    about = {"checkpoint": path, "model": model.config, "flags": vars(args)}
    utils.save_json(f"{folder}/metrics.json", {**result, "iou": iou, **about})
    print(utils.table(dataset.classes, result))
    for name, value in iou.items():
        print(f"IoU {name}: {percent(value)}")
    print(f"Mean IoU: {percent(result['mean_iou'])}")
    print(f"predictions, samples.png, worst.png, per_image.csv and metrics.json are in {folder}")


# ----------------------------------------------------------------------------------------------------------
# command


def run_prediction(args: argparse.Namespace, device: torch.device) -> int:
    """The command with --predict: a mask and an overlay for each image. Returns how many failed."""
    files = prediction.image_files(args.predict, args.out)
    model, _ = open_model(args, device)
    options = args.eval_batch_size, args.scales, args.flip, args.max_side, args.amp, args.confidence
    failed = prediction.predict_files(model.fuse(), files, args.out, *options)
    done = f"{len(files) - failed} of {len(files)} images"
    print(f"{done}: masks, overlays and predictions.csv are in {args.out}")
    return failed


def run_export(args: argparse.Namespace) -> None:
    """The command with --export: the network as it is evaluated, in a file that needs none of this code."""
    export.check_format(args.export)
    model, path = open_model(args, torch.device("cpu"))
    about = {"classes": list(model.classes), "palette": [list(color) for color in model.palette]}
    export.export(model.fuse(), args.export, {**about, "model": model.config, "checkpoint": path})
    print(f"{args.export} is written: image uint8 (N, 3, H, W) in, labels uint8 (N, H, W) and logits out")


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """An error that the user can do something about as one line, or None for another."""
    if isinstance(error, UserError | ModelError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if args.train:
            have = f"--batch_size {args.batch_size}, --crop_size {args.crop_size} and --accum {args.accum}"
            return f"out of memory with {have}: raise --accum, or lower the others"
        way_out = "--max_side or --scales" if args.predict else "--eval_batch_size or --scales"
        return f"out of memory: lower {way_out}"
    # gloo has no error of its own: it names the place in its source.
    if WORLD > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
        way_out = "see there; --resume auto goes on from the last checkpoint"
        return f"another process has ended, {way_out} ({' '.join(str(error).split())[:100]})"
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}"
    return None


def run(args: argparse.Namespace) -> int:
    """One command; returns the exit status."""
    if args.download:
        download_all(args.download, args.url)
        return 0
    if args.check:
        splits = list(dict.fromkeys(("train", "val", args.split)))
        return int(check.check(args.dataset, args.data_root, splits) > 0)
    if args.export:
        run_export(args)
        return 0
    if args.plots:
        plots.make_figure(1, 1)  # whether it can, before the work
    device = pick_device(args)
    if WORLD > 1:
        processes.join(device)
    if args.predict:
        return int(run_prediction(args, device) > 0)
    (train if args.train else run_evaluation)(args, device)
    if WORLD > 1:
        dist.destroy_process_group()
    return 0


def leave(status: int, line: str | None) -> NoReturn:
    """Exit with a line on stderr."""
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()  # a loader's that did not end when told to; Python would wait for it
    if WORLD > 1:
        os._exit(status)  # the tidy way out of NCCL waits for the other processes, which may be gone
    sys.exit(status)


def main(argv: list[str] | None = None) -> None:
    sys.stdout, sys.stderr = utils.Output(None if RANK else sys.stdout), utils.Output(sys.stderr)
    args = parse_args(argv)
    try:
        with utils.stop_signals():
            status = run(args)
    except Stopped as stopped:
        clear_frames(stopped.__traceback__)  # they hold the loader, whose workers would hold up the exit
        number = signal.Signals(utils.noted_signals[0] if utils.noted_signals else signal.SIGTERM)
        line = "; ".join([f"\nmain.py: stopped by {number.name}", *stopped.args])
        leave(128 + number, None if RANK else line)
    except Exception as error:
        message = explain(error, args)
        if message is None and WORLD == 1:
            raise
        clear_frames(error.__traceback__)
        message = message or "".join(format_exception(error))
        leave(1, f"main.py: rank {RANK}: error: {message}" if WORLD > 1 else f"main.py: error: {message}")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()

"""Train DeepLabv3: `python main.py --train --exp NAME`. Evaluate it: the same command without `--train`."""

import os
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # `python -P` leaves it out
from commands import flags
from commands.download import download_all
from utils import prepare_threads, run_command

if __name__ == "__main__":
    # What needs no torch, which takes seconds to import: --help, a wrong flag, downloads, Ctrl-C meanwhile.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        line = b"main.py: stopped by SIGINT\n"
        signal.signal(signal.SIGINT, lambda *_: os.write(2, line) and os._exit(130))
    ARGS = flags.parse_args()
    if ARGS.download:
        run_command(lambda: download_all(ARGS.download, ARGS.url))
    if ARGS.convert:
        from commands.convert import convert  # after the flags: it needs NumPy and Pillow

        run_command(lambda: convert(**flags.convert_options(ARGS)))
    prepare_threads()

import argparse
import math
import time
import zlib
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import datasets
import deeplab
import utils
from commands import machine
from commands.check import check, prepare
from commands.convert import convert
from commands.evaluate import (
    evaluate,
    print_left_over,
    print_never_predicted,
    print_results,
    results_folder,
    write_results,
)
from commands.export import check_format, export
from commands.losses import CrossEntropy, WithDice, class_weights
from commands.predict import image_files, predict_files
from datasets import SegmentationDataset, TrainBatches
from deeplab import DeepLabv3, Inference
from files import checkpoints, pictures
from files.images import AS_STORED, Reading
from files.lists import image_ids
from files.runs import Run, RunLog, backbones, find_checkpoint, until_stopped
from files.training import Training, to_tensor, trained_on, training_flags
from files.whole import locked_folder, save_json, write_whole
from utils import RANK, WORLD, Stopped, UserError, percent

FEW_SHAPES = 16  # of batches in evaluation: to tune the convs for each, or to compile

# ----------------------------------------------------------------------------------------------------------
# data, model


def open_dataset(args: argparse.Namespace, split: str, reading: Reading) -> SegmentationDataset:
    """A split of the data set, in random crops if it is to be trained on. Raises UserError if a sample of it
    cannot be used, unless --skip_bad leaves it out."""
    crop_size = args.crop_size if args.train and split == "train" else None
    options = {"train_list": args.train_list} if args.train_list else {}
    dataset = datasets.DATASETS[args.dataset](args.data_root, split, crop_size, args.seed, **options)
    dataset.reading, dataset.color_jitter = reading, args.color_jitter
    prepare(dataset, split, args.skip_bad, resumes=bool(args.resume))
    return dataset


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[DeepLabv3, str, dict]:
    """The model to evaluate or to predict with, the path of its checkpoint, which tells what it holds, and
    of its training the `flags` and, as `Training` has them, `val_data` and `trained_on`.

    A published one has the weights alone: the flags and their defaults tell the rest, --dataset the classes.
    Raises UserError if there is no such checkpoint, or it is of another model."""
    path = args.checkpoint
    if not path:
        path = find_checkpoint(args.backbone, args.dataset, args.exp, args.epochs, args.best)
        print(f"--exp {args.exp}: {path}")
    checkpoint, options = checkpoints.read(path), flags.model_options(args)
    if not checkpoints.is_published(checkpoint):
        model = deeplab.from_checkpoint(checkpoint, path, **options)
    else:
        labels = datasets.class_labels(args.dataset, args.data_root)
        options = {"num_classes": len(labels.classes), **options}
        model = deeplab.from_checkpoint(checkpoint, path, **options)
        if sorted(model.classes or ()) == sorted(labels.classes):  # VOC's, perhaps in another order
            checkpoints.compare_classes(model.classes, path, labels.classes)
        model.classes, model.palette = labels.classes, labels.palette
    model.reading = model.reading._replace(**flags.reading_options(args))
    trained = {"flags": training_flags(checkpoint), "val_data": checkpoint.get("val_data")}
    return model.place(device).eval(), path, {**trained, "trained_on": trained_on(checkpoint)}


# ----------------------------------------------------------------------------------------------------------
# training


def poly_lr(base_lr: float, iteration: int, max_iter: int) -> float:
    """The paper's poly schedule: base_lr (1 - iteration / max_iter)^0.9, iterations counted from 0."""
    return base_lr * (1 - iteration / max_iter) ** 0.9


def make_optimizer(model: DeepLabv3, fused: bool = True) -> torch.optim.SGD:
    """SGD as in the paper, in two parameter groups, trunk and the rest, whose learning rates the loop sets.
    Not `fused` with a loss scaler: the fused step spoils the momentum where the scaler skips a step."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trunk = [p for name, p in trained if name.startswith("trunk.")]
    head = [p for name, p in trained if not name.startswith("trunk.")]
    groups = [{"params": trunk}, {"params": head}]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=1e-4, fused=fused)


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    criterion: nn.Module,
    images: Tensor,
    masks: Tensor,
    amp: str = "none",
    accum: int = 1,
) -> Tensor:
    """One step on this process' part of a batch: normalised images (N, 3, H, W) and uint8 masks (N, H, W).

    The loss, see `commands.losses`, is that of the whole batch, so that neither the number of processes nor
    `accum`, the number of parts that are computed one after the other, changes it. Returns this process'
    share of it, a scalar on its device; the shares add up."""
    total = criterion.total(masks)
    if WORLD > 1:
        dist.all_reduce(total)
    total = total.where(total > 0, 1)  # of a batch without a labelled pixel the loss is 0, not NaN
    optimizer.zero_grad()
    loss_sum = 0
    parts = min(accum, len(images))
    for i, (x, y) in enumerate(zip(images.tensor_split(parts), masks.tensor_split(parts), strict=True), 1):
        # The processes exchange gradients in the last part's backward pass, and average them: hence WORLD.
        with net.no_sync() if WORLD > 1 and i < parts else nullcontext():
            with deeplab.autocast(images.device, amp):
                logits = net(x)
            loss = (criterion(logits, y) / total).sum()
            scaler.scale(loss * WORLD).backward()
        loss_sum = loss_sum + loss.detach()
    scaler.step(optimizer)
    scaler.update()
    return loss_sum


def make_criterion(args: argparse.Namespace, dataset: SegmentationDataset) -> nn.Module:
    """The loss that the flags ask for. Raises UserError if there is not a weight for each class."""
    weights = class_weights(args.class_weights, dataset)
    cross_entropy = CrossEntropy(weights, args.top_k, args.label_smoothing)
    return WithDice(cross_entropy, args.dice) if args.dice else cross_entropy


def make_batches(
    args: argparse.Namespace, device: torch.device, length: int, num_groups: int | None
) -> TrainBatches:
    """The batches of the whole run, on a training list of that `length`. Raises UserError if a batch would
    have fewer images than training needs."""
    smallest, hint = WORLD, "use a larger --batch_size or fewer processes"
    if not (num_groups or args.freeze_bn):
        # BatchNorm cannot take the variance of ASPP's image-level feature over one image. Processes with GPUs
        # share their statistics, so that one image of each is enough.
        smallest = args.accum * (WORLD if WORLD > 1 and device.type == "cuda" else 2 * WORLD)
        hint = "use larger ones, --freeze_bn, or --groups 32 --weight_std"
    if min(args.batch_size, length) < smallest:
        given = f"--batch_size {args.batch_size}, --accum {args.accum}, {WORLD} processes, {length} images"
        reason = "BatchNorm cannot train on batches of one image"
        reason = reason if smallest > WORLD else "a batch needs an image for each process"
        raise UserError(f"{reason} ({given}): {hint}")
    batches = TrainBatches(length, args.batch_size, args.epochs, args.seed, smallest, RANK, WORLD)
    if length < args.batch_size:
        print(f"--batch_size {args.batch_size}: a batch has the {length} images that there are")
    if (left := length - batches.per_epoch * args.batch_size) > 0:
        print(f"each epoch leaves out {left} images, others each time: too few for a batch")
    return batches


def start(
    args: argparse.Namespace,
    device: torch.device,
    options: dict,
    initial: dict | None,
    run: Run,
    batches: TrainBatches,
    data: SegmentationDataset,
    val_data: str,
) -> Training:
    """The state of a new run or of a resumed one. `options` are the model's, `initial` is the checkpoint of
    --init. Raises UserError if the weights or the checkpoint to start from cannot be used."""
    resume, num_groups = args.resume, options.get("num_groups")
    if resume == "auto":
        resume = run.saved()[-1].path if run.saved() else None
        if not resume and (others := backbones(run.dataset, run.exp)):
            hint = f"give --backbone {others[0]}, or another --exp"
            raise UserError(f"--exp {run.exp} has checkpoints, but none of {run.backbone}: {hint}")
        if not resume:
            print(f"--exp {run.exp} has no checkpoint to resume from: a new run begins")
    options = {**options, "num_classes": len(data.classes)}
    model = deeplab.build(pretrained=not (args.scratch or resume or initial), **options)
    model.classes, model.palette, model.reading = data.classes, data.palette, data.reading
    if initial and not resume:
        if any(os.path.samefile(saved.path, args.init) for saved in run.saved()):
            raise UserError(
                f"--init {args.init} is of --exp {run.exp}, which begins anew: choose another --exp"
            )
        checkpoints.init_weights(model, initial, args.init)
    model.fit_bn_momentum(batches.max_iter)
    if args.freeze_bn and num_groups:
        raise UserError(f"--freeze_bn has nothing to freeze: {args.init or resume} has GroupNorm")
    if args.freeze_bn and not resume and (not initial or checkpoints.is_trunk(initial)):
        raise UserError("--freeze_bn would freeze ASPP, which is new: give --init a whole network")
    if args.freeze_bn:
        model.freeze_bn()
    elif WORLD > 1 and not num_groups and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif WORLD > 1 and not num_groups:
        print("BatchNorm takes statistics in each process by itself: only GPUs can share them")
    model.place(device).train()
    if args.compile:
        model.compile(dynamic=False)
    torch.backends.cudnn.benchmark = True  # finds the fastest convs, for the crops have one size
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    optimizer = make_optimizer(model, fused=not scaler.is_enabled())
    sets = {"images": len(data), "train_data": data.fingerprint(with_masks=False), "val_data": val_data}
    about = {"per_epoch": batches.per_epoch, "flags": vars(args), "labels": data.labels}
    training = Training(model, optimizer, scaler, **about, **sets)
    if resume:
        training.resume(resume)
        print(f"resumed from {resume}: iteration {training.iteration} of {batches.max_iter}")
    return training


def mean_loss(loss_sum: Tensor, iterations: int, done: int, model: DeepLabv3 | None) -> float:
    """The mean loss of the last iterations, over all processes. Only here does the CPU wait for the device.
    Raises UserError if it is not finite, or if a weight of `model`, which is to be saved, is not."""
    loss = loss_sum.cpu()
    if WORLD > 1:
        dist.all_reduce(loss)
    loss = loss.item() / iterations
    if model and not all(p.isfinite().all() for p in model.parameters()):
        loss = math.nan  # the last step broke the weights, and its loss did not show it yet
    if not math.isfinite(loss):
        hint = "lower --base_lr; all checkpoints are from before that"
        raise UserError(f"the loss is {loss} at iteration {done}: {hint}")
    return loss


def report(row: dict, mean_iou: float | None, bar: tqdm, epochs: int, images: int) -> None:
    """Show a row of the log on the bar, or, where the output is no terminal, as a line of text with the time
    that is left for so many `images`."""
    rate = row["images_per_second"]
    status = f"loss {row['loss']:.4f}, lr {row['lr']:.2g}, {rate:.1f} img/s, mean IoU {percent(mean_iou)}"
    bar.set_postfix_str(status)
    if bar.disable:
        left = timedelta(seconds=round(images / rate))
        progress = f"epoch {row['epoch']}/{epochs}, iteration {row['iteration']}/{bar.total}"
        print(f"{progress}, {status}, {left} left", flush=True)


def out_of_patience(args: argparse.Namespace, state: Training) -> bool:
    """Whether so many validations as --patience allows were none the best; says so."""
    if not args.patience or state.waited < args.patience:
        return False
    found = f"{state.waited} validations were no better than that after epoch {state.best.epoch}"
    print(f"{found}: training stops")
    return True


def validate(
    args: argparse.Namespace, model: DeepLabv3, dataset: SegmentationDataset, device: torch.device, hint: str
) -> tuple[float | None, Image.Image | None]:
    """The mean IoU of a model in training, and a picture of samples for TensorBoard. Raises Stopped with the
    hint, if a stop signal has come."""
    if WORLD > 1:
        for buffer in model.buffers():  # BatchNorm's statistics, which CPUs do not share in training
            dist.broadcast(buffer, 0)
    samples = args.samples if args.tensorboard else 0
    inference = Inference(**flags.inference_options(args))
    torch.backends.cudnn.benchmark = len(dataset.eval_shapes(inference.images)) <= FEW_SHAPES
    try:
        result, details = evaluate(model.fuse(), dataset, device, inference, args.workers, samples)
    except Stopped:
        raise Stopped(hint) from None
    finally:
        torch.backends.cudnn.benchmark = True
    print_never_predicted(dataset.classes, result)
    return result["mean_iou"], details.sample_sheet() if samples else None


def open_run(
    args: argparse.Namespace, device: torch.device
) -> tuple[Run, Training, TrainBatches, nn.Module, SegmentationDataset, SegmentationDataset]:
    """What a run of --train is made of: its names, state, batches, loss, and the sets to train on and to
    validate. Raises UserError if one of them cannot be had."""
    options, reading = flags.model_options(args), AS_STORED
    initial = args.init and checkpoints.read(args.init)
    if initial:  # which tells what the flags do not
        options = {**checkpoints.model_config(initial, args.init), **options}
        reading = checkpoints.reading(initial, args.init)
    given = flags.reading_options(args)
    kept = [key for key in ("value_range", "bands") if getattr(reading, key) and key not in given]
    if kept:
        known = " ".join(f"--{key} {reading.words(key)}" for key in kept)
        print(f"{args.init} was trained with {known}: images are read so; give other flags to change that")
    reading = reading._replace(**given)
    train_set, val_set = open_dataset(args, "train", reading), open_dataset(args, "val", reading)
    counts = f"{len(train_set)} images to train on, {len(val_set)} to validate"
    print(f"{counts}, {len(train_set.classes)} classes, base learning rate {args.base_lr:.3g}")
    ids, val_ids = image_ids(train_set.pairs), image_ids(val_set.pairs)
    if both := ids.keys() & val_ids.keys():
        example = min(val_ids[number] for number in both)
        print(f"{len(both)} images to validate are trained on, too, {example} is one")
    batches = make_batches(args, device, len(train_set), options.get("num_groups"))
    run, criterion = Run(options["backbone"], args.dataset, args.exp), make_criterion(args, train_set)
    state = start(args, device, options, initial, run, batches, train_set, val_set.fingerprint())
    val_set.stride = state.model.padded_stride
    before = state.trained_on | trained_on(initial or {})
    state.trained_on = before | ids.keys()
    if seen := (before & val_ids.keys()) - ids.keys():
        print(f"{len(seen)} of the images to validate were trained on before, by --init or in another list")
    return run, state, batches, criterion.to(device), train_set, val_set


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The command with --train: from the first or the resumed iteration to the last checkpoint."""
    torch.manual_seed(args.seed)
    run, state, batches, criterion, train_set, val_set = open_run(args, device)
    first, max_iter, per_epoch = state.iteration, batches.max_iter, batches.per_epoch
    if first >= max_iter:
        return print(f"all {args.epochs} epochs are done: nothing is left to train")
    batches.start, model, optimizer = first, state.model, state.optimizer
    net = machine.share_gradients(model, batches, val_set) if WORLD > 1 else model
    amp = machine.number_format(args.amp, True, device)
    log = RunLog(run, state, args.tensorboard, args.plots) if RANK == 0 else None
    state.validations = machine.of_first_process(state.validations)  # the others have no log
    if out_of_patience(args, state):
        return
    loaded = datasets.load_batches(train_set, batches, args.workers, device)
    loaded = until_stopped(loaded, run, state, args.keep)
    bar = tqdm(loaded, total=max_iter, initial=first, disable=True if RANK else None, dynamic_ncols=True)
    mean_iou, loss_sum, logged, began = None, 0, first, time.perf_counter()
    for iteration, (images, masks, sizes) in enumerate(bar, first):
        torch.manual_seed(zlib.crc32(f"{args.seed} {iteration} {RANK}".encode()))  # of dropout
        lr = poly_lr(args.base_lr, iteration, max_iter)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * args.last_mult
        x = model.normalize(images, sizes)
        loss_sum += train_step(net, optimizer, state.scaler, criterion, x, masks, amp, args.accum)
        done, stops = iteration + 1, utils.stop_asked()
        epochs_done, within = divmod(done, per_epoch)
        state.epoch, state.iteration = epochs_done, done
        validates = done == max_iter or (not within and epochs_done % args.save_every == 0)
        saves = validates or stops or (args.save_every_iters and done % args.save_every_iters == 0)
        if within and done % args.log_every and not saves:
            continue
        row = {"epoch": iteration // per_epoch + 1, "iteration": done, "lr": lr, "per_epoch": per_epoch}
        row["loss"] = mean_loss(loss_sum, done - logged, done, model if saves else None)
        row["images_per_second"] = batches.images(logged, done) / (time.perf_counter() - began)
        report(row, mean_iou, bar, args.epochs, batches.images(done, max_iter))
        path = run.checkpoint(epochs_done, 0 if validates else done)
        if log:
            log.write(row)  # before the checkpoint: a run resumed from it finds it there
            if saves:
                state.save(path)
                run.prune(path, args.keep, state)
        command = "without --train evaluates it" if done == max_iter else "with --resume auto continues it"
        hint = f"{path} is saved: the same command {command}"
        if stops:
            raise Stopped(hint)
        if validates:
            mean_iou, picture = validate(args, model, val_set, device, hint)
            row["val_mean_iou"], row["val_set"] = mean_iou, state.val_set
            state.note_validation(epochs_done, mean_iou)
            bar.write(f"epoch {epochs_done}: saved {path}, mean IoU {percent(mean_iou)}")
            if log:
                log.write(row, picture)
                run.prune(path, args.keep, state)
            if out_of_patience(args, state):
                break
        loss_sum, logged, began = 0, done, time.perf_counter()
    bar.close()
    if log:
        log.close()
    print_end(run, state, device)


def print_end(run: Run, state: Training, device: torch.device) -> None:
    """Print what a run ends with: its best checkpoint, if that is not the last, and the memory it took."""
    if state.waited:
        found = f"epoch {state.best.epoch} had the best validation, mean IoU {percent(state.best.mean_iou)}"
        path = run.checkpoint(state.best.epoch)
        print(f"{found}: {'--best takes' if os.path.exists(path) else 'but there is no'} {path}")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak memory of the GPU: {peak:.1f} GiB, with what cuDNN takes to find the fastest convs")


# ----------------------------------------------------------------------------------------------------------
# the other commands


def run_evaluation(args: argparse.Namespace, device: torch.device) -> None:
    """The command without --train: load the checkpoint, evaluate, print and write the results."""
    model, path, trained = open_model(args, device)
    dataset = open_dataset(args, args.split, model.reading)
    dataset.stride = model.padded_stride
    inference = Inference(**flags.inference_options(args))
    if len(model.classes) != len(dataset.classes):
        counts = f"{len(model.classes)} classes, but --dataset {args.dataset} has {len(dataset.classes)}"
        raise UserError(f"{path} was trained with {counts}: name its own by --dataset and --data_root")
    checkpoints.compare_classes(model.classes, path, dataset.classes)
    shapes = len(dataset.eval_shapes(inference.images)) * len(inference.scales)
    torch.backends.cudnn.benchmark = shapes <= FEW_SHAPES
    if args.compile and shapes > FEW_SHAPES:
        raise UserError(f"--compile would compile for {shapes} sizes of batches, too many: leave it out")
    data = dataset.fingerprint()
    if args.split != "train" and (seen := image_ids(dataset.pairs).keys() & trained["trained_on"]):
        print(f"{path} was trained on at least {len(seen)} of these {len(dataset)} images")
    if args.split == "val" and trained["val_data"] not in (None, data):
        print(f"{path} was validated on other images or masks: it may have been trained on some of these")
    model, folder = model.fuse(), results_folder(path, args.split, vars(args), data)
    with ExitStack() as stack:
        if args.compile:
            from torch._dynamo import config as dynamo  # takes seconds, so only where it is used
            from torch._inductor import config as inductor

            stack.enter_context(dynamo.patch(cache_size_limit=FEW_SHAPES))  # of recompiling
            stack.enter_context(inductor.patch(freezing=True))  # the weights, packed as the convs want them
            model.compile(dynamic=False)  # for each shape anew
        result, details = evaluate(model, dataset, device, inference, args.workers, args.samples, folder)
    if RANK:
        return
    about = {"checkpoint": path, "model": model.config, "flags": flags.evaluation_flags(args), "data": data}
    about["training"] = trained["flags"]
    print_left_over(folder, details)
    if not dataset.has_masks:
        save_json(f"{folder}/metrics.json", about)  # whose predictions these are
        print(f"without masks there is nothing to compare with: the predictions are in {folder}")
        return
    write_results(folder, dataset, result, details, about)
    print_results(dataset.classes, result)
    print_never_predicted(dataset.classes, result)
    print(f"report.html to look at, predictions, per_image.csv and metrics.json are in {folder}")


def run_prediction(args: argparse.Namespace, device: torch.device) -> int:
    """The command with --predict: a mask and an overlay for each image. Returns how many failed."""
    files = image_files(args.predict, args.out)
    model, *_ = open_model(args, device)
    inference = Inference(**flags.inference_options(args))
    with locked_folder(args.out):
        failed = predict_files(model.fuse(), files, args.out, inference, args.confidence)
    print(f"{len(files) - failed} of {len(files)} images: masks, overlays, predictions.csv are in {args.out}")
    return failed


def run_export(args: argparse.Namespace) -> None:
    """The command with --export: the network as it is evaluated, in a file that needs none of this code."""
    ending = check_format(args.export)
    model, path, trained = open_model(args, torch.device("cpu"))
    if ending == ".pth":
        entries = checkpoints.model_entries(model) | {"trained_on": to_tensor(trained["trained_on"])}
        write_whole(args.export, partial(torch.save, entries))
        print(f"{args.export} is written: weights and classes, for --checkpoint, --init and deeplab.load")
        return
    about = {"classes": list(model.classes), "palette": [list(color) for color in model.palette]}
    about |= {"value_range": model.reading.value_range, "bands": model.reading.bands}
    export(model.fuse(), args.export, {**about, "model": model.config, "checkpoint": path})
    print(f"{args.export} is written: image uint8 (N, 3, H, W) in, labels uint8 (N, H, W) and logits out")


def run(args: argparse.Namespace) -> int:
    """One command; returns the exit status."""
    if args.download:
        download_all(args.download, args.url)
        return 0
    if args.convert:
        convert(**flags.convert_options(args))
        return 0
    if args.check:
        splits = list(dict.fromkeys(("train", "val", args.split)))
        reading = Reading(**flags.reading_options(args))
        return int(check(args.dataset, args.data_root, splits, reading) > 0)
    if args.export:
        run_export(args)
        return 0
    if args.plots:
        pictures.make_figure(1, 1)  # whether it can, before the work
    device = machine.pick_device(args.device, args.gpu, args.amp)
    amp = machine.number_format(args.amp, args.train, device)
    print(f"on {machine.describe_device(device, amp)}")
    if WORLD > 1:
        machine.join_processes(device)
    if args.predict:
        return int(run_prediction(args, device) > 0)
    (train if args.train else run_evaluation)(args, device)
    if WORLD > 1:
        dist.all_reduce(torch.zeros(1))  # none ends while another is still at work
    return 0


def explain(error: Exception, args: argparse.Namespace) -> str | None:
    """What to print of an error of torch that the user can mend, or None for another."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        if args.train:
            given = f"--batch_size {args.batch_size}, --crop_size {args.crop_size} and --accum {args.accum}"
            return f"out of memory with {given}: raise --accum, or lower the others"
        side = "--tile" if args.tile else "--max_side" if args.predict else ""
        return f"out of memory: lower {f'{side}, ' if side else ''}--eval_batch_size or --scales"
    if str(error).startswith("DataLoader worker"):  # which torch raises in whatever line is running
        hint = "lower --workers if memory lacks; in Docker, allow more shared memory (--shm-size 8g)"
        return f"a process that loads images was killed ({' '.join(str(error).split()).rstrip('.')}): {hint}"
    # gloo has no error of its own: it names the place in its source.
    if WORLD > 1 and (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
        hint = "see there; --resume auto continues from the last checkpoint"
        return f"another process has ended, {hint} ({' '.join(str(error).split())[:100]})"
    return None


def main(args: argparse.Namespace) -> NoReturn:
    """Run the command that the flags ask for, and exit."""
    utils.run_command(lambda: run(args), lambda error: explain(error, args))


if __name__ == "__main__":
    main(ARGS)

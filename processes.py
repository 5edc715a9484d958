"""Several processes, as torchrun starts them: how they find each other, start alike, train and stop."""

import zlib
from inspect import signature

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import utils
from datasets import SegmentationDataset, TrainBatches
from deeplab import DeepLabv3
from utils import WORLD, UserError


def join(device: torch.device) -> None:
    """Let this process find the others.

    Raises:
        UserError: if the environment names several processes, but not how they find each other.
    """
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        reason = " ".join(str(error).split())
        way_out = "start them by torchrun, or unset WORLD_SIZE for a single one"
        raise UserError(f"WORLD_SIZE is {WORLD}, for so many processes ({reason}): {way_out}") from error


def check_same_start(model: DeepLabv3, batches: TrainBatches, val_set: SegmentationDataset) -> None:
    """Raises:
    UserError: if the processes, on several machines say, do not start alike: their exchanges would hang.
    """
    mine = {"iteration": batches.start, "iterations": batches.max_iter, "validation images": len(val_set)}
    if batches.start:  # new weights need not agree: those of the first process go to all
        mine["weights"] = zlib.crc32(model.aspp.conv3.weight.detach().cpu().contiguous().numpy())
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, mine)
    for what, value in everyone[0].items():
        others = [each.get(what) for each in everyone]
        if any(other != value for other in others):
            different = f"the processes do not start alike ({what}: {', '.join(map(str, others))})"
            raise UserError(f"{different}: each machine needs the same flags, data and checkpoints")


def share_gradients(model: DeepLabv3) -> DistributedDataParallel:
    """The model of one of several processes; its backward pass averages the gradients of all."""
    # BatchNorm's statistics, its buffers, need no exchange: SyncBatchNorm has made them alike, or `validate`
    # does. Newer versions of torch have another name for it.
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{name: False}, gradient_as_bucket_view=True)


def stop_asked() -> bool:
    """Whether a stop signal has come to this process, or to any other."""
    asked = torch.tensor(len(utils.noted_signals))
    if WORLD > 1:
        dist.all_reduce(asked)  # a tensor of the CPU: the GPUs are not waited for
    return asked.item() > 0

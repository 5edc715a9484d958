"""The machine: its devices, their number formats, and the processes that torchrun starts."""

import os
import zlib
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from datasets import SegmentationDataset, TrainBatches
from deeplab import DeepLabv3
from utils import LOCAL_RANK, WORLD, UserError


def pick_device(name: str | None, gpu: int | None, amp: str | None) -> torch.device:
    """The device of that name, else CUDA, else Apple's MPS, else the CPU; torchrun or `gpu` number the CUDA
    device. Raises UserError if it is not there, or cannot compute in the number format `amp`."""
    best = "mps" if torch.backends.mps.is_available() and WORLD == 1 else "cpu"
    best = "cuda" if gpu is not None or torch.cuda.is_available() else best
    name = name or best
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK if WORLD > 1 else gpu or 0}"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("choose cuda, cuda:1, mps or cpu")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        there = f" (there are {torch.cuda.device_count()} GPUs)" if name.startswith("cuda") else ""
        raise UserError(f"device {name} cannot be used{there}: {str(error).splitlines()[0]}") from error
    if amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA device, and this is {device.type}: use bf16 or none")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convs have it by default
    return device


def number_format(amp: str | None, trains: bool, device: torch.device) -> str:
    """`amp`, else bfloat16 for training on a GPU that has it, else float32."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return amp or ("bf16" if has_bf16 and trains else "none")


def describe_device(device: torch.device, amp: str) -> str:
    """A device and its number format in words."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}, {amp if amp != 'none' else 'float32'}"
    if device.type == "mps":
        return "Apple's GPU"
    line = f"the CPU, {torch.get_num_threads()} threads"
    if "GOMP_SPINCOUNT" in os.environ:
        line += ", which do not spin, as the machine is busy"
    if torch.version.cuda is None and os.path.exists("/proc/driver/nvidia"):
        line += ": this torch is built without CUDA, for the NVIDIA GPU install another (https://pytorch.org)"
    return line


def join_processes(device: torch.device) -> None:
    """Let this process find the others. Raises UserError if the environment names several processes, but not
    how they find each other."""
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:
        hint = "start them by torchrun, or unset WORLD_SIZE for a single one"
        raise UserError(f"WORLD_SIZE asks for {WORLD} processes ({error}): {hint}") from error


def check_agreement(values: dict) -> None:
    """Raises UserError if these values differ between the processes, whose exchanges would then wait for
    ever."""
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, values)
    for name, value in values.items():
        others = [other[name] for other in everyone]
        if any(other != value for other in others):
            found = f"the processes do not start alike ({name}: {', '.join(map(str, others))})"
            raise UserError(f"{found}: each machine needs the same flags, data and checkpoints")


def share_gradients(model: DeepLabv3, batches: TrainBatches, val_set: SegmentationDataset) -> nn.Module:
    """The model of one of several processes; its backward pass averages the gradients of all. Raises
    UserError if the processes do not start alike."""
    values = {"iteration": batches.start, "iterations": batches.max_iter, "validation images": len(val_set)}
    if batches.start:  # new weights may differ: those of the first process go to all
        values["weights"] = zlib.crc32(model.head.conv3.weight.detach().cpu().contiguous().numpy())
    check_agreement(values)
    # Buffers, BatchNorm's statistics, need no exchange in each step: SyncBatchNorm has made them alike, or
    # `validate` does. The argument has another name in newer versions of torch.
    known = signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, **{name: False}, gradient_as_bucket_view=True)


def of_first_process(value: object) -> object:
    """The value of the first of the processes, in all of them."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]

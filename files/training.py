"""The state of a training run, and the checkpoints that it is saved to and resumed from."""

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from files import checkpoints
from files.images import Reading
from files.masks import Labels
from files.whole import write_whole
from utils import IGNORE_INDEX, UserError

# Flags whose change in a resumed run is printed; the last are those of its validations.
VALIDATION_FLAGS = ["scales", "flip", "tile", "overlap"]  # the last is for tiles
RUN_FLAGS = ["dataset", "data_root", "crop_size", "epochs", "batch_size", "base_lr", "last_mult", "freeze_bn"]
RUN_FLAGS += ["seed", "train_list", "accum", "amp", "class_weights", "top_k", "dice", "label_smoothing"]
RUN_FLAGS += ["color_jitter", *VALIDATION_FLAGS]


class Best(NamedTuple):
    """The epoch of the highest validation mean IoU so far."""

    epoch: int
    mean_iou: float


class Resumed(NamedTuple):
    """The checkpoint that a run continues, with its progress in its own numbers."""

    path: str
    iteration: int
    per_epoch: int


@dataclass
class Training:
    """The state of a training run, which saves and resumes itself.

    No random state belongs to it: the randomness of a sample follows from (seed, epoch, index).

    Args:
        model: a `DeepLabv3`.
        optimizer: its parameter groups are the trunk and ASPP.
        scaler: of the loss, for fp16.
        images, per_epoch: length of an epoch in images and in iterations.
        flags: of the run, by name.
        labels: what the pixels of the masks mean.
        trained_on: the `image_ids` of all images that the weights have been trained on, as far as is known.
        train_data, val_data: what tells the samples to train on, and to validate, from others.
        epoch: number of whole epochs that are done.
        iteration: number of iterations that are done.
        saved: `iteration` as the newest checkpoint was written.
        validations: the mean IoU after each epoch that was validated.
        others: the same before other images, masks or flags of validation came: these do not compare.
        val_set_before: the `val_set` of the checkpoint that the run continues.
        kept: the best epochs of all such.
        offset: the number of steps that were taken is so much higher than `iteration`, since an epoch had
            another number of iterations.
        resumed: the checkpoint that the run continues.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    images: int
    per_epoch: int
    flags: dict
    labels: Labels
    train_data: str
    val_data: str
    epoch: int = 0
    iteration: int = 0
    saved: int = 0
    validations: dict[int, float] = field(default_factory=dict)
    others: dict[int, float] = field(default_factory=dict)
    val_set_before: str = ""
    trained_on: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)
    offset: int = 0
    resumed: Resumed | None = None

    @property
    def val_set(self) -> str:
        """What tells the samples to validate, and how that is done, from others."""
        keys = VALIDATION_FLAGS if self.flags.get("tile") else VALIDATION_FLAGS[:2]
        flags = [str(self.flags.get(key)) for key in keys]
        return f"{zlib.crc32('|'.join([self.val_data, *flags]).encode()):08x}"

    @property
    def best(self) -> Best | None:
        return find_best(self.validations)

    @property
    def waited(self) -> int:
        """The number of validations since the best one."""
        best = self.best
        return sum(epoch > best.epoch for epoch in self.validations)

    def note_validation(self, epoch: int, mean_iou: float | None) -> None:
        """Keep a mean IoU; None, of a data set without a labelled pixel, says nothing."""
        if mean_iou is not None:
            self.validations[epoch] = mean_iou

    def save(self, path: str) -> None:
        """Write a checkpoint, from which `deeplab.load` makes the model again. Raises UserError if the disk
        is full, say; a file that stood at `path` before is untouched."""
        entries = {
            "epoch": self.epoch,
            "iteration": self.iteration,
            "images": self.images,
            "per_epoch": self.per_epoch,
            "validations": self.validations,
            "kept": sorted(self.kept),
            "steps": self.iteration + self.offset,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "flags": self.flags,
            "masks": self.labels.meaning(),
            "val_set": self.val_set,
            "train_data": self.train_data,
            "val_data": self.val_data,
            "trained_on": to_tensor(self.trained_on),
            **checkpoints.model_entries(self.model),
            "threads": torch.get_num_threads(),
        }
        write_whole(path, partial(torch.save, entries))
        self.saved = self.iteration

    def resume(self, path: str) -> None:
        """Continue a checkpoint: take its weights, momentum, loss scale and progress.

        If an epoch has another number of iterations now, as the list or the batch size has changed, the run
        continues at the same fraction of the epoch. Raises UserError if the checkpoint is of another model,
        or does not tell its progress."""
        checkpoint = checkpoints.read(path)
        now = self.model.config["output_stride"]  # which may differ in evaluation
        if (before := checkpoint.get("model", {}).get("output_stride", now)) != now:
            raise UserError(f"{path} was trained with --output_stride {before}, and not {now}: give that")
        checkpoints.load_weights(self.model, checkpoint, path)
        checkpoints.compare_classes(checkpoint.get("classes", self.model.classes), path, self.model.classes)
        compare_reading(checkpoints.reading(checkpoint, path), path, self.model.reading)
        try:
            compare_masks(checkpoint.get("masks", {}), path, self.labels)
            self.load_momentum(checkpoint["optimizer"])
            if self.scaler.is_enabled() and checkpoint.get("scaler"):
                self.scaler.load_state_dict(checkpoint["scaler"])
            flags = checkpoint.get("flags", {})
            changed = [key for key in RUN_FLAGS if key in flags and self.flags[key] != flags[key]]
            images, per_epoch = (
                int(checkpoint.get(key, getattr(self, key))) for key in ("images", "per_epoch")
            )
            self.epoch, best = int(checkpoint["epoch"]), checkpoint.get("best")  # of earlier versions
            iteration = int(checkpoint.get("iteration", self.epoch * per_epoch))
            self.resumed = Resumed(path, iteration, per_epoch)
            iteration = iteration * self.per_epoch // per_epoch
            self.iteration = self.saved = max(iteration, self.epoch * self.per_epoch)
            self.offset = int(checkpoint.get("steps", self.resumed.iteration)) - self.iteration
            self.kept = set(map(int, checkpoint.get("kept", ())))
            validations = checkpoint.get("validations", {best[0]: best[1]} if best else {})
            self.validations = {int(epoch): float(value) for epoch, value in validations.items()}
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"{path} cannot be resumed, only evaluated: {error}") from error
        self.trained_on = trained_on(checkpoint)
        # What it began with stays, whatever the flags now say.
        self.flags = self.flags | {key: flags[key] for key in ("init", "scratch") if key in flags}
        if changed:
            shown = ", ".join(f"--{key} {flags[key]} to {self.flags[key]}" for key in changed)
            print(f"the run continues with other flags: {shown}")
        self.val_set_before = checkpoint.get("val_set", self.val_set)
        if self.validations and self.val_set_before != self.val_set:
            self.others, self.validations = self.validations, {}
        now = torch.get_num_threads()
        before = checkpoint.get("threads", now)
        if before != now and next(self.model.parameters()).device.type == "cpu":
            print(f"torch has {now} threads, not {before} as before: the run will round differently")
        if (images, per_epoch) != (self.images, self.per_epoch):
            now = f"{self.images} images in {self.per_epoch} iterations"
            before = f"{images} images in {per_epoch} iterations as before"
            print(f"an epoch is {now}, not {before}: the run continues at the same fraction of it")
        elif checkpoint.get("train_data", self.train_data) != self.train_data:
            print("trains on other images than before")

    def load_momentum(self, state: dict) -> None:
        """Take the momentum from an optimizer's state dict, and nothing else: its options may be another's.

        Parameters are numbered there, trunk before ASPP; those of a frozen BatchNorm are not among them.
        Raises LookupError, ValueError, TypeError, AttributeError if it is of another network."""
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = dict(self.model.named_parameters())
        names = list(parameters)
        if len(numbers) != len(names):
            norms = {name for name, module in self.model.named_modules() if isinstance(module, _BatchNorm)}
            names = [name for name in names if name.rpartition(".")[0] not in norms]
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        # Zero is what a new run begins with, and in the strides of the parameter the fused step reads it.
        own = {parameter: torch.zeros_like(parameter) for parameter in trained}
        for name, number in zip(names, numbers, strict=True):
            parameter, momentum = parameters[name], state["state"].get(number, {}).get("momentum_buffer")
            if parameter.requires_grad and momentum is not None:
                if momentum.shape != parameter.shape:
                    raise ValueError("the momentum of the optimizer is of another shape")
                own[parameter].copy_(momentum)
        for parameter, momentum in own.items():
            self.optimizer.state[parameter]["momentum_buffer"] = momentum


def training_flags(checkpoint: dict) -> dict:
    """The flags that a checkpoint was trained with, as far as it tells; of a resumed run the last ones."""
    flags = checkpoint.get("flags")
    flags = flags if isinstance(flags, dict) else {}  # not ours
    keys = [*RUN_FLAGS[: -len(VALIDATION_FLAGS)], "init", "scratch"]
    return {key: flags[key] for key in keys if key in flags}


def trained_on(checkpoint: dict) -> set[int]:
    """The `image_ids` of what a checkpoint was trained on, as far as it tells."""
    found = checkpoint.get("trained_on")
    return set(found.tolist()) if isinstance(found, torch.Tensor) else set()


def to_tensor(ids: set[int]) -> torch.Tensor:
    """`trained_on` as it stands in files."""
    return torch.tensor(sorted(ids), dtype=torch.int64)


def find_best(validations: dict[int, float]) -> Best | None:
    """The first of the best validations, if there is one."""
    found = (Best(*item) for item in sorted(validations.items()))
    return max(found, key=lambda best: best.mean_iou, default=None)


def compare_reading(saved: Reading, path: str, now: Reading) -> None:
    """Raises UserError if a run goes on with images that are read in another way."""
    for key in ("value_range", "bands"):
        before, given = saved.words(key), now.words(key)
        if before != given:
            raise UserError(f"{path} was trained with another --{key} (checkpoint: {before}, here: {given})")


def compare_masks(saved: dict[str, int], path: str, labels: Labels) -> None:
    """Raises UserError if a value or a colour in masks, see `Labels.meaning`, is another class than before;
    some may be new, and some no longer there."""
    now, names = labels.meaning(), dict(enumerate(labels.classes)) | {IGNORE_INDEX: "ignored"}
    for pixel, label in saved.items():
        if now.get(pixel, label) != label:
            changed = f"in the masks {pixel} was {names[label]!r}, and now it is {names[now[pixel]]!r}"
            hint = "change classes.txt back, or begin another run with --init"
            raise UserError(f"{path}: {changed}: {hint}")

"""The losses of training, each in a form that lets a batch be split.

A loss is a sum over the images of a part of the batch, divided by the total of the whole batch, which the
masks alone tell. So neither --accum nor the number of processes changes it.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from commands.check import check_ignored, check_learnable, count_labels, median_frequency
from datasets import SegmentationDataset
from utils import IGNORE_INDEX, RANK, WORLD, UserError


class CrossEntropy(nn.Module):
    """The mean cross-entropy of the labelled pixels, or of the hardest of each image.

    Args:
        class_weights: (num_classes,); the mean is then weighted, as in torch's own loss.
        top_k: share of an image's labelled pixels that counts, those with the highest loss: hard pixel mining
            as in Detectron2's DeepLab, but image by image. A class weight then is relative to the mean weight
            of the image's pixels.
        label_smoothing: the share of the target that all classes have in equal parts, as in torch's loss.
    """

    def __init__(self, class_weights: Tensor | None = None, top_k: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        self.register_buffer("class_weights", class_weights)
        self.top_k, self.label_smoothing = top_k, label_smoothing

    def total(self, masks: Tensor) -> Tensor:
        """The number of the pixels in masks (N, H, W) that count, or the sum of their weights."""
        labelled = masks != IGNORE_INDEX
        pixels = labelled.sum((1, 2))
        if self.class_weights is None:
            return self.hardest(pixels).sum()
        weights = F.pad(self.class_weights, (0, 256 - len(self.class_weights)))[masks.int()].sum((1, 2))
        return (weights * self.hardest(pixels) / pixels.clamp(min=1)).sum()

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The sum over the pixels of logits (N, num_classes, H, W) and masks uint8 (N, H, W)."""
        options = {"ignore_index": IGNORE_INDEX, "label_smoothing": self.label_smoothing}
        if self.top_k == 1:
            return F.cross_entropy(logits, masks.long(), self.class_weights, reduction="sum", **options)
        losses = F.cross_entropy(logits, masks.long(), self.class_weights, reduction="none", **options)
        # As many of each image as if no pixel, whose loss would be 0, were ignored: the device, for which the
        # CPU does not wait, knows how many are.
        limit = int(self.hardest(torch.tensor(masks[0].numel())))
        highest = losses.flatten(1).topk(limit).values
        counted = self.hardest((masks != IGNORE_INDEX).sum((1, 2)))
        return (highest * (torch.arange(limit, device=masks.device) < counted[:, None])).sum()

    def hardest(self, pixels: Tensor) -> Tensor:
        """How many of the labelled pixels of each image count: at least one, if there is one."""
        if self.top_k == 1:
            return pixels
        return (self.top_k * pixels).round().clamp(min=1).long().minimum(pixels)


class Dice(nn.Module):
    """1 - soft Dice (Milletari et al. 2016, https://arxiv.org/abs/1606.04797): the mean over the classes in
    an image's mask, weighted by `class_weights` (num_classes,) if given, then over the images.

    Of one class it is 1 - 2 I / (P + T): P is the sum of its softmax scores over the labelled pixels, I that
    over its own pixels, T their number.
    """

    def __init__(self, class_weights: Tensor | None = None):
        super().__init__()
        self.register_buffer("class_weights", class_weights)

    def total(self, masks: Tensor) -> Tensor:
        """The number of images in masks (N, H, W) with a labelled pixel."""
        return (masks != IGNORE_INDEX).flatten(1).any(1).sum()

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The sum over the images of logits (N, num_classes, H, W) and masks uint8 (N, H, W)."""
        scores, labelled = logits.softmax(1), masks != IGNORE_INDEX
        labels = masks.long().where(labelled, 0)
        own = scores.gather(1, labels[:, None])[:, 0] * labelled  # the score of a pixel's class
        zeros = scores.new_zeros(scores.shape[:2])
        hits = zeros.scatter_add(1, labels.flatten(1), own.flatten(1))
        truth = zeros.scatter_add(1, labels.flatten(1), labelled.flatten(1).to(scores.dtype))
        predicted = torch.einsum("nchw,nhw->nc", scores, labelled.to(scores.dtype))
        losses = 1 - 2 * hits / (predicted + truth).clamp(min=torch.finfo(scores.dtype).tiny)
        weights = (truth > 0).to(scores.dtype)
        if self.class_weights is not None:
            weights = weights * self.class_weights
        sums = weights.sum(1)
        return ((weights * losses).sum(1) / sums.where(sums > 0, 1)).sum()


class WithDice(nn.Module):
    """Cross-entropy plus `weight` times Dice: their totals and sums as tensors (2,)."""

    def __init__(self, cross_entropy: CrossEntropy, weight: float):
        super().__init__()
        self.cross_entropy, self.weight = cross_entropy, weight
        self.dice = Dice(cross_entropy.class_weights)

    def total(self, masks: Tensor) -> Tensor:
        return torch.stack([self.cross_entropy.total(masks), self.dice.total(masks)])

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        return torch.stack([self.cross_entropy(logits, masks), self.weight * self.dice(logits, masks)])


def class_weights(given: Sequence[str] | None, dataset: SegmentationDataset) -> Tensor | None:
    """The weights of the classes (num_classes,) that --class_weights gives; for "auto" the pixels of all
    masks are counted. Raises UserError if there is not a weight for each class, or as `check.check_ignored`
    and `check.check_learnable` where the counts tell."""
    if not given:
        return None
    weights, classes = given, dataset.classes
    if weights == ["auto"]:
        counts = count_labels(dataset, range(len(dataset))[RANK::WORLD], "counting pixels")
        if WORLD > 1:
            dist.all_reduce(torch.from_numpy(counts))
        check_ignored(dataset, counts[0])
        check_learnable(dataset, "train", counts[0])
        weights = median_frequency(counts, len(classes))
    if len(weights) != len(classes):
        found = f"--class_weights has {len(weights)} numbers for {len(classes)} classes"
        raise UserError(f"{found}: {', '.join(classes)}")
    shown = (f"{name} {float(weight):.3g}" for name, weight in zip(classes, weights, strict=True))
    print(f"weights of the classes in the loss: {', '.join(shown)}")
    return torch.tensor([float(weight) for weight in weights])

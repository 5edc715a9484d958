"""DeepLabv3 (Chen et al. 2017, https://arxiv.org/abs/1706.05587) and v3+ on torchvision's networks.

Reads from layer to model: weight-standardised convolution, trunks, ASPP, heads, DeepLabv3, and what builds a
model from ImageNet weights or from a checkpoint.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import mobilenet_v3_large
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from files import checkpoints
from files.images import AS_STORED
from files.pixels import as_rgb, enlarge, padded_side, shrink, to_array
from files.tiles import Result, blend
from utils import UserError

# The backbones: the arguments of torchvision's ResNet, or none for the network of that name.
BACKBONES = {
    "resnet50": {"layers": (3, 4, 6, 3)},
    "resnet101": {"layers": (3, 4, 23, 3)},
    "resnet152": {"layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {"layers": (3, 4, 6, 3), "groups": 32, "width_per_group": 4},
    "resnext101_32x8d": {"layers": (3, 4, 23, 3), "groups": 32, "width_per_group": 8},
    "wide_resnet50_2": {"layers": (3, 4, 6, 3), "width_per_group": 128},
    "wide_resnet101_2": {"layers": (3, 4, 23, 3), "width_per_group": 128},
    "mobilenet_v3_large": {},
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in 0..1
TRUNK_MOMENTUM, HEAD_MOMENTUM = 0.05, 0.0003  # of BatchNorm's running statistics
PAPER_ITERATIONS = 30_000
# The norm behind each conv of a module, None where none follows.
NORMS = {
    Bottleneck: {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "downsample.0": "downsample.1"},
    Conv2dNormActivation: {"0": "1"},
    SqueezeExcitation: {"fc1": None, "fc2": None},
}


class Inference(NamedTuple):
    """How a trained network is applied to images.

    Args:
        scales: average the softmax scores over these sizes of the image, relative to its own.
        flip: average them over the mirrored image, too.
        amp: number format of the convs, as for `autocast`.
        batch_size: images, or tiles, in one forward pass.
        max_side: a photo with a longer side is predicted at this size; bounds the memory.
        tile: a larger image is segmented in windows of this side at its full size, see `segment_tiles`.
        overlap: the share of its side, up to 1/2, by which a window overlaps the next.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    amp: str | None = None
    batch_size: int = 4
    max_side: int = 2049
    tile: int | None = None
    overlap: float = 0.25

    @property
    def images(self) -> int:
        """The number of images in a batch, which with tiles is of windows of one of them."""
        return 1 if self.tile else self.batch_size

    def takes_tiles(self, size: Sequence[int]) -> bool:
        """Whether an image of these sides is segmented in tiles."""
        return self.tile is not None and max(size) > self.tile


ONE_PASS = Inference()
HEADS = ("v3", "v3plus", "torchvision")


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager:
    """The number format of convs: bfloat16 or float16 for "bf16" or "fp16", else float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    # Without need no block is entered: torch 2.6 cannot export one.
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def standardize(weight: Tensor) -> Tensor:
    """Weight Standardization (Qiao et al. 2019, https://arxiv.org/abs/1903.10520): per output channel, minus
    the mean and divided by (unbiased std + 1e-5)."""
    # The published implementation's operations in its order: a deep net amplifies their rounding.
    weight = weight - weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    return weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)


class Standardize(torch.autograd.Function):
    """The same for training, with its gradient, in a third of the time."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        # The mean is 0, so this is the std, which the CPU takes five times as long for.
        std = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True) / (weight[0].numel() - 1) ** 0.5
        scale = 1 / (std + 1e-5)
        standardized = weight * scale
        ctx.save_for_backward(standardized, std, scale)
        return standardized

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        standardized, std, scale = ctx.saved_tensors
        # Not vecdot: compiled under autocast, that computes in bfloat16.
        along = (grad * standardized).sum((1, 2, 3), keepdim=True)
        centered = torch.addcmul(-grad.mean((1, 2, 3), keepdim=True) * scale, grad, scale)
        along = (along / (std * (1 - grad[0].numel()))).where(std > 0, 0)  # of equal weights the std is 0
        return centered.addcmul_(standardized, along)


class WSConv2d(nn.Conv2d):
    """Convolution with Weight Standardization."""

    def forward(self, x: Tensor) -> Tensor:
        weight = Standardize.apply(self.weight) if self.training else standardize(self.weight)
        return self._conv_forward(x, weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the number format of its input, where autocast on CUDA would give, and keep, float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:  # not the module's forward: it refuses a group of one value
            return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return torch.group_norm(x, self.num_groups, weight, bias, self.eps)


def group_norm(num_groups: int, channels: int) -> GroupNorm:
    """GroupNorm of channels that the groups need not divide, as the 48 of v3+."""
    return GroupNorm(math.gcd(num_groups, channels), channels)


class ResNetTrunk(ResNet):
    """torchvision's ResNet up to its last feature map, with dilated stages.

    Takes (N, 3, H, W), gives the feature maps of stride 4 and of the output stride.
    """

    channels = (256, 2048)

    def __init__(
        self,
        output_stride: int,
        multi_grid: Sequence[int],
        beta: bool,
        norm_layer: Callable[[int], nn.Module],
        **options,
    ):
        dilate = (False, output_stride == 8, output_stride <= 16)
        super().__init__(
            Bottleneck, num_classes=1, replace_stride_with_dilation=dilate, norm_layer=norm_layer, **options
        )
        del self.avgpool, self.fc
        self.norms = {"conv1": "bn1"}
        if beta:
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(64, 64, 3, padding=1, bias=False),
                nn.Conv2d(64, 64, 3, padding=1, bias=False),
            )
            self.norms = {"conv1.0": None, "conv1.1": None, "conv1.2": "bn1"}
        if tuple(multi_grid) != (1, 1, 1):
            for block, grid in zip(self.layer4, multi_grid, strict=True):
                rate = 32 // output_stride * grid
                block.conv2.dilation = block.conv2.padding = (rate, rate)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return low, self.layer4(self.layer3(self.layer2(low)))


class MobileNetTrunk(nn.Module):
    """torchvision's MobileNetV3-Large up to its last feature map; input and outputs as for `ResNetTrunk`."""

    channels = (24, 960)
    norms: dict[str, str | None] = {}

    def __init__(self, output_stride: int):
        super().__init__()
        self.features = mobilenet_v3_large(dilated=output_stride == 16).features

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.features[:4](x)
        return low, self.features[4:](low)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (paper, section 3.3).

    Branches `aspp1`, `aspp2`, ...: a 1x1 conv, one 3x3 conv per atrous rate, and, with `image_pooling`, a 1x1
    conv of the image's mean; each 256 wide, normalised, ReLU; then a 1x1 conv of all of them. Takes (N,
    in_channels, H, W), gives (N, 256, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        rates: Sequence[int],
        image_pooling: bool,
        norm_layer: Callable[[int], nn.Module],
        dropout: float = 0.0,
    ):
        super().__init__()
        self.image_pooling = image_pooling
        convs = [nn.Conv2d(in_channels, 256, 1, bias=False)]
        convs += [nn.Conv2d(in_channels, 256, 3, padding=r, dilation=r, bias=False) for r in rates]
        if image_pooling:
            convs.append(nn.Conv2d(in_channels, 256, 1, bias=False))
        self.num_branches = len(convs)
        # All convs come before all norms: the parameter order of the published optimizer states.
        for i, conv in enumerate(convs, 1):
            self.add_module(f"aspp{i}", conv)
        for i in range(1, self.num_branches + 1):
            self.add_module(f"aspp{i}_bn", norm_layer(256))
        self.conv2 = nn.Conv2d(256 * self.num_branches, 256, 1, bias=False)
        self.bn2 = norm_layer(256)
        self.dropout = nn.Dropout(dropout)
        self.norms = {f"aspp{i}": f"aspp{i}_bn" for i in range(1, self.num_branches + 1)} | {"conv2": "bn2"}

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for i in range(1, self.num_branches + 1):
            pooling = self.image_pooling and i == self.num_branches
            y = x.mean((2, 3), keepdim=True) if pooling else x
            y = F.relu(getattr(self, f"aspp{i}_bn")(getattr(self, f"aspp{i}")(y)))
            branches.append(y.expand(-1, -1, *x.shape[2:]) if pooling else y)
        return self.dropout(F.relu(self.bn2(self.conv2(torch.cat(branches, 1)))))


class Head(nn.Module):
    """What follows ASPP, from its (N, 256, H, W) and the trunk's feature map of stride 4 to logits.

    "v3" is a 1x1 classifier. "torchvision" has a 3x3 conv before it. "v3plus" (Chen et al. 2018,
    https://arxiv.org/abs/1802.02611, section 3.1) brings ASPP's output to stride 4, where two 3x3 convs
    refine it with 48 channels of the trunk's.
    """

    def __init__(
        self, kind: str, low_channels: int, num_classes: int, norm_layer: Callable[[int], nn.Module]
    ):
        super().__init__()
        self.kind, self.norms = kind, {"conv3": None}
        widths = {"v3": [], "torchvision": [256], "v3plus": [256 + 48, 256]}[kind]
        if kind == "v3plus":
            self.low, self.low_bn = nn.Conv2d(low_channels, 48, 1, bias=False), norm_layer(48)
            self.norms["low"] = "low_bn"
        for i, width in enumerate(widths, 1):
            self.add_module(f"conv{i}", nn.Conv2d(width, 256, 3, padding=1, bias=False))
            self.add_module(f"bn{i}", norm_layer(256))
            self.norms[f"conv{i}"] = f"bn{i}"
        self.conv3 = nn.Conv2d(256, num_classes, 1)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        if self.kind == "v3plus":
            x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=True)
            x = torch.cat([x, F.relu(self.low_bn(self.low(low)))], 1)
            x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        elif self.kind == "torchvision":
            x = F.relu(self.bn1(self.conv1(x)))
        return self.conv3(x)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context a model is in eval mode; then each of its modules is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def init_convs(module: nn.Module, but: nn.Module | None = None) -> None:
    """Draw the weights of all convs but one as torchvision's ResNet does: normal, std sqrt(2 / (k*k*out))."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d) and conv is not but:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def check_options(config: dict) -> None:
    """Raises UserError for an argument of `DeepLabv3` that has no meaning; the message names the flag."""
    backbone, stride, groups = config["backbone"], config["output_stride"], config["num_groups"]
    rates, num_classes = config["aspp_rates"], config["num_classes"]
    if backbone not in BACKBONES:
        raise UserError(f"--backbone {backbone}: choose one of {', '.join(BACKBONES)}")
    if config["head"] not in HEADS:
        raise UserError(f"--head {config['head']}: choose one of {', '.join(HEADS)}")
    if not 1 <= num_classes <= 255:
        raise UserError(f"{num_classes} classes: a mask of bytes with 255 to ignore can hold 1 to 255")
    if groups and (groups < 1 or 64 % groups):
        raise UserError(f"--groups {groups} does not divide all widths: use 1, 2, 4, 8, 16, 32 or 64")
    if stride not in (8, 16, 32):
        raise UserError(f"--output_stride {stride}: choose 8, 16 or 32")
    if len(config["multi_grid"]) != 3 or min(config["multi_grid"]) < 1:
        raise UserError("--multi_grid takes three positive rates, one for each block of layer4: 1 2 4")
    if not rates or min(rates) < 1 or any(rate * 16 % stride for rate in rates):
        raise UserError("--aspp_rates are positive, and even at --output_stride 32, where they are halved")
    if backbone == "mobilenet_v3_large":
        resnets = {"groups": groups, "weight_std": config["weight_std"], "beta": config["beta"]}
        resnets |= {"multi_grid": config["multi_grid"] != [1, 1, 1], "output_stride 8": stride == 8}
        if given := [f"--{name}" for name, value in resnets.items() if value]:
            raise UserError(f"{' and '.join(given)}: for ResNets, not for {backbone}")


class DeepLabv3(nn.Module):
    """DeepLabv3 or v3+: a trunk, ASPP and a head, whose logits are upsampled to the image.

    Args:
        backbone: one of `BACKBONES`.
        num_classes: width of the logits.
        num_groups: GroupNorm with that many groups everywhere; None or 0 is BatchNorm.
        weight_std: weight standardisation of every conv but the classifier.
        beta: the stem is three 3x3 convs instead of one 7x7.
        output_stride: 8, 16 or 32, the ratio of the input's size to that of the last feature map.
        multi_grid: rates of layer4's three 3x3 convs, in units of the stage's own rate (2 at output stride
            16); (1, 1, 1) keeps torchvision's dilations, whose first block has the rate of the stage before,
            as the published checkpoints have it.
        aspp_rates: atrous rates as given for output stride 16; scaled for the others.
        image_pooling: whether ASPP has its image-level branch.
        head: "v3", "v3plus" or "torchvision", see `Head`.

    Raises:
        UserError: for an option that has no meaning; the message names the flag.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int = 21,
        num_groups: int | None = None,
        weight_std: bool = False,
        beta: bool = False,
        output_stride: int = 16,
        multi_grid: tuple[int, ...] = (1, 1, 1),
        aspp_rates: tuple[int, ...] = (6, 12, 18),
        image_pooling: bool = True,
        head: str = "v3",
    ):
        super().__init__()
        self.config = {
            "backbone": backbone,
            "num_classes": num_classes,
            "num_groups": num_groups or None,
            "weight_std": weight_std,
            "beta": beta,
            "output_stride": output_stride,
            "multi_grid": list(multi_grid),
            "aspp_rates": list(aspp_rates),
            "image_pooling": image_pooling,
            "head": head,
        }
        check_options(self.config)
        self.classes: Sequence[str] | None = None  # names and colours, where they are known
        self.palette: Sequence[Sequence[int]] | None = None
        self.reading = AS_STORED  # how its images become RGB
        self.bn_frozen = False
        norm = partial(nn.BatchNorm2d, momentum=TRUNK_MOMENTUM)
        head_norm = partial(nn.BatchNorm2d, momentum=HEAD_MOMENTUM)
        if num_groups:
            norm = head_norm = partial(group_norm, num_groups)
        if BACKBONES[backbone]:
            self.trunk = ResNetTrunk(output_stride, multi_grid, beta, norm, **BACKBONES[backbone])
        else:
            self.trunk = MobileNetTrunk(output_stride)
        low_channels, channels = self.trunk.channels
        rates = [rate * 16 // output_stride for rate in aspp_rates]
        dropout = 0.5 if head == "torchvision" else 0.0
        self.aspp = ASPP(channels, rates, image_pooling, head_norm, dropout)
        self.head = Head(head, low_channels, num_classes, head_norm)
        classifier = self.head.conv3
        # Under weight standardisation the classifier keeps PyTorch's default, as in the published models.
        init_convs(getattr(self.trunk, "conv1", nn.Identity()))  # the others are torchvision's
        init_convs(self.aspp)
        init_convs(self.head, but=classifier if weight_std else None)
        if weight_std:
            # The standardised conv has the same parameters and differs in its forward alone: another class is
            # all it takes.
            for conv in self.modules():
                if isinstance(conv, nn.Conv2d) and conv is not classifier:
                    conv.__class__ = WSConv2d
        self.align_corners = head != "torchvision"
        self.channels_last = False  # the order of its weights and inputs in memory, see `place`
        self.register_buffer("pixel_mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)

    def place(self, device: torch.device | str) -> "DeepLabv3":
        """Move to a device, in the memory format to use there."""
        # channels_last is the faster one. But the CPU's GroupNorm loses precision in it: of the golden
        # predictions of a GN+WS network, 97 to 99 % of the pixels agree instead of 99.96 %. And MPS gives
        # BatchNorm wrong gradients in it (pytorch issue 175189).
        kind = torch.device(device).type
        self.channels_last = kind == "cuda" or (kind == "cpu" and not self.config["num_groups"])
        return self.to(device, memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:  # which torch.save cannot write
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def normalize(self, images: Tensor, sizes: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) to float32 network input; `sizes` (N, 2) are the heights and widths of the
        images proper.

        Whatever lies right of an image or below it is padding, and exactly 0 after normalising.
        """
        x = (images - self.pixel_mean) / self.pixel_std
        rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]
        columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
        x = x * (rows[:, None, :, None] & columns[:, None, None, :])
        return x.contiguous(memory_format=self.memory_format)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Normalised float (N, 3, H, W) to logits (N, num_classes, H, W), or of another `size`, in the number
        format of `x`, though autocast computes the convs in another."""
        low, high = self.trunk(x)
        logits = self.head(self.aspp(high), low).to(x.dtype)
        return self.resize(logits, size or x.shape[2:])

    def resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def scores(self, x: Tensor, inference: Inference = ONE_PASS, softmax: bool = False) -> Tensor:
        """What to take the argmax of: the logits, or the softmax scores averaged over several passes, or
        those of a single pass with `softmax`.

        Takes normalised images (N, 3, H, W), gives (N, num_classes, H, W) (paper, section 4.1). Raises
        UserError if a number in float16 overflows.
        """
        scales, flip = inference.scales, inference.flip
        with autocast(x.device, inference.amp):
            if list(scales) == [1.0] and not flip and not softmax:
                return check_float16(self(x), inference)
            stride, total = self.config["output_stride"], 0
            for scale in scales:
                if self.align_corners:
                    size = [round((side - 1) * scale / stride) * stride + 1 for side in x.shape[2:]]
                else:
                    size = [max(1, round(side * scale)) for side in x.shape[2:]]
                scaled = x if scale == 1 else self.resize(x, size)
                total = total + self(scaled, x.shape[2:]).softmax(1)
                if flip:
                    total = total + self(scaled.flip(-1), x.shape[2:]).flip(-1).softmax(1)
        return check_float16(total / (len(scales) * (2 if flip else 1)), inference)

    @property
    def padded_stride(self) -> int:
        """Images are padded to multiples of this, plus 1; torchvision's head wants no padding."""
        return self.config["output_stride"] if self.align_corners else 1

    def segment(self, images: Tensor, inference: Inference = ONE_PASS, softmax: bool = False) -> Tensor:
        """The `scores` of uint8 images (N, 3, H, W): they are normalised, padded to the output stride, and
        what was padded is cut off again."""
        # In these operations, and the cut not a slice, so that torch.export takes any size.
        below, right = (padded_side(side, self.padded_stride) - side for side in images.shape[2:])
        x = F.pad((images - self.pixel_mean) / self.pixel_std, [0, right, 0, below])
        scores = self.scores(x.contiguous(memory_format=self.memory_format), inference, softmax)
        return F.pad(scores, [0, -right, 0, -below])

    def segment_tiles(
        self, image: Image.Image, inference: Inference, finish: Callable[[Tensor], Result]
    ) -> Iterator[tuple[slice, slice, Result]]:
        """`blend` the scores of an RGB image in tiles."""

        def segment(images: Tensor) -> Tensor:
            return self.segment(images.to(self.pixel_mean.device), inference, softmax=True)

        return blend(segment, image, inference.tile, inference.overlap, inference.batch_size, finish)

    @torch.inference_mode()
    def predict(
        self,
        image: Image.Image | np.ndarray | str | os.PathLike | list,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        max_side: int = 2049,
        probabilities: bool = False,
        tile: int | None = None,
        overlap: float = 0.25,
    ) -> np.ndarray | list[np.ndarray]:
        """Segment an image: a PIL image of any mode and size, turned as its EXIF orientation says, the path
        of such a file, or a uint8 array (H, W, 3) of RGB or (H, W) of grey; or a list of them. The three of
        an array are what the network gets, also if the model takes other `bands` of files.

        Args:
            scales, flip, max_side: as for `Inference`.
            probabilities: give those of all classes, float32 (num_classes, H, W), instead of labels.
            tile: segment a larger image in windows of this side at its full size, and do not shrink it.
            overlap: the share of its side, up to 1/2, by which a window overlaps the next.

        Returns:
            uint8 labels (H, W), of the turned image's size; a list of them for a list.

        Raises:
            UserError: if a file cannot be read, or not as the model's images were (see `Reading`).
            ValueError: if `max_side` or `tile` is no size, `overlap` not in 0..1/2, a scale not in 0.1..4.
            TypeError: for anything else, such as a tensor or an array of floats.
        """
        if max_side < 1 or (tile is not None and tile < 1) or not 0 <= overlap <= 0.5:
            given = f"max_side {max_side}, tile {tile}, overlap {overlap}"
            raise ValueError(f"max_side and tile are sides in pixels, and overlap is 0 to 0.5: not {given}")
        if not scales or not all(0.1 <= scale <= 4 for scale in scales):
            raise ValueError(f"scales are between 0.1 and 4, not {scales}")
        if isinstance(image, list | tuple):
            options = (scales, flip, max_side, probabilities, tile, overlap)
            return [self.predict(one, *options) for one in image]
        image = as_rgb(image, self.reading)
        inference, size = Inference(scales, flip, tile=tile, overlap=overlap), image.size
        with evaluating(self):
            if inference.takes_tiles(size):
                classes = [self.config["num_classes"]] if probabilities else []
                out = np.empty((*classes, *size[::-1]), np.float32 if probabilities else np.uint8)
                finish = Tensor.float if probabilities else lambda scores: scores.argmax(0).byte()
                for rows, columns, piece in self.segment_tiles(image, inference, finish):
                    out[..., rows, columns] = piece.cpu()
                return out
            pixels = torch.from_numpy(to_array(image if tile else shrink(image, max_side))).permute(2, 0, 1)
            scores = self.segment(pixels[None].to(self.pixel_mean.device), inference, softmax=probabilities)
            if probabilities:  # not `resize`: `shrink` goes by the corners of pixels, whatever the head
                scores = F.interpolate(scores.float(), size[::-1], mode="bilinear", align_corners=False)
                return scores[0].cpu().numpy()
            return enlarge(scores[0].argmax(0).byte().cpu().numpy(), size)

    def train(self, mode: bool = True) -> "DeepLabv3":
        super().train(mode)
        if self.bn_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def freeze_bn(self) -> None:
        """Fix BatchNorm's statistics, scale and shift for good; `train()` does not thaw them."""
        self.bn_frozen = True
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
        self.train(self.training)

    def fuse(self) -> "DeepLabv3":
        """A copy for inference alone: the same logits but for rounding, in about 3/4 of the time.

        BatchNorm is folded into the conv before it, weights are standardised once and for all, and nothing
        has a gradient. The copy has no more part in the model's training, nor fits its checkpoints; the model
        itself stays as it is.
        """
        model = copy.deepcopy(self).eval().requires_grad_(False)
        norms = model.norms()
        for name, conv in [item for item in model.named_modules() if isinstance(item[1], nn.Conv2d)]:
            if isinstance(conv, WSConv2d):
                conv.weight = nn.Parameter(standardize(conv.weight), requires_grad=False)
                conv.__class__ = nn.Conv2d
            norm = norms[name] and model.get_submodule(norms[name])  # an error for a conv that nobody names
            if isinstance(norm, _BatchNorm):
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                model.set_submodule(norms[name], nn.Identity())
        return model

    def norms(self) -> dict[str, str | None]:
        """The name of the norm behind each conv, None where none follows."""
        norms = {}
        for name, module in self.named_modules():
            pairs = NORMS.get(type(module)) or getattr(module, "norms", None)
            if isinstance(pairs, dict):
                norms |= {f"{name}.{conv}": norm and f"{name}.{norm}" for conv, norm in pairs.items()}
        return norms

    def fit_bn_momentum(self, max_iter: int) -> None:
        """Fit the memory of BatchNorm's running statistics to a run of `max_iter` iterations.

        With momentum m they average the last 1/m iterations or so. ASPP's 0.0003 makes that a ninth of the
        paper's 30K iterations: long enough to be smooth, and the initial values fade to exp(-9). Over 100
        iterations those would keep 97 % of the weight and spoil evaluation; so no layer of a short run
        averages over more than a ninth of it. The trunk's 20 iterations are affected in the same way from 180
        iterations down.
        """
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm):
                momentum = TRUNK_MOMENTUM if name.startswith("trunk.") else HEAD_MOMENTUM
                module.momentum = min(1.0, max(momentum, HEAD_MOMENTUM * PAPER_ITERATIONS / max_iter))


def check_float16(scores: Tensor, inference: Inference) -> Tensor:
    """The scores. Raises UserError if they are not finite, of which argmax would make some class."""
    if inference.amp == "fp16" and not scores.isfinite().all():
        raise UserError("numbers overflow in float16, which ends at 65504: give --amp bf16 or none")
    return scores


def build(backbone: str, pretrained: bool = True, *args, **kwargs) -> DeepLabv3:
    """DeepLabv3 with that backbone, from ImageNet weights if `pretrained`; other arguments as for
    `DeepLabv3`."""
    model = DeepLabv3(backbone, *args, **kwargs)
    if pretrained:
        checkpoints.load_imagenet(model)
    return model


# DeepLabv3 on these backbones; arguments as for `build`.
resnet50, resnet101, resnet152 = (partial(build, f"resnet{depth}") for depth in (50, 101, 152))


def from_checkpoint(checkpoint: dict, path: str, **options) -> DeepLabv3:
    """The model of a checkpoint of `checkpoints.read`; `classes` and `palette` are None for a published one.

    `options` are arguments of `DeepLabv3`: what a published checkpoint does not tell, or another
    `output_stride`. Raises UserError if the checkpoint cannot be used, or was trained with other options."""
    try:
        model = DeepLabv3(**{**checkpoints.model_config(checkpoint, path), **options})
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not say what model it holds") from error
    checkpoints.load_weights(model, checkpoint, path)
    model.classes, model.palette = checkpoints.classes(checkpoint, path)
    model.reading = checkpoints.reading(checkpoint, path)
    return model


def load(path: str | os.PathLike, device: torch.device | str = "cpu", **options) -> DeepLabv3:
    """The model of a checkpoint file on a device, in eval mode; `options` as for `from_checkpoint`. Raises
    UserError if the file cannot be read or used."""
    path = os.fspath(path)
    return from_checkpoint(checkpoints.read(path), path, **options).place(device).eval()

"""DeepLabv3 (Chen et al. 2017, https://arxiv.org/abs/1706.05587) on torchvision's ResNet.

Reads from layer to model: weight-standardised convolution, ASPP, DeepLabv3, and what builds one from ImageNet
weights or from a checkpoint. The parameter names are those of the published checkpoints.
"""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import Bottleneck, ResNet

from files import checkpoints
from files.images import enlarge, read_image, shrink, to_rgb
from utils import IGNORE_INDEX, UserError

LAYERS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in 0..1
TRUNK_MOMENTUM, ASPP_MOMENTUM = 0.05, 0.0003  # of BatchNorm's running statistics
PAPER_ITERATIONS = 30_000
# The norm behind each conv of a block; a block may lack one of them.
BOTTLENECK_NORMS = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "downsample.0": "downsample.1"}


class Inference(NamedTuple):
    """How a trained network is applied to images.

    Args:
        scales: average the softmax scores over these sizes of the image, relative to its own.
        flip: average them over the mirrored image, too.
        amp: number format of the convs, as for `autocast`.
        batch_size: images in one forward pass.
        max_side: a photo with a longer side is predicted at this size; bounds the memory.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    amp: str | None = None
    batch_size: int = 4
    max_side: int = 2049


ONE_PASS = Inference()


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
        return centered.addcmul_(standardized, along / (std * (1 - grad[0].numel())))


class WSConv2d(nn.Conv2d):
    """Convolution with Weight Standardization."""

    def forward(self, x: Tensor) -> Tensor:
        weight = Standardize.apply(self.weight) if self.training else standardize(self.weight)
        return self._conv_forward(x, weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the number format of its input, where autocast on CUDA would give, and keep, float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling and the classifier (paper, section 3.3).

    Branches `aspp1`, `aspp2`, ...: a 1x1 conv, one 3x3 conv per atrous rate, and, with `image_pooling`, a 1x1
    conv of the image's mean; each 256 wide, normalised, ReLU. Takes (N, in_channels, H, W), gives logits (N,
    num_classes, H, W).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        rates: Sequence[int],
        image_pooling: bool,
        norm_layer: Callable[[int], nn.Module],
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
        self.conv3 = nn.Conv2d(256, num_classes, 1)
        self.norms = {f"aspp{i}": f"aspp{i}_bn" for i in range(1, self.num_branches + 1)}
        self.norms |= {"conv2": "bn2", "conv3": None}  # the norm behind each conv

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for i in range(1, self.num_branches + 1):
            pooling = self.image_pooling and i == self.num_branches
            y = x.mean((2, 3), keepdim=True) if pooling else x
            y = F.relu(getattr(self, f"aspp{i}_bn")(getattr(self, f"aspp{i}")(y)))
            branches.append(y.expand(-1, -1, *x.shape[2:]) if pooling else y)
        return self.conv3(F.relu(self.bn2(self.conv2(torch.cat(branches, 1)))))


def check_options(backbone, num_classes, num_groups, output_stride, multi_grid, aspp_rates) -> None:
    """Raises UserError for an option of `DeepLabv3` that has no meaning; the message names the flag."""
    if backbone not in LAYERS:
        raise UserError(f"--backbone {backbone}: choose one of {', '.join(LAYERS)}")
    if not 1 <= num_classes <= 255:
        raise UserError(f"{num_classes} classes: a mask of bytes with 255 to ignore can hold 1 to 255")
    if num_groups and (num_groups < 1 or 64 % num_groups):
        raise UserError(f"--groups {num_groups} does not divide all widths: use 1, 2, 4, 8, 16, 32 or 64")
    if output_stride not in (8, 16, 32):
        raise UserError(f"--output_stride {output_stride}: choose 8, 16 or 32")
    if len(multi_grid) != 3 or min(multi_grid) < 1:
        raise UserError("--multi_grid takes three positive rates, one for each block of layer4: 1 2 4")
    if not aspp_rates or min(aspp_rates) < 1 or any(rate * 16 % output_stride for rate in aspp_rates):
        raise UserError("--aspp_rates are positive, and even at --output_stride 32, where they are halved")


class DeepLabv3(ResNet):
    """A torchvision ResNet whose last stages are dilated, with ASPP on top.

    Args:
        backbone: "resnet50", "resnet101" or "resnet152".
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
    ):
        config = {
            "backbone": backbone,
            "num_classes": num_classes,
            "num_groups": num_groups or None,
            "weight_std": weight_std,
            "beta": beta,
            "output_stride": output_stride,
            "multi_grid": list(multi_grid),
            "aspp_rates": list(aspp_rates),
            "image_pooling": image_pooling,
        }
        check_options(backbone, num_classes, num_groups, output_stride, multi_grid, aspp_rates)
        norm = partial(nn.BatchNorm2d, momentum=TRUNK_MOMENTUM)
        aspp_norm = partial(nn.BatchNorm2d, momentum=ASPP_MOMENTUM)
        if num_groups:
            norm = aspp_norm = partial(GroupNorm, num_groups)
        dilate = (False, output_stride == 8, output_stride <= 16)
        super().__init__(
            Bottleneck, LAYERS[backbone], num_classes=1, replace_stride_with_dilation=dilate, norm_layer=norm
        )
        del self.avgpool, self.fc
        self.config = config
        self.classes: Sequence[str] | None = None  # names and colours, where they are known
        self.palette: Sequence[Sequence[int]] | None = None
        self.bn_frozen = False
        if beta:
            self.conv1 = nn.Sequential(
                nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(64, 64, 3, padding=1, bias=False),
                nn.Conv2d(64, 64, 3, padding=1, bias=False),
            )
        if tuple(multi_grid) != (1, 1, 1):
            for block, grid in zip(self.layer4, multi_grid, strict=True):
                rate = 32 // output_stride * grid
                block.conv2.dilation = block.conv2.padding = (rate, rate)
        rates = [rate * 16 // output_stride for rate in aspp_rates]
        self.aspp = ASPP(2048, num_classes, rates, image_pooling, aspp_norm)
        self.initialize(weight_std)
        self.memory_format = torch.contiguous_format
        self.register_buffer("pixel_mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)

    def initialize(self, weight_std: bool) -> None:
        """Draw the weights of the layers that torchvision does not have; standardise them all if wanted."""
        # torchvision has initialised its own layers: normal, std sqrt(2 / (k*k*out)). The new ones follow
        # suit, but for the classifier under weight standardisation, which keeps PyTorch's default as in the
        # published models.
        for conv in [*self.conv1.modules(), *self.aspp.modules()]:
            if isinstance(conv, nn.Conv2d) and not (weight_std and conv is self.aspp.conv3):
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if weight_std:
            # The standardised conv has the same parameters and differs in its forward alone, so torchvision's
            # layers need no rebuilding: another class is all it takes.
            for conv in self.modules():
                if isinstance(conv, nn.Conv2d) and conv is not self.aspp.conv3:
                    conv.__class__ = WSConv2d

    def place(self, device: torch.device | str) -> "DeepLabv3":
        """Move to a device, in the memory format to use there."""
        # channels_last is the faster one. But the CPU's GroupNorm loses precision in it: of the golden
        # predictions of a GN+WS network, 97 to 99 % of the pixels agree instead of 99.96 %. And MPS gives
        # BatchNorm wrong gradients in it (pytorch issue 175189).
        kind = torch.device(device).type
        fast = kind == "cuda" or (kind == "cpu" and not self.config["num_groups"])
        self.memory_format = torch.channels_last if fast else torch.contiguous_format
        return self.to(device, memory_format=self.memory_format)

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
        size, dtype = size or x.shape[2:], x.dtype
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return F.interpolate(self.aspp(x).to(dtype), size, mode="bilinear", align_corners=True)

    def scores(self, x: Tensor, inference: Inference = ONE_PASS, softmax: bool = False) -> Tensor:
        """What to take the argmax of: the logits, or the softmax scores averaged over several passes, or
        those of a single pass with `softmax`.

        Takes normalised images (N, 3, H, W), gives (N, num_classes, H, W) (paper, section 4.1).
        """
        scales, flip = inference.scales, inference.flip
        with autocast(x.device, inference.amp):
            if list(scales) == [1.0] and not flip and not softmax:
                return self(x)
            stride, total = self.config["output_stride"], 0
            for scale in scales:
                size = [round((side - 1) * scale / stride) * stride + 1 for side in x.shape[2:]]
                scaled = x if scale == 1 else F.interpolate(x, size, mode="bilinear", align_corners=True)
                total = total + self(scaled, x.shape[2:]).softmax(1)
                if flip:
                    total = total + self(scaled.flip(-1), x.shape[2:]).flip(-1).softmax(1)
        return total / (len(scales) * (2 if flip else 1))

    def segment(self, images: Tensor, inference: Inference = ONE_PASS, softmax: bool = False) -> Tensor:
        """The `scores` of uint8 images (N, 3, H, W): they are normalised, padded to the output stride, and
        what was padded is cut off again."""
        stride = self.config["output_stride"]
        # In these operations, and the cut not a slice, so that torch.export takes any size.
        below, right = ((side + stride - 2) // stride * stride + 1 - side for side in images.shape[2:])
        x = F.pad((images - self.pixel_mean) / self.pixel_std, [0, right, 0, below])
        scores = self.scores(x.contiguous(memory_format=self.memory_format), inference, softmax)
        return F.pad(scores, [0, -right, 0, -below])

    @torch.inference_mode()
    def predict(
        self,
        image: Image.Image | np.ndarray | str | os.PathLike,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        max_side: int = 2049,
    ) -> np.ndarray:
        """Segment one image: a PIL image of any mode and size, turned as its EXIF orientation says, the path
        of such a file, or a uint8 array (H, W, 3) of RGB or (H, W) of grey. Options as for `Inference`.

        Returns:
            uint8 labels (H, W), of the turned image's size.

        Raises:
            UserError: if the file cannot be read.
        """
        if isinstance(image, str | os.PathLike):
            image = read_image(os.fspath(image))
        image = to_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        pixels = torch.from_numpy(np.array(shrink(image, max_side))).permute(2, 0, 1)[None]
        scores = self.segment(pixels.to(self.pixel_mean.device), Inference(scales, flip))
        return enlarge(scores[0].argmax(0).byte().cpu().numpy(), image.size)

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
        """The name of the norm behind each conv, or None where a conv or a ReLU follows, or nothing."""
        norms = (
            {"conv1.0": None, "conv1.1": None, "conv1.2": "bn1"} if self.config["beta"] else {"conv1": "bn1"}
        )
        parts = [
            (f"{name}.", BOTTLENECK_NORMS) for name, m in self.named_modules() if isinstance(m, Bottleneck)
        ]
        for prefix, pairs in [*parts, ("aspp.", self.aspp.norms)]:
            norms |= {prefix + conv: norm and prefix + norm for conv, norm in pairs.items()}
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
                momentum = ASPP_MOMENTUM if name.startswith("aspp.") else TRUNK_MOMENTUM
                module.momentum = min(1.0, max(momentum, ASPP_MOMENTUM * PAPER_ITERATIONS / max_iter))


class CrossEntropy(nn.Module):
    """The mean cross-entropy of the labelled pixels, in a form that lets a batch be split: the sum over the
    pixels of a part, and the total of the whole batch by which the sums are divided.

    With `class_weights` (num_classes,) it is the weighted mean, as torch's own loss.
    """

    def __init__(self, class_weights: Tensor | None = None):
        super().__init__()
        self.register_buffer("class_weights", class_weights)

    def total(self, masks: Tensor) -> Tensor:
        """The number of labelled pixels in masks (N, H, W), or the sum of their weights."""
        if self.class_weights is None:
            return (masks != IGNORE_INDEX).sum()
        return F.pad(self.class_weights, (0, 256 - len(self.class_weights)))[masks.int()].sum()

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The sum over the pixels of logits (N, num_classes, H, W) and masks uint8 (N, H, W)."""
        options = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
        return F.cross_entropy(logits, masks.long(), self.class_weights, **options)


def build(backbone: str, pretrained: bool = True, *args, **kwargs) -> DeepLabv3:
    """DeepLabv3 with that backbone, from ImageNet weights if `pretrained`; other arguments as for
    `DeepLabv3`."""
    model = DeepLabv3(backbone, *args, **kwargs)
    if pretrained:
        checkpoints.load_imagenet(model)
    return model


# DeepLabv3 on these backbones; arguments as for `build`.
resnet50, resnet101, resnet152 = (partial(build, backbone) for backbone in LAYERS)


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
    return model


def load(path: str | os.PathLike, device: torch.device | str = "cpu", **options) -> DeepLabv3:
    """The model of a checkpoint file on a device, in eval mode; `options` as for `from_checkpoint`. Raises
    UserError if the file cannot be read or used."""
    path = os.fspath(path)
    return from_checkpoint(checkpoints.read(path), path, **options).place(device).eval()

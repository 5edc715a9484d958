"""DeepLabv3 (Chen et al. 2017, https://arxiv.org/abs/1706.05587) on torchvision's ResNet.

Reads from layer to model: weight-standardised convolution, ASPP, DeepLabv3, the three builders, the ImageNet
start, checkpoints. The parameter names are those of the published checkpoints.
"""

import copy
import os
import pickle
import struct
from collections.abc import Sequence
from functools import partial
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models import get_model_weights
from torchvision.models.resnet import Bottleneck, ResNet

LAYERS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
IMAGENET_GN_WS = "R-101-GN-WS.pth.tar"  # ResNet-101 with GN+WS, from the Weight Standardization authors
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in 0..1
TRUNK_MOMENTUM, ASPP_MOMENTUM = 0.05, 0.0003  # of BatchNorm's running statistics
PAPER_ITERATIONS = 30_000


class ModelError(ValueError):
    """Model options, weights or a checkpoint that cannot be used; the message is one line for the user."""


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

    def __init__(self, in_channels, num_classes, rates, image_pooling, norm_layer):
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

    def forward(self, x: Tensor) -> Tensor:
        branches = []
        for i in range(1, self.num_branches + 1):
            pooling = self.image_pooling and i == self.num_branches
            y = x.mean((2, 3), keepdim=True) if pooling else x
            y = F.relu(getattr(self, f"aspp{i}_bn")(getattr(self, f"aspp{i}")(y)))
            branches.append(y.expand(-1, -1, *x.shape[2:]) if pooling else y)
        return self.conv3(F.relu(self.bn2(self.conv2(torch.cat(branches, 1)))))


def check_options(backbone, num_classes, num_groups, output_stride, multi_grid, aspp_rates) -> None:
    """Raises:
    ModelError: for an option of `DeepLabv3` that has no meaning; the message names the flag.
    """
    if backbone not in LAYERS:
        raise ModelError(f"--backbone {backbone}: choose one of {', '.join(LAYERS)}")
    if not 1 <= num_classes <= 255:
        raise ModelError(f"{num_classes} classes: a mask of bytes with 255 to ignore can hold 1 to 255")
    if num_groups and (num_groups < 1 or 64 % num_groups):
        raise ModelError(f"--groups {num_groups} does not divide all widths: use 1, 2, 4, 8, 16, 32 or 64")
    if output_stride not in (8, 16, 32):
        raise ModelError(f"--output_stride {output_stride}: choose 8, 16 or 32")
    if len(multi_grid) != 3 or min(multi_grid) < 1:
        raise ModelError("--multi_grid takes three positive rates, one for each block of layer4: 1 2 4")
    if not aspp_rates or min(aspp_rates) < 1 or any(rate * 16 % output_stride for rate in aspp_rates):
        raise ModelError("--aspp_rates are positive, and even at --output_stride 32, where they are halved")


def autocast(device: torch.device, amp: str | None) -> torch.autocast:
    """The number format of convs: bfloat16 or float16 for "bf16" or "fp16", else float32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


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
        ModelError: for an option that has no meaning; the message names the flag.
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

    def scores(
        self, x: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False, softmax: bool = False
    ) -> Tensor:
        """What to take the argmax of: the logits, or the softmax scores averaged over `scales` and left-right
        `flip`, or those of a single pass with `softmax`.

        Takes normalised images (N, 3, H, W), gives (N, num_classes, H, W) (paper, section 4.1).
        """
        if list(scales) == [1.0] and not flip and not softmax:
            return self(x)
        stride, total, passes = self.config["output_stride"], 0, len(scales) * (2 if flip else 1)
        for scale in scales:
            size = [round((side - 1) * scale / stride) * stride + 1 for side in x.shape[2:]]
            scaled = x if scale == 1 else F.interpolate(x, size, mode="bilinear", align_corners=True)
            total = total + self(scaled, x.shape[2:]).softmax(1)
            if flip:
                total = total + self(scaled.flip(-1), x.shape[2:]).flip(-1).softmax(1)
        return total / passes

    def segment(self, images: Tensor, *options, **more_options) -> Tensor:
        """The `scores`, with its options, of uint8 images (N, 3, H, W): they are normalised, padded to the
        output stride, and what was padded is cut off again."""
        stride = self.config["output_stride"]
        # In these operations, and the cut not a slice, so that torch.export takes any size.
        below, right = ((side + stride - 2) // stride * stride + 1 - side for side in images.shape[2:])
        x = F.pad((images - self.pixel_mean) / self.pixel_std, [0, right, 0, below])
        scores = self.scores(x.contiguous(memory_format=self.memory_format), *options, **more_options)
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
        of such a file, or a uint8 array (H, W, 3) of RGB or (H, W) of grey.

        An image with a side longer than `max_side` is predicted at that size and the labels are enlarged,
        which bounds the memory.

        Returns:
            uint8 labels (H, W), of the turned image's size.

        Raises:
            OSError: if the file cannot be read.
        """
        if isinstance(image, str | os.PathLike):
            with Image.open(image) as file:
                image = to_rgb(file)
        image = to_rgb(Image.fromarray(image) if isinstance(image, np.ndarray) else image)
        pixels = to_pixels(image, max_side)[None].to(self.pixel_mean.device)
        labels = self.segment(pixels, scales, flip)[0].argmax(0).byte().cpu().numpy()
        return enlarge(labels, image.size)

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
        convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        for conv in convs:
            if isinstance(conv, WSConv2d):
                conv.weight = nn.Parameter(standardize(conv.weight), requires_grad=False)
                conv.__class__ = nn.Conv2d
        # Convs and norms stand in the same order. No norm follows the first two convs of the stem of --beta,
        # nor the classifier, which comes last.
        norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        for conv, (name, bn) in zip(convs[2 if self.config["beta"] else 0 :], norms, strict=False):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
            )
            model.set_submodule(name, nn.Identity())
        return model

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


# What shows a stored image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What shows an image upright; None for nothing, or if its EXIF is damaged, which viewers ignore, too."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, TypeError, ValueError, struct.error):
        return None


def upright(image: Image.Image) -> Image.Image:
    """An image, turned as its EXIF orientation says."""
    # Not ImageOps.exif_transpose: that writes the EXIF anew, and fails if another tag of it is damaged.
    image.load()  # which turns a TIFF
    turn = turn_of(image)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, upright, transparency on white."""
    image = upright(image)
    if image.mode.startswith("I"):  # 16 bits of grey, whatever Pillow's version calls them
        image = Image.fromarray((np.asarray(image).astype(np.int64) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_pixels(image: Image.Image, max_side: int) -> Tensor:
    """An RGB image as uint8 (3, H, W), shrunk so that no side is longer than `max_side`."""
    shrink = min(1.0, max_side / max(image.size))
    small = image.resize([max(1, round(side * shrink)) for side in image.size], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def enlarge(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 labels (H, W) at the (width, height) that the image had before `to_pixels`."""
    return np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))


def build(backbone: str, pretrained: bool = True, *args, **kwargs) -> DeepLabv3:
    """DeepLabv3 with that backbone, from ImageNet weights if `pretrained`; other arguments as for
    `DeepLabv3`."""
    model = DeepLabv3(backbone, *args, **kwargs)
    if pretrained:
        load_imagenet(model)
    return model


# DeepLabv3 on these backbones; arguments as for `build`.
resnet50, resnet101, resnet152 = (partial(build, backbone) for backbone in LAYERS)


def load_imagenet(model: DeepLabv3) -> None:
    """Start the trunk from ImageNet: torchvision's weights for BN, `data/R-101-GN-WS.pth.tar` for GN+WS.

    torchvision's file is looked for in `data/`, then in torch.hub's cache, then downloaded there and its hash
    checked.

    Raises:
        ModelError: if there are no such weights, they cannot be had, or a tensor of the trunk is not among
        them.
    """
    config = model.config
    if bool(config["num_groups"]) != config["weight_std"]:
        raise ModelError(
            "only BN and GN+WS have an ImageNet start: give both of --groups and --weight_std, or --scratch"
        )
    if config["weight_std"]:
        if config["backbone"] != "resnet101":
            raise ModelError(
                f"GN+WS has an ImageNet start for resnet101 only, not {config['backbone']}: add --scratch"
            )
        path = os.path.join("data", IMAGENET_GN_WS)
        if not os.path.exists(path):
            raise ModelError(
                f"{path} is missing: `python main.py --download gn_ws_imagenet`, or add --scratch"
            )
        source = read_checkpoint(path)["state_dict"]
    else:
        url = get_model_weights(config["backbone"]).IMAGENET1K_V1.url
        path = os.path.join("data", os.path.basename(url))
        folder = "data" if os.path.exists(path) else None  # None is torch.hub's cache
        try:
            source = torch.hub.load_state_dict_from_url(
                url, model_dir=folder, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, URLError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"cannot get {url} ({reason}): put that file at {path}, or add --scratch"
            ) from error

    # The source's stem is one 7x7 conv, so the three of --beta start from their initialisation.
    fresh = ("aspp.", "conv1.") if config["beta"] else "aspp."
    trunk = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not key.startswith(fresh) and not key.endswith("num_batches_tracked")
    }
    lacking = [key for key, tensor in trunk.items() if key not in source or source[key].shape != tensor.shape]
    if lacking:
        raise ModelError(
            f"{path}: {len(lacking)} of the trunk's {len(trunk)} tensors are not in it, {lacking[0]} first"
        )
    model.load_state_dict({key: source[key] for key in trunk}, strict=False)


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint as data: nothing in it is executed.

    Returns the file's dict; its `state_dict` (the whole dict where the file is a flat one) has names without
    the prefix `module.`. Reads torch's zip format and the legacy one of the published files.

    Raises:
        ModelError: if the file cannot be read, is no checkpoint, or would run code.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise ModelError(
                f"{path} is refused: it is a pickle that names code, not only tensors"
            ) from error
        raise ModelError(f"{path} is not a PyTorch checkpoint") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        # What torch.load raises on a damaged file depends on where the damage lies.
        raise ModelError(f"{path} is damaged or not a PyTorch checkpoint: fetch or write it again") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(value, Tensor) for value in state.values())
    ):
        raise ModelError(f"{path} holds no state_dict of tensors")
    config, classes = checkpoint.get("model", {}), checkpoint.get("classes", [])
    if not isinstance(config, dict) or any(isinstance(value, Tensor) for value in config.values()):
        raise ModelError(f"{path} does not say what model it holds")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ModelError(f"{path} does not name its classes")
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    return {**(checkpoint if "state_dict" in checkpoint else {}), "state_dict": state}


def published(checkpoint: dict) -> bool:
    """Whether a checkpoint is in the published format, which does not tell its model, and not one of ours."""
    return "model" not in checkpoint


def read_config(checkpoint: dict, path: str) -> dict:
    """The arguments of `DeepLabv3` that a checkpoint of `read_checkpoint` was trained with.

    Our checkpoints name them under `model`. For a published one they follow from the names and shapes; what
    these do not show (the number of groups, the rates) is as published: GN comes as 32 groups with weight
    standardisation.

    Raises:
        ModelError: if these are not the weights of a DeepLabv3.
    """
    if not published(checkpoint):
        return checkpoint["model"]
    state = checkpoint["state_dict"]
    blocks = len({key.split(".")[1] for key in state if key.startswith("layer3.")})
    backbone = next((name for name, layers in LAYERS.items() if layers[2] == blocks), None)
    kernels = []
    while f"aspp.aspp{len(kernels) + 1}.weight" in state:
        kernels.append(state[f"aspp.aspp{len(kernels) + 1}.weight"].shape[-1])
    if backbone is None or kernels[:2] != [1, 3] or "aspp.conv3.weight" not in state:
        raise ModelError(
            f"{path} does not hold the weights of a DeepLabv3 (layer1 to layer4 of a ResNet, and aspp)"
        )
    group_norm = "bn1.running_mean" not in state
    return {
        "backbone": backbone,
        "num_classes": state["aspp.conv3.weight"].shape[0],
        "num_groups": 32 if group_norm else None,
        "weight_std": group_norm,
        "beta": "conv1.0.weight" in state,
        "aspp_rates": [6 * (i + 1) for i in range(kernels.count(3))],
        "image_pooling": kernels[-1] == 1,
    }


def differing_flags(model: DeepLabv3, checkpoint: dict, path: str) -> list[str]:
    """The flags in which `model` differs from the model of a checkpoint, with both values.

    The output stride may differ: no weight depends on it. Of a published checkpoint's groups and atrous rates
    only their presence and their number are known, and of weight standardisation nothing.

    Raises:
        ModelError: as `read_config`.
    """
    flags = {
        "num_groups": "groups",
        "num_classes": "dataset (number of classes)",
        "image_pooling": "no_image_pooling",
    }
    saved, known, unknown = read_config(checkpoint, path), {}, {"output_stride"}
    if published(checkpoint):
        known, unknown = {"num_groups": bool, "aspp_rates": len}, {"output_stride", "weight_std"}
    differing = []
    for key in saved.keys() - unknown:
        value, expected = saved[key], model.config.get(key)
        shown = known.get(key, lambda value: value)
        if shown(value) != shown(expected):
            differing.append(f"--{flags.get(key, key)} (checkpoint: {value}, here: {expected})")
    return sorted(differing)


def load_weights(model: DeepLabv3, checkpoint: dict, path: str) -> None:
    """Load a checkpoint of `read_checkpoint` into `model`, all of it.

    `num_batches_tracked` may be absent, as in some published files.

    Raises:
        ModelError: if the checkpoint is of another model (naming the flags that differ), or is damaged.
    """
    if differing := differing_flags(model, checkpoint, path):
        raise ModelError(f"{path} was trained with other flags: {', '.join(differing)}")
    state, expected = checkpoint["state_dict"], model.state_dict()
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
        elif key not in state or state[key].shape != tensor.shape:
            found = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
            raise ModelError(f"{path}: {key} {found}, expected {tuple(tensor.shape)}")
        elif not state[key].is_floating_point():
            raise ModelError(f"{path}: {key} is of type {state[key].dtype}, expected {tensor.dtype}")
        elif not state[key].isfinite().all():
            raise ModelError(f"{path}: {key} holds values that are not finite")
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise ModelError(f"{path}: {len(unknown)} tensors are not of this model, {unknown[0]} first")
    model.load_state_dict(state)


def init_weights(model: DeepLabv3, checkpoint: dict, path: str) -> list[str]:
    """Start from a checkpoint of another number of classes: load all but the classifier, or all where it
    fits.

    Returns the names that were left out.

    Raises:
        ModelError: as `load_weights`.
    """
    state, own = dict(checkpoint["state_dict"]), model.state_dict()
    classifier = ("aspp.conv3.weight", "aspp.conv3.bias")
    left_out = [key for key in classifier if key in state and state[key].shape != own[key].shape]
    state.update({key: own[key] for key in left_out})
    checkpoint = {**checkpoint, "state_dict": state}
    if not published(checkpoint):
        checkpoint["model"] = {**checkpoint["model"], "num_classes": model.config["num_classes"]}
    load_weights(model, checkpoint, path)
    return left_out


def from_checkpoint(checkpoint: dict, path: str, **options) -> DeepLabv3:
    """The model of a checkpoint of `read_checkpoint`; `classes` and `palette` are None for a published one.

    `options` are arguments of `DeepLabv3`: what a published checkpoint does not show, or another
    `output_stride`.

    Raises:
        ModelError: if the checkpoint cannot be used, or was trained with other options.
    """
    try:
        model = DeepLabv3(**{**read_config(checkpoint, path), **options})
    except ModelError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} does not say what model it holds") from error
    load_weights(model, checkpoint, path)
    if not published(checkpoint):
        try:
            model.classes = checkpoint["classes"]
            model.palette = np.array(checkpoint["palette"], np.uint8).reshape(len(model.classes), 3).tolist()
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ModelError(f"{path} does not name its classes and their colours") from error
    return model


def load(path: str, device: torch.device | str = "cpu", **options) -> DeepLabv3:
    """The model of a checkpoint file on a device, in eval mode; `options` as for `from_checkpoint`.

    Raises:
        ModelError: as `read_checkpoint` and `from_checkpoint`.
    """
    return from_checkpoint(read_checkpoint(path), path, **options).place(device).eval()


def to_checkpoint(model: DeepLabv3) -> dict:
    """The entries of a checkpoint from which `load` makes the model again.

    `state_dict` has the names of the published format, whose other entries `epoch` and `optimizer` are the
    training's.
    """
    return {
        "state_dict": {f"module.{key}": tensor for key, tensor in model.state_dict().items()},
        "model": model.config,
        "classes": list(model.classes),
        "palette": [list(color) for color in model.palette],
    }

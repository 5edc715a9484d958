"""The format of a checkpoint: reading it as data, the model it holds, its weights.

A checkpoint is a dict. Published ones have `epoch`, `state_dict`, whose names begin with `module.`, and
`optimizer`; ours have also `model` (the arguments of DeepLabv3) and what else `Training.save` writes.
"""

import os
import pickle
import re
from collections.abc import Sequence
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from files.images import AS_STORED, Reading
from files.masks import VOC_CLASSES
from files.pictures import Palette, voc_palette
from utils import UserError

IMAGENET_GN_WS = "R-101-GN-WS.pth.tar"  # ResNet-101 with GN+WS, from the Weight Standardization authors
# The backbones by the number of blocks in layer3 and the shape of layer1.0.conv2.weight.
BACKBONES = {
    (6, 64, 64): "resnet50",
    (23, 64, 64): "resnet101",
    (36, 64, 64): "resnet152",
    (6, 128, 4): "resnext50_32x4d",
    (23, 256, 8): "resnext101_32x8d",
    (6, 128, 128): "wide_resnet50_2",
    (23, 128, 128): "wide_resnet101_2",
}
FLAG_NAMES = {
    "num_groups": "groups",
    "num_classes": "dataset (number of classes)",
    "image_pooling": "no_image_pooling",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def file_name(name: str) -> str:
    """The name of a tensor of `DeepLabv3` in files, which is the published one where there is one."""
    name = name.removeprefix("trunk.")
    return f"aspp.{name.removeprefix('head.')}" if name.startswith("head.conv3.") else name


def read(path: str) -> dict:
    """Read a checkpoint as data: nothing in it is executed.

    Takes torch's zip format, the legacy one of the published files, and .safetensors; of other programs
    `{"model": state_dict}` and the like, prefixes such as `module.`, and torchvision's names of a DeepLabv3.
    Returns the file's dict, whose `state_dict` has the names of `file_name`. Raises UserError if the file
    cannot be read, is no checkpoint, or would run code."""
    checkpoint = load_file(path)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    keys = ("state_dict", "model_state", "model_state_dict", "model_ema", "model")
    state = next(filter(is_state, [*map(entries.get, keys), checkpoint]), None)
    if state is None:
        raise UserError(f"{path} holds no state_dict of tensors")
    config, names = entries.get("model", {}), entries.get("classes", [])
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if state is not entries.get("state_dict") or not isinstance(config, dict) or not (config or named):
        entries = {}  # another program's
    elif any(isinstance(value, Tensor) for value in config.values()):
        raise UserError(f"{path} does not say what model it holds")
    elif not named:
        raise UserError(f"{path} does not name its classes")
    prefix = re.compile(r"^((module|_orig_mod|model)\.)+")  # of DDP, torch.compile, Lightning
    state = {file_name(prefix.sub("", str(key))): value for key, value in state.items()}
    return {**entries, "state_dict": from_torchvision(state)}


def load_file(path: str) -> object:
    """What lies in a checkpoint file, loaded as data. Raises UserError as `read`."""
    try:
        if path.endswith(".safetensors"):
            try:
                from safetensors.torch import load_file as load_safetensors
            except ImportError as error:
                raise UserError(f"{path} needs a package: pip install safetensors") from error
            return load_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            hint = "if it is a whole model of yours, save torch.save(model.state_dict(), FILE) instead"
            if "deeplab.DeepLabv3" in str(error):  # of which the state_dict does not tell the rates, say
                hint = "instead of the model save torch.save(files.checkpoints.model_entries(model), FILE)"
                hint += ", with the names and colours in model.classes and model.palette"
            raise UserError(
                f"{path} is refused: it is a pickle that names code, not only tensors; {hint}"
            ) from error
        raise UserError(f"{path} is not a PyTorch checkpoint") from error
    except Exception as error:  # what a damaged file raises depends on where the damage lies
        raise UserError(f"{path} is damaged or not a PyTorch checkpoint: fetch or write it again") from error


def is_state(value: object) -> bool:
    return (
        isinstance(value, dict) and bool(value) and all(isinstance(item, Tensor) for item in value.values())
    )


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of torchvision's `DeepLabV3` under the names of `file_name`; others as they are."""
    if "classifier.0.convs.0.0.weight" not in state:
        return state
    prefixes = {"backbone.": "features." if "backbone.0.0.weight" in state else ""}
    for i in range(5):  # the branches, of which the last begins with a pooling layer
        first = int(f"classifier.0.convs.{i}.0.weight" not in state)
        prefixes[f"classifier.0.convs.{i}.{first}."] = f"aspp.aspp{i + 1}."
        prefixes[f"classifier.0.convs.{i}.{first + 1}."] = f"aspp.aspp{i + 1}_bn."
    prefixes |= {"classifier.0.project.0.": "aspp.conv2.", "classifier.0.project.1.": "aspp.bn2."}
    prefixes |= {"classifier.1.": "head.conv1.", "classifier.2.": "head.bn1.", "classifier.4.": "aspp.conv3."}
    renamed = {}
    for key, tensor in state.items():
        old = next(filter(key.startswith, prefixes), "")
        if not key.startswith("aux_classifier."):  # of its training
            renamed[prefixes.get(old, "") + key.removeprefix(old)] = tensor
    return renamed


def load_imagenet(model: nn.Module) -> None:
    """Start the trunk from ImageNet: torchvision's weights for BN, `data/R-101-GN-WS.pth.tar` for GN+WS.
    Raises UserError if there are no such weights, they cannot be fetched, or a tensor of the trunk is not
    among them."""
    config = model.config
    if bool(config["num_groups"]) != config["weight_std"]:
        given = "only BN and GN+WS have an ImageNet start"
        raise UserError(f"{given}: give both of --groups and --weight_std, or --scratch")
    path, source = imagenet_gn_ws(config) if config["weight_std"] else imagenet_bn(config)
    load_trunk(model, source, path)


def load_trunk(model: nn.Module, source: dict[str, Tensor], path: str) -> None:
    """Load the trunk of a `DeepLabv3` alone. Raises UserError if a tensor of it is missing or as
    `check_tensor`."""
    # The source's stem is one 7x7 conv, so the three of --beta start from their initialisation.
    fresh = "conv1." if model.config["beta"] and "conv1.weight" in source else "-"
    own = {k: v for k, v in model.trunk.state_dict().items() if not k.startswith(fresh)}
    own = {key: tensor for key, tensor in own.items() if not key.endswith("num_batches_tracked")}
    missing = [key for key, tensor in own.items() if key not in source or source[key].shape != tensor.shape]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the trunk's {len(own)} tensors are not in it: {missing[0]}"
        )
    for key, tensor in own.items():
        check_tensor(source, key, tensor, path)
    model.trunk.load_state_dict({key: source[key] for key in own}, strict=False)


def imagenet_gn_ws(config: dict) -> tuple[str, dict[str, Tensor]]:
    """The path of the GN+WS weights, and the weights."""
    if config["backbone"] != "resnet101":
        given = f"GN+WS has an ImageNet start for resnet101 only, not {config['backbone']}"
        raise UserError(f"{given}: add --scratch")
    path = os.path.join("data", IMAGENET_GN_WS)
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: `python main.py --download gn_ws_imagenet`, or add --scratch")
    return path, read(path)["state_dict"]


def imagenet_bn(config: dict) -> tuple[str, dict[str, Tensor]]:
    """The path of torchvision's weights, and the weights: from `data/`, from torch.hub's cache, or downloaded
    there with their hash checked."""
    url = get_model_weights(config["backbone"]).IMAGENET1K_V1.url
    path = os.path.join("data", os.path.basename(url))
    folder = "data" if os.path.exists(path) else None  # None is torch.hub's cache
    try:
        return path, torch.hub.load_state_dict_from_url(
            url, model_dir=folder, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, URLError, RuntimeError) as error:
        raise UserError(f"cannot get {url} ({error}): put that file at {path}, or add --scratch") from error


def is_published(checkpoint: dict) -> bool:
    """Whether a checkpoint is in the published format, which does not tell its model, and not one of ours."""
    return "model" not in checkpoint


def model_config(checkpoint: dict, path: str) -> dict:
    """The arguments of `DeepLabv3` that a checkpoint of `read` was trained with.

    Ours name them under `model`. For a published one they follow from the names and shapes; what these do not
    show (the number of groups, the rates) is as published: GN comes as 32 groups with weight standardisation.
    Raises UserError if these are not the weights of a DeepLabv3."""
    if not is_published(checkpoint):
        return {"head": "v3", **checkpoint["model"]}  # earlier checkpoints had no other
    state = checkpoint["state_dict"]
    blocks = len({key.split(".")[1] for key in state if key.startswith("layer3.")})
    width = tuple(state["layer1.0.conv2.weight"].shape[:2]) if "layer1.0.conv2.weight" in state else ()
    backbone = "mobilenet_v3_large" if "features.16.0.weight" in state else BACKBONES.get((blocks, *width))
    group_norm = "bn1.weight" in state and "bn1.running_mean" not in state
    config = {"backbone": backbone, "num_groups": 32 if group_norm else None, "weight_std": group_norm}
    config["beta"] = "conv1.0.weight" in state
    if backbone and is_trunk(checkpoint):
        return config
    kernels = []
    while f"aspp.aspp{len(kernels) + 1}.weight" in state:
        kernels.append(state[f"aspp.aspp{len(kernels) + 1}.weight"].shape[-1])
    if backbone is None or kernels[:2] != [1, 3] or "aspp.conv3.weight" not in state:
        names = ", ".join(list(state)[:3])
        raise UserError(f"{path} does not hold the weights of a DeepLabv3; its tensors begin with {names}")
    config["num_classes"] = state["aspp.conv3.weight"].shape[0]
    config |= {
        "image_pooling": kernels[-1] == 1,
        "aspp_rates": [6 * (i + 1) for i in range(kernels.count(3))],
    }
    if "head.low.weight" in state:
        config["head"] = "v3plus"
    elif "head.conv1.weight" in state:  # rates 12, 24, 36
        config |= {"head": "torchvision", "output_stride": 8}
        if backbone == "mobilenet_v3_large":
            config |= {"output_stride": 16, "aspp_rates": [12, 24, 36]}
    return config


def is_trunk(checkpoint: dict) -> bool:
    """Whether a checkpoint has a trunk alone, such as torchvision's ImageNet weights."""
    return not any(key.startswith("aspp.") for key in checkpoint["state_dict"])


def differing_flags(config: dict, checkpoint: dict, path: str) -> list[str]:
    """The flags in which a model's `config` differs from the model of a checkpoint, with both values.

    The output stride may differ: no weight depends on it. Of a published checkpoint's groups and atrous rates
    only their presence and their number are known, and of weight standardisation nothing. Raises UserError as
    `model_config`."""
    saved, known, unknown = model_config(checkpoint, path), {}, {"output_stride"}
    if is_published(checkpoint):
        known, unknown = {"num_groups": bool, "aspp_rates": len}, {"output_stride", "weight_std"}
    differing = []
    for key in saved.keys() - unknown:
        value, expected = saved[key], config.get(key)
        shown = known.get(key, lambda value: value)
        if shown(value) != shown(expected):
            differing.append(f"--{FLAG_NAMES.get(key, key)} (checkpoint: {value}, here: {expected})")
    return sorted(differing)


def check_tensor(state: dict[str, Tensor], key: str, expected: Tensor, path: str) -> None:
    """Raises UserError if a tensor is missing, or its shape, type or values cannot be those of a weight."""
    found = state.get(key)
    if found is None or found.shape != expected.shape:
        shown = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise UserError(f"{path}: {key} {shown}, expected {tuple(expected.shape)}")
    if found.is_meta:
        raise UserError(f"{path}: {key} has a shape, but no values: load the model before it is saved")
    if found.dtype not in (*FLOATS, expected.dtype) or found.layout != torch.strided:
        layout = "" if found.layout == torch.strided else f" in {found.layout}"
        raise UserError(f"{path}: {key} is of type {found.dtype}{layout}, expected {expected.dtype}")
    if not found.isfinite().all():
        raise UserError(f"{path}: {key} holds values that are not finite")
    if key.endswith("running_var") and found.min() < 0:
        raise UserError(f"{path}: {key}, a variance, is negative")


def load_weights(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Load all of a checkpoint of `read` into a `DeepLabv3`.

    `num_batches_tracked` may be absent, as in some published files. Raises UserError if the checkpoint is of
    another model (naming the flags that differ), or is damaged."""
    if differing := differing_flags(model.config, checkpoint, path):
        raise UserError(f"{path} was trained with other flags: {', '.join(differing)}")
    state = checkpoint["state_dict"]
    expected = {file_name(key): tensor for key, tensor in model.state_dict().items()}
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
        check_tensor(state, key, tensor, path)
    if unknown := [key for key in state if key not in expected]:
        raise UserError(f"{path}: {len(unknown)} tensors are not of this model, {unknown[0]} first")
    model.load_state_dict({key: state[file_name(key)] for key in model.state_dict()})


def init_weights(model: nn.Module, checkpoint: dict, path: str) -> None:
    """Load a checkpoint to start from: all of it, or all but the classifier if the number of its classes
    differs, or some of them are at other places among others.

    Prints what it starts from. Raises UserError as `load_weights` and `compare_classes`."""
    if is_trunk(checkpoint):
        known = model.trunk.state_dict()
        layers = {key.partition(".")[0] for key in known} - {"conv1"}  # which --beta has in three
        layer_keys = [key for key in checkpoint["state_dict"] if key.partition(".")[0] in layers]
        statistics = ("running_mean", "running_var", "num_batches_tracked")  # GroupNorm has none
        if unknown := [key for key in layer_keys if key not in known and not key.endswith(statistics)]:
            found = f"{len(unknown)} tensors of its trunk are not of {model.config['backbone']}'s"
            raise UserError(f"{path}: {found}, {unknown[0]} first: it is of another network")
        load_trunk(model, checkpoint["state_dict"], path)
        print(f"starts from the trunk in {path}; ASPP and the head start anew")
        return
    state = dict(checkpoint["state_dict"])
    own = {file_name(key): tensor for key, tensor in model.state_dict().items()}
    classifier = ("aspp.conv3.weight", "aspp.conv3.bias")
    names = classes(checkpoint, path)[0] or model.classes
    others = sorted(names) != sorted(model.classes) and moved_classes(names, model.classes)
    left_out = [key for key in classifier if key in state and (others or state[key].shape != own[key].shape)]
    state.update({key: own[key] for key in left_out})
    checkpoint = {**checkpoint, "state_dict": state}
    if not is_published(checkpoint):
        checkpoint["model"] = {**checkpoint["model"], "num_classes": model.config["num_classes"]}
    load_weights(model, checkpoint, path)
    if not left_out:
        compare_classes(names, path, model.classes)
    print(f"starts from {path}" + (f" without {' and '.join(left_out)}" if left_out else ""))


def classes(checkpoint: dict, path: str) -> tuple[Sequence[str] | None, Palette | None]:
    """The names of a checkpoint's classes and their colours. A published one with 21 classes has VOC's, and
    one with another number None. Raises UserError if a checkpoint of ours does not tell them."""
    if is_published(checkpoint):
        voc = model_config(checkpoint, path)["num_classes"] == len(VOC_CLASSES)
        return (VOC_CLASSES, voc_palette(len(VOC_CLASSES))) if voc else (None, None)
    try:
        names = checkpoint["classes"]
        palette = np.array(checkpoint["palette"], int).reshape(len(names), 3)
        if (palette & 255 != palette).any():
            raise ValueError
        return names, palette.tolist()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} does not name its classes and their colours") from error


def reading(checkpoint: dict, path: str) -> Reading:
    """How the images were read that a checkpoint was trained on; one that does not tell, as published ones,
    on images as they are stored. Raises UserError if what it tells has no meaning."""
    try:
        saved = checkpoint.get("reading", {})
        (low, high), bands = saved.get("value_range") or (0, 1), saved.get("bands")
        if not low < high or (bands and (len(bands) != 3 or min(bands) < 1)):
            raise ValueError
        return AS_STORED._replace(
            value_range=(float(low), float(high)) if saved.get("value_range") else None,
            bands=tuple(map(int, bands)) if bands else None,
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say how its images were read") from error


def moved_classes(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The classes that both have, at other places."""
    return [name for number, name in enumerate(names) if name in [*classes[:number], *classes[number + 1 :]]]


def compare_classes(names: Sequence[str], path: str, classes: Sequence[str]) -> None:
    """Warn if a checkpoint's classes have other names than those of the data set. Raises UserError if some
    are at other places, so that they would be taken for others."""
    if list(names) == list(classes):
        return
    if moved_classes(names, classes):
        found = f"{path} was trained with the classes in another order: {', '.join(names)}"
        raise UserError(f"{found}; give them that order")
    print(f"{path} was trained with other names of the classes: {', '.join(names)}")


def model_entries(model: nn.Module) -> dict:
    """The entries of a checkpoint from which `deeplab.load` makes a `DeepLabv3` again."""
    return {
        "state_dict": {f"module.{file_name(key)}": tensor for key, tensor in model.state_dict().items()},
        "model": model.config,
        "classes": list(model.classes),
        "palette": [list(color) for color in model.palette],
        # Not max_pixels: that is for who reads images to say, not for a file from elsewhere.
        "reading": {"value_range": model.reading.value_range, "bands": model.reading.bands},
    }

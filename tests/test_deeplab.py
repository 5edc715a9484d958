"""The model: golden numbers of the published implementation, what each option changes, weights in and out."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, NORMS, file_state, golden_keys, golden_state, load_file_state, weights
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import deeplab
import main
from files import checkpoints
from utils import UserError

OFF = torch.amp.GradScaler(enabled=False)


def tiny(**options) -> deeplab.DeepLabv3:
    return deeplab.build("tiny", False, **options)


def check_logits(network: deeplab.DeepLabv3, kind: str, limit: float, agreement: float) -> None:
    """The golden image's logits differ from the original's in float64 by no more than `limit`, in units of
    their standard deviation, and this share of all pixels has the same argmax."""
    golden, parameter = np.load(GOLDEN / f"logits64_{kind}.npz"), next(network.parameters())
    x = torch.from_numpy(weights.image(97, 129, 0)).to(parameter, memory_format=network.memory_format)
    with torch.inference_mode():
        logits = network(x)[0].cpu().numpy()
    assert logits.shape == (21, 97, 129)
    assert np.abs(logits[:, ::4, ::4] - golden["logits"]).max() <= limit * golden["logits"].std()
    assert (logits.argmax(0) == golden["argmax"]).mean() >= agreement


@pytest.mark.parametrize(
    ("kind", "limit", "agreement"), [("bn", 1e-4, 0.999), ("gn_ws", 5e-3, 0.998), ("beta", 1e-4, 0.999)]
)
def test_golden_keys_and_logits(kind, limit, agreement):
    model = deeplab.resnet101(False, **NORMS[kind]).double().eval()
    state = file_state(model)
    assert {key: list(tensor.shape) for key, tensor in state.items()} == golden_keys(kind)
    assert list(state) == list(golden_keys(kind))  # the order, too: optimizer states go by it

    load_file_state(model, golden_state(kind))
    fused = model.fuse()
    assert not any(isinstance(m, _BatchNorm | deeplab.WSConv2d) for m in fused.modules())
    for network in (model, fused):
        check_logits(network, kind, 1e-6, 1.0)
    # The rounding of float32 differs between processors, and random weights with GN+WS amplify it: the
    # original itself is 2e-3 away from its own float64.
    for network in (model.float().place("cpu"), model.fuse()):
        check_logits(network, kind, limit, agreement)


def golden_losses(model: deeplab.DeepLabv3) -> Iterator[float]:
    """Take the five golden steps of training, and give the loss of each."""
    golden, parameter = json.loads((GOLDEN / "train_losses64.json").read_text()), next(model.parameters())
    images = torch.from_numpy(np.concatenate([weights.image(97, 97, 11), weights.image(97, 97, 12)]))
    images = images.to(parameter, memory_format=model.memory_format)
    rng = np.random.RandomState(13)
    target = rng.randint(0, 21, (2, 97, 97))
    target[rng.rand(2, 97, 97) < 0.05] = 255
    masks = torch.from_numpy(target.astype(np.uint8)).to(parameter.device)
    optimizer = main.make_optimizer(model)
    for iteration in range(5):
        lr = main.poly_lr(golden["base_lr"], iteration, 5)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * golden["last_mult"]
        yield main.train_step(model, optimizer, OFF, main.CrossEntropy(), images, masks).item()


def check_golden_steps(model: deeplab.DeepLabv3, kind: str, steps: int) -> None:
    """The losses of the first steps, and every tensor after the first, are the original's in float64."""
    expected = json.loads((GOLDEN / "train_losses64.json").read_text())["losses"][kind]
    expected_state = json.loads((GOLDEN / "step64.json").read_text())[kind]
    load_file_state(model, golden_state(kind))
    losses = golden_losses(model)
    assert next(losses) == pytest.approx(expected[0], rel=1e-9)
    state = {key: x for key, x in file_state(model).items() if not key.endswith("num_batches_tracked")}
    assert state.keys() == expected_state.keys()
    for key, (total, norm) in expected_state.items():
        assert state[key].sum().item() == pytest.approx(total, rel=0, abs=1e-9 * norm), key
        assert state[key].norm().item() == pytest.approx(norm, rel=1e-9), key
    for golden, loss in zip(expected[1:steps], losses, strict=False):
        assert loss == pytest.approx(golden, rel=1e-6)


# A step of BatchNorm on two images with random weights amplifies a difference 10,000 times: of BN the first
# alone is compared.
@pytest.mark.parametrize(("kind", "steps"), [("bn", 1), ("gn_ws", 5)])
def test_golden_training_steps(kind, steps):
    check_golden_steps(deeplab.resnet101(False, **NORMS[kind]).double().train(), kind, steps)


@pytest.mark.parametrize("kind", NORMS)
def test_fusing_leaves_the_model_to_its_training(kind):
    model = tiny(**NORMS[kind]).place("cpu").train()
    if kind == "bn":
        model.freeze_bn()
    modes = [module.training for module in model.modules()]
    images, masks = torch.randn(2, 3, 33, 33), torch.zeros(2, 33, 33).byte()
    main.train_step(model, main.make_optimizer(model), OFF, main.CrossEntropy(), images, masks)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    types = [type(module) for module in model.modules()]

    fused = model.fuse()
    assert fused.config == model.config and fused.memory_format == model.memory_format
    assert not fused.training and not any(p.requires_grad for p in fused.parameters())
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()  # no memory is shared
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == types
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.requires_grad is (gradient is not None)
        assert gradient is None or torch.equal(p.grad, gradient)


def norms_that_follow(model: deeplab.DeepLabv3, x: torch.Tensor) -> dict[str, str | None]:
    """The norm that takes the output of each conv, or None, as seen while x passes through the model."""
    convs, norms = {}, {}

    def note_conv(name, output):
        convs[name], norms[name] = output, None

    def note_norm(name, taken):
        (conv,) = (conv for conv, output in convs.items() if output is taken)
        norms[conv] = name

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output, name=name: note_conv(name, output))
        elif isinstance(module, _BatchNorm | nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs, name=name: note_norm(name, inputs[0]))
    with torch.inference_mode():
        model(x)
    return norms


@pytest.mark.parametrize(
    "options",
    [
        {"beta": True},
        {"backbone": "few", "multi_grid": (1, 2, 4)},
        {"image_pooling": False},
        {"aspp_rates": (6,), "output_stride": 8},
        {"weight_std": True},
        {"num_groups": 32},
        {"num_groups": 32, "weight_std": True, "beta": True, "image_pooling": False},
    ],
)
def test_fused_network_computes_the_same(monkeypatch, options):
    """With statistics and weights of BatchNorm that no two norms share, in float64."""
    monkeypatch.setitem(deeplab.BACKBONES, "few", {"layers": (1, 1, 1, 3)})
    model = deeplab.DeepLabv3(**{"backbone": "tiny", **options}).double().eval()
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm | nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(1, 3, 65, 49, dtype=torch.float64)
    fused = model.fuse()
    with torch.inference_mode():
        expected, logits = model(x), fused(x)
    assert (logits - expected).abs().max() <= 1e-9 * expected.std()
    assert not any(isinstance(m, _BatchNorm | deeplab.WSConv2d) for m in fused.modules())
    for conv, norm in norms_that_follow(model, x).items():
        assert model.norms()[conv] == norm


@pytest.mark.parametrize("place", ["", "trunk.layer1.0", "aspp", "head"])
def test_conv_whose_norm_nobody_names_is_not_fused(place):
    model = tiny()
    model.get_submodule(place).more = nn.Conv2d(256, 256, 1)
    with pytest.raises(KeyError, match=f"{place}.more".lstrip(".")):
        model.fuse()


def test_training_step_is_sgd_of_the_recipe():
    """Poly schedule, momentum 0.9, weight decay 1e-4 on everything, the mean loss of the labelled pixels:
    against plain arithmetic."""
    torch.manual_seed(0)
    model = nn.Module()
    model.trunk, model.aspp = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)
    model.forward = lambda x: model.aspp(model.trunk(x))
    model.double()
    images, masks = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.randint(0, 5, (2, 7, 7)).byte()
    masks[0, :3] = 255
    parameters = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in parameters]
    optimizer = main.make_optimizer(model)
    for step in range(4):
        lr = main.poly_lr(0.1, step, 4)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 10 * lr
        loss = main.train_step(model, optimizer, OFF, main.CrossEntropy(), images, masks)

        w, b, w2, b2 = (p.clone().requires_grad_() for p in parameters)
        logits = torch.einsum("oi,nihw->nohw", w2[:, :, 0, 0], torch.conv2d(images, w, b)) + b2[:, None, None]
        scores = logits.log_softmax(1).permute(0, 2, 3, 1)[masks != 255]
        expected = -scores[range(len(scores)), masks[masks != 255].long()].mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients, lr = torch.autograd.grad(expected, (w, b, w2, b2)), 0.1 * (1 - step / 4) ** 0.9
        for i, gradient in enumerate(gradients):
            buffers[i] = 0.9 * buffers[i] + gradient + 1e-4 * parameters[i]
            parameters[i] = parameters[i] - lr * (1 if i < 2 else 10) * buffers[i]
    for p, q in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accum", [1, 2, 5])
def test_weighted_loss_is_that_of_torch(accum):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    images, masks = torch.randn(5, 3, 7, 7).double(), torch.randint(0, 5, (5, 7, 7)).byte()
    masks[0, :3], masks[3] = 255, 255
    class_weights = torch.tensor([0.1, 2.0, 1.0, 30.0, 0.5], dtype=torch.float64)
    criterion = main.CrossEntropy(class_weights)
    loss = main.train_step(model, optimizer, OFF, criterion, images, masks, accum=accum)
    gradient = model.weight.grad.clone()
    expected = nn.functional.cross_entropy(model(images), masks.long(), class_weights, ignore_index=255)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.weight)[0])


@pytest.mark.parametrize("class_weights", [None, torch.ones(5)])
def test_batch_without_a_label_has_no_loss(class_weights):
    model = nn.Conv2d(3, 5, 1)
    before = model.weight.detach().clone()
    optimizer, criterion = torch.optim.SGD(model.parameters(), lr=1.0), main.CrossEntropy(class_weights)
    images, masks = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8)
    assert main.train_step(model, optimizer, OFF, criterion, images, masks).item() == 0
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("options", "layer3", "layer4", "rates"),
    [
        ({}, [1] * 6, [1, 2, 2], [6, 12, 18]),
        ({"multi_grid": (1, 2, 4)}, [1] * 6, [2, 4, 8], [6, 12, 18]),
        ({"multi_grid": (1, 2, 1)}, [1] * 6, [2, 4, 2], [6, 12, 18]),
        ({"output_stride": 8}, [1] + [2] * 5, [2, 4, 4], [12, 24, 36]),
        ({"output_stride": 8, "multi_grid": (1, 2, 4)}, [1] + [2] * 5, [4, 8, 16], [12, 24, 36]),
        ({"output_stride": 32}, [1] * 6, [1, 1, 1], [3, 6, 9]),
        ({"output_stride": 32, "multi_grid": (1, 2, 4)}, [1] * 6, [1, 2, 4], [3, 6, 9]),
        ({"aspp_rates": (6, 12, 18, 24)}, [1] * 6, [1, 2, 2], [6, 12, 18, 24]),
    ],
)
def test_rates(options, layer3, layer4, rates):
    with torch.device("meta"):  # shapes without numbers
        model, x = deeplab.resnet50(False, **options).eval(), torch.zeros(1, 3, 65, 97)
    for name, dilations in (("layer3", layer3), ("layer4", layer4)):
        convs = [block.conv2 for block in model.trunk.get_submodule(name)]
        assert [conv.dilation for conv in convs] == [conv.padding for conv in convs]
        assert [conv.dilation for conv in convs] == [(rate, rate) for rate in dilations]
    wide = [conv for conv in model.aspp.children() if getattr(conv, "kernel_size", None) == (3, 3)]
    assert [conv.dilation for conv in wide] == [conv.padding for conv in wide] == [(r, r) for r in rates]
    stride, sizes = options.get("output_stride", 16), []
    model.aspp.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2:]))
    assert model(x).shape == (1, 21, 65, 97)
    assert sizes == [(64 // stride + 1, 96 // stride + 1)]


@pytest.mark.parametrize("pooling", [True, False])
def test_image_pooling_sees_the_whole_image(pooling):
    """A change in one corner moves the opposite corner's logits through the image-level branch alone."""
    aspp, x = deeplab.ASPP(8, (6, 12, 18), pooling, nn.BatchNorm2d).eval(), torch.randn(1, 8, 65, 65)
    with torch.inference_mode():
        before = aspp(x)[0, :, -1, -1]
        x[:, :, 0, 0] += 100
        after = aspp(x)[0, :, -1, -1]
    assert torch.equal(before, after) is not pooling
    assert aspp.num_branches == 4 + pooling


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"num_groups": 3}, "--groups"),
        ({"num_groups": 128}, "--groups"),
        ({"num_groups": -1}, "--groups"),
        ({"output_stride": 4}, "--output_stride"),
        ({"multi_grid": (1, 2)}, "--multi_grid"),
        ({"multi_grid": (0, 1, 1)}, "--multi_grid"),
        ({"aspp_rates": ()}, "--aspp_rates"),
        ({"aspp_rates": (6, 0)}, "--aspp_rates"),
        ({"aspp_rates": (5,), "output_stride": 32}, "--aspp_rates"),
        ({"num_classes": 0}, "0 classes"),
        ({"num_classes": 256}, "256 classes"),
        ({"backbone": "resnet18"}, "--backbone"),
    ],
)
def test_options_without_meaning(options, flag):
    with pytest.raises(UserError, match=flag):
        deeplab.DeepLabv3(**{"backbone": "resnet50", **options})


def test_init():
    model = tiny(num_groups=32, weight_std=True, beta=True)
    for conv in (model.trunk.conv1[1], model.trunk.layer3[0].conv2, model.aspp.aspp2):
        expected = (2 / (9 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert model.head.conv3.weight.abs().max() <= 1 / 16  # PyTorch's default: uniform within 1/sqrt(256)
    assert tiny().head.conv3.weight.std().item() == pytest.approx((2 / 21) ** 0.5, rel=0.05)


def test_weight_standardization():
    torch.manual_seed(0)
    for size in (1, 1e-4):
        weight = (size * torch.randn(4, 5, 3, 3, dtype=torch.float64)).requires_grad_()
        standardized = deeplab.standardize(weight)
        assert standardized.mean((1, 2, 3)).abs().max() < 1e-6
        std = weight.std((1, 2, 3))
        torch.testing.assert_close(standardized.std((1, 2, 3)), std / (std + 1e-5))
        torch.testing.assert_close(deeplab.Standardize.apply(weight), standardized)
        assert torch.autograd.gradcheck(deeplab.Standardize.apply, weight, eps=1e-6 * size)


def test_weight_standardization_of_equal_weights():
    """Their std is 0, and the gradient that of a division by 1e-5."""
    weight = torch.full((4, 5, 3, 3), 0.5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(weight)
    standardized = deeplab.Standardize.apply(weight)
    assert (standardized == 0).all() and (deeplab.standardize(weight) == 0).all()
    (gradient,) = torch.autograd.grad(standardized, weight, grad)
    torch.testing.assert_close(gradient, (grad - grad.mean((1, 2, 3), keepdim=True)) / 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_weight_standardization_compiled_under_autocast_stays_in_float32():
    """Its gradient, given the gradient of the standardised weight; a vecdot was 0.17 % off."""
    weight = torch.randn(64, 32, 3, 3, requires_grad=True)
    grad = torch.randn(64, 32, 3, 3)

    def gradient(weight):
        with torch.autocast("cpu", torch.bfloat16):
            return deeplab.Standardize.apply(weight)

    results = []
    for function in (deeplab.Standardize.apply, torch.compile(gradient)):
        results.append(torch.autograd.grad(function(weight), weight, grad)[0])
    assert (results[0] - results[1]).norm() < 1e-5 * results[0].norm()


def test_group_norm_keeps_the_number_format_of_autocast():
    """A float32 norm between bfloat16 convs would double the memory of what is kept for the backward pass."""
    torch.manual_seed(0)
    norm, x = deeplab.GroupNorm(4, 8), torch.randn(2, 8, 5, 5)
    nn.init.normal_(norm.weight)
    plain = nn.functional.group_norm(x, 4, norm.weight, norm.bias)
    assert torch.equal(norm(x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
        assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), plain, atol=0.1)
        assert norm(x).dtype == torch.float32
    half.sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    model = tiny(num_groups=32)
    assert {type(m) for m in model.modules() if isinstance(m, nn.GroupNorm)} == {deeplab.GroupNorm}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_takes_a_group_of_one_value(dtype):
    """As of the image-level branch with as many groups as channels."""
    norm = deeplab.GroupNorm(4, 4)
    nn.init.normal_(norm.bias)
    x = norm(torch.randn(1, 4, 1, 1, dtype=dtype))
    torch.testing.assert_close(x.flatten(), norm.bias.to(dtype), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", ["bn", "gn_ws"])
def test_logits_are_float32_under_autocast(kind):
    """The loss of millions of pixels is not added up in bfloat16."""
    model, x = tiny(**NORMS[kind]).eval(), torch.randn(1, 3, 65, 65)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(
    ("kind", "groups", "layout"),
    [
        ("cuda", None, torch.channels_last),
        ("cuda", 32, torch.channels_last),
        ("cpu", None, torch.channels_last),
        ("cpu", 32, torch.contiguous_format),
        ("mps", None, torch.contiguous_format),
        ("mps", 32, torch.contiguous_format),
    ],
)
def test_memory_layout_of_each_device(monkeypatch, kind, groups, layout):
    moves = []
    monkeypatch.setattr(
        deeplab.DeepLabv3, "to", lambda self, *args, **kwargs: moves.append((args, kwargs)) or self
    )
    model = tiny(num_groups=groups).place(torch.device(kind, 0))
    assert model.memory_format == layout and moves == [((torch.device(kind, 0),), {"memory_format": layout})]


def test_freeze_bn_stays_frozen():
    model = tiny()
    model.freeze_bn()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = main.make_optimizer(model)
    images, masks = torch.randn(1, 3, 33, 33), torch.zeros(1, 33, 33).byte()
    for _ in range(2):  # validation between epochs must not thaw it
        model.eval()
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        main.train_step(model, optimizer, OFF, main.CrossEntropy(), images, masks)
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    assert changed == {key for key in before if key.rpartition(".")[0] not in norms}


def test_bn_statistics_fit_the_run():
    model = tiny()
    for max_iter in (1, 20, 100, 1000, 33_050):
        model.fit_bn_momentum(max_iter)
        for norm in (model.trunk.bn1, model.aspp.bn2):
            left = (1 - norm.momentum) ** max_iter  # what the initial statistics still weigh at the end
            assert left < 2e-4
    assert (model.trunk.bn1.momentum, model.aspp.bn2.momentum) == (0.05, 0.0003)  # the published run's values


def test_normalize_pads_with_exact_zero():
    images = torch.full((2, 3, 4, 5), 255, dtype=torch.uint8)
    x = tiny().normalize(images, torch.tensor([[4, 5], [2, 3]]))
    white = [(1 - m) / s for m, s in zip(deeplab.MEAN, deeplab.STD, strict=True)]
    assert x[0, :, 3, 4].tolist() == pytest.approx(white)
    assert torch.equal(x[1, :, :2, :3], x[0, :, :2, :3])
    assert x[1, :, 2:].abs().max() == 0 and x[1, :, :, 3:].abs().max() == 0


def test_imagenet_start(tmp_path, monkeypatch):
    """The trunk comes from the file, all of it; a file that lacks something is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data/R-101-GN-WS.pth.tar"
    model = deeplab.resnet101(False, **NORMS["gn_ws"])
    with pytest.raises(UserError, match="download gn_ws_imagenet"):
        checkpoints.load_imagenet(model)

    source = {k: v for k, v in golden_state("gn_ws").items() if not k.startswith("aspp.")}
    assert len(source) == 312
    torch.save({f"module.{k}": v for k, v in source.items()} | {"module.fc.bias": torch.zeros(1000)}, path)
    head = {k: v.clone() for k, v in model.aspp.state_dict().items()}
    checkpoints.load_imagenet(model)
    assert all(torch.equal(file_state(model)[k], v) for k, v in source.items())
    assert all(torch.equal(model.aspp.state_dict()[k], v) for k, v in head.items())

    source.pop("layer3.22.conv2.weight")
    torch.save({f"module.{k}": v for k, v in source.items()}, path)
    with pytest.raises(
        UserError,
        match="1 of the trunk's 312 tensors are not in it: layer3.22.conv2.weight",
    ):
        checkpoints.load_imagenet(model)


def write_imagenet(folder: Path, value: float) -> None:
    """A file of torchvision's ResNet-50 whose tensors all have this value, in a few kilobytes."""
    with torch.device("meta"):
        state = deeplab.ResNet(deeplab.Bottleneck, (3, 4, 6, 3)).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: torch.tensor(value, dtype=x.dtype).expand(x.shape) for key, x in state.items()}
    torch.save(state, folder / "resnet50-0676ba61.pth")


def test_imagenet_start_of_torchvision(tmp_path, monkeypatch):
    """A file in data/ comes first, then torch.hub's cache, then a download whose hash is checked; without a
    network one line helps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    asked = []

    def no_network(url, target, hash_prefix=None, **options):
        asked.append((url, hash_prefix))
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"put that file at data.resnet50-0676ba61.pth, or add --scratch"):
        deeplab.resnet50(True)
    assert asked == [("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61")]

    for folder, value in (("cache/hub/checkpoints", 2), ("data", 3)):
        write_imagenet(tmp_path / folder, value)
        state = file_state(deeplab.resnet50(True))
        trunk = {k: v for k, v in state.items() if not k.startswith("aspp.") and "num_batches" not in k}
        assert len(trunk) == 265 and all((tensor == value).all() for tensor in trunk.values())
        assert not (state["aspp.conv3.weight"] == value).any()
    stem = deeplab.resnet50(True, beta=True).trunk.conv1  # has no counterpart and starts afresh
    assert not any((conv.weight == 3).any() for conv in stem)
    assert len(asked) == 1


def test_imagenet_start_that_does_not_exist():
    for options in ({"num_groups": 32}, {"weight_std": True}, {"num_groups": 32, "weight_std": True}):
        with pytest.raises(UserError, match="--scratch"):
            deeplab.build("tiny", True, **options)


def test_published_checkpoint_without_num_batches_tracked_in_the_legacy_format(tmp_path):
    source = tiny()
    state = {f"module.{k}": v for k, v in file_state(source).items() if not k.endswith("num_batches_tracked")}
    torch.save({"epoch": 50, "state_dict": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    model = deeplab.load(tmp_path / "x.pth", output_stride=8)  # trained at 16, evaluated at 8
    assert model.config == {**source.config, "output_stride": 8}
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("trained", "flags"),
    [
        ({"num_groups": 32, "weight_std": True}, ["--groups", "--weight_std"]),
        ({"beta": True}, ["--beta"]),
        ({"num_classes": 19}, ["--dataset"]),
        ({"aspp_rates": (6, 12)}, ["--aspp_rates"]),
        ({"image_pooling": False}, ["--no_image_pooling"]),
        ({"backbone": "resnet101"}, ["--backbone"]),
        ({"multi_grid": (1, 2, 4)}, ["--multi_grid"]),
    ],
)
@pytest.mark.parametrize("published", [True, False])
def test_checkpoint_of_another_shape_names_the_flags(trained, flags, published):
    with torch.device("meta"):
        source = deeplab.build(**{"backbone": "resnet50", "pretrained": False, **trained})
        model = deeplab.resnet50(False)
    checkpoint = {"epoch": 1, "state_dict": file_state(source)}
    if published:  # which does not tell these
        flags = [flag for flag in flags if flag not in ("--weight_std", "--multi_grid")]
    else:
        checkpoint["model"] = source.config
    assert re.findall(r"--\w+", " ".join(checkpoints.differing_flags(model.config, checkpoint, "x"))) == flags
    if flags:
        with pytest.raises(UserError, match=f"x was trained with other flags: {flags[0]}") as error:
            checkpoints.load_weights(model, checkpoint, "x")
        assert "\n" not in str(error.value)

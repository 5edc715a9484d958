"""The model: golden numbers of the published implementation, what each option changes, weights in and out."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, NORMS, golden_keys, golden_state, weights

import deeplab
import main
from deeplab import ModelError


@pytest.mark.parametrize("kind", NORMS)
def test_golden_keys_and_logits(kind):
    model = deeplab.resnet101(False, **NORMS[kind]).eval()
    state = model.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == golden_keys(kind)
    assert list(state) == list(golden_keys(kind))  # the order, too: optimizer states go by it

    model.load_state_dict(golden_state(kind))
    golden = np.load(GOLDEN / f"logits_{kind}.npz")
    fused = model.fuse()
    assert not any(isinstance(m, (torch.nn.BatchNorm2d, deeplab.WSConv2d)) for m in fused.modules())
    for network in (model, fused, fused.place("cpu")):
        with torch.inference_mode():
            logits = network(torch.from_numpy(weights.image(97, 129, 0)))[0].numpy()
        assert np.abs(logits[:, ::4, ::4] - golden["logits"]).max() <= 1e-3 * golden["logits"].std()
        assert (logits.argmax(0) == golden["argmax"]).mean() >= 0.999


@pytest.mark.parametrize("kind", NORMS)
def test_fusing_leaves_the_model_to_its_training(kind):
    model = deeplab.resnet50(False, **NORMS[kind]).place("cpu").train()
    if kind == "bn":
        model.freeze_bn()
    modes = [module.training for module in model.modules()]
    main.train_step(
        model,
        main.make_optimizer(model),
        torch.amp.GradScaler(enabled=False),
        torch.randn(2, 3, 33, 33),
        torch.zeros(2, 33, 33).byte(),
    )
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


@pytest.mark.parametrize("kind", ["bn", "gn_ws"])
def test_golden_training_losses(kind):
    golden = json.loads((GOLDEN / "train_losses.json").read_text())
    model = deeplab.resnet101(False, **NORMS[kind]).train()
    model.load_state_dict(golden_state(kind))
    images = torch.from_numpy(np.concatenate([weights.image(97, 97, 11), weights.image(97, 97, 12)]))
    rng = np.random.RandomState(13)
    target = rng.randint(0, 21, (2, 97, 97))
    target[rng.rand(2, 97, 97) < 0.05] = 255
    masks = torch.from_numpy(target.astype(np.uint8))

    optimizer, scaler = main.make_optimizer(model), torch.amp.GradScaler(enabled=False)
    losses = []
    for iteration in range(5):
        lr = main.poly_lr(golden["base_lr"], iteration, 5)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * golden["last_mult"]
        losses.append(main.train_step(model, optimizer, scaler, images, masks).item())
    # A random ResNet-101 on two images is chaotic: in float64 the later losses move by 2e-3, with one thread
    # instead of two by 1e-2. What the steps do exactly is tested below.
    assert losses[0] == pytest.approx(golden["losses"][kind][0], rel=1e-5)
    assert losses == pytest.approx(golden["losses"][kind], rel=2e-2)


def test_training_step_is_sgd_of_the_recipe():
    """Momentum 0.9, weight decay 1e-4 on everything, the mean loss of the labelled pixels: against plain
    arithmetic."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.trunk, model.aspp = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 1)
    model.forward = lambda x: model.aspp(model.trunk(x))
    model.double()
    images, masks = torch.randn(2, 3, 9, 9, dtype=torch.float64), torch.randint(0, 5, (2, 7, 7)).byte()
    masks[0, :3] = 255
    parameters = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(p) for p in parameters]
    optimizer, scaler = main.make_optimizer(model), torch.amp.GradScaler(enabled=False)
    for step in range(4):
        lr = main.poly_lr(0.1, step, 4)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 10 * lr
        loss = main.train_step(model, optimizer, scaler, images, masks)

        w, b, w2, b2 = (p.clone().requires_grad_() for p in parameters)
        logits = torch.einsum("oi,nihw->nohw", w2[:, :, 0, 0], torch.conv2d(images, w, b)) + b2[:, None, None]
        scores = logits.log_softmax(1).permute(0, 2, 3, 1)[masks != 255]
        expected = -scores[range(len(scores)), masks[masks != 255].long()].mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        gradients = torch.autograd.grad(expected, (w, b, w2, b2))
        for i, gradient in enumerate(gradients):
            buffers[i] = 0.9 * buffers[i] + gradient + 1e-4 * parameters[i]
            parameters[i] = parameters[i] - lr * (1 if i < 2 else 10) * buffers[i]
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("accum", [1, 2, 5])
def test_weighted_loss_is_that_of_torch(accum):
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 5, 1).double()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.0), torch.amp.GradScaler(enabled=False)
    images, masks = torch.randn(5, 3, 7, 7).double(), torch.randint(0, 5, (5, 7, 7)).byte()
    masks[0, :3], masks[3] = 255, 255
    weights = torch.tensor([0.1, 2.0, 1.0, 30.0, 0.5], dtype=torch.float64)
    loss = main.train_step(model, optimizer, scaler, images, masks, accum=accum, weights=weights)
    gradient = model.weight.grad.clone()
    expected = torch.nn.functional.cross_entropy(model(images), masks.long(), weights, ignore_index=255)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, model.weight)[0])


@pytest.mark.parametrize("weights", [None, torch.ones(5)])
def test_batch_without_a_label_has_no_loss(weights):
    model = torch.nn.Conv2d(3, 5, 1)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler(enabled=False)
    masks = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    images = torch.randn(1, 3, 4, 4)
    assert main.train_step(model, optimizer, scaler, images, masks, weights=weights).item() == 0


def dilations(model):
    return [[block.conv2.dilation[0] for block in layer] for layer in (model.layer3, model.layer4)]


def aspp_rates(model):
    return [m.dilation[0] for m in model.aspp.children() if getattr(m, "kernel_size", None) == (3, 3)]


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
    model = deeplab.resnet50(False, **options)
    assert dilations(model) == [layer3, layer4]
    assert aspp_rates(model) == rates
    stride = options.get("output_stride", 16)
    sizes = []
    model.aspp.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[2:]))
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 3, 65, 97)).shape == (1, 21, 65, 97)
    assert sizes == [torch.Size([64 // stride + 1, 96 // stride + 1])]


def test_image_pooling_sees_the_whole_image():
    """A change in one corner moves the opposite corner's logits through the image-level branch alone."""
    for pooling in (True, False):
        model = deeplab.resnet50(False, image_pooling=pooling).aspp.eval()
        x = torch.randn(1, 2048, 65, 65)
        with torch.inference_mode():
            before = model(x)[0, :, -1, -1]
            x[:, :, 0, 0] += 100
            after = model(x)[0, :, -1, -1]
        assert torch.equal(before, after) is not pooling
        assert model.num_branches == 4 + pooling


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"num_groups": 3}, "--groups"),
        ({"num_groups": 128}, "--groups"),
        ({"output_stride": 4}, "--output_stride"),
        ({"multi_grid": (1, 2)}, "--multi_grid"),
        ({"multi_grid": (0, 1, 1)}, "--multi_grid"),
        ({"aspp_rates": ()}, "--aspp_rates"),
        ({"aspp_rates": (5,), "output_stride": 32}, "--aspp_rates"),
        ({"num_classes": 256}, "256 classes"),
    ],
)
def test_options_without_meaning(options, flag):
    with pytest.raises(ModelError, match=flag):
        deeplab.resnet50(False, **options)


def test_init():
    model = deeplab.resnet50(False, num_groups=32, weight_std=True, beta=True)
    for conv in (model.conv1[1], model.layer3[0].conv2, model.aspp.aspp2):
        expected = (2 / (9 * conv.out_channels)) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert model.aspp.conv3.weight.abs().max() <= 1 / 16  # PyTorch's default: uniform within 1/sqrt(256)
    bn = deeplab.resnet50(False)
    assert bn.aspp.conv3.weight.std().item() == pytest.approx((2 / 21) ** 0.5, rel=0.05)


def test_weight_standardization():
    for size in (1, 1e-4):
        weight = (size * torch.randn(4, 5, 3, 3, dtype=torch.float64)).requires_grad_()
        standardized = deeplab.standardize(weight)
        assert standardized.mean((1, 2, 3)).abs().max() < 1e-6
        std = weight.std((1, 2, 3))
        torch.testing.assert_close(standardized.std((1, 2, 3)), std / (std + 1e-5))
        torch.testing.assert_close(deeplab.Standardize.apply(weight), standardized)
        assert torch.autograd.gradcheck(deeplab.Standardize.apply, weight, eps=1e-6 * size)


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
    norm, x = deeplab.GroupNorm(4, 8), torch.randn(2, 8, 5, 5)
    torch.nn.init.normal_(norm.weight)
    plain = torch.nn.functional.group_norm(x, 4, norm.weight, norm.bias)
    assert torch.equal(norm(x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x.bfloat16())
        assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), plain, atol=0.1)
        assert norm(x).dtype == torch.float32
    half.sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    model = deeplab.resnet50(False, num_groups=32)
    assert {type(m) for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {deeplab.GroupNorm}


@pytest.mark.parametrize("kind", ["bn", "gn_ws"])
def test_logits_are_float32_under_autocast(kind):
    """The loss of millions of pixels is not added up in bfloat16."""
    model, x = deeplab.resnet50(False, **NORMS[kind]).eval(), torch.randn(1, 3, 65, 65)
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
    model = deeplab.resnet50(False, num_groups=groups).place(torch.device(kind, 0))
    assert model.memory_format == layout and moves == [((torch.device(kind, 0),), {"memory_format": layout})]


def test_freeze_bn_stays_frozen():
    model = deeplab.resnet50(False)
    model.freeze_bn()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer, scaler = main.make_optimizer(model), torch.amp.GradScaler(enabled=False)
    for _ in range(2):  # validation between epochs must not thaw it
        model.eval()
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        main.train_step(model, optimizer, scaler, torch.randn(1, 3, 33, 33), torch.zeros(1, 33, 33).byte())
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and all("bn" not in key and "downsample.1" not in key for key in changed)


def test_bn_statistics_fit_the_run():
    model = deeplab.resnet50(False)
    for max_iter in (1, 20, 100, 1000, 33_050):
        model.fit_bn_momentum(max_iter)
        for norm in (model.bn1, model.aspp.bn2):
            assert (
                1 - norm.momentum
            ) ** max_iter < 2e-4  # what the initial statistics still weigh at the end
    assert (model.bn1.momentum, model.aspp.bn2.momentum) == (0.05, 0.0003)  # the published run's values


def test_normalize_pads_with_exact_zero():
    model = deeplab.resnet50(False)
    images = torch.full((2, 3, 4, 5), 255, dtype=torch.uint8)
    x = model.normalize(images, torch.tensor([[4, 5], [2, 3]]))
    white = [(1 - m) / s for m, s in zip(deeplab.MEAN, deeplab.STD, strict=True)]
    assert x[0, :, 3, 4].tolist() == pytest.approx(white)
    assert torch.equal(x[1, :, :2, :3], x[0, :, :2, :3])
    assert x[1, :, 2:].abs().max() == 0 and x[1, :, :, 3:].abs().max() == 0


def save(path, state, **more):
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}, **more}, path)
    return str(path)


def test_imagenet_start(tmp_path, monkeypatch):
    """The trunk comes from the file, all of it; a file that lacks something is an error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / deeplab.IMAGENET_GN_WS
    with pytest.raises(ModelError, match="download gn_ws_imagenet"):
        deeplab.resnet101(True, num_groups=32, weight_std=True)

    source = {k: v for k, v in golden_state("gn_ws").items() if not k.startswith("aspp.")}
    assert len(source) == 312
    torch.save({f"module.{k}": v for k, v in source.items()} | {"module.fc.bias": torch.zeros(1000)}, path)
    model = deeplab.resnet101(True, num_groups=32, weight_std=True)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in source.items())

    source.pop("layer3.22.conv2.weight")
    torch.save({f"module.{k}": v for k, v in source.items()}, path)
    with pytest.raises(ModelError, match="1 of the trunk's 312"):
        deeplab.resnet101(True, num_groups=32, weight_std=True)


def test_imagenet_start_of_torchvision(tmp_path, monkeypatch):
    """A file in data/ comes first, and its hash is checked; without it and without a network, one line
    helps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ModelError, match=r"put that file at data.resnet50-0676ba61.pth, or add --scratch"):
        deeplab.resnet50(True)

    asked = []

    def from_disk(url, model_dir=None, **kwargs):
        asked.append((model_dir, kwargs["check_hash"], kwargs["weights_only"]))
        return deeplab.ResNet(deeplab.Bottleneck, (3, 4, 6, 3)).state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", from_disk)
    deeplab.resnet50(True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "resnet50-0676ba61.pth").touch()
    deeplab.resnet50(True, beta=True)  # its stem has no counterpart and starts afresh
    assert asked == [(None, True, True), ("data", True, True)]


def test_imagenet_start_that_does_not_exist():
    for options in ({"num_groups": 32}, {"weight_std": True}, {"num_groups": 32, "weight_std": True}):
        with pytest.raises(ModelError, match="--scratch"):
            deeplab.resnet50(True, **options)


def test_published_checkpoint_without_num_batches_tracked_in_the_legacy_format(tmp_path):
    source = deeplab.resnet50(False)
    state = {
        f"module.{k}": v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")
    }
    torch.save({"epoch": 50, "state_dict": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    checkpoint = deeplab.read_checkpoint(str(tmp_path / "x.pth"))
    model = deeplab.resnet50(False, output_stride=8)  # trained at 16, evaluated at 8
    deeplab.load_weights(model, checkpoint, "x.pth")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in source.state_dict().items())


@pytest.mark.parametrize(
    ("trained", "flags"),
    [
        ({"num_groups": 32, "weight_std": True}, ["--groups"]),
        ({"beta": True}, ["--beta"]),
        ({"num_classes": 19}, ["--dataset"]),
        ({"aspp_rates": (6, 12)}, ["--aspp_rates"]),
        ({"image_pooling": False}, ["--no_image_pooling"]),
        ({"multi_grid": (1, 2, 4)}, ["--multi_grid"]),
    ],
)
@pytest.mark.parametrize("published", [True, False])
def test_checkpoint_of_another_shape_names_the_flags(tmp_path, trained, flags, published):
    if published and "multi_grid" in trained:
        pytest.skip("a published checkpoint does not say")
    source = deeplab.resnet50(False, **trained)
    more = {} if published else {"model": source.config}
    path = save(tmp_path / "x.pth", source.state_dict(), **more)
    with pytest.raises(ModelError) as error:
        deeplab.load_weights(deeplab.resnet50(False), deeplab.read_checkpoint(path), path)
    assert all(flag in str(error.value) for flag in flags) and "\n" not in str(error.value)

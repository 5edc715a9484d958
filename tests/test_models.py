"""The backbones and heads, torchvision's DeepLabv3, the files of other programs, and the model in Python."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import SMALL, make_list_dataset, one_line, spoil, weights_of
from PIL import Image
from torch import nn
from torchvision.models import segmentation

import deeplab
from commands import flags as flags_module
from commands.check import drop_bad
from commands.evaluate import evaluate
from datasets import ListSegmentation, SegmentationDataset
from deeplab import Inference
from files import checkpoints
from files.masks import VOC_CLASSES
from utils import UserError

PLAIN = ["--aspp_rates", 2, "--batch_size", 6]


@pytest.fixture
def narrow(monkeypatch):
    """Backbones as ResNeXt and the wide ResNets are, with one block a stage."""
    kinds = {"next": {"groups": 32, "width_per_group": 4}, "wide": {"width_per_group": 128}}
    for name, options in kinds.items():
        monkeypatch.setitem(deeplab.BACKBONES, name, {"layers": (1, 1, 1, 1), **options})
    monkeypatch.setattr(flags_module, "BACKBONES", [*flags_module.BACKBONES, *kinds])


def torchvision_model(name: str, num_classes: int = 21) -> nn.Module:
    """torchvision's own DeepLabv3, with weights and statistics that no two layers share."""
    torch.manual_seed(0)
    build = getattr(segmentation, f"deeplabv3_{name}")
    model = build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.1)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize("name", ["resnet50", "resnet101", "mobilenet_v3_large"])
def test_torchvision_file_gives_torchvision_logits(tmp_path, name):
    """At odd sizes, with the auxiliary classifier in the file; the fused network, too."""
    reference = torchvision_model(name)
    torch.save({"model": reference.state_dict(), "epoch": 29}, tmp_path / "x.pth")
    model = deeplab.load(tmp_path / "x.pth")
    assert model.classes == VOC_CLASSES and model.config["head"] == "torchvision"
    for dtype, limit in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        networks = model.to(dtype), model.fuse()
        for size in ((65, 80), (33, 49)):
            x = torch.randn(1, 3, *size, dtype=dtype)
            with torch.inference_mode():
                expected = reference.to(dtype)(x)["out"]
                for network in networks:
                    assert (network(x) - expected).abs().max() <= limit * expected.std()


def test_torchvision_head_pads_nothing():
    """torchvision's network sees the image as it is; ours is padded to the output stride."""
    sizes = []
    for head, padded in (("torchvision", (40, 50)), ("v3", (49, 65))):
        model = deeplab.build("tiny", False, 3, head=head).eval()
        model.trunk.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        with torch.inference_mode():
            assert model.segment(torch.zeros(1, 3, 40, 50, dtype=torch.uint8)).shape == (1, 3, 40, 50)
        assert sizes.pop() == padded


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("tiny", ["--head", "v3plus", "--groups", 32, "--weight_std", "--output_stride", 8]),
        ("tiny", ["--head", "torchvision"]),
        ("next", []),
        ("mobilenet_v3_large", ["--head", "v3plus", "--output_stride", 32]),
        pytest.param("tiny", ["--head", "v3plus"], marks=pytest.mark.slow),
        pytest.param("wide", ["--groups", 32, "--weight_std"], marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_large", [], marks=pytest.mark.slow),
    ],
)
def test_every_trunk_and_head_goes_all_the_way(cli, small, narrow, tmp_path, backbone, options):
    """Trains, stops, resumes, evaluates, predicts, and is written as a slim file that starts another run."""
    model = ["--backbone", backbone, *PLAIN, *options]
    data, rest = small[:4], small[6:]
    train = ["--train", *data, *rest, *model, "--exp"]
    assert cli(*train, "x", "--epochs", 1)[0] == 0
    status, out, _ = cli(*train, "x", "--epochs", 2, "--resume", "auto")
    assert status == 0 and "iteration 1 of 2" in out
    path = f"data/deeplab_{backbone}_custom_v3_x_epoch2.pth"
    status, out, _ = cli("--exp", "x", *data)
    assert status == 0 and "Mean IoU: " in out
    assert cli("--predict", "set/images/val0.jpg", "--exp", "x", *data)[0] == 0
    assert Image.open("data/predictions/val0_mask.png").size == (80, 60)
    assert cli("--export", "slim.pth", "--checkpoint", path)[0] == 0
    assert (tmp_path / "slim.pth").stat().st_size < 0.6 * (tmp_path / path).stat().st_size
    a, b = weights_of(path), weights_of("slim.pth")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    status, out, _ = cli(
        "--train", *data, *rest, *PLAIN[2:], "--exp", "y", "--epochs", 1, "--init", "slim.pth"
    )
    assert status == 0 and "starts from slim.pth" in out  # whose model needs no flags
    assert (tmp_path / f"data/deeplab_{backbone}_custom_v3_y_epoch1.pth").exists()


@pytest.mark.parametrize("options", [{"head": "v3plus"}, {"head": "torchvision"}])
def test_heads_are_fused_to_the_same_logits(options):
    model, x = deeplab.build("tiny", False, 3, **options).double(), torch.randn(2, 3, 65, 49).double()
    model(x)  # statistics that are not the initial ones
    fused = model.eval().fuse()
    with torch.inference_mode():
        assert (fused(x) - model(x)).abs().max() <= 1e-10 * model(x).std()


def test_v3plus_sees_stride_4():
    """The trunk's feature map of stride 4 reaches the logits, and only by way of the decoder."""
    for head, reaches in (("v3plus", True), ("v3", False)):
        head = deeplab.Head(head, 256, 3, nn.BatchNorm2d).eval()
        x, low = torch.randn(1, 256, 5, 5), torch.randn(1, 256, 17, 17)
        with torch.inference_mode():
            assert torch.equal(head(x, low), head(x, low + 1)) is not reaches
            assert head(x, low).shape == (1, 3, 17, 17) if reaches else (1, 3, 5, 5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_groups": 32}, "--groups"),
        ({"weight_std": True}, "--weight_std"),
        ({"beta": True}, "--beta"),
        ({"multi_grid": (1, 2, 4)}, "--multi_grid"),
        ({"output_stride": 8}, "--output_stride 8"),
    ],
)
def test_what_mobilenet_does_not_have(options, named):
    with pytest.raises(deeplab.UserError, match=f"{named}: for ResNets, not for mobilenet_v3_large"):
        deeplab.DeepLabv3("mobilenet_v3_large", **options)


def test_mobilenet_strides_and_imagenet_names():
    """Its trunk has torchvision's names, so that torchvision's weights fit."""
    from torchvision.models import mobilenet_v3_large

    names = {key for key in mobilenet_v3_large().state_dict() if key.startswith("features.")}
    for stride in (16, 32):
        model = deeplab.build("mobilenet_v3_large", False, output_stride=stride).eval()
        assert set(model.trunk.state_dict()) == names
        with torch.inference_mode():
            low, high = model.trunk(torch.zeros(1, 3, 65, 97))
        assert low.shape == (1, 24, 17, 25) and high.shape == (1, 960, 64 // stride + 1, 96 // stride + 1)


def rename(state: dict, prefix: str) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {}, "epoch": 3, "args": None},
        lambda state: {"model_state": rename(state, "_orig_mod.module.")},
        lambda state: {"state_dict": rename(state, "model._orig_mod."), "pytorch-lightning_version": "2.5"},
        lambda state: {"model_ema": rename(state, "module."), "model": None},
        lambda state: {"state_dict": state, "model": "deeplabv3_resnet50"},
        lambda state: {"state_dict": state, "classes": 3},
    ],
)
@pytest.mark.parametrize("head", ["v3", "v3plus"])
def test_files_of_other_programs(tmp_path, wrap, head):
    source = deeplab.build("tiny", False, 3, head=head)
    torch.save(wrap(source.state_dict()), tmp_path / "x.pth")
    loaded = deeplab.load(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in source.state_dict().items())


def test_safetensors(cli, tmp_path, monkeypatch):
    source = deeplab.build("tiny", False, 3)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(rename(source.state_dict(), "module."), tmp_path / "x.safetensors")
    loaded = deeplab.load(tmp_path / "x.safetensors").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in source.state_dict().items())
    (tmp_path / "y.safetensors").write_bytes(b"nothing of the kind")
    status, _, err = cli("--predict", "a.png", "--checkpoint", "y.safetensors")
    assert status == 1 and one_line(err) and "y.safetensors is damaged" in err


def test_safetensors_without_the_package(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").touch()
    status, _, err = cli("--predict", "x.png", "--checkpoint", "x.safetensors")
    assert status == 1 and one_line(err) and "pip install safetensors" in err


def test_what_a_file_seems_to_be(cli, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    torch.save(nn.Sequential(nn.Conv2d(3, 3, 1)), tmp_path / "module.pth")
    torch.save(rename(nn.Linear(2, 2).state_dict(), "encoder."), tmp_path / "other.pth")
    torch.save(deeplab.build("tiny", False, 3), tmp_path / "ours.pth")
    for name, hint in (
        ("module", "save torch.save(model.state_dict(), FILE) instead"),
        ("ours", "save torch.save(files.checkpoints.model_entries(model), FILE)"),
        ("other", "encoder.weight"),
    ):
        status, _, err = cli("--predict", "a.png", "--checkpoint", f"{name}.pth")
        assert status == 1 and one_line(err) and f"{name}.pth" in err and hint in err


def test_start_from_a_trunk_with_the_other_norm(cli, small, tmp_path):
    """Its convs and its norms' scales are GroupNorm's, too; its statistics are nobody's."""
    torch.save(deeplab.build("tiny", False).trunk.state_dict(), tmp_path / "trunk.pth")
    flags = ["--train", "--exp", "x", *small, "--groups", 32, "--epochs", 1, "--init", "trunk.pth"]
    status, out, err = cli(*flags)
    assert status == 0 and "starts from the trunk in trunk.pth" in out, err


def test_start_from_a_trunk_alone(cli, small, tmp_path):
    """torchvision's names of ImageNet weights, with their classifier: ASPP starts anew, and it is said so."""
    source = deeplab.build("tiny", False)
    state = {**source.trunk.state_dict(), "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "trunk.pth")
    flags = ["--train", "--exp", "x", *small, "--epochs", 1, "--base_lr", 0, "--batch_size", 6]
    status, out, _ = cli(*flags, "--init", "trunk.pth")
    assert status == 0 and "starts from the trunk in trunk.pth; ASPP and the head start anew" in out
    saved = weights_of("data/deeplab_tiny_custom_v3_x_epoch1.pth")
    same = [torch.equal(saved[f"module.{k}"], v) for k, v in source.trunk.named_parameters()]
    assert all(same) and len(same) > 20
    assert not torch.equal(saved["module.aspp.conv2.weight"], source.aspp.conv2.weight)
    status, _, err = cli("--predict", "set/images/val0.jpg", "--checkpoint", "trunk.pth")
    assert status == 1 and one_line(err) and "trunk.pth" in err
    torch.save({**state, "layer1.0.se.fc1.weight": torch.zeros(16, 256, 1, 1)}, tmp_path / "se.pth")
    status, _, err = cli(*flags, "--init", "se.pth")
    assert status == 1 and one_line(err) and "se.pth: 1 tensors of its trunk are not of tiny's" in err
    assert "layer1.0.se.fc1.weight first" in err


def test_fine_tuning_torchvision_weights(cli, tmp_path):
    """On other classes: the classifier starts anew, the rest is torchvision's, and no flag is needed."""
    reference = torchvision_model("mobilenet_v3_large")
    torch.save(reference.state_dict(), tmp_path / "tv.pth")
    root = make_list_dataset(tmp_path / "set")
    flags = [
        "--train",
        "--exp",
        "x",
        "--dataset",
        "custom",
        "--data_root",
        root,
        "--epochs",
        1,
        "--workers",
        0,
    ]
    flags += ["--crop_size", 33, "--batch_size", 6, "--base_lr", 0, "--init", "tv.pth"]
    status, out, _ = cli(*flags)
    assert status == 0 and "starts from tv.pth without aspp.conv3.weight and aspp.conv3.bias" in out
    saved = torch.load("data/deeplab_mobilenet_v3_large_custom_v3_x_epoch1.pth", weights_only=True)
    assert saved["model"]["head"] == "torchvision" and saved["model"]["output_stride"] == 16
    name = "module.head.conv1.weight"
    assert torch.equal(saved["state_dict"][name], reference.state_dict()["classifier.1.weight"])
    status, _, err = cli(*flags, "--head", "v3plus")
    assert status == 1 and one_line(err) and "--head (checkpoint: torchvision, here: v3plus)" in err


@pytest.mark.parametrize("command", [["--train", "--exp", "x", *SMALL, *PLAIN], []])
def test_classes_of_voc_in_another_order(cli, tmp_path, command):
    """A published file names none, but its 21 are VOC's: persons must not count as bottles."""
    state = deeplab.build("tiny", False, aspp_rates=[2], image_pooling=False).state_dict()
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "voc.pth")
    root = make_list_dataset(tmp_path / "set", classes=[VOC_CLASSES[0], *VOC_CLASSES[:0:-1]])
    flags = ["--dataset", "custom", "--data_root", root, "--aspp_rates", 2, "--no_image_pooling"]
    status, _, err = cli(*command, *flags, "--init" if command else "--checkpoint", "voc.pth")
    assert status == 1 and one_line(err) and "with the classes in another order" in err


def test_predict_in_python(tmp_path, monkeypatch):
    """From another folder, in training mode, which stays."""
    spoil("none", tmp_path / "x.pth")
    monkeypatch.chdir(tmp_path)
    model = deeplab.load("x.pth")
    model.train()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    image.save("a.png")
    labels = model.predict(image)
    assert model.training and labels.shape == (30, 40) and labels.dtype == np.uint8
    both = model.predict([image, "a.png", np.array(image), tmp_path / "a.png"])
    assert len(both) == 4 and all(np.array_equal(labels, other) for other in both)
    scores = model.predict(image, probabilities=True)
    assert scores.shape == (3, 30, 40) and scores.dtype == np.float32
    assert np.allclose(scores.sum(0), 1, atol=1e-5) and (scores.argmax(0) == labels).mean() > 0.99
    small = model.predict(image, probabilities=True, max_side=20)
    assert small.shape == (3, 30, 40) and np.allclose(small.sum(0), 1, atol=1e-5)
    arrays = np.zeros((9, 9, 3)), np.zeros((3, 9, 9, 3), np.uint8), np.zeros(9, np.uint8)
    for wrong in (torch.zeros(3, 9, 9), *arrays, None):
        with pytest.raises(TypeError, match="predict takes a PIL image, a path, or a uint8 array"):
            model.predict(wrong)
    for options in ({"max_side": 0}, {"tile": 0}, {"overlap": 0.6}, {"scales": ()}, {"scales": [0]}):
        with pytest.raises(ValueError, match="sides in pixels|between 0.1 and 4"):
            model.predict(image, **options)


@pytest.mark.parametrize("head", ["v3", "torchvision"])
def test_labels_and_probabilities_of_a_shrunk_image_lie_on_the_image(monkeypatch, head):
    """An eighth of the size: its pixels are enlarged where they were, at the borders, too."""
    model = deeplab.build("tiny", False, 3, head=head)

    def segment(images, inference, softmax):  # black is class 0, white class 1
        white = images[:, 0].float() / 255
        return torch.stack([1 - white, white, 0 * white], 1)

    monkeypatch.setattr(model, "segment", segment)
    stripes = np.repeat((np.arange(1600) // 80 % 2)[None], 320, 0).astype(np.uint8)
    for image in (255 * stripes, 255 * stripes.T):
        labels, scores = (model.predict(image, max_side=200, probabilities=p) for p in (False, True))
        assert np.array_equal(labels, image // 255)
        assert np.array_equal(scores.argmax(0), labels)


def test_prediction_leaves_the_modes_as_they_were(tmp_path, monkeypatch):
    """A part that its user has set to eval stays so; also if the prediction fails."""
    model = deeplab.build("tiny", False, 3)
    model.train()
    model.trunk.eval()
    image = Image.new("RGB", (40, 30))
    modes = [module.training for module in model.modules()]
    for options in ({}, {"tile": 20}):
        model.predict(image, **options)
        assert modes == [module.training for module in model.modules()]
    hook = model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    for options in ({}, {"tile": 20}):
        with pytest.raises(ZeroDivisionError):
            model.predict(image, **options)
        assert modes == [module.training for module in model.modules()]
    hook.remove()
    torch.save(model.place("cpu"), tmp_path / "whole.pth")  # as people do; its memory format is no obstacle
    assert torch.load(tmp_path / "whole.pth", weights_only=False).memory_format == torch.channels_last


@pytest.mark.parametrize("head", ["v3", "v3plus", "torchvision"])
@pytest.mark.parametrize("stride", [8, 16])
def test_evaluation_predicts_what_predict_gives(tmp_path, head, stride):
    """Images are padded alike: what is beside an image reaches its pixels through ASPP."""
    root = make_list_dataset(tmp_path / "set", size=(67, 49))
    torch.manual_seed(0)
    model = deeplab.build("tiny", False, 3, head=head, output_stride=stride, aspp_rates=[2])
    model.place("cpu").eval()
    dataset = ListSegmentation(str(root), "val")
    assert drop_bad(dataset) == []
    dataset.stride = model.padded_stride
    evaluate(model, dataset, torch.device("cpu"), Inference(), folder=str(tmp_path / "out"))
    for (image, _), name in zip(dataset.pairs, dataset.names, strict=True):
        found = np.array(Image.open(tmp_path / f"out/{name}.png"))
        assert np.array_equal(found, model.predict(image)), name


@pytest.mark.parametrize("flags", [["--output_stride", 8], ["--head", "torchvision"]])
def test_commands_agree_on_sizes_that_fit_no_stride(cli, tmp_path, flags):
    """The validation of a run, its evaluation, and the masks of a prediction."""
    root = make_list_dataset(tmp_path / "set", size=(67, 49))
    data = ["--dataset", "custom", "--data_root", root]
    network = ["--aspp_rates", 2, "--groups", 32, "--weight_std", *flags]
    status, out, _ = cli("--train", "--exp", "x", *data, *SMALL, *network, "--epochs", 2, "--base_lr", 0.02)
    assert status == 0
    validated = re.search("saved (.*), mean IoU (.*)\n", out)
    status, out, _ = cli("--checkpoint", validated[1], *data)
    assert status == 0 and f"Mean IoU: {validated[2]}\n" in out
    model = deeplab.load(validated[1])
    for i in range(3):
        mask = np.array(Image.open(next(tmp_path.glob(f"data/val/*/val{i}.png"))))
        assert np.array_equal(mask, model.predict(root / f"images/val{i}.jpg")), i


def test_padding_of_voc():
    """As in the published code, but not for torchvision's head, which is evaluated without padding."""
    dataset = SegmentationDataset([], None, eval_size=(513, 513))
    assert dataset.padded_size(375, 500) == (513, 513) and dataset.padded_size(600, 500) == (609, 513)
    dataset.stride = 1
    assert dataset.padded_size(375, 500) == (375, 500)


def test_scales_of_a_head_without_aligned_corners():
    """An edge stays where it is: torchvision's corners are those of pixels, not their centres."""
    model = deeplab.build("tiny", False, 3, head="torchvision", output_stride=16).eval()
    sizes = []
    model.trunk.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    with torch.inference_mode():
        model.scores(torch.zeros(1, 3, 64, 480), Inference(scales=(0.5, 1.0, 1.25)))
    assert sizes == [(32, 240), (64, 480), (80, 600)]


def test_checkpoint_of_before_heads(tmp_path):
    """Earlier checkpoints tell no head: theirs is v3."""
    model = deeplab.build("tiny", False, 3)
    model.classes, model.palette = list("abc"), [[0, 0, 0]] * 3
    entries = checkpoints.model_entries(model)
    entries["model"] = {key: value for key, value in model.config.items() if key != "head"}
    torch.save({"epoch": 1, **entries}, tmp_path / "x.pth")
    assert deeplab.load(tmp_path / "x.pth").config == model.config
    assert json.dumps(entries["model"]) and not re.search("trunk|head", " ".join(entries["state_dict"]))


@pytest.mark.parametrize("options", [{}, {"flip": True}])
def test_numbers_that_overflow_in_float16_are_no_labels(monkeypatch, options):
    model = deeplab.build("tiny", False, 3).eval()
    x, logits = torch.zeros(1, 3, 33, 33), torch.zeros(1, 3, 33, 33)
    monkeypatch.setattr(model, "forward", lambda x, size=None: logits)
    assert model.scores(x, Inference(amp="fp16", **options)).isfinite().all()
    logits[0, 1, 7, 7] = float("inf")
    with pytest.raises(UserError, match="overflow in float16.*--amp bf16 or none"):
        model.scores(x, Inference(amp="fp16", **options))

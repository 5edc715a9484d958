"""The losses of training, against their definitions written out in float64, and against other libraries."""

import math

import numpy as np
import pytest
import torch
from conftest import one_line
from torch import nn
from torch.nn import functional as F

import main
from commands.losses import CrossEntropy, Dice, WithDice

OFF = torch.amp.GradScaler(enabled=False)
WEIGHTS = torch.tensor([0.1, 2.0, 1.0, 3.0, 0.5], dtype=torch.float64)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and masks of five images: one whole, one in parts ignored, one of a single pixel, one without
    any, one of a single class."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 5, 7, 9, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, 5, (5, 7, 9), generator=generator).byte()
    masks[1, :4], masks[2:4], masks[4] = 255, 255, 3
    masks[2, 3, 4] = 1
    return logits, masks


def pixel_losses(logits, label, weights, smoothing) -> float:
    """Of one pixel: the weighted cross-entropy with a target that is smoothed over the classes."""
    target = np.full(len(logits), smoothing / len(logits))
    target[label] += 1 - smoothing
    return float(-(target * weights * logits.log_softmax(0).numpy()).sum())


def plain_cross_entropy(logits, masks, weights, top_k=1.0, smoothing=0.0) -> float:
    """Image by image and pixel by pixel."""
    weights = np.ones(5) if weights is None else weights.numpy()
    loss_sum = total = 0
    for image, mask in zip(logits, masks, strict=True):
        places = [tuple(place) for place in (mask != 255).nonzero().tolist()]
        losses = [pixel_losses(image[:, y, x], mask[y, x], weights, smoothing) for y, x in places]
        if not losses:
            continue
        count = max(1, round(top_k * len(losses)))
        mean_weight = np.mean([weights[mask[place]] for place in places])
        loss_sum += sum(sorted(losses)[-count:])
        total += count * mean_weight
    return loss_sum / total


def plain_dice(logits, masks, weights) -> float:
    """Image by image and class by class."""
    images = []
    for image, mask in zip(logits, masks, strict=True):
        scores, losses = image.softmax(0)[:, mask != 255].numpy(), {}
        truth = mask[mask != 255].numpy()
        for label in np.unique(truth):
            hits, predicted = scores[label][truth == label].sum(), scores[label].sum()
            losses[label] = 1 - 2 * hits / (predicted + (truth == label).sum())
        if losses:
            given = [1.0 if weights is None else weights[label].item() for label in losses]
            images.append(np.average(list(losses.values()), weights=given))
    return np.mean(images)


def loss_of(criterion, logits, masks):
    return (criterion(logits, masks) / criterion.total(masks)).sum().item()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("top_k", [1.0, 0.25, 0.01, 0.9])
def test_cross_entropy_of_the_hardest_pixels(weights, smoothing, top_k):
    logits, masks = batch()
    expected = plain_cross_entropy(logits, masks, weights, top_k, smoothing)
    criterion = CrossEntropy(weights, top_k, smoothing)
    assert loss_of(criterion, logits, masks) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_all_pixels_are_torchs_own_loss(weights):
    logits, masks = batch()
    for smoothing in (0.0, 0.2):
        options = {"ignore_index": 255, "label_smoothing": smoothing}
        expected = F.cross_entropy(logits, masks.long(), weights, **options).item()
        assert loss_of(CrossEntropy(weights, 1.0, smoothing), logits, masks) == pytest.approx(expected)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_dice(weights):
    logits, masks = batch()
    expected = plain_dice(logits, masks, weights)
    assert loss_of(Dice(weights), logits, masks) == pytest.approx(expected, rel=1e-12)
    both = WithDice(CrossEntropy(weights, 0.5), 0.7)
    expected = plain_cross_entropy(logits, masks, weights, 0.5) + 0.7 * expected
    assert loss_of(both, logits, masks) == pytest.approx(expected, rel=1e-12)


def test_dice_is_that_of_smp():
    """Where the definitions meet: one image that has all classes."""
    losses = pytest.importorskip("segmentation_models_pytorch.losses")
    logits, masks = (tensor[1:2] for tensor in batch())
    assert set(masks.unique().tolist()) == {0, 1, 2, 3, 4, 255}
    expected = losses.DiceLoss("multiclass", ignore_index=255)(logits, masks.long()).item()
    assert loss_of(Dice(), logits, masks) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("logit", [0.0, 1e4])
def test_gradients_are_finite(logit):
    """Also of perfect and of hopeless predictions, and of a batch without a label."""
    for masks in (batch()[1], torch.full((2, 3, 3), 255).byte()):
        logits = torch.zeros(len(masks), 5, *masks.shape[1:])
        logits[:, 3] = logit
        logits.requires_grad_()
        criterion = WithDice(CrossEntropy(WEIGHTS.float(), 0.25, 0.1), 1.0)
        total = criterion.total(masks)
        loss = (criterion(logits, masks) / total.where(total > 0, 1)).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite() and gradient.isfinite().all()
        assert (gradient[(masks == 255)[:, None].expand_as(logits)] == 0).all()


@pytest.mark.parametrize("accum", [1, 2, 5])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_parts_give_the_loss_of_the_batch(accum, weights):
    torch.manual_seed(0)
    model, images = nn.Conv2d(3, 5, 1).double(), torch.randn(5, 3, 7, 9).double()
    masks, criterion = batch()[1], WithDice(CrossEntropy(weights, 0.25, 0.1), 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = main.train_step(model, optimizer, OFF, criterion, images, masks, accum=accum)
    gradient, logits = model.weight.grad.clone(), model(images)
    expected = plain_cross_entropy(logits.detach(), masks, weights, 0.25, 0.1)
    expected += 0.5 * plain_dice(logits.detach(), masks, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    whole = (criterion(logits, masks) / criterion.total(masks)).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, model.weight)[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "loss",
    [["--top_k", 0.25], ["--dice", 1], ["--label_smoothing", 0.1, "--class_weights", "auto", "--dice", 0.5]],
)
def test_each_loss_trains_and_resumes(cli, small, tmp_path, loss):
    flags = ["--train", "--epochs", 2, "--save_every", 1, *small, *loss]
    assert cli(*flags, "--exp", "x")[0] == 0
    path = tmp_path / "data/deeplab_tiny_custom_v3_x_epoch2.pth"
    whole = torch.load(path)["state_dict"]
    path.unlink()
    status, out, _ = cli(*flags, "--exp", "x", "--resume", "auto")
    assert status == 0 and "other flags" not in out
    assert all(torch.equal(whole[key], value) for key, value in torch.load(path)["state_dict"].items())
    assert cli(*flags[: -len(loss)], "--exp", "plain")[0] == 0
    plain = torch.load(tmp_path / "data/deeplab_tiny_custom_v3_plain_epoch2.pth")["state_dict"]
    assert any(not torch.equal(whole[key], plain[key]) for key in whole)
    status, out, _ = cli(*flags[: -len(loss)], "--exp", "x", "--resume", "auto", "--epochs", 3)
    assert status == 0 and loss[0] in out  # the run continues with other flags


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("--top_k", (0, -0.5, 1.1, math.nan)),
        ("--dice", (-1, math.inf, math.nan)),
        ("--label_smoothing", (-0.1, 1)),
        ("--color_jitter", (-0.1, 1)),
    ],
)
def test_values_that_have_no_meaning(cli, flag, values):
    for value in values:
        status, _, err = cli("--train", "--exp", "x", f"{flag}={value}")
        assert status == 2 and one_line(err) and flag in err

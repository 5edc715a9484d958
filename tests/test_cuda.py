"""What only a GPU can answer: `python -m pytest tests/test_cuda.py -v`, on one GPU; more with two."""

import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    NETWORK,
    NORMS,
    SMALL,
    TINY,
    children,
    golden_state,
    load_file_state,
    make_list_dataset,
    one_line,
    torchrun,
    wait_for,
)
from PIL import Image
from test_deeplab import check_golden_steps, check_logits
from test_parallel import steps
from test_runs import take_step, two_groups

import deeplab
import main
from files.training import Training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
CUDA = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def as_before():
    """Exact float32, and afterwards the settings of torch as they were."""
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    benchmark = torch.backends.cudnn.benchmark
    use_tf32(False)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = benchmark
    torch.cuda.empty_cache()


def use_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def batch(count: int, size: int, classes: int = 21) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator)
    masks = torch.randint(0, classes, (count, size, size), generator=generator).byte()
    return images.to(CUDA), masks.to(CUDA)


def stepper(model: deeplab.DeepLabv3, amp: str = "none"):
    model = model.place(CUDA).train()
    scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
    return model, main.make_optimizer(model, fused=not scaler.is_enabled()), scaler


@pytest.mark.parametrize("flags", [[], ["--device", "cuda"], ["--device", "cuda:0"], ["--gpu", 0]])
def test_evaluation_counts_as_the_cpu_does(cli, smallest, tmp_path, flags):
    torch.manual_seed(0)
    options = {"num_groups": 32, "weight_std": True, "aspp_rates": [6], "image_pooling": False}
    model = deeplab.build("tiny", False, 3, **options)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "x.pth")
    counts = []
    for device in (flags, ["--device", "cpu"]):
        assert cli("--checkpoint", "x.pth", *smallest, *device, "--workers", 2)[0] == 0
        metrics = json.loads((tmp_path / "data/val/x/metrics.json").read_text())
        counts.append(np.array(metrics["confusion"]))
    assert np.abs(counts[0] - counts[1]).sum() <= 2e-3 * counts[0].sum()


@pytest.mark.parametrize(
    "flags", [[], ["--tile", 33, "--eval_batch_size", 2], ["--scales", 0.75, 1, "--flip"]]
)
def test_prediction_is_that_of_the_cpu(cli, trained, flags):
    checkpoint, root = trained
    photos = sorted((root / "images").iterdir())[:3]
    for device in ("cuda", "cpu"):
        words = ["--predict", *photos, "--checkpoint", checkpoint, "--out", device, "--confidence"]
        assert cli(*words, *flags, "--device", device)[0] == 0
    for kind, least in (("mask", 0.99), ("confidence", 0.9)):
        for path in sorted(Path("cpu").glob(f"*_{kind}.png")):
            ours, theirs = (np.array(Image.open(p), int) for p in (path, Path("cuda", path.name)))
            assert (abs(ours - theirs) <= (kind == "confidence")).mean() > least
    model = deeplab.load(checkpoint, CUDA)
    for options in ({}, {"tile": 33}):
        for labels, path in zip(model.predict(list(map(str, photos)), **options), photos, strict=True):
            expected = deeplab.load(checkpoint).predict(str(path), **options)
            assert (labels == expected).mean() > 0.99
            scores = model.predict(str(path), probabilities=True, **options)
            assert (scores.argmax(0) == expected).mean() > 0.99 and abs(scores.sum(0) - 1).max() < 1e-3


def test_gpu_that_is_not_there(cli, smallest):
    for flags in (["--device", "cuda:99"], ["--gpu", 99]):
        status, _, err = cli("--train", "--exp", "x", *smallest, *flags)
        assert status == 1 and one_line(err) and "cuda:99" in err and "GPUs)" in err


def test_batches_come_from_pinned_memory(cli, smallest, monkeypatch):
    to, pinned = torch.Tensor.to, []

    def watch(self, *args, **kwargs):
        if kwargs.get("non_blocking"):
            pinned.append(self.is_pinned())
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watch)
    assert cli("--train", "--exp", "x", "--epochs", 1, *smallest)[0] == 0
    assert len(pinned) >= 9 and all(pinned)


@pytest.mark.parametrize("kind", NORMS)
def test_golden_logits(kind):
    model = deeplab.resnet101(False, **NORMS[kind]).double().eval()
    load_file_state(model, golden_state(kind))
    for network in (model.place(CUDA), model.fuse()):
        check_logits(network, kind, 1e-6, 1.0)
    # cuDNN's convs for float32 may round more than the CPU's, which GN+WS amplifies 10,000 times.
    limit, agreement = (0.1, 0.98) if kind == "gn_ws" else (1e-3, 0.999)
    for network in (model.float(), model.fuse()):
        check_logits(network, kind, limit, agreement)
    if kind != "gn_ws":
        use_tf32(True)
        check_logits(model, kind, 0.02, 0.99)


@pytest.mark.parametrize(("kind", "steps"), [("bn", 1), ("gn_ws", 5)])
def test_golden_training_steps(kind, steps):
    check_golden_steps(deeplab.resnet101(False, **NORMS[kind]).double().place(CUDA).train(), kind, steps)


def test_step_is_that_of_the_cpu_whatever_its_parts():
    expected = steps()
    for accum in (1, 4):
        for key, tensor in steps(accum, "cuda").items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["bn", "gn_ws"])
@pytest.mark.parametrize(("amp", "weighted"), [("none", False), ("bf16", False), ("bf16", True)])
def test_step_does_not_wait_for_the_gpu(kind, amp, weighted):
    model, optimizer, scaler = stepper(deeplab.build("tiny", False, **NORMS[kind]), amp)
    criterion = main.CrossEntropy(torch.rand(21) if weighted else None).to(CUDA)
    pixels = torch.randint(0, 256, (4, 3, 65, 65), dtype=torch.uint8, device=CUDA)
    sizes, (_, masks) = torch.full((4, 2), 65, device=CUDA), batch(4, 65)
    losses = []
    for i in range(4):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if i else "default")  # the first step sets things up
        try:
            x = model.normalize(pixels, sizes)
            losses.append(main.train_step(model, optimizer, scaler, criterion, x, masks, amp, accum=2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_has_float32_logits(amp, dtype):
    model = deeplab.build("tiny", False).place(CUDA).eval()
    images, _ = batch(2, 65)
    with torch.inference_mode(), deeplab.autocast(CUDA, amp):
        logits = model(images)
        features, _ = model.trunk(images)
    assert logits.dtype == torch.float32 and logits.isfinite().all() and features.dtype == dtype


def test_loss_scaler_that_skips_the_first_step():
    results = []
    for scales in ((1e38, 1.0), (1.0,)):
        model = two_groups(torch.channels_last).to(CUDA)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**20)
        optimizer = main.make_optimizer(model, fused=not scaler.is_enabled())
        before = [p.clone() for p in model.parameters()]
        for scale in scales:
            take_step(model, optimizer, scaler, 0, scale)
            if scale > 1:
                assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_momentum_goes_from_the_cpu_to_the_gpu_and_back():
    """Three steps, the second on the GPU in another memory layout, are three steps on the CPU, in float64."""
    home, away = ("cpu", torch.contiguous_format), ("cuda", torch.channels_last)
    results, off = [], torch.amp.GradScaler(enabled=False)
    for route in ((home, away, home), (home, home, home)):
        model = optimizer = None
        for seed, (device, layout) in enumerate(route):
            following = two_groups(layout).to(device).double()
            new = main.make_optimizer(following)
            if model:
                following.load_state_dict(model.state_dict())
                Training(following, new, off, 2, 1, {}, None, "", "").load_momentum(optimizer.state_dict())
            model, optimizer = following, new
            take_step(model, optimizer, off, seed)
        momenta = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        results.append([*model.parameters(), *momenta])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_group_norm_in_bfloat16_keeps_bfloat16():
    peaks = {}
    for amp in ("none", "bf16"):
        model, optimizer, scaler = stepper(deeplab.resnet50(False, num_groups=32, weight_std=True))
        images, masks = batch(16, 257)  # enough that the weights, 0.7 of 2.9 GB, count little
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            main.train_step(model, optimizer, scaler, main.CrossEntropy(), images, masks, amp)
        peaks[amp] = torch.cuda.max_memory_allocated()
        del model, optimizer
        torch.cuda.empty_cache()
    assert peaks["bf16"] <= 0.8 * peaks["none"], peaks


def test_compiled_training_over_five_validations(cli, smallest, monkeypatch):
    """Nothing is compiled anew, and no memory grows."""
    evaluate, held, graphs = main.evaluate, [], []

    def measuring(*args, **options):
        result = evaluate(*args, **options)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return result

    monkeypatch.setattr(main, "evaluate", measuring)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = ["--train", "--exp", "x", "--epochs", 5, "--save_every", 1, "--batch_size", 6, "--compile"]
    status, _, err = cli(*flags, *smallest)
    assert status == 0 and "recompile" not in err and len(held) == 5
    assert len(set(graphs)) == 1 and held[-1] - held[1] < 2**20, (graphs, held)


def test_stopped_and_resumed(cli, smallest, tmp_path, monkeypatch):
    flags = ["--train", "--exp", "x", "--epochs", 3, *smallest]
    step, taken = main.train_step, []

    def interrupted(*args, **kwargs):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    monkeypatch.setattr(main, "train_step", interrupted)
    status, _, err = cli(*flags)
    assert status == 143 and "x_epoch1_iter3.pth is saved" in err and len(taken) == 3
    status, out, _ = cli(*flags, "--resume", "auto")
    assert status == 0 and "iteration 3 of 6" in out and "peak memory of the GPU" in out


def test_too_large_a_batch_is_one_line(cli, small):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        status, _, err = cli("--train", "--exp", "x", *small, "--crop_size", 769)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert status == 1 and one_line(err) and "out of memory with --batch_size" in err and "--accum" in err


# Two GPUs


FLAGS = ["--save_every", 1, "--device", "cuda"]


@two_gpus
def test_two_gpus_take_the_step_of_one(tmp_path):
    assert torchrun(tmp_path, Path(__file__), "steps", tmp_path / "two.pth").wait() == 0
    two, whole = torch.load(tmp_path / "two.pth"), steps()
    for key, tensor in two["steps"].items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-9, atol=1e-11)
    # Of five images three are on one GPU: their statistics are those of the five.
    norm = torch.nn.BatchNorm2d(4, momentum=1.0).double()
    norm(two["images"])
    for key, tensor in norm.state_dict().items():
        torch.testing.assert_close(two["norm"][key], tensor)


@two_gpus
@pytest.mark.parametrize("flags", [NETWORK, ["--aspp_rates", 6], [*NETWORK, "--compile"]])
def test_two_gpus_train_and_evaluate(tmp_path, flags):
    root = make_list_dataset(tmp_path / "set", train=7, val=5)
    data = ["--dataset", "custom", "--data_root", root, *SMALL]
    run = torchrun(tmp_path, TINY, "--train", "--exp", "x", "--epochs", 2, *data, *flags, *FLAGS)
    assert run.wait() == 0
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert out.count("7 images to train on") == 1 and "recompile" not in err
    folder = tmp_path / "data/val/deeplab_tiny_custom_v3_x_epoch2"
    results = []
    for processes in (2, 1):
        flags = ["--exp", "x", *data[:4], "--device", "cuda"]
        assert torchrun(tmp_path, TINY, *flags, processes=processes).wait() == 0
        results.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert results[0].keys() == results[1].keys() and len(results[0]) == 9
    for name in ("metrics.json", *(f"val{i}.png" for i in range(5))):
        if name == "metrics.json":
            two, one = (np.array(json.loads(files[name])["confusion"]) for files in results)
            assert np.abs(two - one).sum() <= 1e-3 * one.sum()
        else:
            two, one = (np.array(Image.open(io.BytesIO(files[name]))) for files in results)
            assert one.shape == (60, 80) and (two == one).mean() >= 0.999
    said = re.findall(r"mean IoU ([\d.]+)\n", out)[-1]
    assert float(said) == pytest.approx(100 * json.loads(results[1]["metrics.json"])["mean_iou"], abs=0.5)


@two_gpus
def test_starts_that_differ_are_refused(tmp_path):
    root = make_list_dataset(tmp_path / "set")
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK, *FLAGS]
    for machine, epochs in (("0", 2), ("1", 1)):
        (tmp_path / machine).mkdir()
        assert torchrun(tmp_path / machine, TINY, *flags, "--epochs", epochs, processes=1).wait() == 0
    run = torchrun(tmp_path, Path(__file__), "machines", *flags, "--epochs", 3, "--resume", "auto")
    assert run.wait(timeout=120) != 0
    assert "the processes do not start alike (iteration: 4, 2)" in (tmp_path / "err").read_text()


@two_gpus
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_or_killed_process_ends_the_run_within_a_minute(tmp_path, number):
    """SIGTERM to all of them leaves a checkpoint."""
    root = make_list_dataset(tmp_path / "set")
    flags = ["--train", "--exp", "x", "--dataset", "custom", "--data_root", root, *SMALL, *NETWORK, *FLAGS]
    run = torchrun(tmp_path, TINY, *flags, "--save_every", 10_000, "--epochs", 10_000, "--log_every", 1)
    wait_for(tmp_path / "out", run)
    if number == signal.SIGTERM:
        run.send_signal(number)
    else:
        os.kill(children(run)[1], number)
    begin = time.monotonic()
    assert run.wait(timeout=120) != 0 and time.monotonic() - begin < 60
    if number == signal.SIGTERM:
        (checkpoint,) = (tmp_path / "data").glob("*_iter*.pth")
        assert f"data/{checkpoint.name} is saved" in (tmp_path / "err").read_text()


def write_steps(path: str) -> None:
    """In each of two processes: the steps of test_parallel.py, and a SyncBatchNorm of uneven parts."""
    torch.cuda.set_device(main.LOCAL_RANK)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    result = {"steps": steps(2, f"cuda:{main.LOCAL_RANK}")}
    images = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    norm = torch.nn.SyncBatchNorm(4, momentum=1.0).double().cuda()
    norm(images[main.RANK :: 2].cuda())
    result.update(images=images, norm={key: tensor.cpu() for key, tensor in norm.state_dict().items()})
    if main.RANK == 0:
        torch.save(result, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "machines":
        import tiny

        tiny.run(sys.argv[2:], folder=str(main.RANK))
    else:
        write_steps(sys.argv[2])

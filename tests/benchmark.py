"""How fast this is, beside the plain way of doing the same: `python tests/benchmark.py [--device cuda]`.

Prints one markdown table. The two of a pair take turns, so that a busy machine slows both; shown are medians,
of the ratio too. It needs no files: the photos are drawn here.
"""

import argparse
import copy
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch._inductor.config
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.models.segmentation import (
    deeplabv3_mobilenet_v3_large,
    deeplabv3_resnet50,
    deeplabv3_resnet101,
)

import deeplab
import main
from commands.check import drop_bad
from commands.evaluate import confusion_matrices, evaluate, metrics
from commands.predict import predict_batch, segment_tiles
from datasets import SegmentationDataset, Shapes
from files.masks import VOC_CLASSES, Labels
from files.pictures import voc_palette
from files.tiles import windows

SIZE = 513  # of crops and of padded images
GFLOP = 142  # of a forward pass of resnet101 at that size
MEAN, STD = 255 * torch.tensor(deeplab.MEAN).view(3, 1, 1), 255 * torch.tensor(deeplab.STD).view(3, 1, 1)


def draw_photos(folder: str, count: int) -> SegmentationDataset:
    """Photos of VOC's size, smooth with some noise, and masks of 21 classes."""
    rng, pairs = np.random.RandomState(0), []
    for i in range(count):
        ground = rng.randint(0, 256, (12, 16, 3)).astype(np.uint8)
        photo = np.array(Image.fromarray(ground).resize((500, 375), Image.Resampling.BICUBIC))
        mask = np.where(photo[..., 0] > 251, 255, photo[..., 0] // 12).astype(np.uint8)
        photo = (photo + rng.normal(0, 4, photo.shape)).clip(0, 255).astype(np.uint8)
        pairs.append((f"{folder}/{i}.jpg", f"{folder}/{i}.png"))
        Image.fromarray(photo).save(pairs[-1][0], quality=90)
        Image.fromarray(mask).save(pairs[-1][1])
    return SegmentationDataset(pairs, Labels(VOC_CLASSES, voc_palette(21)), eval_size=(SIZE, SIZE))


def compare(ours: Callable, baseline: Callable, rounds: int, sync: Callable) -> tuple[float, float, float]:
    """Median seconds of each, taking turns after one round to warm up, and the median of their ratios."""
    times = []
    for _ in range(rounds + 1):
        marks = [time.perf_counter()]
        for run in (ours, baseline):
            run()
            sync()
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    times = times[1:]
    return *(median(column) for column in zip(*times, strict=True)), median(b / a for a, b in times)


def plain_sample(image_path: str, mask_path: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A training sample: the whole photo is flipped, scaled, normalised and padded, then cropped."""
    image, mask = Image.open(image_path).convert("RGB"), Image.open(mask_path)
    if rng.random() < 0.5:
        flip = Image.Transpose.FLIP_LEFT_RIGHT
        image, mask = image.transpose(flip), mask.transpose(flip)
    scale = 2 ** rng.uniform(-1, 1)
    size = [round(side * scale) for side in image.size]
    image, mask = image.resize(size, Image.Resampling.LANCZOS), mask.resize(size, Image.Resampling.NEAREST)
    image = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    image, mask = (image - MEAN) / STD, torch.from_numpy(np.array(mask)).long()
    padding = [0, max(0, SIZE - size[0]), 0, max(0, SIZE - size[1])]
    image, mask = F.pad(image, padding), F.pad(mask, padding, value=255)
    top, left = (int(rng.integers(side - SIZE + 1)) for side in mask.shape)
    return image[:, top : top + SIZE, left : left + SIZE], mask[top : top + SIZE, left : left + SIZE]


def plain_counts(prediction: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Intersection, prediction and truth per class, by three histograms."""
    prediction, mask = np.where(mask == 255, 0, prediction + 1), np.where(mask == 255, 0, mask + 1)
    hits = np.where(prediction == mask, prediction, 0)
    return [np.histogram(labels, bins=21, range=(1, 21))[0] for labels in (hits, prediction, mask)]


@torch.inference_mode()
def plain_evaluate(model: nn.Module, dataset: SegmentationDataset, device: torch.device) -> np.ndarray:
    """One image at a time, in one process."""
    counts = 0
    for image_path, mask_path in dataset.pairs:
        image = torch.from_numpy(np.array(Image.open(image_path))).permute(2, 0, 1).float()
        mask = torch.from_numpy(np.array(Image.open(mask_path))).long()
        padding = [0, SIZE - image.shape[2], 0, SIZE - image.shape[1]]
        x = F.pad((image - MEAN) / STD, padding)[None].to(device)
        prediction = model(x).argmax(1)[0].cpu().numpy()
        counts = counts + np.array(plain_counts(prediction, F.pad(mask, padding, value=255).numpy()))
    return counts


def input_rows(dataset: SegmentationDataset) -> list[tuple]:
    """Whole batches, as a worker of the loader makes them."""
    rng, dataset = np.random.default_rng(0), copy.copy(dataset)
    dataset.crop_size = SIZE
    jittered = copy.copy(dataset)
    jittered.color_jitter = 0.4

    def ours(dataset: SegmentationDataset = dataset):
        epoch = int(rng.integers(1 << 30))
        dataset.collate([dataset[epoch, i] for i in range(len(dataset))])

    def plain():
        default_collate([plain_sample(*pair, rng) for pair in dataset.pairs])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs = {
        "training samples per core": (ours, plain),
        "training samples per core, with --color_jitter and without": (partial(ours, jittered), ours),
    }
    rows = []
    for what, pair in pairs.items():
        a, b, ratio = compare(*pair, 9, lambda: None)
        rows.append((what, f"{len(dataset) / a:.0f} /s", f"{len(dataset) / b:.0f} /s", ratio))
    torch.set_num_threads(threads)
    return rows


@torch.inference_mode()
def forward_rows(device: torch.device, sync: Callable, rounds: int) -> list[tuple]:
    plain = deeplab.resnet101(False).eval().to(device)
    fused, compiled = plain.fuse().place(device), plain.fuse().place(device)
    torch._inductor.config.freezing = True
    compiled.compile(dynamic=False)
    peer = deeplabv3_resnet101(weights=None, weights_backbone=None, num_classes=21).eval().to(device)
    x = torch.randn(1, 3, SIZE, SIZE, device=device)
    xl = x.contiguous(memory_format=fused.memory_format)

    # A large conv tells the machine's limit: the matmul of MKL is slower than it on some processors.
    width = 512 if device.type == "cpu" else 2048
    conv, y, seconds = (
        nn.Conv2d(width, width, 3, device=device),
        torch.randn(1, width, 66, 66, device=device),
        [],
    )
    for _ in range(8):
        start = time.perf_counter()
        conv(y)
        sync()
        seconds.append(time.perf_counter() - start)
    limit = 2 * 9 * (width * 64) ** 2 / min(seconds) / 1e9

    rows = []
    for what, ours, baseline in (
        ("forward, fused", fused, plain),
        ("forward, fused and compiled", compiled, plain),
        ("forward, fused; torchvision's (stride 8)", fused, peer),
    ):
        a, b, ratio = compare(partial(ours, xl), partial(baseline, x), rounds, sync)
        if "torchvision" not in what:
            what += f"; {GFLOP / a / limit:.0%} of a large conv's {limit:,.0f} GFLOP/s"
        rows.append((what, f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", ratio))
    return rows


@torch.inference_mode()
def runtime_rows(device: torch.device, rounds: int) -> list[tuple]:
    """The compiled pass beside the runtimes that are installed, all with the same folded network; and in
    bfloat16 beside float32, where the processor has it."""
    if device.type == "cuda":
        return []
    x, fused = torch.randn(1, 3, SIZE, SIZE), deeplab.resnet101(False).fuse()
    ours = {amp: compiled_pass(fused, x, amp) for amp in (("none", "bf16") if has_bf16() else ("none",))}
    expected = ours["none"]().argmax(1)
    peers = {("in float32", "bf16"): ours["none"], **runtimes(fused, x)}
    rows = []
    for (name, amp), peer in peers.items():
        if amp not in ours:
            continue
        a, b, ratio = compare(ours[amp], peer, rounds, lambda: None)
        agreement = (ours[amp]().argmax(1) == expected).float().mean().item()
        share = f", bfloat16, labels as in float32: {agreement:.1%}" if amp == "bf16" else ""
        what = f"forward, fused and compiled{share}; {name}"
        rows.append((what, f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", ratio))
    return rows


def compiled_pass(fused: deeplab.DeepLabv3, x: Tensor, amp: str) -> Callable[[], Tensor]:
    model = copy.deepcopy(fused).place("cpu")
    model.compile(dynamic=False)
    x = x.contiguous(memory_format=model.memory_format)

    def run() -> Tensor:
        with deeplab.autocast(x.device, amp):
            return model(x)

    return run


def runtimes(fused: deeplab.DeepLabv3, x: Tensor) -> dict[tuple[str, str], Callable]:
    """A pass of each runtime that is installed, by its name and number format."""
    passes = {}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/network.onnx"
        try:
            import onnxruntime

            torch.onnx.export(fused, (x,), path, dynamo=True, verbose=False, external_data=False)
            session = onnxruntime.InferenceSession(path)
            feed = {session.get_inputs()[0].name: x.numpy()}
            passes["onnxruntime's", "none"] = partial(session.run, None, feed)
            import openvino

            for amp, precision in (("none", "f32"), ("bf16", "bf16")):
                hint = {"INFERENCE_PRECISION_HINT": precision}
                network = openvino.Core().compile_model(path, "CPU", hint)
                passes["OpenVINO's", amp] = partial(network, [x.numpy()])
        except ImportError as error:
            print(f"<!-- {error.name} is not installed: no row of it -->")
    return passes


def has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.exists() and "_bf16" in info.read_text()


def training_rows(device: torch.device, sync: Callable) -> list[tuple]:
    cuda = device.type == "cuda"
    backbone, crop, batch = ("resnet101", SIZE, 16) if cuda else ("resnet50", 129, 4)

    def stepper(placed: bool, amp: str = "none", **norm) -> Callable:
        model = deeplab.build(backbone, False, **norm).train().to(device)
        model = model.place(device) if placed else model
        images = torch.randn(batch, 3, crop, crop, device=device)
        masks = torch.randint(0, 21, (batch, crop, crop), device=device).byte()
        return our_stepper(model, images, masks, amp)

    rows, gn, ws = [], {"num_groups": 32}, {"num_groups": 32, "weight_std": True}
    steps = [
        ("", stepper(True), stepper(False)),
        (", bfloat16", stepper(True, "bf16"), stepper(False)),
        (", GN: with WS and without", stepper(True, **ws), stepper(True, **gn)),
    ]
    if cuda:
        layouts = stepper(True, "bf16", **ws), stepper(False, "bf16", **ws)
        steps.append((", GN+WS, bfloat16: channels_last and contiguous", *layouts))
    for what, ours, baseline in steps:
        a, b, ratio = compare(ours, baseline, 5, sync)
        what = f"training step, {backbone}, {batch} crops of {crop}{what}"
        rows.append((what, f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", ratio))
    return rows


def plain_stepper(model: nn.Module, images: Tensor, masks: Tensor) -> Callable:
    """A training step of another library's model, as its users write it."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.007, momentum=0.9, weight_decay=1e-4)

    def step():
        optimizer.zero_grad()
        out = model(images)
        logits = out["out"] if isinstance(out, dict) else out  # torchvision's
        F.cross_entropy(logits, masks.long(), ignore_index=255).backward()
        optimizer.step()

    return step


def our_stepper(model: deeplab.DeepLabv3, images: Tensor, masks: Tensor, amp: str = "none") -> Callable:
    """A training step of `main.py`."""
    optimizer, scaler = main.make_optimizer(model.train()), torch.amp.GradScaler(enabled=False)
    images = images.contiguous(memory_format=model.memory_format)
    return partial(main.train_step, model, optimizer, scaler, main.CrossEntropy(), images, masks, amp)


def peer_rows(device: torch.device, sync: Callable, rounds: int) -> list[tuple]:
    """Models beside other libraries' own with the same trunk. smp takes only sizes that its stride divides;
    its v3plus has depthwise separable convs in ASPP and decoder, by default or always."""
    empty = {"weights": None, "weights_backbone": None, "num_classes": 21}
    peer = deeplabv3_mobilenet_v3_large(**empty).eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(peer.state_dict(), f"{folder}/peer.pth")
        ours = deeplab.load(f"{folder}/peer.pth")
    passes = [("mobilenet_v3_large with torchvision's head, fused; torchvision's", ours, peer, SIZE)]
    v3, v3plus = partial(deeplab.resnet50, False), partial(deeplab.resnet50, False, head="v3plus")
    steps = [
        ("v3; torchvision's (stride 8)", v3(), deeplabv3_resnet50(**empty)),
        ("v3, stride 8; torchvision's (stride 8)", v3(output_stride=8), deeplabv3_resnet50(**empty)),
    ]
    try:
        import segmentation_models_pytorch as smp

        empty = {"encoder_name": "resnet50", "encoder_weights": None, "classes": 21}
        full = {**empty, "decoder_aspp_separable": False}
        smp_v3 = smp.DeepLabV3(**empty, encoder_output_stride=16)
        steps.append(("v3; smp's (stride 16)", v3(), smp_v3))
        steps.append(("v3plus; smp's", v3plus(), smp.DeepLabV3Plus(**empty)))
        steps.append(("v3plus; smp's with full convs in ASPP", v3plus(), smp.DeepLabV3Plus(**full)))
        for what, options in (("", empty), (" with full convs in ASPP", full)):
            peer = smp.DeepLabV3Plus(**options).eval()
            passes.append((f"resnet50, v3plus, fused; smp's{what}", v3plus().eval(), peer, SIZE - 1))
    except ImportError as error:
        print(f"<!-- {error.name} is not installed: no row of it -->")

    rows = []
    for what, ours, peer, size in passes:
        ours, peer, x = (
            ours.fuse().place(device),
            peer.to(device),
            torch.randn(1, 3, size, size, device=device),
        )
        with torch.inference_mode():
            xl = x.contiguous(memory_format=ours.memory_format)
            a, b, ratio = compare(partial(ours, xl), partial(peer, x), rounds, sync)
        rows.append((f"forward, {what}, {size}", f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", ratio))
    crop, batch = (SIZE - 1, 16) if device.type == "cuda" else (128, 4)
    data = (
        torch.randn(batch, 3, crop, crop, device=device),
        torch.randint(0, 21, (batch, crop, crop), device=device).byte(),
    )
    for what, ours, peer in steps:
        steppers = our_stepper(ours.place(device), *data), plain_stepper(peer.to(device), *data)
        a, b, ratio = compare(*steppers, rounds, sync)
        what = f"training step, resnet50, {batch} crops of {crop}, {what}"
        rows.append((what, f"{1000 * a:.0f} ms", f"{1000 * b:.0f} ms", ratio))
    return rows


def evaluation_rows(dataset: SegmentationDataset, device: torch.device, sync: Callable) -> list[tuple]:
    plain, fused = deeplab.resnet101(False).eval().to(device), deeplab.resnet101(False).fuse().place(device)
    n, workers = len(dataset), 4 if device.type == "cuda" else 0
    drop_bad(dataset)
    ours = partial(evaluate, fused, dataset, device, deeplab.Inference(), workers)
    a, b, ratio = compare(ours, partial(plain_evaluate, plain, dataset, device), 2, sync)
    return [("evaluation, images", f"{n / a:.2f} /s", f"{n / b:.2f} /s", ratio)]


@torch.inference_mode()
def tile_rows(device: torch.device, sync: Callable) -> list[tuple]:
    """An image in tiles beside the whole of it at once, by the pixels that the network sees."""
    side = 4096
    model = deeplab.build("mobilenet_v3_large", False).fuse().place(device)
    image = Image.effect_noise((side, side), 80).convert("RGB")
    rows = []
    for tile in (SIZE, 1025):
        inference = deeplab.Inference(batch_size=1, tile=tile)
        seen = (len(windows(side, tile, inference.overlap)) * tile) ** 2 / side**2
        tiled = partial(segment_tiles, model, image, inference, True)
        whole = partial(predict_batch, model, [image], deeplab.Inference(), True)
        a, b, _ = compare(tiled, lambda whole=whole: list(whole()), 2, sync)
        a, b = 1000 * a / seen / (side**2 / 1e6), 1000 * b / (side**2 / 1e6)
        what = f"megapixel in tiles of {tile}, which see {seen:.2f} times the image; of {side}x{side} at once"
        rows.append((what, f"{a:.0f} ms", f"{b:.0f} ms", b / a))
    return rows


def count_rows(device: torch.device, sync: Callable) -> list[tuple]:
    """The counts of each image of a batch, as evaluation takes them."""
    predictions = torch.randint(0, 21, (4, SIZE, SIZE), device=device).byte()
    masks = torch.randint(0, 22, (4, SIZE, SIZE), device=device).byte()
    masks[masks == 21] = 255

    def plain():
        for prediction, mask in zip(predictions.cpu().numpy(), masks.cpu().numpy(), strict=True):
            plain_counts(prediction.astype(int), mask.astype(int))

    a, b, ratio = compare(lambda: confusion_matrices(predictions, masks, 21).cpu(), plain, 11, sync)
    return [("confusion counts of an image", f"{250 * a:.1f} ms", f"{250 * b:.1f} ms", ratio)]


def print_mosaic(checkpoint: str, device: torch.device) -> None:
    """The mean IoU on a mosaic of 8000x6000 of the scenes that `shapes` validates on, shrunk and in tiles."""
    scenes, rng = Shapes("data/shapes", "val"), np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(50 * 47 // len(scenes) + 1)])
    samples, order = [scenes[i] for i in range(len(scenes))], order[: 47 * 50].reshape(47, 50).tolist()
    image = torch.cat([torch.cat([samples[i][0] for i in row], 2) for row in order], 1)[:, :6000, :8000]
    truth = torch.cat([torch.cat([samples[i][1] for i in row], 1) for row in order])[None, :6000, :8000]
    image, model = image.permute(1, 2, 0).contiguous().numpy(), deeplab.load(checkpoint, device).fuse()
    print("| mosaic of 8000x6000 | mean IoU |\n|---|---|", flush=True)
    for tile in (None, 513, 257, 129):
        labels = torch.from_numpy(model.predict(image, tile=tile).copy())[None]
        mean_iou = metrics(confusion_matrices(labels, truth, len(model.classes)).sum(0))["mean_iou"]
        print(f"| {f'tiles of {tile}' if tile else 'shrunk'} | {100 * mean_iou:.2f} |", flush=True)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(": ")[1] if names else platform.processor()


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--mosaic", metavar="CHECKPOINT", help="only what tiles give, with a model of shapes")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.mosaic:
        return print_mosaic(args.mosaic, device)
    cuda = device.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    gpu = f", {torch.cuda.get_device_name()}" if cuda else ""
    print(f"{processor()}{gpu}, {platform.platform()}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {date.today()}\n")
    print("| what | ours | baseline | ratio |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        dataset = draw_photos(folder, 16)
        few = copy.copy(dataset)
        few.pairs = dataset.pairs[: 16 if cuda else 8]
        for measure, *inputs in (
            (input_rows, dataset),
            (forward_rows, device, sync, 30 if cuda else 4),
            (runtime_rows, device, 5),
            (training_rows, device, sync),
            (peer_rows, device, sync, 20 if cuda else 7),
            (evaluation_rows, few, device, sync),
            (tile_rows, device, sync),
            (count_rows, device, sync),
        ):
            for *cells, ratio in measure(*inputs):
                print(f"| {' | '.join(cells)} | {ratio:.2f} |", flush=True)
    print(f"\npeak memory of it all: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    if cuda:
        print(f"peak memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    run()

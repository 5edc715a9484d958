"""The flags of main.py: their names, meanings and defaults, and which go together. Imports no torch."""

import argparse
import math
import os
import re
from difflib import get_close_matches

from commands.download import DOWNLOADS
from utils import RANK, WORLD

BACKBONES = ["resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2"]
BACKBONES += ["wide_resnet101_2", "mobilenet_v3_large"]
# The data sets, and where they lie without --data_root.
DATA_ROOTS = {
    "pascal": "data/VOCdevkit",
    "cityscapes": "data/cityscapes",
    "custom": None,
    "shapes": "data/shapes",
}
# What --dataset shapes sets unless a flag says otherwise: a run of minutes on a CPU.
SHAPES_DEFAULTS = {
    "backbone": "resnet50",
    "scratch": True,
    "groups": 32,
    "weight_std": True,
    "crop_size": 81,
    "batch_size": 4,
    "epochs": 4,
    "base_lr": 0.02,
}
# Where a checkpoint tells what model it holds, these are None unless given.
MODEL_FLAGS = ["backbone", "groups", "weight_std", "beta", "multi_grid", "aspp_rates", "no_image_pooling"]
MODEL_FLAGS += ["output_stride", "head"]
CUSTOM_LR = (
    0.007  # for --dataset custom and a batch of 16, as in the paper; the published default suits no other
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        hint = "all flags: python main.py --help"
        if message.startswith("unrecognized") and (flag := re.search(r"--[\w-]+", message)):
            name, known = flag[0].replace("-", "_").replace("__", "--", 1), list(self._option_string_actions)
            close = [k for k in known if k.endswith("_" + name[2:])] or get_close_matches(name, known)
            close = [name] if name in known else close
            hint = f"did you mean {close[0]}?" if close else hint
        self.exit(2, f"main.py: error: {message} ({hint})\n" if RANK == 0 else None)


def positive(text: str) -> int:
    """An argparse type: an integer from 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def make_parser() -> Parser:
    """The flags and their defaults; each help text is a row of the README, too."""
    about = "DeepLabv3. Train: python main.py --train --exp NAME. Evaluate: the same without --train."
    parser = Parser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # its own takes -1e-05 for a flag
    yes, switch = "store_true", argparse.BooleanOptionalAction

    group = parser.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group().add_argument
    add("--train", action=yes, help="train; the default is to evaluate")
    add("--check", action=yes, help="read all files of the data set, print what it holds and every fault")
    add(
        "--predict",
        metavar="PATH",
        nargs="+",
        help="segment images, folders, patterns; - reads paths from stdin",
    )
    add(
        "--export",
        metavar="FILE",
        help="write the network to FILE.onnx or .pt2, or its weights to FILE.pth",
    )
    add("--download", metavar="NAME", nargs="+", choices=DOWNLOADS, help=f"fetch {', '.join(DOWNLOADS)}")
    add("--convert", metavar="EXPORT", help="make a data set, --data_root, of an annotation tool's export")
    add = group.add_argument
    add("--exp", metavar="NAME", help="name of the experiment, part of the checkpoints' names")
    add("--resume", metavar="PATH", help="continue this checkpoint; `auto`: the newest of --exp, if any")
    add("--init", metavar="PATH", help="start from these weights, without the classifier if classes differ")
    add("--checkpoint", metavar="PATH", help="evaluate this file, or predict with it")
    add("--best", action=yes, help="take the checkpoint of --exp with the best validation, not the newest")
    add("--out", metavar="DIR", default="data/predictions", help="where --predict writes")
    add("--url", help="mirror for one --download NAME: address of its file or of its folder")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATA_ROOTS, default="pascal", help="shapes needs no files")
    add("--data_root", metavar="DIR", help="folder of the data set, if not the one under data/")
    add("--split", choices=("train", "val", "test"), default="val", help="split to evaluate")
    add("--train_list", metavar="NAME", help="train pascal on this list of ImageSets/Segmentation")
    add("--classes", metavar="NAME", nargs="+", help="--convert only these; pascal: VOC's 20, from COCO")
    add("--others", choices=("background", "ignore"), default="background", help="what the others become")
    add("--images", metavar="DIR", help="where the images are, if the export of --convert has none")
    add("--crop_size", type=positive, default=513, help="height and width of the training crops")
    add("--workers", type=int, help="processes that load images; 0: load in the main one (4, or one a core)")
    add(
        "--value_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="values that become black and white in images that are not of 8 bits",
    )
    add(
        "--bands",
        type=positive,
        nargs=3,
        metavar=("R", "G", "B"),
        help="bands of TIFFs, from 1, to take for red, green and blue",
    )
    add("--max_pixels", type=positive, default=10**9, help="refuse images of more pixels")
    add("--skip_bad", action=yes, help="decode all files first, and leave out damaged samples")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=BACKBONES, default="resnet101", help="network of torchvision to build on")
    add("--head", choices=("v3", "v3plus", "torchvision"), default="v3", help="what follows ASPP")
    add("--groups", type=int, help="use GroupNorm with N groups; 0 is BatchNorm", metavar="N")
    add("--weight_std", action=switch, default=False, help="weight standardisation of the convs")
    add("--beta", action=yes, help="three 3x3 convs as the stem instead of one 7x7")
    add("--output_stride", type=int, choices=(8, 16, 32), default=16, help="input size over feature map size")
    add("--multi_grid", type=positive, nargs=3, default=[1, 1, 1], help="relative rates in layer4")
    add("--aspp_rates", type=positive, nargs="+", default=[6, 12, 18], help="atrous rates at stride 16")
    add("--no_image_pooling", action=yes, help="leave out ASPP's image-level branch")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=30, help="passes over the training list; or the one to evaluate")
    add("--batch_size", type=positive, default=16, help="images in one step, over all processes")
    add(
        "--accum",
        type=positive,
        default=1,
        help="compute a batch in N parts, to need less memory",
        metavar="N",
    )
    add("--base_lr", type=float, default=0.00025, help="initial learning rate")
    add("--last_mult", type=float, default=1.0, help="learning rate of ASPP, relative to the trunk's")
    add(
        "--class_weights",
        metavar="W",
        nargs="+",
        help="weights of the classes in the loss; auto: median frequency",
    )
    add(
        "--top_k",
        type=float,
        metavar="SHARE",
        default=1.0,
        help="learn from the share of each image's pixels that have the highest loss",
    )
    add("--dice", type=float, metavar="W", default=0.0, help="add W times (1 - Dice) to the loss")
    add("--label_smoothing", type=float, metavar="E", default=0.0, help="share of the target for all classes")
    add("--color_jitter", type=float, metavar="S", default=0.0, help="vary colours by up to this share")
    add("--scratch", action=switch, default=False, help="do not start from ImageNet weights")
    add("--freeze_bn", action=yes, help="keep BatchNorm's statistics, scale and shift as they are")
    add("--seed", type=int, default=0, help="the same seed gives the same run, on the CPU to the bit")
    add(
        "--save_every", type=positive, default=10, help="epochs between checkpoints; the last is always saved"
    )
    add("--save_every_iters", type=positive, help="iterations between further checkpoints, within epochs")
    add(
        "--keep",
        type=positive,
        help="keep the N newest checkpoints and the best one, delete others",
        metavar="N",
    )
    add("--patience", type=positive, help="stop after N validations without a better one", metavar="N")
    add("--log_every", type=positive, default=10, help="iterations between rows of the log")
    add("--plots", action=yes, help="draw the log as curves (needs matplotlib)")
    add("--tensorboard", action=yes, help="write the log and samples for TensorBoard")

    add = parser.add_argument_group("evaluation and prediction").add_argument
    add("--eval_batch_size", type=positive, default=4, help="images, or tiles, in one forward pass")
    add("--tile", type=positive, metavar="SIZE", help="segment larger images in tiles of this side")
    add(
        "--overlap",
        type=float,
        metavar="SHARE",
        default=0.25,
        help="share of its side that a tile overlaps the next by",
    )
    add("--scales", type=float, nargs="+", default=[1.0], help="average the scores over these image sizes")
    add("--flip", action=yes, help="average the scores over the mirrored image")
    add("--samples", type=int, default=8, help="rows of samples.png: image, truth, prediction")
    add("--confidence", action=yes, help="with --predict, write the probability of the predicted class")
    add(
        "--max_side",
        type=positive,
        default=2049,
        help="longest side of an image that is not shrunk for --predict",
    )

    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=int, help="number of the CUDA device, 0 if not given")
    add("--device", help="cuda, cuda:1, mps or cpu; the default is the best there is")
    add(
        "--amp",
        choices=("bf16", "fp16", "none"),
        help="number format of convs (bf16 in training on GPUs that have it)",
    )
    add("--compile", action=yes, help="compile the model: minutes at first, then faster; needs a compiler")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults that the data set brings; None for what a checkpoint tells."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.dataset == "shapes":
        parser.set_defaults(**SHAPES_DEFAULTS)
    if args.dataset == "custom":
        parser.set_defaults(base_lr=CUSTOM_LR * args.batch_size / 16)
    if not args.train or args.init:
        parser.set_defaults(**dict.fromkeys(MODEL_FLAGS))
    # None is not given, which `check_args` asks.
    parser.set_defaults(**{"split": None} if args.train else {"epochs": None})
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.split = args.split or "val"
    if args.workers is None:  # torch warns of more than there are cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = min(4, cores or 1)
    args.data_root = args.data_root or DATA_ROOTS[args.dataset]
    return args


def model_options(args: argparse.Namespace) -> dict:
    """The arguments of `DeepLabv3` that the flags give."""
    keys = ("backbone", "weight_std", "beta", "output_stride", "multi_grid", "aspp_rates", "head")
    options = {key: getattr(args, key) for key in keys} | {"num_groups": args.groups}
    options["image_pooling"] = None if args.no_image_pooling is None else not args.no_image_pooling
    return {key: value for key, value in options.items() if value is not None}


def convert_options(args: argparse.Namespace) -> dict:
    """The arguments of `convert` that the flags give."""
    options = {"export": args.convert, "root": args.data_root, "images": args.images}
    return options | {"wanted": args.classes, "others": args.others, "skip_bad": args.skip_bad}


def inference_options(args: argparse.Namespace) -> dict:
    """The arguments of `inference.Inference` that the flags give."""
    return {
        "scales": tuple(args.scales),
        "flip": args.flip,
        "amp": args.amp,
        "batch_size": args.eval_batch_size,
        "max_side": args.max_side,
        "tile": args.tile,
        "overlap": args.overlap,
    }


def evaluation_flags(args: argparse.Namespace) -> dict:
    """The flags that an evaluation goes by, for its results to tell; others are of training."""
    keys = ["exp", "epochs", "best", "checkpoint", "dataset", "split", "value_range", "bands", "max_pixels"]
    keys += ["skip_bad", "output_stride", "eval_batch_size", "tile", "overlap", "scales", "flip", "amp"]
    flags = {key: getattr(args, key) for key in [*keys, "compile", "device", "gpu"]}
    return {**flags, "data_root": os.path.abspath(args.data_root)}  # data/ may be a link


def reading_options(args: argparse.Namespace) -> dict:
    """The fields of `files.images.Reading` that the flags give; a checkpoint tells the others."""
    given = {"value_range": args.value_range, "bands": args.bands}
    options = {key: tuple(value) for key, value in given.items() if value is not None}
    return {**options, "max_pixels": args.max_pixels}


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """End with the first mistake that the flags show by themselves."""
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):  # of a shell's variable that is not set
            parser.error(f"--{name} is empty: give it a value, or leave it out")
    evaluates = not any((args.train, args.predict, args.export, args.download, args.check, args.convert))
    if not args.exp and (args.train or (evaluates and not args.checkpoint)):
        parser.error("--exp NAME is needed: it names the checkpoints; to try it out, add --dataset shapes")
    if args.convert and not args.data_root:
        parser.error("--convert needs --data_root DIR: the folder of the data set that it makes")
    if not args.convert and (args.classes or args.images or args.others != "background"):
        parser.error("--classes, --others and --images go with --convert")
    if args.others == "ignore" and not args.classes:
        parser.error("--others ignore goes with --classes: without them, there are no others")
    if args.train_list and not (args.train and args.dataset == "pascal"):
        parser.error("--train_list goes with --train and --dataset pascal")
    if args.train_list and os.path.basename(args.train_list) != args.train_list:
        parser.error(f"--train_list {args.train_list!r}: give the list's name, without folder and ending")
    if args.url and len(args.download or ()) != 1:
        parser.error("--url replaces the address of one --download NAME: give one NAME with it")
    if args.url and not args.url.lower().startswith(("http://", "https://")):
        parser.error(f"--url {args.url!r} is no http:// or https:// address; a file at hand goes to data/")
    if WORLD > 1 and not (args.train or evaluates):
        parser.error("only training and evaluation take several processes: leave out torchrun")
    if args.predict and args.compile:
        parser.error("--compile is for training and evaluation: photos have too many sizes to compile for")
    if (args.predict or args.export) and not (args.checkpoint or args.exp):
        name = "predict" if args.predict else "export"
        parser.error(f"--{name} needs --checkpoint FILE, or --exp NAME for the newest of an experiment")
    if args.export and (args.scales != [1.0] or args.flip):
        parser.error("--export writes one pass of the network: leave out --scales and --flip")
    if args.export and (args.device or args.amp or args.compile):
        parser.error("--export writes for any machine, in float32: leave out --device, --amp and --compile")
    if args.plots and not args.train:
        parser.error("--plots draws a training run: leave it out (an evaluation writes report.html)")
    if args.best and (not args.exp or args.checkpoint or args.epochs or args.train or args.check):
        parser.error("--best picks a checkpoint of --exp: leave out --train, --check, --checkpoint, --epochs")
    validations = math.ceil((args.epochs or 0) / args.save_every)
    if args.patience and not args.train:
        parser.error("--patience goes with --train")
    if args.patience and args.patience >= validations:
        given = f"{args.epochs} epochs have {validations} validations, one every {args.save_every} epochs"
        parser.error(f"--patience {args.patience} would never stop: {given}; lower --save_every")
    if args.train and args.split:
        parser.error("--split is for evaluation: training reads train, and validates on val")
    if args.checkpoint and args.epochs and not args.train:
        parser.error("--epochs picks one of --exp, and --checkpoint names a file: leave one of them out")
    if args.train and args.checkpoint:
        parser.error("--train does not read --checkpoint: --resume continues one, --init begins from one")
    check_values(parser, args)


def check_values(parser: Parser, args: argparse.Namespace) -> None:
    """The same for mistakes that the values of the flags show."""
    if args.exp and (os.path.basename(args.exp) != args.exp or not args.exp.isprintable()):
        parser.error(f"--exp {args.exp!r} becomes part of a file's name: leave out slashes and line ends")
    if args.exp and len(os.fsencode(args.exp)) > 120:
        parser.error("--exp becomes part of a file's name: use at most 120 letters")
    if min(args.seed, args.workers or 0, args.samples) < 0:
        parser.error("--seed, --workers and --samples cannot be negative")
    if args.seed >= 2**63:
        parser.error("--seed is below 2**63")
    if not (0 <= args.base_lr < math.inf and 0 <= args.last_mult < math.inf):
        parser.error("--base_lr and --last_mult are numbers from 0")
    if not all(0.1 <= scale <= 4 for scale in args.scales):
        parser.error("--scales are between 0.1 and 4")
    if not 0 <= args.overlap <= 0.5:
        parser.error("--overlap is between 0 and 0.5")
    if args.value_range and not -math.inf < args.value_range[0] < args.value_range[1] < math.inf:
        parser.error("--value_range takes two numbers, the lower one first")
    if args.init and args.resume not in (None, "auto"):
        parser.error("--resume continues a run and --init begins one: only --resume auto goes with --init")
    if not args.train and (args.resume or args.init):
        parser.error("--resume and --init go with --train; to evaluate a file, use --checkpoint")
    if args.freeze_bn and args.groups:
        parser.error("--freeze_bn has nothing to freeze with --groups")
    if args.train and args.freeze_bn and args.scratch and not (args.resume or args.init):
        parser.error("--freeze_bn with --scratch freezes what was never learnt: leave one of them out")
    if WORLD > 1 and args.device and args.device.startswith("cuda:"):
        parser.error(f"--device {args.device} puts all processes on one GPU; --device cuda does not")
    if args.gpu is not None and args.device not in (None, "cuda"):
        parser.error(f"--gpu numbers the device cuda, but --device is {args.device}: leave one of them out")
    if WORLD > 1 and args.gpu is not None:
        parser.error("--gpu is for one process: torchrun gives each its own, of CUDA_VISIBLE_DEVICES")
    if not 0 < args.top_k <= 1:
        parser.error("--top_k is the share of pixels to learn from, above 0 and up to 1: 0.25, say")
    if not 0 <= args.dice < math.inf:
        parser.error("--dice is a weight from 0: 1, say")
    if not 0 <= args.label_smoothing < 1:
        parser.error("--label_smoothing is from 0 to below 1: 0.1, say")
    if not 0 <= args.color_jitter < 1:
        parser.error("--color_jitter is from 0 to below 1: 0.4, say")
    if args.class_weights not in (None, ["auto"]) and not all(map(is_positive, args.class_weights)):
        parser.error("--class_weights are positive numbers, one for each class, or auto")
    if args.dataset == "custom" and not args.data_root and not (args.predict or args.export or args.download):
        parser.error("--dataset custom needs --data_root DIR: a folder with images/, masks/ and classes.txt")

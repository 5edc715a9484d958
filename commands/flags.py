"""The flags of main.py: what they are called, what they mean, which go together."""

import argparse
import math
import os

import deeplab
from commands.download import DOWNLOADS
from datasets import DATASETS
from utils import RANK, WORLD

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
# Without --train these are None unless given: a checkpoint tells what it holds.
CHECKPOINT_FLAGS = (
    *("backbone", "groups", "weight_std", "beta", "output_stride", "multi_grid", "aspp_rates"),
    *("no_image_pooling", "epochs"),
)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        line = f"main.py: error: {message} (all flags: python main.py --help)\n"
        self.exit(2, line if RANK == 0 else None)


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
    yes, switch = "store_true", argparse.BooleanOptionalAction

    group = parser.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group().add_argument
    add("--train", action=yes, help="train; without this and the next four, evaluate")
    add("--check", action=yes, help="look at all files of the data set: what it holds, and its faults")
    add("--predict", metavar="PATH", nargs="+", help="segment images, folders of them, patterns; -: stdin's")
    add("--export", metavar="FILE", help="write the network of --checkpoint to FILE.onnx or FILE.pt2")
    add("--download", metavar="NAME", nargs="+", choices=DOWNLOADS, help=f"fetch {', '.join(DOWNLOADS)}")
    add = group.add_argument
    add("--exp", metavar="NAME", help="name of the experiment, part of the checkpoints' names")
    add("--resume", metavar="PATH", help="go on from this checkpoint; `auto`: the newest of --exp, if any")
    add("--init", metavar="PATH", help="start from these weights, but for the classifier if classes differ")
    add("--checkpoint", metavar="PATH", help="evaluate this file, not one of --exp; or predict with it")
    add("--out", metavar="DIR", default="data/predictions", help="where --predict writes")
    add("--url", help="mirror for one --download NAME: address of its file, or of the folder that holds it")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="pascal", help="shapes is embedded and needs no files")
    add("--data_root", metavar="DIR", help="where the data set lies, if not under data/")
    add("--split", choices=("train", "val", "test"), default="val", help="part to evaluate")
    add("--crop_size", type=positive, default=513, help="height and width of the training crops")
    add("--workers", type=int, help="processes that load images, 0: the main one (4, or a core each)")
    add("--skip_bad", action=yes, help="decode all files first, leave out the samples that are damaged")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=deeplab.LAYERS, default="resnet101", help="torchvision ResNet to build on")
    add("--groups", type=int, help="GroupNorm with so many groups instead of BatchNorm (0)")
    add("--weight_std", action=switch, default=False, help="weight standardisation of the convs")
    add("--beta", action=yes, help="three 3x3 convs as the stem instead of one 7x7")
    add("--output_stride", type=int, choices=(8, 16, 32), default=16, help="input over feature map size")
    add("--multi_grid", type=positive, nargs=3, default=[1, 1, 1], help="relative rates in layer4")
    add("--aspp_rates", type=positive, nargs="+", default=[6, 12, 18], help="atrous rates at stride 16")
    add("--no_image_pooling", action=yes, help="leave out ASPP's image-level branch")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=30, help="passes over the training list; or which to evaluate")
    add("--batch_size", type=positive, default=16, help="images in one step, of all processes together")
    add("--accum", type=positive, default=1, help="compute a batch in so many parts, to need less memory")
    add("--base_lr", type=float, default=0.00025, help="initial learning rate")
    add("--last_mult", type=float, default=1.0, help="learning rate of ASPP over that of the trunk")
    add("--class_weights", metavar="W", nargs="+", help="of the classes in the loss; auto: median frequency")
    add("--scratch", action=switch, default=False, help="do not start from ImageNet weights")
    add("--freeze_bn", action=yes, help="keep BatchNorm's statistics, scale and shift as they are")
    add("--seed", type=int, default=0, help="the same seed gives the same run, on the CPU to the bit")
    add("--save_every", type=positive, default=10, help="epochs between checkpoints; the last is saved, too")
    add("--save_every_iters", type=positive, help="iterations between further checkpoints, within epochs")
    add("--keep", type=positive, help="keep only so many of the newest checkpoints, and the best one")
    add("--log_every", type=positive, default=10, help="iterations between looks at the loss")
    add("--plots", action=yes, help="draw the log, or the confusion matrix, by matplotlib")
    add("--tensorboard", action=yes, help="write the log and samples for TensorBoard, too")

    add = parser.add_argument_group("evaluation and prediction").add_argument
    add("--eval_batch_size", type=positive, default=4, help="images in one forward pass")
    add("--scales", type=float, nargs="+", default=[1.0], help="average the scores over these image sizes")
    add("--flip", action=yes, help="average them over the mirrored image, too")
    add("--samples", type=int, default=8, help="rows of samples.png: image, truth, prediction")
    add("--confidence", action=yes, help="--predict writes the winning class's probability, too, in grey")
    add("--max_side", type=positive, default=2049, help="--predict shrinks longer images to this")

    add = parser.add_argument_group("machine").add_argument
    add("--gpu", type=int, help="number of the CUDA device, 0 if not given")
    add("--device", help="cuda, cuda:1, mps or cpu instead of the best there is")
    add(
        "--amp",
        choices=("bf16", "fp16", "none"),
        help="number format of convs (GPUs that have it train in bf16)",
    )
    add("--compile", action=yes, help="compile the model: minutes at first, then faster; needs a compiler")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults that the data set brings; see CHECKPOINT_FLAGS for those without."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.dataset == "shapes":
        parser.set_defaults(**SHAPES_DEFAULTS)
    if args.train:
        parser.set_defaults(split=None)  # None is not given, which `check_args` wants to know
    else:
        parser.set_defaults(**dict.fromkeys(CHECKPOINT_FLAGS))
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.split = args.split or "val"
    if args.workers is None:  # torch warns of more than there are cores
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = min(4, cores or 1)
    args.data_root = args.data_root or DATASETS[args.dataset].default_root
    return args


def check_args(parser: Parser, args: argparse.Namespace) -> None:
    """End with the first mistake that the flags show by themselves."""
    for name, value in vars(args).items():
        if value == "" or (isinstance(value, list) and "" in value):  # of a shell's variable that is not set
            parser.error(f"--{name} is empty: give it a value, or leave it out")
    evaluates = not (args.train or args.predict or args.export or args.download or args.check)
    if args.url and len(args.download or ()) != 1:
        parser.error("--url replaces the address of one --download NAME: give one NAME with it")
    if args.url and not args.url.lower().startswith(("http://", "https://")):
        parser.error(f"--url {args.url!r} is no http:// or https:// address; a file at hand goes to data/")
    if WORLD > 1 and not (args.train or evaluates):
        parser.error("only training and evaluation take several processes: leave out torchrun")
    if args.predict and args.compile:
        parser.error("--compile is for training and evaluation: photos have too many sizes to compile for")
    if (args.predict or args.export) and not args.checkpoint:
        parser.error(f"--{'predict' if args.predict else 'export'} needs --checkpoint FILE")
    if args.export and (args.scales != [1.0] or args.flip):
        parser.error("--export writes one pass of the network: leave out --scales and --flip")
    if args.export and (args.device or args.amp or args.compile):
        parser.error("--export writes for any machine, in float32: leave out --device, --amp and --compile")
    if args.plots and not (args.train or evaluates):
        parser.error("--plots draws a training run or the confusion matrix of an evaluation: leave it out")
    if args.train and args.split:
        parser.error("--split is for evaluation: training reads the train part, and validates on val")
    if args.train and args.checkpoint:
        parser.error(
            "--train does not read --checkpoint: use --resume to go on, --init to begin from weights"
        )
    if not args.exp and (args.train or (evaluates and not args.checkpoint)):
        parser.error("--exp NAME is needed: it names the checkpoints; to try it out, add --dataset shapes")
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
    if args.resume and args.init:
        parser.error("--resume goes on with a run and --init begins one: leave one of them out")
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
    if args.class_weights not in (None, ["auto"]) and not all(map(is_positive, args.class_weights)):
        parser.error("--class_weights are positive numbers, one for each class, or auto")
    if args.dataset == "custom" and not args.data_root and not (args.predict or args.download):
        parser.error("--dataset custom needs --data_root DIR: a folder with images/, masks/ and classes.txt")

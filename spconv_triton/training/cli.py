"""The command line: ``python -m spconv_triton demo`` and ``python -m spconv_triton train``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from .errors import UserError, need

PROGRAM = "python -m spconv_triton"
INTERRUPTED = 130

LARGEST = (2 - 2**-23) * 2.0**127
"""Of float32, which networks and their optimizers compute in."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, without the program's name; None takes ``sys.argv``.

    Returns:
        The exit status: 0, 2 for bad input or a machine that cannot do it, 130 for Ctrl-C.
    """
    try:
        options = make_parser().parse_args(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    try:
        options.run(options)
    except UserError as error:
        # A worker process wraps the message in its traceback; the last line is ours.
        message = str(error).strip().splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
        print(f"{PROGRAM}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; what was written before stays", file=sys.stderr)
        return INTERRUPTED
    return 0


def _demo(options: argparse.Namespace) -> None:
    from . import demo  # the parser answers --help without loading the rest

    demo.run(
        demo.Options(
            out=options.out,
            epochs=options.epochs,
            samples=options.samples,
            size=options.image_size,
            alpha=options.alpha,
            branch_norm=options.branch_norm,
            seed=options.seed,
            rounds=options.rounds,
            threads=options.threads,
            device=options.device,
        )
    )


def _train(options: argparse.Namespace) -> None:
    from . import loop

    console = need("rich.console", "training").Console(highlight=False, soft_wrap=True, markup=False)
    resume = options.out / loop.LAST if options.resume == "" else options.resume
    settings = loop.Settings(
        model=options.model,
        alpha=options.alpha,
        groups=options.groups,
        branch_norm=options.branch_norm,
        data=options.data,
        image_size=options.image_size,
        samples=options.samples,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        weight_decay=options.weight_decay,
        seed=options.seed,
        amp=options.amp,
    )
    surroundings = loop.Surroundings(
        out=options.out,
        resume=None if resume is None else Path(resume),
        device=options.device,
        threads=options.threads,
        workers=options.workers,
        compile=options.compile,
        save_every=options.save_every,
        parallel=options.parallel,
    )
    loop.run(settings, surroundings, console.print)


def make_parser() -> Parser:
    """The options of both commands."""
    parser = Parser(prog=PROGRAM, description="SPConv: a demo, and training of the paper's networks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="vanilla and SPConv ResNet-20 side by side on handwritten digits, in a few minutes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the table and the picture")
    demo.add_argument("--epochs", type=count, default=20, help="passes over the training images")
    demo.add_argument("--alpha", type=_ratio, default=0.5, help="ratio of representative channels, as 0.5 or 1/2")
    demo.add_argument(
        "--branch-norm", action=argparse.BooleanOptionalAction, default=False, help="a norm in each branch of SPConv"
    )
    demo.add_argument("--image-size", type=count, default=16, help="pixels that the 8 x 8 digits are enlarged to")
    demo.add_argument("--samples", type=count, help="training images; all 1,437 if not given")
    demo.add_argument("--rounds", type=count, default=20, help="turns of each network in a timing")
    demo.add_argument("--threads", type=count, default=1, help="CPU threads; networks so small gain little by more")
    demo.add_argument("--seed", type=count_or_zero, default=0, help="of weights, order and augmentation")
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")

    train = commands.add_parser(
        "train",
        help="train a network of the paper; also under torchrun",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=_train)
    add = train.add_argument
    add("--model", default="resnet20", help="resnet20, resnet50 or vgg16")
    add(
        "--alpha",
        type=_ratio_or_none,
        default=0.5,
        help="ratio of representative channels, as 0.5 or 1/2; none: vanilla",
    )
    add("--groups", type=count, default=2, help="G of the group-wise convolutions")
    add("--branch-norm", action=argparse.BooleanOptionalAction, default=True, help="a norm in each branch of SPConv")
    add("--data", default="digits", help="digits, cifar10:DIR (binary version) or folder:DIR (train/ and val/)")
    add("--image-size", type=count, help="pixels; the data set's own if not given (digits 16, folders 224)")
    add("--samples", type=count, help="keep so many training images; all if not given")
    add("--epochs", type=count, default=30, help="passes over the training images")
    add("--batch-size", type=count, default=64, help="images of a step, over all processes together")
    add("--lr", type=_not_negative, default=0.1, help="peak learning rate")
    add("--weight-decay", type=_not_negative, default=5e-4, help="L2 penalty on weights (not norms and biases)")
    add("--seed", type=count_or_zero, default=0, help="of weights, order and augmentation")
    add("--amp", choices=("none", "bfloat16", "float16"), default="none", help="what autocast computes in")
    add("--out", type=Path, default=Path("runs/train"), help="folder of last.pt, best.pt and metrics.jsonl")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on from last.pt in --out, or from PATH")
    add("--save-every", type=count, default=1, help="epochs between checkpoints")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--threads", type=count, help="CPU threads of a process; PyTorch's default if not given")
    add("--workers", type=count_or_zero, default=0, help="processes that load images")
    add("--compile", action="store_true", help="pass the network through torch.compile")
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="under torchrun: a whole network per process (ddp), or weights and momentum in parts (fsdp)",
    )
    return parser


def count(text: str) -> int:
    """An option that is a number of things.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    value = count_or_zero(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def count_or_zero(text: str) -> int:
    """Likewise, where there may be none."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0 and below 2^31, got {text!r}")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= LARGEST:
        raise argparse.ArgumentTypeError(f"must be a number of float32 of at least 0, got {text!r}")
    return value


def _ratio(text: str) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], as 0.5 or 1/2, got {text!r}")
    return value


def _ratio_or_none(text: str) -> float | None:
    if text.lower() == "none":
        return None
    try:
        return _ratio(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; none trains the vanilla network") from error

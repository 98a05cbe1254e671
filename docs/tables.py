"""The pages' tables, computed by the library whenever the pages are built."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from spconv_triton import SPConv2d, models
from spconv_triton.network_summary import summarize
from spconv_triton.training.cli import make_parser

INPUTS = {"vgg16": (1, 3, 32, 32), "resnet20": (1, 3, 32, 32), "resnet50": (1, 3, 224, 224)}

TITLES = {
    "vgg16": "VGG-16, CIFAR-10 (32 x 32)",
    "resnet20": "ResNet-20, CIFAR-10 (32 x 32)",
    "resnet50": "ResNet-50, ImageNet (224 x 224)",
}

PAPER = {
    ("vgg16", "0"): ("16.62", "349.51", "94.00"),
    ("vgg16", "1/2"): ("5.6", "118.27", "94.40"),
    ("vgg16", "1/4"): ("3.77", "79.34", "93.94"),
    ("vgg16", "1/8"): ("2.85", "59.87", "93.77"),
    ("vgg16", "1/16"): ("2.39", "55.14", "93.43"),
    ("resnet20", "0"): ("0.27", "41.62", "92.00"),
    ("resnet20", "1/2"): ("0.10", "17.91", "92.23"),
    ("resnet20", "1/4"): ("0.071", "12.89", "91.15"),
    ("resnet50", "0"): ("25.56", "4140", "75.91"),
    ("resnet50", "1/2"): ("18.34", "2970", "76.26"),
    ("resnet50", "1/4"): ("16.93", "2740", "75.95"),
    ("resnet50", "1/8"): ("16.22", "2620", "75.40"),
}
"""Millions of parameters, millions of operations per image and top-1 accuracy in %, as Zhang et al. print them."""


def networks_table(name: str) -> str:
    """Parameters and MACs of one of the paper's networks at the paper's alphas, beside what the paper prints."""
    lines = [
        "| alpha | parameters (M) | paper | MACs (M) | paper: operations (M) | ours | paper: accuracy (%) |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (network, text), paper in PAPER.items():
        if network == name:
            parameters, macs = total(name, Fraction(text))
            label = text if Fraction(text) else "none (vanilla)"
            printed, operations, accuracy = paper
            cells = [f"{parameters / 1e6:.3f}", printed, f"{macs / 1e6:,.1f}", operations]
            cells += [f"{macs / float(operations) / 1e4 - 100:+.1f} %", accuracy]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def total(name: str, alpha: Fraction) -> tuple[int, int]:
    """Parameters and MACs of one of the paper's networks; alpha = 0 is the vanilla one."""
    with torch.device("meta"):
        network = models.MODELS[name](float(alpha) if alpha else None)
    costs = summarize(network, INPUTS[name]).total
    return costs.parameters_after, costs.macs_after


def layer_table() -> str:
    """What a 3 x 3 layer of 128 to 128 channels costs at each alpha, per output pixel."""
    dense = nn.Conv2d(128, 128, 3, bias=False, device="meta").weight.numel()
    lines = ["| alpha | representative channels | weights | of nn.Conv2d's |", "|---|---:|---:|---:|"]
    lines.append(f"| nn.Conv2d | | {dense:,} | 1.000 |")
    for text in ("1", "3/4", "1/2", "1/4", "1/8", "1/16"):
        layer = SPConv2d(128, 128, 3, bias=False, alpha=float(Fraction(text)), device="meta")
        weights = sum(p.numel() for p in layer.parameters())
        lines.append(f"| {text} | {layer.representative_channels} of 128 | {weights:,} | {weights / dense:.3f} |")
    return "\n".join(lines)


def options_table(command: str) -> str:
    """The options of a command of ``python -m spconv_triton``, from its parser."""
    lines = ["| option | default | |", "|---|---|---|"]
    for action in _options(command):
        names = " ".join(f"`{name}`" for name in action.option_strings)
        default = "" if action.default is None or action.nargs == 0 else f"`{action.default}`"
        choices = f" ({', '.join(action.choices)})" if action.choices else ""
        text = re.sub(r"--[\w-]+", r"`\g<0>`", f"{action.help}{choices}")
        lines.append(f"| {names} | {default} | {text} |")
    return "\n".join(lines)


def _options(command: str) -> Iterable[argparse.Action]:
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return (a for a in commands.choices[command]._actions if a.dest != "help")


TABLES: dict[str, Callable[[], str]] = {
    "layer": layer_table,
    **{name: lambda name=name: f"**{TITLES[name]}**\n\n{networks_table(name)}" for name in TITLES},
    "demo": lambda: options_table("demo"),
    "train": lambda: options_table("train"),
}


def write(folder: Path) -> None:
    """Write each table into a file of its own, for the pages to include."""
    folder.mkdir(exist_ok=True)
    for name, table in TABLES.items():
        (folder / f"{name}.md").write_text(table() + "\n")

"""``python -m benchmarks.dense_init``: what starting SPConv from a trained convolution's weights is worth.

Trains the vanilla ResNet-20 on the digits, converts it with each way of choosing the weights, and prints two tables:
how far each layer's output is from that of the convolution which it replaces, on the trained network's own activations
(mean and range over the layers), and the test accuracy after a few epochs of fine-tuning, 22 steps each (mean over the
seeds).
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spconv_triton import SPConv2d, convert, models
from spconv_triton.dense import CORRELATION, split_weights
from spconv_triton.training.cli import count
from spconv_triton.training.data import (
    WEIGHTS,
    Data,
    evaluation_batches,
    seed_epoch,
    steps_per_epoch,
    training_batches,
)
from spconv_triton.training.datasets import digits
from spconv_triton.training.learner import Learner, Recipe
from spconv_triton.training.processes import Processes, cpu_threads

BATCH = 64
STARTS: dict[str, float | None] = {
    "drawn afresh": None,
    "centre tap (correlation 0)": 0.0,
    f"init='dense' (correlation {CORRELATION:g})": CORRELATION,
    "sum of taps (correlation 1)": 1.0,
}
HERE = Processes(0, 1, torch.device("cpu"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense_init", description="init='dense' of convert")
    parser.add_argument("--epochs", type=count, default=6, help="of the vanilla network (default: %(default)s)")
    parser.add_argument("--tuning", type=count, default=3, help="epochs of fine-tuning (default: %(default)s)")
    parser.add_argument("--seeds", type=count, default=3, help="repetitions of fine-tuning (default: %(default)s)")
    parser.add_argument("--samples", type=count, help="training images to keep (default: all)")
    options = parser.parse_args(arguments)
    with cpu_threads(1):
        data = digits(16, options.samples)
        images = torch.cat([x for x, _ in evaluation_batches(data, BATCH, HERE)])
        seed_epoch(0, WEIGHTS)
        network = models.resnet20(in_channels=data.channels)
        (accuracy,) = train(network, data, options.epochs, lr=0.1, seed=0)[-1:]
        print(
            f"vanilla ResNet-20 on digits after {options.epochs} epochs: {accuracy:.1f} %; torch {torch.__version__}\n"
        )
        print(f"neighbouring pixels of the layers' inputs correlate by {describe(correlations(network, images))}\n")
        print("| weights | alpha 1/2 | alpha 1/4 |\n|---|---|---|")
        for name, correlation in STARTS.items():
            cells = [describe(errors(network, start(network, alpha, correlation), images)) for alpha in (0.5, 0.25)]
            print(f"| {name} |", " | ".join(cells), "|", flush=True)
        columns = [f"epoch {epoch + 1}" for epoch in range(options.tuning)]
        print("\n| weights, alpha 1/2 |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
        for name, correlation in STARTS.items():
            runs = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                runs.append(train(start(network, 0.5, correlation), data, options.tuning, lr=0.02, seed=seed))
            means = [statistics.fmean(values) for values in zip(*runs, strict=True)]
            print(f"| {name} |", " | ".join(f"{mean:.1f} %" for mean in means), "|", flush=True)


def start(network: nn.Module, alpha: float, correlation: float | None) -> nn.Module:
    """``network`` converted, its weights made for this correlation of neighbouring pixels; drawn where it is None."""
    converted = convert(copy.deepcopy(network), alpha)
    for name, layer in converted.named_modules():
        if isinstance(layer, SPConv2d) and correlation is not None:
            weight = network.get_parameter(f"{name}.weight").detach()
            weights = split_weights(weight, layer.representative_channels, layer.geometry, correlation)
            for key, value in weights._asdict().items():
                layer.get_parameter(f"weight_{key}").data.copy_(value)
    return converted


@torch.no_grad()
def errors(network: nn.Module, converted: nn.Module, images: Tensor) -> list[float]:
    """|Y - convolution| / |convolution| of each layer, fed what the convolution is fed in the trained network."""
    found: list[float] = []
    handles = []
    for name, layer in converted.named_modules():
        if isinstance(layer, SPConv2d):

            def compare(_module: nn.Module, inputs: tuple[Tensor], y: Tensor, layer: SPConv2d = layer) -> None:
                found.append(((layer(inputs[0]) - y).norm() / y.norm()).item())

            handles.append(network.get_submodule(name).register_forward_hook(compare))
    network.eval()(images)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def correlations(network: nn.Module, images: Tensor) -> list[float]:
    """Of horizontal neighbours, about each channel's mean, in the input of each convolution that is swapped."""
    found: list[float] = []
    converted = convert(copy.deepcopy(network))
    handles = []
    for name, layer in converted.named_modules():
        if isinstance(layer, SPConv2d):

            def measure(_module: nn.Module, inputs: tuple[Tensor]) -> None:
                x = inputs[0] - inputs[0].mean((0, 2, 3), keepdim=True)
                found.append(((x[..., 1:] * x[..., :-1]).mean() / x.square().mean()).item())

            handles.append(network.get_submodule(name).register_forward_pre_hook(measure))
    network.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def describe(values: list[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def train(network: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> list[float]:
    """Test accuracy in % after each epoch; the network is trained in place."""
    recipe = Recipe(lr=lr, weight_decay=5e-4, steps=steps_per_epoch(data, BATCH, 1) * epochs)
    learner = Learner(network, recipe, HERE)
    accuracies = []
    for epoch in range(epochs):
        for images, labels in training_batches(data, BATCH, seed, epoch, HERE):
            learner.step(images, labels)
        learner.finish_epoch()
        accuracies.append(100 * learner.evaluate(evaluation_batches(data, 256, HERE)).accuracy)
    return accuracies


if __name__ == "__main__":
    main()

"""One network with what trains it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from .data import IGNORED, Batch
from .processes import Processes
from .sharding import shard

AMP = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""A state as one process without a GPU would have it."""


MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum; the learning rate warms up over the first tenth and falls to zero along a cosine.

    Attributes:
        lr: peak learning rate.
        weight_decay: L2 penalty, on weights of more than one dimension: norms and biases are left alone.
        steps: of the whole training.
        amp: ``"none"``, ``"bfloat16"`` or ``"float16"``: what autocast computes in.
        compile: pass the network through ``torch.compile``.
        parallel: what several processes do: ``"ddp"``, each holds the network and they average gradients; ``"fsdp"``,
            each holds a part of every weight, its gradient and its momentum, and they gather a block when it is due.
    """

    lr: float
    weight_decay: float
    steps: int
    amp: str = "none"
    compile: bool = False
    parallel: str = "ddp"

    def factor(self, step: int) -> float:
        """The learning rate of a step, as a share of ``lr``."""
        warm = max(self.steps // 10, 1)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(self.steps - warm, 1)))


class Score(NamedTuple):
    """Mean cross-entropy (nats) and the share of samples classified rightly, over all processes."""

    loss: float
    accuracy: float


class Learner:
    """A network, its optimizer and its schedule, on the device of one process.

    Args:
        network: on the CPU, the same in every process; moved to the device in channels_last.
        recipe: how it is trained.
        processes: where.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, processes: Processes) -> None:
        self.recipe = recipe
        self.processes = processes
        self.network = network.to(processes.device)
        sharded = processes.world > 1 and recipe.parallel == "fsdp"
        if sharded:
            shard(self.network, processes)
        else:
            self.network.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.network, recipe.weight_decay),
            lr=recipe.lr,
            momentum=MOMENTUM,
            nesterov=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, recipe.factor)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.amp == "float16")
        compiled = cast(nn.Module, torch.compile(self.network)) if recipe.compile else self.network
        self._evaluate = compiled
        if processes.world > 1 and not sharded:
            ids = [processes.device.index] if processes.device.type == "cuda" else None
            self._train: nn.Module = DistributedDataParallel(compiled, device_ids=ids)
        else:
            self._train = compiled
        self._sums = torch.zeros(3, device=processes.device, dtype=torch.float64)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step on this process's share of a batch."""
        self.network.train()
        with self._autocast():
            outputs = self._train(images)
        loss = F.cross_entropy(outputs.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else the gradients were infinite, and it has taken no step
            self.scheduler.step()
        self._count(loss.detach().double() * len(labels), outputs.detach(), labels)

    def finish_epoch(self) -> Score:
        """The training score since the last call; batch-norm statistics become those of rank 0 everywhere."""
        self.processes.share_buffers(self.network)
        return self._score()

    @torch.no_grad()  # what a sharded network gathers in inference mode could not be trained
    def evaluate(self, batches: Iterable[Batch]) -> Score:
        """Score on batches that the processes share, as many for each; call between epochs."""
        self.network.eval()
        for images, labels in batches:
            with self._autocast():
                outputs = self._evaluate(images)
            loss = F.cross_entropy(outputs.float(), labels, ignore_index=IGNORED, reduction="sum")
            self._count(loss, outputs, labels)
        return self._score()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, tensors and plain values only, by the names of the parameters.

        The same however many processes there are and whatever they share. All of them must call; of several, rank 0
        alone is given the tensors.
        """
        network, optimizer = get_state_dict(self.network, self.optimizer, options=WHOLE)
        return {
            "network": network,
            "optimizer": optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the :meth:`state_dict` of a learner that has taken a step, the same in every process.

        Raises:
            AttributeError, KeyError, RuntimeError, TypeError, ValueError: it is not that of such a network.
        """
        self._check(state["network"], state["optimizer"])
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
            options=WHOLE,
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])

    def _check(self, network: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """``set_state_dict`` would leave as it is what a whole state lacks."""
        parameters, ours = dict(self.network.named_parameters()), self.network.state_dict()
        for name in ours.keys() | network.keys():
            if network[name].shape != ours[name].shape:
                raise ValueError(f"{name} must have shape {tuple(ours[name].shape)}")
        for name, parameter in parameters.items():
            if optimizer["state"][name]["momentum_buffer"].shape != parameter.shape:
                raise ValueError(f"the momentum of {name} must have shape {tuple(parameter.shape)}")
        grouped = [name for group in optimizer["param_groups"] for name in group["params"]]
        if sorted(grouped) != sorted(parameters):
            raise ValueError("the optimizer's groups must hold each parameter once")

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AMP[self.recipe.amp]
        return torch.autocast(self.processes.device.type, dtype=dtype, enabled=dtype is not None)

    def _count(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Sums (``loss`` is one) stay on the device, so that a step does not wait for it."""
        correct = (outputs.argmax(1) == labels).sum()
        self._sums += torch.stack([loss.double(), correct, (labels != IGNORED).sum()])

    def _score(self) -> Score:
        loss, correct, count = self.processes.total(self._sums.clone()).tolist()
        self._sums.zero_()
        return Score(loss / count, correct / count)


def _parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

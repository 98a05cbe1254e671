"""One list of mistakes: the tests provoke each and read its message, and docs/errors.md is written from the same list.

A case is source code, so that the documentation shows what has been run.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import error_networks as networks
import error_rows as rows
import torch

import spconv_triton
from spconv_triton import dispatch

PREAMBLE = """\
from pathlib import Path

import torch
from torch import nn, ones
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from spconv_triton import SPConv2d, convert, explain, functional, fuse, load_reference_checkpoint, load_tuning
from spconv_triton import models, set_recompute, summary
from spconv_triton.fused import FusedSPConv2d
from spconv_triton.launch.common import check_samples, pixel_arguments  # what the kernels' launches ask first

x = ones(2, 8, 6, 5)  # N = 2, L = 8
x3, x1 = x[:, :4], x[:, 4:]  # alpha L = 4
weight_gwc = ones(6, 2, 3, 3)  # M = 6, G = 2, k = 3
weight_pwc, weight_redundant = ones(6, 4, 1, 1), ones(6, 4, 1, 1)
u3, u1 = ones(2, 3, 4, 5), ones(2, 3, 4, 5)
trained = ones(2, 8, 6, 5, requires_grad=True)

layer = SPConv2d(8, 6, 3)
normed = SPConv2d(8, 6, 3, branch_norm=True, bias=False)
conv = nn.Conv2d(8, 6, 3)
network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
slim = convert(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)))
image = ones(1, 3, 9, 9)
"""

PACKAGE = Path(spconv_triton.__file__).parent


@contextmanager
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


CIRCUMSTANCES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "": nullcontext,
    "in a process group": _process_group,
    "with TRITON_INTERPRET=1": lambda: mock.patch.object(dispatch, "INTERPRETED", True),
    "without triton": lambda: mock.patch.object(dispatch, "HAS_TRITON", False),
    "where PyTorch is built without CUDA": lambda: mock.patch.object(torch.backends.cuda, "is_built", lambda: False),
}


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        call: what is called, as the documentation names it.
        code: statements after ``PREAMBLE``, of which the last raises.
        error: the exception, of this very type.
        parts: of its message.
        circumstances: under which it is a mistake, a key of ``CIRCUMSTANCES``.
        is_traced: ``torch.compile`` can trace the code.
    """

    call: str
    code: str
    error: type[Exception]
    parts: tuple[str, ...]
    circumstances: str = ""
    is_traced: bool = False

    def run(self) -> Any:
        """Run the code, in an empty folder."""
        namespace = fresh_namespace()
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as folder, CIRCUMSTANCES[self.circumstances]():
            os.chdir(folder)
            try:
                exec(self.code, namespace)
            finally:
                os.chdir(before)

    @functools.cache  # noqa: B019, a list of constants keeps all cases anyway
    def provoke(self) -> Exception:
        """The exception that the code raises.

        Raises:
            AssertionError: it raises none, another one, or says something else.
        """
        try:
            self.run()
        except Exception as error:
            self.check(error)
            return error
        raise AssertionError(f"no {self.error.__name__} from: {self.code}")

    def check(self, error: Exception) -> None:
        """The exception is the documented one.

        Raises:
            AssertionError: it is not.
        """
        assert type(error) is self.error, f"{type(error).__name__} instead of {self.error.__name__}: {error}"
        missing = [part for part in self.parts if part not in str(error)]
        assert not missing, f"{missing} not in: {error}"


def fresh_namespace() -> dict[str, Any]:
    """The names of ``PREAMBLE``."""
    namespace: dict[str, Any] = {}
    exec(PREAMBLE, namespace)
    return namespace


def with_arguments(right: str, wrong: str) -> str:
    """The source of the call ``right`` in which the arguments in ``wrong`` take the places of its own, or join them."""
    call = ast.parse(right, mode="eval").body
    replacing = ast.parse(f"f({wrong})", mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(replacing, ast.Call)
    for keyword in replacing.keywords:
        place = next((i for i, a in enumerate(call.args) if isinstance(a, ast.Name) and a.id == keyword.arg), None)
        if place is None:
            call.keywords = [k for k in call.keywords if k.arg != keyword.arg] + [keyword]
        else:
            call.args[place] = keyword.value
    return ast.unparse(call)


LAYOUTS = re.compile(r"\.to_(sparse|mkldnn)\(|nested")
"""What makes a tensor that is not dense."""


def cases_of(right: str, table: rows.Rows, *, is_traced: bool = True) -> list[Case]:
    """Cases whose calls are ``right`` but for what is wrong; ``torch.compile`` traces no layout but the dense one."""
    name = right.partition("(")[0]
    return [
        Case(name, with_arguments(right, wrong), error, parts, "", is_traced and not LAYOUTS.search(wrong))
        for wrong, error, parts in table
    ]


def statements(table: networks.Rows) -> list[Case]:
    """Cases that are statements of their own."""
    return [Case(code.rpartition("; ")[2].partition("(")[0], code, *rest) for code, *rest in table]


ONE_GROUP_FITS_NOT = ("groups=3", "groups=4")
"""The constructor has its own messages for these, in ``rows.CONSTRUCTOR``."""

RIGHT_CALLS = {
    "spconv2d": "functional.spconv2d(x, weight_gwc, weight_pwc, weight_redundant)",
    "inference": "functional.spconv2d_inference(x, weight_gwc, weight_pwc, weight_redundant)",
    "batch norm": "functional.spconv2d_batch_norm(x, weight_gwc, weight_pwc, weight_redundant)",
    "representative": "functional.representative_branch(x3, weight_gwc, weight_pwc)",
    "redundant": "functional.redundant_branch(x1, weight_redundant, kernel_size=3)",
    "fusion": "functional.gap_softmax_fusion(u3, u1)",
    "layer": "layer(x)",
    "layer with branch norms": "normed(x)",
}

COMMON = [*rows.WINDOW, *rows.GROUPS, *rows.BACKEND, *rows.BRANCH_WEIGHTS]

CASES = [
    *cases_of(RIGHT_CALLS["spconv2d"], [*rows.input_rows("x", 8), *COMMON, *rows.LAYER]),
    *cases_of(RIGHT_CALLS["inference"], rows.INFERENCE),
    *cases_of(RIGHT_CALLS["batch norm"], rows.BATCH_NORM),
    *cases_of(RIGHT_CALLS["representative"], [*rows.input_rows("x3", 4), *rows.REPRESENTATIVE, *COMMON]),
    *cases_of(RIGHT_CALLS["redundant"], [*rows.input_rows("x1", 4), *rows.REDUNDANT, *rows.WINDOW]),
    *cases_of(RIGHT_CALLS["fusion"], [*rows.FUSION, *rows.BACKEND]),
    *cases_of(RIGHT_CALLS["layer"], rows.FORWARD),
    *cases_of(RIGHT_CALLS["layer with branch norms"], rows.FORWARD),
    *cases_of(
        "SPConv2d(in_channels=8, out_channels=6, kernel_size=3)",
        [
            *rows.WINDOW,
            *(row for row in rows.GROUPS if row[0] not in ONE_GROUP_FITS_NOT),
            *rows.CONSTRUCTOR,
            *rows.BACKEND,
        ],
        is_traced=False,
    ),
    *statements(networks.LAYERS),
    *statements(networks.DEVICES),
    *statements(networks.CONVERT),
    *statements(networks.NETWORKS),
]

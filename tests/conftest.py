"""Fresh random inputs for every test, from a seed that the header prints and ``--seed`` repeats.

Hypothesis draws from that seed too. ``SPCONV_EXAMPLES`` is how often it does so per test, 40 by default.
"""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch

from spconv_triton.dispatch import INTERPRETED

try:
    import hypothesis
except ModuleNotFoundError:  # machines that are lent with a GPU: the kernels' tests run there with pytest alone
    pass
else:
    hypothesis.settings.register_profile(
        "spconv",
        max_examples=int(os.environ.get("SPCONV_EXAMPLES", "40")),
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )
    hypothesis.settings.load_profile("spconv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of the random inputs; a fresh one by default")


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--seed")
    config.stash[SEED] = random.randrange(2**31) if seed is None else seed
    if getattr(config.option, "hypothesis_seed", 0) is None:  # Hypothesis is there, and nobody gave it another
        config.option.hypothesis_seed = config.stash[SEED]


def pytest_report_header(config: pytest.Config) -> str:
    kernels = "Triton's interpreter" if INTERPRETED else "cuda" if torch.cuda.is_available() else "not run (no GPU)"
    return f"torch {torch.__version__}, kernels: {kernels}, inputs: --seed {config.stash[SEED]}"


SEED = pytest.StashKey[int]()


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> None:
    """A test's inputs depend on the session's seed and its own name, not on which tests ran before."""
    torch.manual_seed(request.config.stash[SEED] ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor starts as NaN, so that an element that nobody writes shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)

"""Fresh random inputs for every test, from a seed that the header prints and ``--seed`` repeats.

Hypothesis draws from that seed too. ``SPCONV_EXAMPLES`` is how often it does so per test, 40 by default. So do tests
whose cases are many of one kind and slow: ``@pytest.mark.drawn`` runs some of them, others in every session.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from typing import Any

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
    parser.addoption("--every", action="store_true", help="all cases of the tests that draw some of theirs")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = getattr(config, "workerinput", {}).get("seed", random.randrange(2**31))
    if getattr(config.option, "hypothesis_seed", 0) is None:  # Hypothesis is there, and nobody gave it another
        config.option.hypothesis_seed = config.option.seed


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker of pytest-xdist has the seed that the header prints, not one of its own."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.drawn(count, names, values)`` is ``parametrize`` by ``count`` of the values, by the seed."""
    option = metafunc.config.option
    for mark in metafunc.definition.iter_markers("drawn"):
        count, names, values = mark.args
        chosen = list(enumerate(values))
        if not option.every:
            chance = random.Random(f"{option.seed} {metafunc.definition.nodeid} {names}")
            chosen = sorted(chance.sample(chosen, count), key=lambda numbered: numbered[0])
        metafunc.parametrize(names, [value for _, value in chosen], **mark.kwargs)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``-n``: tests go to whichever process is free, one at a time, but what shares a fixture goes together."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Dealing(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return hand(nodeid)

    return Dealing(config, log)


def hand(nodeid: str) -> str:
    """What a test is dealt out with: itself, or the others that use what takes its module long to make."""
    file, _, test = nodeid.partition("::")
    name = file.rpartition("/")[2]
    if name == "test_clients.py":  # a network each
        return f"{file}[{test.partition('[')[2]}"
    return file if name in TOGETHER else nodeid


TOGETHER = {"test_distributed.py", "test_gpu_kit.py", "test_machine_code.py", "test_packaging.py"}


def pytest_report_header(config: pytest.Config) -> str:
    kernels = "Triton's interpreter" if INTERPRETED else "cuda" if torch.cuda.is_available() else "not run (no GPU)"
    return f"torch {torch.__version__}, kernels: {kernels}, inputs: --seed {config.option.seed}"


@pytest.fixture(autouse=True)
def fresh_seed(request: pytest.FixtureRequest) -> None:
    """A test's inputs depend on the session's seed and its own name, not on which tests ran before."""
    torch.manual_seed(request.config.option.seed ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What needs the same bits every time needs one number of threads; and small networks are fastest in one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> None:
    """Nothing is compiled yet, and nothing counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor starts as NaN, so that an element that nobody writes shows."""
    for name in ("empty", "empty_like", "empty_strided"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poisoned)

"""Bad arguments fail at the call, with a message that names the argument, what it got and what is legal.

The mistakes are in ``error_cases``; docs/errors.md shows one for every message.
"""

from __future__ import annotations

import random

import pytest
import torch
from error_cases import CASES, RIGHT_CALLS, Case, fresh_namespace
from error_commands import COMMANDS, Command
from error_sites import Site, find_sites, sites_of
from pins import is_pinned

from docs import errors
from spconv_triton.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on a CPU what must be refused here"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

UNPROVOKED = {
    ("launch/common.py", "path must be 'auto'"): "no caller sees path=; tests/kernels/test_descriptor.py provokes it",
    ("launch/common.py", "path='descriptor' does not take a layer"): "the same",
    ("launch/descriptor.py", "no tile takes"): "can_run and supports are asked first",
    ("launch/gradients_descriptor.py", "no tile takes"): "can_run and supports are asked first",
    ("training/data.py", "must be a multiple of"): "needs several processes; tests/test_training.py provokes it",
    ("training/datasets.py", "cannot read {path}"): "a file that goes between two looks at it",
}
"""Messages that no public call can bring about, by file and beginning, and why."""


def test_the_right_calls_are_right() -> None:
    """Otherwise the cases could be refused for another reason than theirs."""
    sizes = {name: torch.Size([2, 6, 4, 3]) for name in RIGHT_CALLS} | {"fusion": torch.Size([2, 3, 4, 5])}
    for name, code in RIGHT_CALLS.items():
        result = eval(code, fresh_namespace())
        assert (result[0] if isinstance(result, tuple) else result).shape == sizes[name], code


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.code)
def test_it_is_refused(case: Case) -> None:
    case.provoke()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.arguments} {command.where}")
def test_the_command_line_tells(command: Command) -> None:
    if command.needs:
        pytest.importorskip(command.needs)
    _, line = command.provoke()
    assert "\n" not in line


@pytest.fixture
def every_command() -> None:
    """All that a command may need is there."""
    for name in {command.needs for command in COMMANDS if command.needs}:
        pytest.importorskip(name)


@pytest.mark.usefixtures("every_command")
def test_every_message_has_a_case() -> None:
    sites = find_sites()
    errors = [*(case.provoke() for case in CASES), *(command.provoke()[0] for command in COMMANDS)]
    provoked = {site for error in errors for site in sites_of(error, sites)}
    excused = {site for site in sites if _excuse(site)}
    assert not excused & provoked, "listed as impossible, but provoked"
    assert {reason for site in excused if (reason := _excuse(site))} == set(UNPROVOKED), "an excuse that nothing needs"
    missing = [f"{site.file}:{site.first}: {site.text}" for site in sites if site not in provoked | excused]
    assert not missing, "add cases to error_rows.py, error_networks.py or error_commands.py:\n" + "\n".join(missing)


def _excuse(site: Site) -> tuple[str, str] | None:
    return next((key for key in UNPROVOKED if key[0] == site.file and key[1] in site.text), None)


@pytest.mark.usefixtures("every_command")
@pytest.mark.skipif(not is_pinned("torch"), reason="some messages quote PyTorch, which words them by its version")
def test_the_page_is_up_to_date() -> None:
    assert errors.PAGE.read_text() == errors.page(), "run python -m docs.errors"


def traced(case: Case) -> object:
    """The case's code as a function that ``torch.compile`` takes."""
    namespace = fresh_namespace()
    exec(f"def call():\n    return {case.code}", namespace)
    return namespace["call"]


TRACED = [case for case in CASES if case.is_traced]


@pytest.mark.parametrize("case", TRACED, ids=lambda case: case.code)
def test_fullgraph_carries_the_message(case: Case) -> None:
    """Tracing is where the checks run, so no compiler is needed behind it."""
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(traced(case), backend="eager", fullgraph=True)()
    missing = [part for part in (case.error.__name__, *case.parts) if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.slow
def test_compiled_raises_the_same() -> None:
    """A few messages of every file, others each time: where a graph breaks its parts are compiled, which takes long."""
    sites = find_sites()
    by_file: dict[str, dict[Site, Case]] = {}
    for case in TRACED:
        site = sites_of(case.provoke(), sites)[0]
        by_file.setdefault(site.file, {})[site] = case
    assert by_file.keys() >= {"arguments.py", "checks.py", "geometry.py", "functional.py", "modules.py"}
    draw = random.Random(int(torch.randint(2**31, ())))
    for case in [case for cases in by_file.values() for case in draw.sample([*cases.values()], min(len(cases), 3))]:
        torch._dynamo.reset()  # else the limit of recompilations leaves later cases to plain Python
        with pytest.raises(case.error) as caught:
            torch.compile(traced(case), backend="eager")()
        case.check(caught.value)

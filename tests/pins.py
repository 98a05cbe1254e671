"""Whether a package is of the version that the project pins."""

from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def is_pinned(package: str) -> bool:
    """Whether the installed ``package`` is the one of constraints.txt."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    pins = {pin.name: pin.specifier for pin in map(Requirement, filter(None, lines))}
    return pins[package].contains(version(package))

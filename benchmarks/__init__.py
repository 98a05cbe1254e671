"""Timings of SPConv2d against nn.Conv2d. They share the named shapes and error budgets of the tests."""

import sys
from pathlib import Path

# `pytest` knows of tests/ by itself; `python -m benchmarks.ratios` does not.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

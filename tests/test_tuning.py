"""Tuned choices travel between processes and machines of one kind; no size of input tunes anew, and few compile."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spconv_triton.dispatch import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("needs compiled kernels", allow_module_level=True)

import triton
from cases import RESNET50

from benchmarks.fingerprint import fingerprint
from benchmarks.launches import CAPABILITIES, Launch, backward_launches, forward_launches, fusion_launches
from benchmarks.machine_code import compiling_for, jit_function
from spconv_triton import load_tuning, save_tuning
from spconv_triton.kernels.onepass import onepass_forward
from spconv_triton.launch import TUNED_KERNELS

KEY = (64, 32, 64, 2, 3, 3, 1, 1, "ieee", "torch.float16")


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onepass_forward, "cache", {})


def test_choices_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    config = onepass_forward.configs[1]
    onepass_forward.cache[KEY] = config
    with compiling_for("sm_90"):
        assert save_tuning(file) == 1
        onepass_forward.cache.clear()
        assert load_tuning(file) == 1
    assert onepass_forward.cache == {KEY: config}
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


def test_others_may_read_the_file(tmp_path: Path) -> None:
    with compiling_for("sm_90"):
        save_tuning(tmp_path / "tuned.json")
    (tmp_path / "beside.json").touch()
    assert (tmp_path / "tuned.json").stat().st_mode == (tmp_path / "beside.json").stat().st_mode


def test_a_file_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    onepass_forward.cache[KEY] = onepass_forward.configs[1]
    with compiling_for("sm_90"):
        save_tuning(file)
        saved = json.loads(file.read_text())
        for broken in ({"kernel": "onepass_forward"}, {**saved["choices"][0], "key": [[1]]}):
            file.write_text(json.dumps({**saved, "choices": [*saved["choices"], broken]}))
            onepass_forward.cache.clear()
            with pytest.raises(ValueError, match="path must be a file written by save_tuning"):
                load_tuning(file)
            assert not onepass_forward.cache


def test_what_is_tuned_here_stays(tmp_path: Path) -> None:
    onepass_forward.cache[KEY] = onepass_forward.configs[1]
    with compiling_for("sm_90"):
        save_tuning(tmp_path / "tuned.json")
        onepass_forward.cache[KEY] = onepass_forward.configs[0]
        assert load_tuning(tmp_path / "tuned.json") == 0
    assert onepass_forward.cache[KEY] is onepass_forward.configs[0]


def test_another_device_or_version_takes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    onepass_forward.cache[KEY] = onepass_forward.configs[1]
    with compiling_for("sm_90"):
        save_tuning(file)
    onepass_forward.cache.clear()
    with compiling_for("sm_80"):
        assert load_tuning(file) == 0
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "triton": triton.__version__ + ".1"}))
    with compiling_for("sm_90"):
        assert load_tuning(file) == 0


def test_without_a_gpu_nothing_is_chosen_or_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    with compiling_for("sm_90"):
        onepass_forward.cache[KEY] = onepass_forward.configs[1]
        save_tuning(tmp_path / "tuned.json")
    onepass_forward.cache.clear()
    monkeypatch.setattr(type(triton.runtime.driver), "active", property(fail))
    assert load_tuning(tmp_path / "tuned.json") == 0
    assert save_tuning(tmp_path / "none.json") == 0
    assert load_tuning(tmp_path / "none.json") == 0


def test_a_config_that_the_table_lost_is_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    onepass_forward.cache[KEY] = triton.Config({"BLOCK_PIX": 1, "BLOCK_CO": 1, "BLOCK_C": 1})
    with compiling_for("sm_90"):
        save_tuning(file)
        onepass_forward.cache.clear()
        assert load_tuning(file) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        pytest.param("[" * 100000, id="deep"),
        '{"format": 99}',
        '{"format": 1, "device": 0, "triton": 0}',
    ],
)
def test_a_foreign_file_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    if "device" in text:
        with compiling_for("sm_90"):
            assert load_tuning(file) == 0
        return
    with compiling_for("sm_90"), pytest.raises(ValueError, match=r"other\.json"):
        load_tuning(file)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.json"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with compiling_for("sm_90"), pytest.raises(OSError, match="no space"):
        save_tuning(file)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


def launches(target: str, stride: int, **sizes: Any) -> list[Launch]:
    """Of a wide layer, forward and backward, with biases: flat on sm_80, over descriptors on sm_90."""
    case = replace(RESNET50[2], stride=(stride, stride), **sizes)
    capability = CAPABILITIES[target]
    return [
        *forward_launches(case, torch.float16, capability, bias=True, branch_bias=True),
        *backward_launches(case, torch.float16, capability, branch_bias=True),
        *forward_launches(replace(case, alpha=1.0), torch.float16, capability),
        *fusion_launches(case, torch.float16),
    ]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_another_size_is_the_same_binary(target: str, stride: int) -> None:
    for found in launches(target, stride):
        named = {**found.arguments, **found.constants}
        sizes = [name for name, value in found.arguments.items() if isinstance(value, int) and "stride" not in name]
        assert sizes, found.name
        first = fingerprint(found.kernel, target, found.configs[-1], **named)
        for size in (1, 16, 17, 4096):
            resized = named | dict.fromkeys(sizes, size)
            assert fingerprint(found.kernel, target, found.configs[-1], **resized) == first, f"{found.name} at {size}"


@pytest.mark.parametrize("sizes", [{"batch": 1}, {"batch": 128}, {"size": (56, 56)}], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_little_of_a_size_is_compiled_in(target: str, stride: int, sizes: dict[str, Any]) -> None:
    """In how many parts sums are made, whether samples are few, and the statistics' and a descriptor kernel's block."""
    for usual, other in zip(launches(target, stride), launches(target, stride, **sizes), strict=True):
        assert usual.name == other.name
        differing = {name for name, value in usual.constants.items() if other.constants[name] != value}
        tile = {name for name in usual.constants if name.startswith(("BLOCK_", "num_"))} | {"TRANSPOSED"}
        chosen = tile if usual.name.endswith("_descriptor") or usual.name == "window_statistics" else {"SPLITS"}
        assert differing <= chosen | {"OVERLAP"}, usual.name
        assert [config.kwargs for config in usual.configs] == [config.kwargs for config in other.configs]


def test_keys_name_no_size() -> None:
    for kernel in TUNED_KERNELS:
        compiled_in = {parameter.name for parameter in jit_function(kernel).params if parameter.is_constexpr}
        assert set(kernel.keys) <= compiled_in, kernel.base_fn.__name__


@pytest.mark.parametrize("option", ["num_warps", "num_stages"])
def test_the_same_blocks_with_other_options_are_not_taken(option: str, tmp_path: Path) -> None:
    config = copy.deepcopy(onepass_forward.configs[1])
    setattr(config, option, 7)
    onepass_forward.cache[KEY] = config
    with compiling_for("sm_90"):
        save_tuning(tmp_path / "tuned.json")
        onepass_forward.cache.clear()
        assert load_tuning(tmp_path / "tuned.json") == 0

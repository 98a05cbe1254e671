"""Floor times of the layers that are timed, by the roofline model, for a GPU whose data sheet it knows."""

from __future__ import annotations

import torch

from benchmarks.floors import DEVICES, DIRECTIONS, PATHS, floor_seconds
from benchmarks.gpu import plan
from benchmarks.gpu.layers import keys
from benchmarks.gpu.record import Record


def model(record: Record) -> None:
    """Milliseconds, by layer, direction and path."""
    name = "H100" if record.rehearsal else torch.cuda.get_device_name()
    device = next((known for known in DEVICES if known in name), None)
    if device is None:
        record.skip(f"the model knows {', '.join(DEVICES)}, and this is {name}")
        return
    record.note(f"by the data sheet of the {device} as an SXM module; see benchmarks/floors.py")
    for timed in (plan.layers, plan.single, plan.others):
        for entry in timed(rehearsal=record.rehearsal):
            for direction in DIRECTIONS:
                for path in PATHS:
                    seconds = floor_seconds(entry.case, path, direction, device, entry.dtype)
                    record.row("model", **keys(entry), direction=direction, path=path, device=device, ms=1e3 * seconds)

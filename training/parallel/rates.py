"""At which rates work gets done: data sheets times what is had of them. The one place for assumptions of the cost model.

They hold until `training/bench.py` has measured them on the accelerator: its figures take their place with `--measured FILE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training.parallel.hardware import Accelerator, Cluster
from waver_core.errors import UserError

ASSUMED = {
    "matmul": 0.70,  # large bf16 products on Hopper; power, not the clock of the sheet, is their limit
    "attention_forward": 0.50,  # heads of 128, tens of thousands of keys
    "attention_backward": 0.40,  # counted as twice the forward, though kernels compute the scores once more
    "memory": 0.80,
    "node": 0.75,
    "network": 0.80,
    "host": 0.80,
}
"""Part of the data sheet's figure that is had. Assumptions, not measurements."""

ELEMENTWISE_PASSES = 28
"""Reads and writes of a tensor [n, D] in a block's forward outside of products and attention, each group of operations one
kernel: norm and modulation 2, norms and rotation of queries and keys 4, values 2, joining and splitting text and video 4, gate
and residual 3, norm and modulation 2, GELU 8 (it is four wide), gate and residual 3."""
ELEMENTWISE_PASSES_EAGER = 75
"""The same with a kernel for each operation, some of them in fp32."""
ELEMENTWISE_BACKWARD = 2
"""Backward reads what forward did and the gradients, and writes theirs."""
OPTIMIZER_PASSES = 13
"""Reads and writes of every fp32 parameter held: norm of the gradient 1, clipping 2, AdamW 7 (weight, gradient and two moments
read, three of them written), average 3."""

MEASURED = {
    "matmul_tflops": ("matmul", 1e12),
    "attention_forward_tflops": ("attention_forward", 1e12),
    "attention_backward_tflops": ("attention_backward", 1e12),
    "memory_gb_s": ("memory", 1e9),
    "host_gb_s": ("host", 1e9),
}
"""Keys of a file of measurements."""
_MOST_OF_SHEET = 1.1


class Rate(NamedTuple):
    """Work a second of one worker, and who says so."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Rates:
    """What one worker gets done a second."""

    matmul: Rate
    attention_forward: Rate
    attention_backward: Rate
    memory: Rate
    host: Rate
    node: Rate
    network: Rate

    def ring(self, cluster: Cluster, size: int, stride: int = 1) -> float:
        """Bytes a second of a gather, scatter or sum in a group; see `Cluster.ring_gb_s`."""
        return 1e9 * cluster.ring_gb_s(size, stride, ASSUMED["node"], ASSUMED["network"])

    def all_to_all_s(self, cluster: Cluster, payload_bytes: float, size: int) -> float:
        """Seconds of an exchange of all with all; see `Cluster.all_to_all_s`."""
        return cluster.all_to_all_s(payload_bytes, size, ASSUMED["node"], ASSUMED["network"])


def rates_of(device: Accelerator, measured: str | None = None) -> Rates:
    """Rates of an accelerator: assumed parts of its data sheet, or measured where the JSON file `measured` has a figure."""
    sheet = {
        "matmul": (device.bf16_tflops, "TFLOPS"),
        "attention_forward": (device.bf16_tflops, "TFLOPS"),
        "attention_backward": (device.bf16_tflops, "TFLOPS"),
        "memory": (device.hbm_gb_s, "GB/s"),
        "host": (device.host_gb_s, "GB/s"),
        "node": (device.nvlink_gb_s, "GB/s"),
        "network": (device.network_gb_s, "GB/s"),
    }
    told = "data sheet" if device.name != "cpu" else "a guess"
    scale = {"TFLOPS": 1e12, "GB/s": 1e9}
    found = {
        name: Rate(
            figure * ASSUMED[name] * scale[unit],
            "FLOP/s" if unit == "TFLOPS" else "B/s",
            f"{figure:,g} {unit} ({told}) x {ASSUMED[name]:.2f} (assumed)",
        )
        for name, (figure, unit) in sheet.items()
    }
    for key, figure in _read(measured).items():
        name, factor = MEASURED[key]
        most = sheet[name][0] * _MOST_OF_SHEET
        if figure > most:
            raise UserError(
                f"--measured {measured}: {key} is {figure:g}, more than a {device.name} can do: name the one it ran on"
            )
        found[name] = Rate(figure * factor, found[name].unit, f"measured: {Path(str(measured)).name}")
    return Rates(**found)


def _read(path: str | None) -> Mapping[str, float]:
    """The figures of a file of measurements that the model knows. Raises `UserError` where it holds none."""
    if path is None:
        return {}
    try:
        raw = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--measured {path} cannot be read as JSON ({type(error).__name__}): give what training/bench.py wrote"
        ) from error
    figures = raw.get("ceilings", raw) if isinstance(raw, dict) else {}
    known = {key: figures[key] for key in MEASURED if isinstance(figures, dict) and figures.get(key) is not None}
    wrong = [key for key, value in known.items() if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0]
    if wrong or not known:
        told = f"{wrong[0]} is no rate" if wrong else f"none of {', '.join(MEASURED)} is in it"
        raise UserError(f"--measured {path}: {told}; give what training/bench.py wrote")
    return {key: float(value) for key, value in known.items()}

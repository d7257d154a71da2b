"""The figures of `training/bench.py` as a file and as tables: what was measured, on what, with which versions."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from training.bench_cases import Case
from training.parallel.hardware import ACCELERATORS
from waver_core.dit import DiTConfig
from waver_core.dit.flops import Flops
from waver_core.errors import UserError

_FIXED = ("device", "versions", "model")
"""What figures in one file have in common."""


@dataclass
class Report:
    """A result file that grows row by row, so that a run that ends early has left what it measured."""

    path: Path | None
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(cls, path: Path | None, device: torch.device, model: dict[str, Any]) -> Report:
        """A new file, or one of the same device, versions and model that goes on. Raises `UserError` where it is of others."""
        figures: dict[str, Any] = {
            "benchmark": "training_step",
            "command": shlex.join(["python", "training/bench.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device_facts(device),
            "versions": versions(),
            "model": model,
            "cases": [],
        }
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            differing = [key for key in _FIXED if before.get(key) != figures[key]]
            if differing:
                raise UserError(f"{path} holds figures of another {' and '.join(differing)}: give another --output, or remove it")
            figures = {**before, "command": f"{before['command']}; {figures['command']}", "date": figures["date"]}
        return cls(path, figures)

    @property
    def matmul_tflops(self) -> float:
        """The large matrix product of this run."""
        return float(self.figures["ceilings"]["matmul_tflops"])

    @property
    def peak_tflops(self) -> float:
        """What MFU is a share of: the data sheet's dense bf16, or the measured product on a device without one."""
        return float(self.figures["peak_tflops"])

    def add_ceilings(self, measured: dict[str, Any]) -> None:
        """Record the device's ceilings, and with them the peak."""
        known = data_sheet_tflops(self.figures["device"]["name"])
        self.figures |= {
            "ceilings": {**self.figures.get("ceilings", {}), **measured},
            "peak_tflops": known or measured["matmul_tflops"],
            "peak_from": "data sheet, dense bf16" if known else "measured matrix product",
        }
        self.write()

    def add_case(self, case: Case, config: DiTConfig, flops: Flops) -> dict[str, Any]:
        """A case without rows, in place of one of the same name. Returns it, for rows to be added."""
        told: dict[str, Any] = {
            "name": case.name,
            "samples": len(case.shapes),
            "tokens": sum(case.lengths),
            "lengths": list(case.lengths),
            "blocks": [config.dual_blocks, config.single_blocks],
            "windowed": case.windowed,
            "flops": {**flops._asdict(), "forward": flops.forward, "training": flops.training},
            "rows": [],
        }
        self.figures["cases"] = [c for c in self.figures["cases"] if c["name"] != case.name] + [told]
        return told

    def add_row(self, case: dict[str, Any], row: dict[str, Any]) -> None:
        """One row of a case that was added. Says which row is fastest by now and what windows gain, keeps attention's rates at
        the longest case for the cost model, and writes the file."""
        case["rows"].append(row)
        ran = [row for row in case["rows"] if row["error"] is None]
        same = [row for row in ran if row["settings"]["windowed"] == case["windowed"]]
        best = min(same, key=lambda row: row["step_ms"], default=None)
        case["best"] = best and {key: best[key] for key in ("label", "step_ms", "mfu", "share_of_ceiling")}
        case["window_gain"] = _window_gain(ran)
        longest = max(self.figures["cases"], key=lambda c: max(c["lengths"]))
        for key in ("attention_forward_tflops", "attention_backward_tflops"):
            self.figures["ceilings"][key] = longest["ceilings"][key]
        self.write()

    def write(self) -> None:
        """The file as it stands, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(_rounded(self.figures), indent=2) + "\n")
        os.replace(partial, self.path)


def _window_gain(rows: list[dict[str, Any]]) -> float | None:
    """Step time of full attention over that of windows, all else the same; None where either is missing."""
    for full in (row for row in rows if row["option"] == "windows"):
        for row in rows:
            if row["settings"] == {**full["settings"], "windowed": True}:
                return float(full["step_ms"] / row["step_ms"])
    return None


def data_sheet_tflops(device: str) -> float | None:
    """Dense bf16 of the data sheet for a device as the driver names it; None for those of another form (PCIe, NVL) and others."""
    words = device.replace("-", " ").split()
    if "PCIe" in device or "NVL" in words:
        return None
    return next((each.bf16_tflops for name, each in ACCELERATORS.items() if name in words), None)


def device_facts(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    if device.type != "cuda":
        return {"type": "cpu", "name": _cpu_name(), "threads": torch.get_num_threads()}
    facts = torch.cuda.get_device_properties(device)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {"type": "cuda", "name": facts.name, "memory_gib": round(facts.total_memory / 2**30, 1), "driver": driver}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of what the figures hang on."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for name in ("triton", "flash-attn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def print_ceilings(console: Console, report: Report) -> None:
    """What the device does at best."""
    figures, ceilings = report.figures, report.figures["ceilings"]
    size = ceilings["matmul_size"]
    host = f", host memory {ceilings['host_gb_s']:.1f} GB/s" if ceilings.get("host_gb_s") else ""
    console.print(
        f"{figures['device']['name']}, torch {figures['versions']['torch']}: product of {size}^3 at "
        f"{ceilings['matmul_tflops']:.3g} TFLOP/s, memory {ceilings['memory_gb_s']:,.0f} GB/s{host}. MFU is a share of "
        f"{figures['peak_tflops']:.3g} TFLOP/s ({figures['peak_from']}).",
        soft_wrap=True,
    )


def print_case(console: Console, case: dict[str, Any]) -> None:
    """A case's operations, its ceilings, and its rows."""
    flops, ceilings, blocks = case["flops"], case["ceilings"], case["blocks"]
    total = flops["forward"]
    parts = ", ".join(f"{name} {flops[name] / total:.1%}" for name in Flops._fields)
    console.print(
        f"\n{case['name']}: {case['tokens']:,} tokens in {case['samples']} samples, {blocks[0]} dual and {blocks[1]} single "
        f"blocks; {flops['training'] / 1e12:,.3g} TFLOP forward and backward: {parts}",
        soft_wrap=True,
    )
    products = ", ".join(f"{name} {rate:.3g}" for name, rate in ceilings["matmul_tflops"].items())
    kernels = "; ".join(
        f"{k['name']} {k['forward_tflops']:.3g} forward, {k['backward_tflops']:.3g} backward"
        for k in ceilings["attention"]
        if k["error"] is None
    )
    console.print(f"Ceilings in TFLOP/s: products of a block: {products}; bare attention: {kernels}", soft_wrap=True)
    table = Table(header_style="bold")
    for name in ("settings", "step ms", "MFU", "of ceiling", "peak GiB", "first step s", "note"):
        table.add_column(name, justify="left" if name in ("settings", "note") else "right")
    for row in case["rows"]:
        table.add_row(*_cells(row))
    console.print(table)
    if case["best"]:
        console.print(f"Best: {case['best']['label']}, MFU {case['best']['mfu']:.3f}", soft_wrap=True)
    if case["window_gain"]:
        console.print(f"A step with windows is {case['window_gain']:.2f} times as fast as with full attention", soft_wrap=True)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["error"] is not None:
        return row["label"], "-", "-", "-", "-", "-", row["error"]
    memory, share = row["peak_memory_gib"], row["share_of_ceiling"]
    note = f"{row['offloaded_gib']:.3g} GiB to the host" if "offloaded_gib" in row else ""
    if row.get("overlap", {}).get("hidden_share") is not None:
        note += f", {row['overlap']['hidden_share']:.0%} of the copying hidden"
    return (
        row["label"],
        f"{row['step_ms']:,.1f}",
        f"{row['mfu']:.3f}",
        "-" if share is None else f"{share:.3f}",
        "-" if memory is None else f"{memory:.1f}",
        f"{row['first_step_s']:.1f}",
        note,
    )


def _rounded(value: Any) -> Any:
    """Five significant digits of every fraction: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value

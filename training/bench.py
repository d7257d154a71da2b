"""Entry script: how fast real blocks train on this device, and what each option is worth (Waver §5, Table 3). No Ray.

python training/bench.py --output benchmarks/results/training_step.json --trace out/traces
python training/bench.py --quick                        # small, for a CPU
python training/bench.py --cases 720p --blocks 2,5

For micro-batches as the stages have them (short 192p videos packed; 5 s of 480p and 720p; the refiner's 1080p) it runs forward
and backward through as many blocks of the model's width as fit, and prints step time, peak memory and MFU: under the best
settings, and with each of them changed. Beside it stands what the device can do at best, measured in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

import time
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from training.bench_cases import CASES, OPTIONS, Case, Settings, candidates, case_of, variations
from training.bench_report import Report, print_case, print_ceilings
from training.benching import Bench
from training.parallel.ceilings import BACKWARD_OVER_FORWARD, attention_kernels, copy_gb_s, host_gb_s, matmul_tflops
from training.parallel.memory import block_bytes
from waver_core.command_line import new_console
from waver_core.command_line import run as run_command_line
from waver_core.dit import DiTConfig, preset
from waver_core.dit.flops import Flops, step_flops
from waver_core.errors import UserError, did_you_mean

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

MODEL_BLOCKS = (2, 5)
"""The 16 : 40 of Table 1."""
COMPILERS = ("inductor", "aot_eager")
WORKING_TENSORS = 16
"""Tensors [N, D] at work in an eager block beside those that it keeps."""
MAX_STEP_S = 20.0
"""Blocks are alike, so more of them only take longer: `--blocks auto` stops where a step would take about so long."""
EXPECTED_MFU = 0.4


@app.command()
def main(
    model: Annotated[str, typer.Option("--model", help="Preset whose width the blocks have.")] = "waver_12b",
    cases: Annotated[str, typer.Option("--cases", help="Micro-batches, by resolution.")] = ",".join(CASES),
    options: Annotated[str, typer.Option("--options", help="What is changed, row by row.")] = ",".join(OPTIONS),
    blocks: Annotated[str, typer.Option("--blocks", help="Dual and single blocks, as 2,5; auto takes what fits.")] = "auto",
    device: Annotated[str | None, typer.Option("--device", help="cuda or cpu (default: the GPU where there is one).")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Steps of which a row's median is taken, at most.")] = 5,
    output: Annotated[
        Path | None, typer.Option("--output", help="JSON file; cases are added to it, and it is written after every row.")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Folder for traces of the steps with offloading.")] = None,
    max_minutes: Annotated[float | None, typer.Option("--max-minutes", help="Rows after this much time are left out.")] = None,
    compiler: Annotated[
        str | None,
        typer.Option("--compiler", help="inductor, or aot_eager, which only captures (default with --quick)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Narrow blocks and short videos, for a CPU.")] = False,
) -> None:
    """Measure the training step of one device."""
    ends_at = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
    names, wanted = _words("--cases", cases, CASES), _words("--options", options, OPTIONS)
    place = _device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    config = preset(model, heads=4, head_dim=32, text_dims=(64, 96)) if quick else preset(model)
    compiler = _words("--compiler", compiler or ("aot_eager" if quick else "inductor"), COMPILERS)[0]
    console = new_console()
    report = Report.begin(output, place, {"preset": model, "width": config.width, "quick": quick, "compiler": compiler})
    ceilings = device_ceilings(place, dtype, quick)
    report.add_ceilings(ceilings)
    print_ceilings(console, report)
    bench = Bench(place, dtype, repeats, compiler, 2**12 if quick else 2**20, trace_folder=trace)
    for name in names:
        case = case_of(name, quick, len(config.text_dims))
        built = with_blocks(config, case, blocks, place, ceilings["matmul_tflops"], quick)
        run_case(bench, case, built, wanted, report, console, ends_at)
    if output is not None:
        console.print(f"Written to {output}", soft_wrap=True)


def device_ceilings(device: torch.device, dtype: torch.dtype, quick: bool) -> dict[str, Any]:
    """What the device does at best: a product, copies in its memory, and the slower way to or from the host (None on a CPU)."""
    size = 512 if quick else 8192 if device.type == "cuda" else 2048
    nbytes = (64 << 20) if quick or device.type == "cpu" else (4 << 30)
    host = host_gb_s(min(nbytes, 1 << 30), device)
    return {
        "matmul_size": size,
        "matmul_tflops": matmul_tflops(size, size, size, device, dtype),
        "memory_gb_s": copy_gb_s(nbytes, device),
        "host_gb_s": min(host.values(), default=None),
        "host_ways_gb_s": host,
    }


def case_ceilings(case: Case, config: DiTConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The products of a block at the case's tokens, and full attention at its lengths by every kernel, fastest first."""
    tokens, width = sum(case.lengths), config.width
    shapes = {"qkv": (width, 3 * width), "mlp in": (width, config.mlp_width), "mlp out": (config.mlp_width, width)}
    kernels = attention_kernels(case.lengths, config.heads, config.head_dim, device, dtype)
    return {
        "matmul_tflops": {name: matmul_tflops(tokens, k, n, device, dtype) for name, (k, n) in shapes.items()},
        "attention": [kernel._asdict() for kernel in kernels],
        "attention_forward_tflops": kernels[0].forward_tflops,
        "attention_backward_tflops": kernels[0].backward_tflops,
    }


def with_blocks(config: DiTConfig, case: Case, blocks: str, device: torch.device, tflops: float, quick: bool) -> DiTConfig:
    """The model with as many blocks as asked for, and windows in the same part of them as the refiner has."""
    if blocks != "auto":
        dual, single = _pair(blocks)
    elif quick:
        dual, single = 1, 2
    else:
        dual, single = fitting_blocks(config, case, device, tflops)
    full = max(1, round(config.full_blocks * (dual + single) / config.blocks))
    return replace(config, dual_blocks=dual, single_blocks=single, full_blocks=full)


def fitting_blocks(config: DiTConfig, case: Case, device: torch.device, tflops: float) -> tuple[int, int]:
    """The most blocks in the model's ratio that fit in the free memory with `selective` recomputation; at least 1 and 2, which
    may not fit.

    Raises `UserError` on a CPU, where nothing says how much memory is free.
    """
    if device.type != "cuda":
        raise UserError("--blocks auto asks a GPU for its free memory: give --blocks 1,2, or --quick for a small run")
    video, text, samples = sum(s.tokens for s in case.shapes), sum(map(sum, case.text_lengths)), len(case.shapes)
    windows = 4 if case.windowed else 1
    # Weights and their gradients in bf16: 36 D^2 of them in a dual block, half as many in a single one.
    dual_bytes = block_bytes(config, "dual", video, text, samples, windows=windows).selective + 4 * 36 * config.width**2
    single_bytes = block_bytes(config, "single", video, text, samples, windows=windows).selective + 4 * 18 * config.width**2
    free = 0.9 * torch.cuda.mem_get_info(device)[0] - WORKING_TENSORS * 2 * (video + text) * config.width
    for groups in range(config.dual_blocks // MODEL_BLOCKS[0], 0, -1):
        dual, single = groups * MODEL_BLOCKS[0], groups * MODEL_BLOCKS[1]
        flops = step_flops(replace(config, dual_blocks=dual, single_blocks=single), case.shapes, case.text_lengths)
        quick_enough = flops.training / (EXPECTED_MFU * tflops * 1e12) <= MAX_STEP_S
        if dual * dual_bytes + single * single_bytes <= free and quick_enough:
            return dual, single
    return 1, 2


def run_case(
    bench: Bench, case: Case, config: DiTConfig, wanted: list[str], report: Report, console: Console, ends_at: float
) -> None:
    """Measure a case's rows, each written to the report as it comes, and print them."""
    flops = {w: step_flops(replace(config, windowed=w), case.shapes, case.text_lengths) for w in {case.windowed, False}}
    told = report.add_case(case, config, flops[case.windowed])
    told["ceilings"] = ceilings = case_ceilings(case, config, bench.device, bench.dtype)

    def measure(option: str, settings: Settings) -> dict[str, Any]:
        if time.monotonic() > ends_at:
            row: dict[str, Any] = {"label": settings.label, "error": "left out: --max-minutes"}
        else:
            row = bench.row(case, config, settings)
        counted = flops[settings.windowed]
        if row["error"] is None:
            row |= rates(counted, row["step_ms"] / 1e3, report.peak_tflops, report.matmul_tflops, ceilings)
        report.add_row(told, {"option": option, **row})
        return row

    ran: list[tuple[float, Settings]] = []
    for settings in candidates(case):
        row = measure("checkpointing", settings)
        if row["error"] is None:
            ran.append((row["step_ms"], settings))
            if "checkpointing" not in wanted:
                break
    best = min(ran, key=lambda each: each[0])[1] if ran else candidates(case)[0]
    for option, settings in variations(case, best, bench.device):
        if option in wanted:
            measure(option, settings)
    print_case(console, told)


def rates(
    flops: Flops, step_s: float, peak_tflops: float, matmul_tflops: float, ceilings: dict[str, Any]
) -> dict[str, float | None]:
    """Operations a second, MFU, and the step as a share of the ceilings': the time that its products and its attention would take
    at the measured rates, over the time that it took."""
    told: dict[str, float | None] = {
        "tflops": flops.training / step_s / 1e12,
        "mfu": flops.training / step_s / 1e12 / peak_tflops,
        "share_of_matmul": flops.training / step_s / 1e12 / matmul_tflops,
        "share_of_ceiling": None,
    }
    forward, backward = ceilings["attention_forward_tflops"], ceilings["attention_backward_tflops"]
    if forward and backward:
        attention_s = flops.attention / forward + BACKWARD_OVER_FORWARD * flops.attention / backward
        products_s = 3 * (flops.forward - flops.attention) / matmul_tflops
        told["share_of_ceiling"] = (attention_s + products_s) / 1e12 / step_s
    return told


def _words(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UserError(f"{option}: no '{word}', {did_you_mean(word, known)}")
    if not words:
        raise UserError(f"{option} is empty: give some of {', '.join(known)}")
    return words


def _pair(blocks: str) -> tuple[int, int]:
    parts = blocks.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts) or not any(int(part) for part in parts):
        raise UserError(f"--blocks {blocks}: give the numbers of dual and single blocks as 2,5, or auto")
    return int(parts[0]), int(parts[1])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: cuda or cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; leave --device out, or install a build with CUDA")
    return torch.device(name)


if __name__ == "__main__":
    run_command_line(app)

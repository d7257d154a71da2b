"""One denoising step at full width, and from it what the cascade saves: 720p or 480p and then the refiner, against 1080p directly
(Waver §2.2: 40 % less time from 720p, 60 % less from 480p). For one GPU; no Ray, no weights.

    python benchmarks/generation_step.py --predict             # from counted operations alone, anywhere
    python benchmarks/generation_step.py --modes eager,compiled --whole 480p --save
    python benchmarks/generation_step.py --quick               # narrow blocks and small videos, for a CPU

The steps are those of `waver_core.denoising`, which serving runs: a guided step computes the prompt and the negative prompt, the
refiner's one prompt. Weights are random. As blocks are alike, some of them stand for all: times are scaled by the operations, and
`--whole` shows for one case how well that holds. Text encoders and autoencoder are not counted.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from training.bench_report import data_sheet_tflops, device_facts, versions
from training.parallel.ceilings import matmul_tflops, one_line
from training.parallel.compiling import compile_block
from waver_core.command_line import run as run_command_line
from waver_core.denoising import Inputs, denoise, sharpen
from waver_core.dit import DiTConfig, WaverDiT, preset
from waver_core.dit.flops import Flops, step_flops
from waver_core.errors import UserError, did_you_mean
from waver_core.flow.guidance import Apg
from waver_core.flow.sampler import Stop
from waver_core.shapes import LATENT_CHANNELS, VideoShape, whole_frames

app = common.new_app()
MODES = ("eager", "compiled")
SIZES = {"480p": (480, 864), "720p": (720, 1280), "1080p": (1080, 1920)}
QUICK_SIZES = {"480p": (64, 96), "720p": (96, 128), "1080p": (136, 240)}
REPORTED = {"720p": 0.4, "480p": 0.6}
"""Time that the report's cascade saves against 1080p in one stage, by the size of its first stage."""
REFINER_BLOCKS = 2
"""So many times the blocks of the others: windows in space and in time then have the shares that they have in the whole model."""


@dataclass(frozen=True)
class Case:
    """A step to be measured: of the base model, guided, or of the refiner."""

    name: str
    shape: VideoShape
    text_tokens: tuple[int, ...]
    """From every encoder"""
    refiner: bool = False
    guided: bool = True

    @property
    def samples(self) -> int:
        """Prompts that a step computes."""
        return 2 if self.guided else 1

    def flops(self, config: DiTConfig) -> Flops:
        """Operations of a step."""
        config = replace(config, windowed=self.refiner)
        return step_flops(config, [self.shape.latent] * self.samples, [self.text_tokens] * self.samples)


class Way(NamedTuple):
    """A way to a 1080p video: (case, steps) in order."""

    name: str
    parts: tuple[tuple[str, int], ...]
    reported: float | None = None
    """Share of time saved, as the report has it"""


def cases_of(seconds: float, fps: float, text_tokens: int, encoders: int, quick: bool) -> dict[str, Case]:
    """All of them with the same number of frames, in the order in which they are worth measuring."""
    frames = whole_frames(max(5, int(seconds * fps + 0.5)))
    shapes = {name: VideoShape(frames, *size) for name, size in (QUICK_SIZES if quick else SIZES).items()}
    text = (text_tokens,) * encoders
    cases = [Case(name, shapes[name], text) for name in ("720p", "480p")]
    cases += [Case("refiner", shapes["1080p"], text, refiner=True, guided=False), Case("1080p", shapes["1080p"], text)]
    return {case.name: case for case in cases}


def ways(steps: int, refiner_steps: int) -> list[Way]:
    """1080p in one stage first, which the others are compared with."""
    cascades = [Way(f"{n} + refiner", ((n, steps), ("refiner", refiner_steps)), share) for n, share in REPORTED.items()]
    return [Way("1080p directly", (("1080p", steps),)), *cascades]


def compared(found: list[Way], step_cost: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Cost of each way whose steps are all known, and what it saves of the first one's (None where that is not known)."""
    totals = {w.name: sum(n * step_cost[case] for case, n in w.parts) for w in found if all(c in step_cost for c, _ in w.parts)}
    direct = totals.get(found[0].name)
    return {
        w.name: {
            "total": totals[w.name],
            "saved": None if direct is None else 1 - totals[w.name] / direct,
            "reported": w.reported,
        }
        for w in found
        if w.name in totals
    }


def some_blocks(config: DiTConfig, dual: int, single: int) -> DiTConfig:
    """So many blocks, with full attention in the same part of them as the refiner has."""
    full = max(1, round(config.full_blocks * (dual + single) / config.blocks))
    return replace(config, dual_blocks=dual, single_blocks=single, full_blocks=full)


def random_model(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> WaverDiT:
    """The transformer with random weights everywhere, made where it stays: zeros would run faster, and fp32 may not fit."""
    with torch.device("meta"):
        dit = WaverDiT(config)
    dit = dit.to(dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.02)
    return dit.eval().requires_grad_(False)


def step_seconds(dit: WaverDiT, case: Case, device: torch.device, repeats: int, patience_s: float) -> list[float]:
    """Seconds of up to `repeats` steps of the sampler, as many as `patience_s` allows and at least one, after one to warm up."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randn(n, dim, generator=generator) for n, dim in zip(case.text_tokens, dit.config.text_dims, strict=True)]
    latent = case.shape.latent
    black = torch.randn(LATENT_CHANNELS, 1, latent.height, latent.width, generator=generator)
    sample = Inputs(latent, 1, black, tuple(texts), tuple(-t for t in texts))
    marks: list[float] = []

    def on_step(*_: object) -> bool:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        return len(marks) < 3 or marks[-1] - marks[1] < patience_s

    try:
        if case.refiner:
            start = torch.randn(LATENT_CHANNELS, *latent, generator=generator)
            sharpen(dit, [start], [sample], steps=1 + repeats, shift=1.0, noise_weight=0.1, on_step=on_step)
        else:
            denoise(dit, [sample], steps=1 + repeats, shift=7.0, guidance=Apg(), on_step=on_step)
    except Stop:
        pass  # patience is over
    return [after - before for before, after in pairwise(marks[1:])]


def measure(
    case: Case, config: DiTConfig, whole: DiTConfig, mode: str, device: torch.device, repeats: int, patience_s: float
) -> dict[str, Any]:
    """A case's row; what does not fit or does not run is told in `error`."""
    row: dict[str, Any] = {"case": case.name, "mode": mode, "blocks": [config.dual_blocks, config.single_blocks], "error": None}
    try:
        times, peak_gib = _timed(case, replace(config, windowed=case.refiner), mode, device, repeats, patience_s)
        done, step_s = case.flops(config).forward, statistics.median(times)
        row |= {"steps_s": times, "step_s": step_s, "tflops": done / step_s / 1e12, "peak_memory_gib": peak_gib}
        row["whole_step_s"] = step_s * case.flops(whole).forward / done
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:  # one row must not cost the others
        row["error"] = one_line(error)
    torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    return row


def _timed(
    case: Case, config: DiTConfig, mode: str, device: torch.device, repeats: int, patience_s: float
) -> tuple[list[float], float | None]:
    """Seconds of the steps, and the most memory that they took (None on a CPU, which does not tell)."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    dit = random_model(config, device, torch.bfloat16 if on_gpu else torch.float32)
    if mode == "compiled":
        for block in dit.blocks():
            compile_block(block, backend="inductor" if on_gpu else "aot_eager")
    times = step_seconds(dit, case, device, repeats, patience_s)
    return times, torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None


def predicted(found: list[Way], cases: Mapping[str, Case], whole: DiTConfig) -> dict[str, Any]:
    """The same from counted operations: as served, and with a guided refiner, which computes two prompts a step."""
    flops = {name: case.flops(whole) for name, case in cases.items()}
    cost = {name: f.forward / 1e12 for name, f in flops.items()}
    return {
        "step_tflop": cost,
        "attention_share": {name: f.attention_share for name, f in flops.items()},
        "ways": compared(found, cost),
        "ways_with_guided_refiner": compared(found, {**cost, "refiner": 2 * cost["refiner"]}),
    }


def print_predicted(figures: Mapping[str, Any], cases: Mapping[str, Case]) -> None:
    """Operations of a step, and of the ways."""
    rows = [
        (
            name,
            f"{case.shape.width_px}x{case.shape.height_px}",
            case.shape.latent.tokens,
            case.samples,
            figures["step_tflop"][name],
        )
        + (f"{figures['attention_share'][name]:.0%}",)
        for name, case in cases.items()
    ]
    columns = ("step", "size", "video tokens", "prompts", "TFLOP", "attention")
    common.print_table(f"A step of the whole model, {next(iter(cases.values())).shape.frames} frames", columns, rows)
    guided = figures["ways_with_guided_refiner"]
    common.print_table(
        "By operations alone",
        ("way to 1080p", "PFLOP", "less", "less, refiner guided too", "the report"),
        [
            (n, w["total"] / 1e3, *map(_share, (w["saved"], guided[n]["saved"], w["reported"])))
            for n, w in figures["ways"].items()
        ],
    )


def print_measured(rows: list[dict[str, Any]], found: list[Way], peak_tflops: float) -> dict[str, Any]:
    """Every row, and the ways by mode, which are returned."""
    common.print_table(
        "A step, measured",
        ("step", "mode", "blocks", "s", "TFLOP/s", "MFU", "s, all blocks", "peak GiB", "note"),
        [
            (r["case"], r["mode"], "{} + {}".format(*r["blocks"]), *(r.get(k) for k in ("step_s", "tflops")))
            + (r["tflops"] / peak_tflops if "tflops" in r else None, r.get("whole_step_s"), r.get("peak_memory_gib"), r["error"])
            for r in rows
        ],
        left=(0, 1, 8),
    )
    told: dict[str, Any] = {}
    for mode in MODES:
        # Of two rows of a case the first counts: all cases are scaled alike then.
        cost = {r["case"]: r["whole_step_s"] for r in reversed(rows) if r["mode"] == mode and r["error"] is None}
        if not (by_way := compared(found, cost)):
            continue
        told[mode] = by_way
        common.print_table(
            f"The whole of denoising, {mode}",
            ("way to 1080p", "s", "less", "the report"),
            [(n, w["total"], _share(w["saved"]), _share(w["reported"])) for n, w in by_way.items()],
        )
    return told


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


@app.command()
def main(
    model: Annotated[str, typer.Option("--model", help="Preset whose width the blocks have.")] = "waver_12b",
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the video.")] = 5.0,
    fps: Annotated[float, typer.Option(min=1, help="Its frames a second.")] = 24.0,
    text_tokens: Annotated[int, typer.Option(min=1, help="From each text encoder.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the base model.")] = 40,
    refiner_steps: Annotated[int, typer.Option(min=1)] = 20,
    cases: Annotated[str, typer.Option(help="What to measure, in order.")] = "720p,480p,refiner,1080p",
    modes: Annotated[str, typer.Option(help="eager, as serving runs it, and compiled.")] = "eager",
    groups: Annotated[int, typer.Option(min=1, help="Blocks that are measured: so many times 2 dual and 5 single ones.")] = 1,
    whole: Annotated[str, typer.Option(help="Cases to measure with all blocks, too; for 12B a GPU with 40 GB or more.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Steps of which the median is taken, at most.")] = 5,
    patience: Annotated[float, typer.Option(min=0, help="Seconds after which a row is repeated no more.")] = 30.0,
    max_minutes: Annotated[float | None, typer.Option(help="Rows after this much time are left out.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu (default: the GPU where there is one).")] = None,
    predict: Annotated[bool, typer.Option("--predict", help="Count operations only, measure nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Narrow blocks and small videos, for a CPU.")] = False,
    save: common.Save = False,
) -> None:
    """Count, measure, compare."""
    before, ends_at = common.machine(), time.monotonic() + 60 * (max_minutes or 1e9)
    config = preset(model, heads=4, head_dim=32, text_dims=(64, 96)) if quick else preset(model)
    if quick:
        seconds, text_tokens = min(seconds, 0.5), min(text_tokens, 8)
    known, found = cases_of(seconds, fps, text_tokens, len(config.text_dims), quick), ways(steps, refiner_steps)
    measured, wanted_modes = _words("--cases", cases, tuple(known)), _words("--modes", modes, MODES)
    all_blocks = _words("--whole", whole, tuple(known)) if whole else []
    figures: dict[str, Any] = {
        "model": model,
        "width": config.width,
        "quick": quick,
        "blocks": [config.dual_blocks, config.single_blocks],
    }
    figures |= {"frames": known["1080p"].shape.frames, "text_tokens": text_tokens, "steps": steps, "refiner_steps": refiner_steps}
    figures["predicted"] = predicted(found, known, config)
    print_predicted(figures["predicted"], known)
    if predict:
        common.finish("generation_step_predicted", figures, save, before)
        return
    place = _device(device, quick)
    size = 512 if quick else 8192
    product = matmul_tflops(size, size, size, place, torch.bfloat16 if place.type == "cuda" else torch.float32)
    sheet = data_sheet_tflops(torch.cuda.get_device_name(place)) if place.type == "cuda" else None
    figures |= {"device": device_facts(place), "torch": versions(), "matmul_tflops": product, "peak_tflops": sheet or product}
    figures["peak_from"] = "data sheet, dense bf16" if sheet else "measured matrix product"
    rows: list[dict[str, Any]] = []
    figures["rows"] = rows
    plan = [(name, mode, False) for mode in wanted_modes for name in measured]
    plan += [(name, wanted_modes[0], True) for name in all_blocks]
    for name, mode, is_whole in plan:
        case, times = known[name], groups * (REFINER_BLOCKS if known[name].refiner else 1)
        built = config if is_whole else some_blocks(config, *((1, 2) if quick else (2 * times, 5 * times)))
        if time.monotonic() > ends_at:
            common.console().print(f"{name} {mode} is left out: --max-minutes")
            continue
        rows.append(measure(case, built, config, mode, place, repeats, patience))
        done = rows[-1]
        common.console().print(f"{name}, {mode}: {done['error'] or '{:.3g} s a step'.format(done['step_s'])}")
        common.finish("generation_step", figures, save, before)  # a run that is cut off has left what it measured
    figures["measured"] = print_measured(rows, found, figures["peak_tflops"])
    common.console().print(f"MFU is a share of {figures['peak_tflops']:.3g} TFLOP/s ({figures['peak_from']}).")
    common.finish("generation_step", figures, save, before)


def _words(option: str, given: str, known: tuple[str, ...]) -> list[str]:
    words = [word.strip() for word in given.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UserError(f"{option}: no '{word}', {did_you_mean(word, known)}")
    if not words:
        raise UserError(f"{option} is empty: give some of {', '.join(known)}")
    return words


def _device(name: str | None, quick: bool) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; take --predict, or --quick for a small run on the CPU")
    if device.type == "cpu" and not quick:
        raise UserError("a CPU would take hours: take --predict, or --quick for a small run")
    return device


if __name__ == "__main__":
    run_command_line(app)

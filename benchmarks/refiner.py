"""What the refiner mends: error of clips that were shrunk and enlarged again, against that of the same clips after refinement.

    python benchmarks/refiner.py --run out/training

Starts from a base checkpoint of the tiny model (trained here for a few steps where --run has none), trains `refine_1080p` on the
rendered collection, then takes scenes of another seed, which no stage has seen.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import adherence, common, learning
from benchmarks.learning import psnr
from training.previews import write_sheet
from training.trackers import read_metrics
from waver_core.flow.degradation import degrade_pixels
from waver_core.generation import Task
from waver_core.shapes import VideoShape
from waver_core.synthetic.training_collection import training_collection

app = common.new_app()
_LINEAGE = ("t2v_192p_12fps", "t2v_480p")
_STAGE = "refine_1080p"


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of the refiner's stage.")] = 500,
    base_steps: Annotated[int, typer.Option(min=1, help="Steps of each base stage, where they are not trained yet.")] = 300,
    scenes: Annotated[int, typer.Option(min=1, help="Clips to refine.")] = 24,
    clips: Annotated[int, typer.Option(min=24, help="Files in the rendered collection.")] = 480,
    denoising_steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 4,
    shift: Annotated[float, typer.Option(min=0.1, help="Shift of the sampler's timesteps.")] = 1.0,
    run: Annotated[Path | None, typer.Option("--run", help="Training run that may hold the base stages.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Degraded, refined and true clips as a picture.")] = None,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Train, refine, compare."""
    before = common.machine()
    source = learning.curated(clips, 0, work)
    output = run or work / f"refiner-run-{int(time.time())}"
    quiet = "training.sampling.every_steps=0"
    for stage in _LINEAGE:
        if not (output / stage / "export").exists():
            learning.train(stage, output, source, f"training.stages.{stage}.schedule.max_steps={base_steps}", quiet)
    learning.train(_STAGE, output, source, f"training.stages.{_STAGE}.schedule.max_steps={steps}", quiet)
    generator, recipe = learning.loaded(output, _STAGE)
    size = recipe.video_sizes[0]
    videos = [v for v in training_collection(scenes * 2, 3000) if v.file.suffix == ".mp4"][:scenes]
    true = [adherence.tiny_clip(v, recipe.frame_counts[-1], recipe.fps or 4.0, size[0]) for v in videos]
    degraded = [np.asarray(degrade_pixels(clip, recipe.refinement.pixel_factor)) for clip in true]
    shape = VideoShape(recipe.frame_counts[-1], *size)
    tasks = [Task(adherence.prompt_for(v).short, shape, 5000 + k) for k, v in enumerate(videos)]
    weight = (recipe.refinement.noise_min + recipe.refinement.noise_max) / 2
    refined = generator.decode(generator.refined(degraded, tasks, steps=denoising_steps, shift=shift, noise_weight=weight))
    codec = generator.autoencoder
    passed = {name: codec.decode(codec.encode(x)) for name, x in (("upscaled", degraded), ("codec alone", true))}
    told = {name: _errors(x, true) for name, x in (*passed.items(), ("refined", refined))}
    gain_db = told["refined"]["psnr_db"] - told["upscaled"]["psnr_db"]
    lowered = 1 - told["refined"]["mse"] / told["upscaled"]["mse"]
    rows = [(name, e["mse"], e["psnr_db"], e["gradient_mse"]) for name, e in told.items()]
    common.print_table(f"{len(true)} unseen clips against the truth", ("clip", "mse", "psnr dB", "mse of gradients"), rows)
    common.console().print(f"The refiner lowers the error of the enlarged clips by {lowered:.1%} ({gain_db:+.2f} dB).")
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        write_sheet(sheet, [clip for k in range(min(6, len(true))) for clip in (passed["upscaled"][k], refined[k], true[k])])
    held_out = [line["held_out/loss"] for line in read_metrics(output / _STAGE) if "held_out/loss" in line]
    figures: dict[str, Any] = {
        "steps": steps,
        "scenes": len(true),
        "noise_weight": weight,
        "denoising_steps": denoising_steps,
        "shift": shift,
        "errors": told,
        "error_lowered_by": lowered,
        "gain_db": gain_db,
        "held_out_loss": held_out[-1] if held_out else None,
    }
    common.finish("refiner", figures, save, before)


def _errors(clips: list[np.ndarray], true: list[np.ndarray]) -> dict[str, float]:
    """Mean squared error in 8-bit levels, PSNR, and the error of horizontal and vertical differences, where sharpness shows."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(clips, true, strict=True)]
    gradients = [np.mean([np.mean(np.diff(a - b, axis=axis) ** 2) for axis in (1, 2)]) for a, b in pairs]
    return {
        "mse": float(np.mean([np.mean((a - b) ** 2) for a, b in pairs])),
        "psnr_db": float(np.mean([psnr(a, b) for a, b in zip(clips, true, strict=True)])),
        "gradient_mse": float(np.mean(gradients)),
    }


if __name__ == "__main__":
    app()

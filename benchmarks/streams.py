"""Hybrid, dual and single streams at equal parameters on the same data, in the same order, from the same seeds (Waver Fig. 5).

    python benchmarks/streams.py --steps 400 --picture out/bench/streams.png

The report's figure is of its 12B model; this one is of the `tiny` presets on the rendered collection of `learning.py`. They are
compared by the held-out loss at fixed timesteps, with averaged weights.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, learning
from training.trackers import read_metrics
from waver_core.dit import preset
from waver_core.weights import load_export

app = common.new_app()
_STAGE = "t2v_192p_12fps"
_PRESETS = {"hybrid": "tiny", "dual": "tiny_dual", "single": "tiny_single"}


def curve(run: Path) -> list[tuple[int, float]]:
    """Steps and held-out losses of a run."""
    return [(line["step"], line["held_out/loss"]) for line in read_metrics(run / _STAGE) if "held_out/loss" in line]


def draw(curves: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    """All curves in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        x, y = np.array(points).T
        axes.plot(x, y, "o-", markersize=3, label=name)
    axes.set(title=title, xlabel="step", ylabel="held-out loss", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=10, help="Steps of each of the three.")] = 400,
    every: Annotated[int, typer.Option(min=1, help="Steps between two held-out losses.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, with other start weights and draws.")] = 1,
    clips: Annotated[int, typer.Option(min=24, help="Files in the rendered collection.")] = 480,
    picture: Annotated[Path | None, typer.Option(help="Draw the curves.")] = None,
    work: common.Work = common.WORK_DEFAULT,
    save: common.Save = False,
) -> None:
    """Train the three and compare."""
    before = common.machine()
    source = learning.curated(clips, 0, work)
    curves: dict[str, list[tuple[int, float]]] = {}
    figures: dict[str, Any] = {"steps": steps, "seeds": seeds}
    rows = []
    for name, model in _PRESETS.items():
        found = []
        for seed in range(seeds):
            run = work / f"streams-{steps}-{name}-{seed}-{int(time.time())}"
            sets = (
                f"training.model.preset={model}",
                f"training.data.seed={seed}",
                f"training.stages.{_STAGE}.schedule={{max_steps: {steps}, validate_every_steps: {every}}}",
                "training.sampling.every_steps=0",
            )
            learning.train(_STAGE, run, source, *sets)
            found.append(curve(run))
        dims = load_export(str(run / _STAGE / "export")).model["text_dims"]
        curves[name] = [(points[0][0], float(np.mean([loss for _, loss in points]))) for points in zip(*found, strict=True)]
        config = preset(model, text_dims=tuple(dims))
        final = [points[-1][1] for points in found]
        figures[name] = {
            "blocks": [config.dual_blocks, config.single_blocks],
            "final_held_out_loss": float(np.mean(final)),
            "each_seed": final,
            "curve": curves[name],
        }
        rows.append((name, f"{config.dual_blocks} + {config.single_blocks}", float(np.mean(final)), _reached(curves, name)))
    common.print_table(
        f"Held-out loss after {steps} steps", ("streams", "dual + single", "loss", "steps to the hybrid's loss at half way"), rows
    )
    if picture is not None:
        draw(curves, picture, "The tiny model, equal parameters")
    common.finish("streams", figures, save, before)


def _reached(curves: dict[str, list[tuple[int, float]]], name: str) -> int | None:
    """The first measured step at which a curve is below the hybrid's half-way loss; None where it never is."""
    hybrid = curves["hybrid"]
    goal = hybrid[len(hybrid) // 2][1]
    return next((step for step, loss in curves[name] if loss <= goal), None)


if __name__ == "__main__":
    app()

"""The loss of a stage as a picture, from its `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from training.trackers import read_metrics

CURVE_NAME = "loss.png"
_SMOOTHED = 20


def draw_curve(folder: Path, title: str) -> Path | None:
    """Write `<folder>/loss.png`: loss of every step, its running mean, the held-out loss, and the held-out loss by timestep.
    None where there is nothing to draw yet."""
    from matplotlib.figure import Figure  # half a second, which a training step need not wait for

    lines = read_metrics(folder)
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not steps:
        return None
    held_out = [line for line in lines if "held_out/loss" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x, y = np.array(steps).T
    left.plot(x, y, color="#c9d3e0", linewidth=0.8, label="each step")
    width = min(_SMOOTHED, len(y))
    left.plot(x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), color="#1f5fa8", label=f"mean of {width} steps")
    if held_out:
        left.plot([h["step"] for h in held_out], [h["held_out/loss"] for h in held_out], "o-", color="#d1495b", label="held out")
        for name in sorted(key for key in held_out[-1] if key.startswith("held_out/t")):
            right.plot(
                [h["step"] for h in held_out],
                [h[name] for h in held_out],
                "o-",
                markersize=3,
                label=name.removeprefix("held_out/"),
            )
        right.legend(title="timestep", frameon=False)
    left.legend(frameon=False)
    left.set(title=title, xlabel="step", ylabel="loss", ylim=(0, None))
    right.set(title="Held-out loss at fixed timesteps (1 is noise)", xlabel="step", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path = folder / CURVE_NAME
    figure.savefig(path, dpi=110)
    return path

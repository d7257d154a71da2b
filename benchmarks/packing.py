"""How full SPFHP packs are, and how long packing takes (Waver §5, Krell et al. 2021), on a million clips.

    python benchmarks/packing.py

Lengths: clips of 2 to 10 s, evenly spread, at 16 fps and 192x352 or 480x864, cut to the lengths that training takes, and text of
40 to 500 tokens. Beside it, what padding every sample to the longest of them would leave of the room.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from training.data.packing import efficiency, pack, shapes_of
from training.recipe import load_recipe
from waver_core.config import load_config
from waver_core.shapes import VideoShape

app = common.new_app()


def lengths(stages: tuple[str, ...], clips: int, seed: int) -> np.ndarray:
    """Tokens of clips of 2 to 10 s under the recipes of stages, in equal parts, with text."""
    rng = np.random.default_rng(seed)
    parts = []
    for stage, count in zip(stages, np.diff(np.linspace(0, clips, len(stages) + 1).astype(int)), strict=True):
        recipe = load_recipe(load_config(), stage)
        frames = np.array(recipe.frame_counts)
        tokens = np.array([VideoShape(f, *recipe.video_sizes[0]).latent.tokens for f in frames.tolist()])
        seconds = rng.uniform(frames[0] / (recipe.fps or 1), 10.1, count)
        longest = np.searchsorted(frames / (recipe.fps or 1), seconds, side="right") - 1
        parts.append(tokens[longest] + rng.integers(40, 501, count))
    return np.concatenate(parts)


@app.command()
def main(
    clips: Annotated[int, typer.Option(min=1000, help="Clips in each histogram.")] = 1_000_000,
    max_per_pack: Annotated[int, typer.Option(min=1, help="Samples of one pack at most.")] = 64,
    seed: int = 0,
    save: common.Save = False,
) -> None:
    """Pack a few collections and print how full the packs are."""
    before = common.machine()
    rows, figures = [], []
    cases: tuple[tuple[str, tuple[str, ...], int], ...] = (
        ("192p", ("t2v_192p_16fps",), 65_536),
        ("192p and 480p", ("t2v_192p_16fps", "t2v_480p"), 65_536),
        ("480p", ("t2v_480p",), 65_536),
        ("480p", ("t2v_480p",), 131_072),
    )
    for name, stages, capacity in cases:
        tokens = lengths(stages, clips, seed)
        started = time.perf_counter()
        shapes = shapes_of(tokens, capacity, max_per_pack)
        planned_s = time.perf_counter() - started
        packs = pack(tokens, capacity, max_per_pack, np.random.default_rng(seed).random(len(tokens)))
        packed_s = time.perf_counter() - started - planned_s
        padded = float(tokens.sum() / (len(tokens) * tokens.max()))
        told: dict[str, Any] = {
            "lengths": name,
            "capacity": capacity,
            "clips": clips,
            "packs": len(packs),
            "efficiency": efficiency(shapes, capacity),
            "padded": padded,
            "plan_s": planned_s,
            "pack_s": packed_s,
        }
        figures.append(told)
        rows.append((name, capacity, len(packs), f"{told['efficiency']:.2%}", f"{padded:.1%}", planned_s, packed_s))
    title = f"SPFHP on {clips:,} clips, at most {max_per_pack} a pack"
    common.print_table(title, ("lengths", "capacity", "packs", "room used", "padded instead", "histogram s", "with rows s"), rows)
    common.finish("packing", {"cases": figures}, save, before)


if __name__ == "__main__":
    app()

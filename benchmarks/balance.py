"""How long workers wait for the slowest of them, by what packs are bucketed and dealt by (Waver §5, bucket dataloader).

    python benchmarks/balance.py
    python benchmarks/balance.py --profile full --stage t2v_480p --blocks 8 --tokens 65536

First the cost of a micro-batch is measured on this machine, as `training/calibrate.py` does; or it was measured before, and is
given as that script prints it (--set training.data.cost=...). Then a collection with a long tail of lengths is packed full of
tokens, cut into steps and dealt to 8, 64 and 128 workers, and every micro-batch takes the time that the cost says. 1.00 is no
waiting. *In step*: workers wait for one another after every micro-batch, as they do with sharded weights; *in sum*: only at the
end of a step, as replicas do. Only whole steps count: the last of each bucket is small however it is dealt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from training.calibrate import DOUBTFUL, calibrated_model, device_of, measure, packs_up_to, reduced
from training.command_line import Profiles, recipe_of
from training.data.cost import Fit, MicroBatchCost, fit_cost, rounds
from training.data.epochs import Step
from training.data.plan import Plan
from training.recipe import Recipe
from waver_core.command_line import Sets

WORLDS = (8, 64, 128)
PER_STEP = 256
"""Micro-batches of a step, as pipelines.yaml has it."""
FRAME_TOKENS = 16
"""Of a frame of 64x64 px; samples differ in their number of frames."""
NO_COST = MicroBatchCost(fixed_s=1.0, per_token_s=0.0, per_pair_s=0.0)
"""All packs alike: one bucket, and workers take turns."""

app = common.new_app()


def collection(samples: int, tokens: int, seed: int) -> tuple[pa.Table, np.ndarray]:
    """Videos with lengths of a long tail, from 1/64 of `tokens` to all of them, the median 1/12; and their tokens with text."""
    rng = np.random.default_rng(seed)
    wanted = np.clip(rng.lognormal(np.log(tokens / 12), 1.0, samples), tokens / 64, tokens).astype(np.int64)
    text = np.maximum(2, np.minimum(256, wanted // 8) - rng.integers(0, 8, samples))
    latent_frames = np.maximum(1, (wanted - text) // FRAME_TOKENS)
    table = pa.table(
        {
            "clip_id": [f"c{i}" for i in range(samples)],
            "kind": ["video"] * samples,
            "frames": pa.array(4 * latent_frames - 3, pa.int32()),
            "height_px": pa.array([64] * samples, pa.int32()),
            "width_px": pa.array([64] * samples, pa.int32()),
            "weight": np.ones(samples),
            "held_out": np.zeros(samples, bool),
            "text_tokens": pa.array(text, pa.int32()),
        }
    )
    return table, FRAME_TOKENS * latent_frames + text


def whole_steps(table: pa.Table, recipe: Recipe, cost: MicroBatchCost | None, tokens: int) -> list[Step]:
    """An epoch's steps with all their micro-batches, planned by a cost."""
    changes = {"packing": "spfhp", "micro_batch_tokens": tokens, "max_per_pack": 64, "cost": cost, "image_share": None}
    data = recipe.data.model_copy(update={**changes, "micro_batches_per_step": PER_STEP, "text_multiple": 1})
    schedule = recipe.schedule.model_copy(update={"max_steps": None})
    plan = Plan(table, recipe.model_copy(update={"data": data, "schedule": schedule, "epochs": 1.0}))
    return [step for step in plan.steps(0) if len(step.micro_batches) == PER_STEP]


def waiting(steps: Sequence[Step], true: Sequence[np.ndarray], world: int, turns: bool) -> dict[str, float]:
    """Time of the slowest over the mean, summed over steps; `true` has the seconds of each step's micro-batches."""
    in_step = in_sum = mean = 0.0
    for step, seconds in zip(steps, true, strict=True):
        shares = [list(range(rank, PER_STEP, world)) for rank in range(world)] if turns else rounds(step.costs, world)
        times = seconds[np.array(shares)]
        in_step += float(times.max(axis=0).sum())
        in_sum += float(times.sum(axis=1).max())
        mean += float(times.sum()) / world
    return {"in_step": in_step / mean, "in_sum": in_sum / mean}


@app.command()
def main(
    stage: Annotated[str, typer.Option("--stage", help="Whose model is measured.")] = "t2v_480p",
    profile: Profiles = None,
    set_: Sets = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1024, help="Of a full micro-batch.")] = 2048,
    blocks: Annotated[int | None, typer.Option("--blocks", min=1, help="Measure so many blocks and scale them up.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1)] = 3,
    samples: Annotated[int, typer.Option("--samples", min=20_000, help="Videos in the collection.")] = 80_000,
    seed: int = 0,
    save: common.Save = False,
) -> None:
    """Measure, plan, deal, and print how long the slowest worker takes over the mean."""
    before = common.machine()
    recipe = recipe_of(stage, None, profile, set_)
    given = recipe.data.cost
    fit = None if given else _measured(recipe, tokens, blocks, repeats)
    cost = fit.cost if fit else given
    assert cost is not None
    units = zip(cost.model_dump().values(), ("s", "s a token", "s a pair"), strict=True)
    off = f"{fit.mean_error:.1%} off in the mean, {fit.worst_error:.1%} at most" if fit else "given"
    common.console().print(f"{recipe.model.preset}: {' + '.join(f'{value:.3g} {unit}' for value, unit in units)}; {off}")
    if fit and fit.mean_error > DOUBTFUL:
        raise SystemExit(
            "error: such a fit tells nothing, the machine has other work: run it again, or give a cost measured before"
        )
    table, lengths = collection(samples, tokens, seed)
    ways: tuple[tuple[str, MicroBatchCost | None, bool], ...] = (
        ("full of tokens, in turns", NO_COST, True),
        ("buckets of counted cost, in turns", None, True),
        ("buckets of counted cost, dealt by it", None, False),
        ("buckets of measured cost, dealt by it", cost, False),
    )
    rows, figures = [], []
    for name, planned, turns in ways:
        steps = whole_steps(table, recipe, planned, tokens)
        true = [np.array([cost.of([int(lengths[d.row]) for d in batch]) for batch in step.micro_batches]) for step in steps]
        found = {world: waiting(steps, true, world, turns) for world in WORLDS}
        buckets = len({step.bucket for step in steps})
        figures.append({"way": name, "steps": len(steps), "buckets": buckets, "workers": found})
        rows.append((name, len(steps), buckets, *(f"{of[key]:.3f}" for key in ("in_step", "in_sum") for of in found.values())))
    columns = [f"{key}, {world}" for key in ("in step", "in sum") for world in WORLDS]
    title = f"The slowest worker's time over the mean; {PER_STEP} packs of {tokens:,} tokens a step"
    common.print_table(title, ("way", "steps", "buckets", *columns), rows)
    errors = {"mean_error": fit.mean_error, "worst_error": fit.worst_error} if fit else {}
    settings: dict[str, Any] = {"model": recipe.model.preset, "tokens": tokens, "samples": samples}
    common.finish("balance", {**settings, "cost": {**cost.model_dump(), **errors}, "ways": figures}, save, before)


def _measured(recipe: Recipe, tokens: int, blocks: int | None, repeats: int) -> Fit:
    model = calibrated_model(recipe)
    part = model if blocks is None else reduced(model, blocks)
    packs = packs_up_to(tokens, recipe.data.max_per_pack, part)
    return fit_cost(measure(recipe, model, part, packs, device_of(recipe), repeats))


if __name__ == "__main__":
    app()

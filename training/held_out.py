"""The held-out loss at fixed timesteps: what runs on the same samples, sizes and encoders can be compared by.

Samples of sources that are never trained on, each with its own fixed noise, nothing dropped, nothing given; averaged weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.conditioning import Conditioner, generator_of
from training.data.epochs import Draw
from training.data.on_the_fly import ClipSamples
from training.data.shards import EncodedSamples
from training.group import Worker
from training.trainee import Trainee

TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def held_out_losses(
    trainee: Trainee,
    batches: Sequence[Sequence[Draw]],
    source: EncodedSamples | ClipSamples,
    conditioner: Conditioner,
    worker: Worker,
) -> dict[str, float]:
    """Mean flow loss by timestep, `held_out/t0.1` and so on, and over all of them, `held_out/loss`. Empty without samples.

    Every worker takes its share of the micro-batches; all of them run equally many forwards, as sharded weights ask for.
    """
    if not batches:
        return {}
    seed = conditioner.recipe.data.seed
    sums = torch.zeros(len(TIMESTEPS), dtype=torch.float64)
    count = 0
    for first in range(0, len(batches), worker.data_workers):
        number = first + worker.data_rank
        mine = number < len(batches) and worker.counts
        batch = batches[number if number < len(batches) else first]
        ids = [source.table["sample_id"][draw.row].as_py() for draw in batch]
        for row, t in enumerate(TIMESTEPS):
            examples = [
                conditioner.example(source[draw.row], generator_of(seed, "held out", sample), t)
                for draw, sample in zip(batch, ids, strict=True)
            ]
            losses = trainee([example.to(worker.device) for example in examples]).flow
            sums[row] += losses.double().sum().cpu() * mine
        count += len(batch) * mine
    total = worker.sum(torch.cat([sums, torch.tensor([float(count)], dtype=torch.float64)]))
    means = (total[:-1] / total[-1]).tolist()
    named = {f"held_out/t{t}": mean for t, mean in zip(TIMESTEPS, means, strict=True)}
    return {"held_out/loss": sum(means) / len(means), **named}

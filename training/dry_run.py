"""A stage on a stated cluster, planned on any machine: nothing is trained, encoded or sent.

python training/stage.py --stage refine_1080p --profile full --dry-run --cluster 128xH100
python training/dry_run.py --stage ct_720p --profile full --cluster 8xH100 --cluster 64xH100 --cluster 1024xH100

The first prints the whole plan of one cluster, the second a Markdown table of several.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

import typer
from rich.console import Console

from training.command_line import Profiles, Stage, recipe_of
from training.dry_run_plan import build
from training.dry_run_report import print_plan, scale_table
from training.parallel.hardware import Cluster
from training.parallel.hardware import cluster as cluster_of
from training.recipe import Recipe
from waver_core.command_line import ConfigPath, Sets
from waver_core.command_line import run as run_command_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def dry_run(
    recipe: Recipe,
    cluster: str,
    console: Console,
    samples: str | None = None,
    curated: Sequence[str] = (),
    measured: str | None = None,
) -> None:
    """Print the plan of a stage on a cluster such as `128xH100`. Raises `UserError` as `build` does."""
    print_plan(build(recipe, cluster_of(cluster), samples, curated, measured), console)


@app.command()
def main(
    stage: Stage,
    cluster: Annotated[list[str], typer.Option("--cluster", help="Workers x accelerator, such as 64xH100; repeat for several.")],
    measured: Annotated[str | None, typer.Option("--measured", help="Rates measured by training/bench.py, JSON.")] = None,
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
) -> None:
    """Memory, communication and speed of a stage on several clusters, as a Markdown table.

    Where training.parallel.shard is more than a cluster's data workers, it takes them all; where its data workers are more than
    the micro-batches of a step, the step grows to one for each.
    """
    recipe = recipe_of(stage, config, profile, list(set_ or ()))
    plans = [build(_fitted(recipe, each), each, measured=measured) for each in map(cluster_of, cluster)]
    print(scale_table(plans))


def _fitted(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with a shard and a step that suit a cluster's size."""
    data_workers = cluster.workers // recipe.parallel.sequence
    shard = recipe.parallel.shard if (recipe.parallel.shard or 0) < data_workers else None
    per_step = max(recipe.data.micro_batches_per_step, data_workers)
    return recipe.model_copy(
        update={
            "parallel": recipe.parallel.model_copy(update={"shard": shard}),
            "data": recipe.data.model_copy(update={"micro_batches_per_step": per_step}),
        }
    )


if __name__ == "__main__":
    run_command_line(app)

"""Entry script of the training plane: one stage of Waver Table 2.

python training/stage.py --stage t2v_192p_12fps --curated out/curated --output out/training
ray job submit --working-dir . -- python training/stage.py --stage sft --profile full --curated s3://... --output /mnt/run
python training/stage.py --stage refine_1080p --profile full --dry-run --cluster 128xH100

Encodes what is not encoded yet, starts from the export of the stage before, goes on where it was stopped, and leaves
`<output>/<stage>/export`: safetensors and recipe.yaml. A dry run trains nothing: it prints what a stage takes on a cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from training.checkpoint import latest, read_complete
from training.command_line import Profiles, Stage, recipe_of
from training.encode import Resources, encode
from training.export import check_parent
from training.job import Job, text_dims
from training.recipe import Recipe
from training.trainee import model_config
from waver_core.command_line import ConfigPath, Sets, new_console
from waver_core.command_line import run as run_command_line
from waver_core.errors import UserError
from waver_core.storage import exists, is_local, join, local_path
from waver_core.telemetry import duration_text
from waver_core.weights import read_record

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    stage: Stage,
    output: Annotated[str, typer.Option("--output", help="Folder of the run; every stage has a folder in it.")] = "out/training",
    curated: Annotated[list[str] | None, typer.Option("--curated", help="Output of the funnel; repeat for several.")] = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Export to start from (default: that of the stage before, in the same run).")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with random weights, lineage or not; checkpoints go on.")
    ] = False,
    on_the_fly: Annotated[bool, typer.Option("--on-the-fly", help="Encode while training and keep nothing.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers (default: training.workers.count).")] = None,
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
    serial: Annotated[bool, typer.Option("--serial", help="Run in this process, without Ray (for debugging).")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Print memory, communication and speed on --cluster; train nothing.")
    ] = False,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="For --dry-run: workers x accelerator, such as 128xH100.")
    ] = None,
    measured: Annotated[
        str | None, typer.Option("--measured", help="For --dry-run: rates measured by training/bench.py, JSON.")
    ] = None,
) -> None:
    """Train one stage on curated manifests. Run it again to go on where it stopped."""
    _check_dry(dry, cluster, measured, workers)
    sets = [*(set_ or []), *([f"training.workers.count={workers}"] if workers else [])]
    recipe = recipe_of(stage, config, profile, sets)
    console = new_console()
    if not is_local(output):
        raise UserError(f"--output {output}: weights are mapped from files, so give a folder that all workers have mounted")
    run = str(Path(local_path(output)).resolve())
    sources = tuple(_absolute(uri) for uri in curated or ())
    if cluster is not None:
        from training.dry_run import dry_run

        dry_run(recipe, cluster, console, join(run, "encoded", recipe.stage), sources, measured)
        return
    parent = None if from_scratch else _parent(recipe, run, from_)
    model = model_config(recipe, text_dims(recipe)).to_dict()
    if parent is not None:
        check_parent(parent, model, recipe.after, stage=stage)
    samples = None if on_the_fly else _encoded(recipe, run, sources, serial, console)
    if on_the_fly and not sources:
        raise UserError("--on-the-fly encodes from the funnel's output: give --curated")
    job = Job(recipe, run, samples, sources, parent)
    job.open_samples()  # what is wrong with them is told before workers start
    _announce(job, console)
    summary = _train(job, console, serial)
    told = f", {summary['skipped']} skipped as spikes" if summary["skipped"] else ""
    console.print(f"{stage}: {summary['steps']:,} steps{told}. Averaged weights: {job.export_folder}", soft_wrap=True)
    console.print(f"Loss: {job.folder / 'loss.png'}", soft_wrap=True)


def _check_dry(dry: bool, cluster: str | None, measured: str | None, workers: int | None) -> None:
    """Raise `UserError` where the options of a dry run do not go together."""
    if dry and cluster is None:
        raise UserError("--dry-run plans for a stated cluster: add --cluster, for example --cluster 128xH100")
    if dry and workers is not None:
        raise UserError(f"--workers {workers} and --cluster {cluster} both say how many workers there are: leave --workers out")
    for option, given in (("--cluster", cluster), ("--measured", measured)):
        if given is not None and not dry:
            raise UserError(f"{option} {given} is for a dry run: add --dry-run, or leave {option} out")


def _train(job: Job, console: Console, serial: bool) -> dict[str, Any]:
    if not serial:
        from training.launch import train_on_ray  # importing Ray takes a second; --help and errors need it not

        return train_on_ray(job, console)
    import torch

    from training.group import Worker
    from training.launch import shown_progress
    from training.loop import train

    if job.recipe.workers.threads:
        torch.set_num_threads(job.recipe.workers.threads)
    with shown_progress(job, console) as show:
        return train(job, Worker(device="cuda" if job.recipe.workers.gpus else "cpu"), show)


def _parent(recipe: Recipe, run: str, given: str | None) -> str | None:
    """The export that the stage starts from. Raises `UserError` where its lineage wants one that is not there."""
    if given is not None:
        return str(Path(given).resolve())
    if recipe.after is None:
        return None
    folder = join(run, recipe.after, "export")
    if not exists(join(folder, "recipe.yaml")):
        raise UserError(
            f"{recipe.stage} starts from {recipe.after}, and {folder} is not there: train {recipe.after} with this --output, "
            "give its export with --from, or say --from-scratch"
        )
    return folder


def _encoded(recipe: Recipe, run: str, curated: tuple[str, ...], serial: bool, console: Console) -> str:
    """The folder of the stage's encoded samples; made, or brought up to date, where the funnel's output is given."""
    folder = join(run, "encoded", recipe.stage)
    if curated:
        encode(recipe, curated, run, console, Resources(serial, None, recipe.workers.gpus and 1.0))
    elif not exists(join(folder, "index.json")):
        raise UserError(f"no encoded samples at {folder}: give the funnel's output with --curated")
    return folder


def _announce(job: Job, console: Console) -> None:
    """What is about to be trained, on what, in how many steps."""
    from training.data.plan import Plan

    source, facts = job.open_samples()
    plan = Plan(source.table, job.recipe, facts.dropped)
    workers, shared = job.recipe.workers.count // job.recipe.parallel.sequence, job.recipe.data.micro_batches_per_step
    if workers > shared:
        groups = f"groups of {job.recipe.parallel.sequence} workers" if job.recipe.parallel.sequence > 1 else "workers"
        raise UserError(
            f"{workers} {groups} share {shared} micro-batches a step, so some would have nothing to do: raise "
            "training.data.micro_batches_per_step or lower training.workers.count"
        )
    table = Table(title=f"{job.recipe.stage}: {plan.total_steps():,} steps", title_justify="left", header_style="bold")
    for name in ("samples", "trained on", "held out", "drawn per epoch", "micro-batches", "room used", "clips left out"):
        table.add_column(name, justify="left" if name == "samples" else "right")
    for kind, told in plan.report.items():
        left_out = f"{sum(told['dropped'].values()):,} ({told['dropped_share']:.1%})"
        counts = [f"{told[key]:,}" for key in ("samples", "held_out", "drawn", "micro_batches")]
        table.add_row(kind, *counts, f"{told['efficiency']:.1%}", left_out)
    console.print(table)
    begin = f"from {job.parent}" if job.parent else "from random weights"
    stopped = latest(str(job.folder / "checkpoints"))
    if stopped is not None:
        begin = f"goes on after step {read_complete(stopped)['progress']['step']:,}"
        before, now = read_record(stopped)["recipe"], job.recipe.model_dump(mode="json")
        changed = [key for key in now if now[key] != before.get(key) and key not in ("workers", "schedule", "profiles")]
        if changed:
            console.print(f"Changed since that step: {', '.join(changed)}. The run is no longer the one that was begun.")
    limit = job.recipe.schedule.max_minutes
    console.print(
        f"Model {job.recipe.model.preset} {begin}, workers: {job.recipe.workers.count}; metrics, samples and checkpoints in "
        f"{job.folder}" + (f"; ends after {duration_text(60 * limit)} of training" if limit else "")
    )


def _absolute(uri: str) -> str:
    return str(Path(local_path(uri)).resolve()) if is_local(uri) else uri


if __name__ == "__main__":
    run_command_line(app)

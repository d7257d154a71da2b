"""Entry script: the samples of a training stage, encoded once for all its epochs (Waver §2, §4.1) by a Ray Data job.

python training/encode.py --stage t2v_192p_12fps --curated out --output run
ray job submit --working-dir . -- python training/encode.py --stage t2v_480p --profile full --curated /abs/out --output /abs/run
Run it again to go on where it stopped, or after more clips were curated.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from training.command_line import Profiles, Stage, recipe_of
from training.data.samples import build_samples, check_dropped
from training.data.shards import INDEX_NAME, EncodedSamples, describe_encoders, encoded_folder, publish, recipe_facts
from training.encoding import ClipEncoder
from training.encoding_units import (
    Job,
    UnitEncoder,
    clear_attempts,
    content_keys,
    cut,
    finished,
    published_samples,
    unpacked_arrays,
)
from training.recipe import Recipe
from waver_core.command_line import ConfigPath, Sets, new_console
from waver_core.command_line import run as run_command_line
from waver_core.config import digest_of
from waver_core.errors import RunFailed, UserError
from waver_core.shapes import VideoShape
from waver_core.storage import exists, is_local, join, local_path, make_folder, size_and_mtime
from waver_core.telemetry import duration_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_LINE_EVERY_S = 10.0
_LISTED_FAILURES = 10


@dataclass(frozen=True)
class Resources:
    """Where units are encoded."""

    serial: bool = False
    actors: int | None = None
    gpus_per_actor: float = 0.0


@app.command()
def main(
    stage: Stage,
    curated: Annotated[list[str], typer.Option("--curated", help="Output of curation/run_funnel.py; repeat for several.")],
    output: Annotated[str, typer.Option("--output", help="Folder or URL of the training run.")],
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Actors (default: one per CPU, or as the GPUs allow).")] = None,
    gpus_per_actor: Annotated[float, typer.Option(min=0, help="GPUs, or a share of one, of each actor.")] = 0.0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard at most: what a kill may cost.")] = 64,
    max_failed_share: Annotated[
        float, typer.Option(min=0, max=1, help="Fail where more of the samples could not be encoded.")
    ] = 0.05,
    serial: Annotated[bool, typer.Option("--serial", help="Run in this process, without Ray (for debugging).")] = False,
) -> None:
    """Encode the clips and captions of a training stage. Run it again to go on where it stopped."""
    recipe = recipe_of(stage, config, profile, set_)
    sources, target = [_absolute(uri) for uri in curated], _absolute(output)
    resources = Resources(serial, actors, gpus_per_actor)
    encode(recipe, sources, target, new_console(), resources, samples_per_shard, max_failed_share)


def encode(
    recipe: Recipe,
    curated: Sequence[str],
    output: str,
    console: Console,
    resources: Resources,
    samples_per_shard: int = 64,
    max_failed_share: float = 0.05,
) -> dict[str, Any]:
    """Encode what `curated` has for a recipe and return the index.

    Raises `UserError` where there is nothing to encode or an encoder is missing, and `RunFailed` where more than
    `max_failed_share` of the samples failed; what was encoded by then is kept and not done again.
    """
    started = time.monotonic()
    built = build_samples([join(folder, "tiers", recipe.tier) for folder in curated], recipe)
    samples: pa.Table = built.table
    check_dropped(built.dropped, samples, recipe)
    keys = content_keys(samples, recipe)
    folder = encoded_folder(output, recipe.stage)
    try:
        make_folder(folder)
        clear_attempts(folder)
    except OSError as error:
        raise UserError(f"cannot write to the output {output}: {error}") from error
    done = finished(folder, keys)
    units = cut(samples, keys, done.keys, samples_per_shard)
    console.print(f"Encoding {len(samples):,} samples of {recipe.stage}, {len(done.keys):,} of them done before, to {folder}")
    job = Job(folder, recipe, samples.schema, uuid.uuid4().hex[:12])
    watched = _watch(_run(job, units, resources), sum(map(len, units)), len(samples) * max_failed_share, console)
    failed = watched.failed
    parts, table = published_samples(samples, keys, finished(folder, keys))
    if not len(table):
        raise RunFailed(f"not one of {len(samples):,} samples could be encoded: {_commonest(failed)}")
    encoder = ClipEncoder(recipe)
    facts = {
        "encoders": describe_encoders(recipe),
        "dims": encoder.dims,
        "sample_digest": digest_of(table["content_key"].to_pylist()),
        "recipe": recipe_facts(recipe),
        "curated": list(curated),
        "failed": failed,
        "dropped": built.dropped,
    }
    constants = watched.constants or _constants_before(folder, encoder) or encoder.constants()
    index = publish(folder, parts, table, constants, facts)
    clear_attempts(folder)
    _summary(index, table, time.monotonic() - started, folder, console)
    return index


def _run(job: Job, units: Sequence[pa.Table], resources: Resources) -> Iterator[dict[str, Any]]:
    if resources.serial:
        worker = UnitEncoder(job)
        return (row for unit in units for row in worker(unit.to_pylist()))
    from training.ray_cluster import run_units  # importing Ray takes a second; --help and errors need it not

    return run_units(UnitEncoder, (job,), units, actors=resources.actors, gpus=resources.gpus_per_actor)


class _Watched(NamedTuple):
    """What came of the units."""

    failed: list[dict[str, str]]
    constants: dict[str, np.ndarray]
    """Empty where no unit was left to do."""


def _constants_before(folder: str, encoder: ClipEncoder) -> dict[str, np.ndarray]:
    """Those of the set that is published there, if it was made the same way: loading the encoders here may not be possible."""
    if not exists(join(folder, INDEX_NAME)):
        return {}
    before = EncodedSamples(folder)
    same = before.index["encoders"] == describe_encoders(encoder.recipe) and set(encoder.constant_names) <= set(before.constants)
    return before.constants if same else {}


def _watch(results: Iterable[dict[str, Any]], total: int, budget: float, console: Console) -> _Watched:
    """Follow the units and print how far they are; raises `RunFailed` once failures are beyond the budget."""
    failed: list[dict[str, str]] = []
    constants: dict[str, np.ndarray] = {}
    started = last_line = time.monotonic()
    count = first = 0
    for result in results:
        if not count:  # starting the workers took a while that says nothing about the rest
            started, first = time.monotonic(), result["samples"]
        count += result["samples"]
        failed += json.loads(result["failed"])
        if result["constants"] and not constants:
            constants = unpacked_arrays(result["constants"])
        if len(failed) > budget:
            told = f"{len(failed):,} of {count:,} samples could not be encoded, more than --max-failed-share allows"
            raise RunFailed(f"{told}: {_commonest(failed)}")
        now = time.monotonic()
        if now - last_line > _LINE_EVERY_S and first < count < total:
            last_line = now
            left = duration_text((now - started) * (total - count) / (count - first))
            console.print(f"{count:,} of {total:,} encoded, {len(failed):,} failed, about {left} left")
    return _Watched(sorted(failed, key=lambda failure: failure["sample_id"]), constants)


def _summary(index: dict[str, Any], table: pa.Table, seconds: float, folder: str, console: Console) -> None:
    """One table by kind and shape, what made them, and what went wrong."""
    shapes = Counter(zip(*(table[name].to_pylist() for name in ("kind", "frames", "height_px", "width_px")), strict=True))
    shown = Table(title=f"{index['rows']:,} samples for {index['recipe']['stage']}", title_justify="left", header_style="bold")
    for name in ("kind", "frames", "height x width", "samples", "video tokens"):
        shown.add_column(name, justify="left" if name == "kind" else "right")
    for (kind, frames, height, width), count in sorted(shapes.items()):
        tokens = VideoShape(frames, height, width).latent.tokens
        shown.add_row(kind, f"{frames}", f"{height}x{width}", f"{count:,}", f"{tokens:,}")
    console.print(shown)
    size_mb = sum(size_and_mtime(join(folder, shard["name"]))[0] for shard in index["shards"]) / 1e6
    encoders = index["encoders"]
    made_by = [encoders["autoencoder"], *encoders["text"], *filter(None, [encoders["features"]])]
    longest = max(table["text_tokens"].to_pylist())
    console.print(
        f"{size_mb:,.1f} MB in {len(index['shards']):,} shards, text of up to {longest:,} tokens, in {duration_text(seconds)}"
    )
    console.print(f"Encoders: {escape('; '.join(made_by))}")
    if any(index["dropped"].values()):
        console.print(f"Clips left out: {escape(_in_words(index['dropped']))}")
    for failure in index["failed"][:_LISTED_FAILURES]:
        console.print(f"Failed: {escape(failure['source_uri'])}: {escape(failure['reason'])}", soft_wrap=True)
    if len(index["failed"]) > _LISTED_FAILURES:
        console.print(f"and {len(index['failed']) - _LISTED_FAILURES:,} more, listed in {join(folder, 'index.json')}")


def _in_words(dropped: dict[str, dict[str, int]]) -> str:
    return "; ".join(
        f"{bucket}: " + ", ".join(f"{n:,} {why}" for why, n in reasons.items()) for bucket, reasons in dropped.items() if reasons
    )


def _commonest(failed: Sequence[dict[str, str]]) -> str:
    first = failed[0]
    kinds = Counter(failure["reason"].split(":", 1)[0] for failure in failed).most_common(3)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds) + f"; such as {first['source_uri']}: {first['reason']}"


def _absolute(uri: str) -> str:
    return str(Path(local_path(uri)).resolve()) if is_local(uri) else uri


if __name__ == "__main__":
    run_command_line(app)

"""Model averaging (Waver §4.5): one model from several checkpoints, which differ in data, stage or timestep distribution.

python training/averaging.py --output out/average out/exports/a out/exports/b ...
python training/averaging.py --output out/average --method ema --decay 0.8 out/checkpoints/step-*

The report merges 7 to 10 models. `simple` weighs them equally, `weighted` as told, `ema` from the first to the last as a moving
average does (list the oldest first). Sources are exports or complete step folders of a run, mixed as you like. One tensor is
averaged at a time, in fp32, so a machine with little memory will do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

import torch
import torch.distributed.checkpoint as dcp
import typer
from torch import Tensor

from training.checkpoint import COMPLETE, read_complete, reader_of
from training.export import MAX_SHARD_BYTES, in_order, write_export
from waver_core.errors import UserError, did_you_mean
from waver_core.storage import content_digest, exists, join
from waver_core.tensor_files import Entry
from waver_core.weights import Exported, load_export, read_record

Method = Literal["simple", "weighted", "ema"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RECOMMENDED = range(7, 11)
"""Sources, of which the report found 7 to 10 favourable."""
_CHUNK = 1 << 20
"""Numbers converted to fp32 at once."""


@dataclass(frozen=True)
class StepWeights:
    """The weights in a step folder of a run: averaged (`take` "ema") or as trained ("raw")."""

    folder: str
    record: Any
    digest: str
    entries: dict[str, Entry]
    keys: dict[str, str]
    """Name of a tensor -> its key in the shards."""
    reader: Any
    metadata: Any

    def tensor(self, name: str) -> Tensor:
        """One tensor, put together from the shards of all workers."""
        entry, key = self.entries[name], self.keys[name]
        state = {key: torch.empty(entry.shape, dtype=entry.dtype)}
        dcp.load(state, storage_reader=self.reader, no_dist=True)
        return state[key]


Source = Exported | StepWeights


def open_source(folder: str, take: Literal["ema", "raw"] = "ema") -> Source:
    """An export or a step folder. Raises `UserError` where it is neither, incomplete, or lacks what `take` asks for."""
    if not exists(join(folder, COMPLETE)):
        return load_export(folder)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    record = {**read_record(folder), "weights": take, "step": read_complete(folder)["progress"]["step"]}
    reader = reader_of(folder)
    metadata = reader.read_metadata()
    reader.read_metadata = lambda *_, **__: metadata  # of thousands of shards it is large: read it once, not once a tensor
    stored = metadata.state_dict_metadata
    if take == "ema" and not any(key.startswith("ema.") for key in stored):
        raise UserError(f"{folder} holds no averaged weights: say --take raw")
    keys = {key.removeprefix("model."): key for key in stored if key.startswith("model.")}
    if take == "ema":  # buffers have no average
        keys = {name: f"ema.{name}" if f"ema.{name}" in stored else key for name, key in keys.items()}
    entries = {name: Entry(tuple(stored[key].size), stored[key].properties.dtype) for name, key in keys.items()}
    return StepWeights(folder, record, content_digest(join(folder, ".metadata")), entries, keys, reader, metadata)


def shares(method: Method, count: int, weights: Sequence[float] | None = None, decay: float = 0.8) -> list[float]:
    """How much of each source there is in the average; they sum to 1.

    `ema` is `average = decay * average + (1 - decay) * next`, so the first source keeps `decay ** (count - 1)`.
    """
    if method not in get_args(Method):
        raise UserError(f"no method '{method}': {did_you_mean(method, get_args(Method))}")
    if (weights is not None) != (method == "weighted"):
        raise UserError("--weights belongs to --method weighted, which needs it: one number for each source")
    if method == "ema":
        if not 0 < decay < 1:
            raise UserError(f"--decay lies between 0 and 1, not {decay:g}")
        return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    given = [1.0] * count if weights is None else list(weights)
    if len(given) != count:
        raise UserError(f"{len(given)} weights for {count} sources: give one for each, in their order")
    total = sum(given)
    if min(given) < 0 or not 0 < total < float("inf"):
        raise UserError("--weights are numbers of 0 or more, and not all 0")
    return [w / total for w in given]


def average(
    folders: Sequence[str],
    output: str,
    *,
    method: Method = "simple",
    weights: Sequence[float] | None = None,
    decay: float = 0.8,
    take: Literal["ema", "raw"] = "ema",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the average of the sources as an export, which counts as one of the last source's stage; its `recipe.yaml` lists
    the sources with digests and shares.

    Raises `UserError` where there are fewer than two, one stands twice, or model, encoders, names or shapes differ. `dtype` is
    that of the result (None: that of the first source); floating-point tensors are averaged in fp32, others must be equal.
    """
    parts = shares(method, len(folders), weights, decay)
    if len(folders) < 2:
        raise UserError("an average needs two or more sources")
    sources = [open_source(folder, take) for folder in folders]
    for source in sources[1:]:
        _must_match(sources[0], source)
    for i, source in enumerate(sources):
        if twin := next((s for s in sources[:i] if s.digest == source.digest), None):
            raise UserError(f"{source.folder} holds the same weights as {twin.folder}: name each source once")
    entries = {
        name: Entry(e.shape, dtype if dtype and e.dtype.is_floating_point else e.dtype) for name, e in sources[0].entries.items()
    }
    order: Iterator[str] = in_order({name: name for name in entries}, entries, max_shard_bytes)
    used = [(source, part) for source, part in zip(sources, parts, strict=True) if part > 0]
    means = (_mean(used, name) for name in order)
    last = sources[-1].record
    record = {
        **last,
        "weights": "average",
        "lineage": last["lineage"][:-1] if "digest" in last else last["lineage"],  # ends with what the stage started from
        "averaging": {"method": method, **({"decay": decay} if method == "ema" else {})},
        "sources": [_described(source, part) for source, part in zip(sources, parts, strict=True)],
    }
    write_export(output, entries, means, record, max_shard_bytes)
    return load_export(output)


def _mean(sources: Sequence[tuple[Source, float]], name: str) -> Tensor:
    """The weighted mean of one tensor as fp32, at the cost of the mean and one source's tensor.

    Each source moves the running mean by its share of what has been taken in, so that the mean of equal tensors is that tensor.
    """
    first = sources[0][0].tensor(name)
    if not first.dtype.is_floating_point:
        if any(not torch.equal(first, source.tensor(name)) for source, _ in sources[1:]):
            raise UserError(f"{name} is not a floating-point tensor and differs between the sources: it has no average")
        return first
    mean = first.to(torch.float32, copy=True).contiguous()
    del first
    taken = sources[0][1]
    for source, part in sources[1:]:
        taken += part
        flat = source.tensor(name).reshape(-1)
        for piece, other in zip(mean.view(-1).split(_CHUNK), flat.split(_CHUNK), strict=True):
            piece.lerp_(other.float(), part / taken)
    return mean


def _must_match(first: Source, other: Source) -> None:
    """Raise `UserError`, one line, where two sources cannot be averaged."""
    for what in ("model", "encoders"):
        here, there = first.record[what], other.record[what]
        for key in sorted({*here, *there}):
            if here.get(key) != there.get(key):
                raise UserError(
                    f"{first.folder} and {other.folder} cannot be averaged: {what}.{key} is {here.get(key)} and {there.get(key)}"
                )
    for name in [*first.entries, *other.entries]:
        pair = [source.entries.get(name) for source in (first, other)]
        if pair[0] is None or pair[1] is None:
            lacking = (first if pair[0] is None else other).folder
            raise UserError(f"{first.folder} and {other.folder} cannot be averaged: {lacking} lacks {name}")
        if pair[0].shape != pair[1].shape:
            shapes = f"{list(pair[0].shape)} and {list(pair[1].shape)}"
            raise UserError(f"{first.folder} and {other.folder} cannot be averaged: {name} is {shapes}")


def _described(source: Source, part: float) -> dict[str, Any]:
    record = source.record
    facts = {"stage": record["recipe"]["stage"], "step": record.get("step"), "weights": record["weights"]}
    return {"folder": str(source.folder), **facts, "digest": source.digest, "share": part}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    sources: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="Exports or step folders, the oldest first.")],
    output: Annotated[str, typer.Option("--output", help="Folder of the average; must not be there yet.")],
    method: Annotated[str, typer.Option("--method", help="simple, weighted or ema.")] = "simple",
    weights: Annotated[str | None, typer.Option("--weights", metavar="W,W,...", help="One for each source.")] = None,
    decay: Annotated[float, typer.Option("--decay", help="Of method ema: what each further source leaves of the average.")] = 0.8,
    take: Annotated[str, typer.Option("--take", help="From step folders: ema or raw weights.")] = "ema",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 or bfloat16 (default: as the first source).")] = None,
) -> None:
    """Average checkpoints of one model (7 to 10 of them work well, Waver §4.5) into an export."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: {did_you_mean(dtype, DTYPES)}")
    if take not in ("ema", "raw"):
        raise UserError(f"--take {take}: {did_you_mean(take, ('ema', 'raw'))}")
    try:
        numbers = [float(word) for word in weights.split(",")] if weights is not None else None
    except ValueError as error:
        raise UserError(f"--weights takes numbers with commas between them, for example 1,1,2, not '{weights}'") from error
    if len(sources) not in RECOMMENDED:
        print(f"warning: {len(sources)} sources; the report found 7 to 10 favourable (Waver §4.5)", file=sys.stderr)
    done = average(
        sources,
        output,
        method=method,  # type: ignore[arg-type]
        weights=numbers,
        decay=decay,
        take=take,  # type: ignore[arg-type]
        dtype=DTYPES[dtype] if dtype else None,
    )
    for source in done.record["sources"]:
        print(f"{source['share']:.4f}  {source['folder']} ({source['stage']}, step {source['step']}, {source['weights']})")
    print(f"Average of {len(sources)} checkpoints of {done.stage}: {output}")


if __name__ == "__main__":
    from waver_core.command_line import run

    run(app)

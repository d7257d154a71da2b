"""The funnel from input to report; the order of the steps is the order of this file.

    list -> identify -> first pass (shots) -> dedup -> second pass (scores) -> labels -> tiers -> balance -> manifests
    -> ledger -> report
Everything between the passes works on columns only. Every step can be killed and run again: see `curation.workfolder`.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from curation.balance import balance_tiers
from curation.gates import tier_gates
from curation.ledger import build_ledger, print_bad_sources, print_ledger, print_tiers
from curation.llm_pass import converse, units_of_clips
from curation.passes import LaterPass, check_language_models, later_passes, shots_key
from curation.progress import Progress
from curation.report import write_report
from curation.scores_pass import ScoresPass
from curation.selection import add_reasons, count_tiers
from curation.serial import Executor, Serial, units_of
from curation.shots_pass import ShotsPass
from curation.stage import StageSet, load_stages
from curation.tables import clips_of, join_results, pending_clips, resolve_tables, sort_rows
from curation.tags import add_training_captions, check_tags
from curation.text_pass import TextPass
from curation.workfolder import WorkFolder
from waver_core import __version__
from waver_core.config import Config
from waver_core.errors import MediaError, RunFailed
from waver_core.manifest import SOURCE_SCHEMA, write_table
from waver_core.storage import exists, join, read_bytes, size_and_mtime, write_atomic
from waver_core.telemetry import duration_text

Row = dict[str, Any]
_SMALL_INPUT_BYTES = 8 << 30
"""Up to this much is digested in the driver: sooner done than workers started."""
_SMALL_ROWS = 50_000


@dataclass(frozen=True)
class FunnelResult:
    """What a run leaves behind, for the entry script and for tests."""

    output: str
    clips: pa.Table
    sources: list[Row]
    ledger: dict[str, Any]
    tier_rows: dict[str, int]
    decoded_sources: int
    """Sources that this run decoded; 0 when everything was done already."""


class Identify:
    """Worker of the first step: digest and size per file, an error as a row and not as an exception."""

    def __init__(self, config: Config) -> None:
        self._ingest = load_stages(config).named("ingest")

    def __call__(self, files: list[Row]) -> list[Row]:
        """Add source_id, bytes and stamp, or reason and error, to every file."""
        out = []
        for file in files:
            empty: Row = {"source_id": None, "bytes": None, "stamp": None, "reason": None, "error": None}
            try:
                out.append({**file, **empty, **self._ingest.identify(file["uri"])})
            except MediaError as error:
                out.append({**file, **empty, "reason": error.reason, "error": str(error)})
        return out


def run_funnel(config: Config, input_uri: str, output: str, execute: Executor, console: Console) -> FunnelResult:
    """Curate everything under `input_uri` into `output`. Raises `UserError` or `RunFailed` with one clear line."""
    started, started_at = time.monotonic(), datetime.now(UTC)
    stages = load_stages(config)
    tiers = tier_gates(config, stages)
    check_tags(config.tags, stages.schema)
    later = later_passes(config, stages)
    check_language_models(config, stages, later)
    for part in later:
        if part.resources.llm is not None:
            execute.require(part.resources.llm)
    for stage in stages.stages:
        stage.check_tiers(list(tiers))
    keys = {"shots": shots_key(stages), **{p.name: p.key for p in later}}
    work = WorkFolder(output, keys, uuid.uuid4().hex[:12])
    listed = stages.named("ingest").list_input(input_uri)
    work.prepare()
    write_atomic(join(output, "config.yaml"), config.resolved_yaml())

    known, _ = work.read_sources()
    sources = _identify(config, listed, known, execute, console)
    done = {s["source_id"] for s in known}
    todo = [s for s in sources if s["status"] == "new" and s["source_id"] not in done]
    _run_shots(_largest_first(todo), config, work, execute, console)

    finished, seconds = work.read_sources()
    sources = _with_results(sources, finished)
    clips = clips_of(sources, finished, work, stages)
    clips = resolve_tables(clips, stages, tiers)
    for part in later:
        pending = pending_clips(clips, sources, work, part, stages, tiers)
        _run_later(part, pending, config, work, execute, console)
        results, spent = work.read(part.name, part.schema(stages))
        clips = join_results(clips, results, part, stages, tiers)
        seconds = {k: seconds.get(k, 0) + spent.get(k, 0) for k in {*seconds, *spent}}

    clips = add_training_captions(clips, config.tags)
    clips = add_reasons(clips, tiers, [s.name for s in stages.stages])
    clips = sort_rows(clips, [("source_uri", "ascending"), ("start_frame", "ascending")])
    backends = {s.name: f for s in stages.stages if (f := s.backend_fingerprints())}
    models = {p.name: p.resources.llm.model for p in later if p.resources.llm}
    facts = {
        "config_digest": config.digest,
        "passes": keys,
        "models_served": models,
        "backends": backends,
        "openwaver": __version__,
    }
    publish, counts = stages.named("publish"), count_tiers(clips, tiers)
    publish.write_clips(output, clips, facts)
    # A group-by over workers takes seconds to set up; the driver adds a small table up in none.
    balance = balance_tiers(output, clips, list(tiers), stages, execute if len(clips) > _SMALL_ROWS else Serial())
    publish.write_tiers(output, clips, list(tiers), balance, facts)
    write_atomic(join(output, "negative_tags.json"), json.dumps(config.tags.negative_words(), indent=2) + "\n")

    table = pa.Table.from_pylist([{n: s.get(n) for n in SOURCE_SCHEMA.names} for s in sources], schema=SOURCE_SCHEMA)
    write_table(join(output, "sources.parquet"), table)
    ledger = {**build_ledger(clips, sources, stages, seconds), "wall_s": time.monotonic() - started}
    run = {
        "input": input_uri,
        "output": output,
        "profiles": config.profiles,
        "config_digest": config.digest,
        "version": __version__,
        "started": started_at.isoformat(timespec="seconds"),
        "wall_s": ledger["wall_s"],
    }
    summary = [
        {
            "name": t,
            "from": config.tier_parents[t],
            **vars(counts[t]),
            "gates": [{"name": g.name, **g.gate.model_dump()} for g in gates],
        }
        for t, gates in tiers.items()
    ]
    write_atomic(join(output, "ledger.json"), json.dumps({**run, **ledger, "tiers": summary}, indent=2) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        write_report(
            join(folder, "report.html"),
            clips=clips,
            sources=table,
            ledger=ledger,
            tiers=summary,
            run=run,
            thumbnail=lambda clip_id: _read_if_there(work.thumbnail_uri(clip_id)),
            max_gallery_clips=publish.options.max_gallery_clips,
            balance=balance,
            requests=balance.requests if balance else None,
        )
        write_atomic(join(output, "report.html"), read_bytes(join(folder, "report.html")))
    _write_clip_files(clips, stages, output, console)
    print_ledger(ledger, console)
    print_tiers(tiers, counts, console)
    print_bad_sources(sources, console)
    console.print(f"{_plural(len(sources), 'file')}, {_plural(len(clips), 'clip')} in {duration_text(ledger['wall_s'])}")
    _refuse_empty(sources, clips, counts)
    return FunnelResult(output, clips, sources, ledger, {t: counts[t].clips for t in tiers}, len(todo))


def _identify(config: Config, listed: list[Row], known: list[Row], execute: Executor, console: Console) -> list[Row]:
    """Source id of every listed file; unchanged files that were seen before are not read again.

    Of files with the same bytes the first by name is the source and the others are exact duplicates, whichever came first.
    """
    by_stat = {(s["uri"], s["bytes"], s["stamp"]): s["source_id"] for s in known}
    fresh: list[Row] = []
    out: list[Row] = []
    fresh_bytes = 0
    for file in listed:
        if file["kind"] == "other":
            out.append({**file, "status": "ignored", "reason": "not_media", "error": "neither a video nor an image by its name"})
            continue
        try:
            size, stamp = size_and_mtime(file["uri"])
        except OSError:
            size, stamp = 0, ""
        source_id = by_stat.get((file["uri"], size, stamp))
        if source_id:
            out.append({**file, "source_id": source_id, "bytes": size, "stamp": stamp, "status": "new"})
        else:
            fresh.append(file)
            fresh_bytes += size
    executor = execute if fresh_bytes > _SMALL_INPUT_BYTES else Serial()
    resources = config.funnel.resources("shots").model_copy(update={"gpus": 0.0})
    results = executor.run(Identify, (config,), units_of(fresh, 16), resources)
    for row in _watched("identify", results, len(fresh), fresh_bytes, config, console):
        out.append({**row, "status": "quarantined" if row["reason"] else "new"})
    out.sort(key=lambda s: s["uri"])
    first_uri: dict[str, str] = {}
    for source in out:
        if source["status"] == "new":
            keeper = first_uri.setdefault(source["source_id"], source["uri"])
            if keeper != source["uri"]:
                source.update(status="duplicate", reason="exact_duplicate", error=f"the same bytes as {keeper}")
    return out


def _watched(name: str, results: Iterator[Row], n: int, n_bytes: int, config: Config, console: Console) -> Iterator[Row]:
    """Pass results on with progress; raises `RunFailed` when more of them are failures than the budget allows.

    A result that failed has a `reason`; `bytes` is the size of its source. One that stands for several clips or captions
    says how many in `items`, and how many of them failed in `failed`.
    """
    budget = config.funnel.failure_budget
    reasons: Counter[str] = Counter()
    items = 0
    with Progress(name, n, n_bytes, console) as progress:
        for row in results:
            items += row.get("items", 1)
            failed_here = row.get("failed", 1 if row["reason"] else 0)
            if failed_here:
                reasons[row["reason"]] += failed_here
            progress.advance(row["bytes"] or 0, failed=bool(failed_here))
            failed = reasons.total()
            if items >= budget.min_items and failed > budget.max_share * items:
                common = ", ".join(f"{count} {reason}" for reason, count in _commonest(reasons.elements()))
                raise RunFailed(
                    f"stopped: {failed} of {items} failed in the pass '{name}' ({common}), more than "
                    f"funnel.failure_budget.max_share = {budget.max_share:g}. What is done is kept; run again to go on"
                )
            yield row


def _run_shots(items: list[Row], config: Config, work: WorkFolder, execute: Executor, console: Console) -> None:
    """The first decode of every source in `items`; results go to the work folder."""
    resources = config.funnel.resources("shots")
    results = execute.run(ShotsPass, (config, work), units_of(items, resources.sources_per_task), resources)
    for _ in _watched("shots", results, len(items), sum(i["bytes"] or 0 for i in items), config, console):
        pass


def _run_later(part: LaterPass, clips: pa.Table, config: Config, work: WorkFolder, execute: Executor, console: Console) -> None:
    """A pass over clips; results go to the work folder."""
    args = (config, work, part.name)
    units, expected, n_bytes = units_of_clips(clips, part), len(clips), 0
    if part.resources.llm is not None:
        results = converse(part, clips, config, work, execute)
        n_bytes = int(pc.sum(clips["bytes"]).as_py() or 0)
    elif part.hook == "text":
        # Small lots are labelled here sooner than a pool of workers has started, unless the model is to have its own.
        executor = execute if part.pooled or len(clips) > _SMALL_ROWS else Serial()
        results, expected = executor.run(TextPass, args, units, part.resources), len(units)
    else:
        sizes = dict(zip(clips["source_id"].to_pylist(), clips["bytes"].to_pylist(), strict=True))
        results, expected, n_bytes = execute.run(ScoresPass, args, units, part.resources), len(sizes), sum(sizes.values())
    for _ in _watched(part.name, results, expected, n_bytes, config, console):
        pass


def _largest_first(sources: list[Row]) -> list[Row]:
    """Long files first, so that the last worker is not left with the longest."""
    names = ("source_id", "uri", "kind", "dataset", "licence", "style", "bytes", "stamp")
    return sorted(({n: s.get(n) for n in names} for s in sources), key=lambda s: (-(s["bytes"] or 0), s["uri"]))


def _with_results(sources: list[Row], finished: list[Row]) -> list[Row]:
    """The first pass's verdict on each source of this input, under the name it has now."""
    by_id = {s["source_id"]: s for s in finished}
    kept = ("uri", "dataset", "licence", "style")
    return [
        {**by_id[s["source_id"]], **{k: s.get(k) for k in kept}} if s["status"] == "new" and s["source_id"] in by_id else s
        for s in sources
    ]


def _write_clip_files(clips: pa.Table, stages: StageSet, output: str, console: Console) -> None:
    """Write the clips of one tier as MP4 files, if the configuration wants them."""
    publish = stages.named("publish")
    if publish.options.clip_files == "none":
        return
    column = f"reason_{publish.options.clip_tier}"
    kept = clips.filter(pc.and_(pc.is_null(clips[column]), pc.equal(clips["kind"], "video"))).to_pylist()
    ways: Counter[str] = Counter()
    for clip in kept:
        uri = join(output, "files", f"{clip['clip_id']}.mp4")
        ways["already there" if exists(uri) else publish.write_clip_file(clip, uri)] += 1
    console.print(f"clip files: {', '.join(f'{n} {way}' for way, n in ways.items())} in {join(output, 'files')}")


def _refuse_empty(sources: list[Row], clips: pa.Table, counts: dict[str, Any]) -> None:
    """A run in which nothing survived is no success; say what did it."""
    media = [s for s in sources if s["status"] != "ignored"]
    if not any(s["status"] == "ok" for s in media):
        common = _commonest(s["reason"] for s in media or sources)
        raise RunFailed(f"no source could be used: {', '.join(f'{n} {r}' for r, n in common)}")
    if not clips.num_rows:
        raise RunFailed("no clips were found in any source")
    if not any(c.clips for c in counts.values()):
        common = _commonest(clips["reject_reason"].to_pylist())
        raise RunFailed(f"nothing survived: of {len(clips)} clips, {', '.join(f'{n} fell to {r}' for r, n in common)}")


def _commonest(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """The three most frequent reasons, ties by name."""
    return sorted(Counter(reasons).items(), key=lambda pair: (-pair[1], pair[0]))[:3]


def _read_if_there(uri: str) -> bytes | None:
    try:
        return read_bytes(uri)
    except FileNotFoundError:
        return None


def _plural(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"

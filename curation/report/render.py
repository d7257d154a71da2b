"""Fill the page and write it: one file that holds its data, its pictures and its scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from curation.report import summary
from curation.report.actions import Weighted, label_summary, request_rows
from curation.report.charts import score_charts
from curation.report.gallery import gallery_payload, thumbnails
from curation.report.issues import HIGH_QUALITY, ISSUE_COLUMNS, LIKELY, issue_summary
from curation.report.tiers import tier_rows

HERE = Path(__file__).parent
RUN_FACTS = ("input", "output", "config_digest", "profiles", "version", "started", "wall_s", "seed")
STYLES = ("page.css", "semantics.css")
SCRIPTS = ("page.js", "actions.js", "words.js", "gallery.js", "detail.js")
TIER_COLOURS = 8
"""As many as page.css defines (``--tier-0`` and so on); a ninth tier starts over."""


def write_report(
    path: str | Path,
    *,
    clips: pa.Table,
    sources: pa.Table,
    ledger: Mapping[str, Any],
    tiers: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    thumbnail: Callable[[str], bytes | None],
    max_gallery_clips: int = 400,
    balance: Weighted | None = None,
    requests: pa.Table | None = None,
) -> None:
    """Write the funnel's report as one self-contained HTML file; the file appears whole or not at all.

    Args:
        path: Where to write; the folder is made when it is missing.
        clips: A row per clip, rejected ones included. Each Arrow field may carry the metadata ``owner`` (stage),
            ``unit``, ``doc`` and ``score`` (``1`` asks for a distribution). Issues, captions and labels have places of
            their own on the page, by the names that the stages quality, caption and label give their columns; a table
            without them gives a page without those places.
        sources: A row per source: source_id, uri, kind, status, reason, error, duration_s, bytes, n_clips.
        ledger: ``{"stages": [{"stage", "rows_in", "kept", "rejected", "errors", "seconds"}], "wall_s"}``.
        tiers: ``{"name", "from", "clips", "hours", "images", "gates"}`` each; ``clips`` counts images too. What each gate
            rejected is counted from ``clips``.
        run: For the header (input, output, config_digest, profiles, version, started, wall_s, seed), all optional.
        thumbnail: Gives the JPEG filmstrip of a clip (``thumbnail_frames`` frames side by side), or None.
        max_gallery_clips: Cap on the clips shown one by one. Counts and charts always use all rows.
        balance: Groups and weights of the balanced tiers (`curation.balance.Balance`): adds the distribution as drawn.
        requests: Synthetic clips that are wanted (`curation.balance.REQUEST_SCHEMA`).

    Raises:
        ValueError: ``clips`` lacks the ``reason_<tier>`` column of a tier.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page = render(clips, sources, ledger, tiers, run, thumbnail, max_gallery_clips, balance, requests)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # A file name that is no valid text (a lone surrogate) must not cost the report: it shows as "?".
        draft.write_bytes(page.encode("utf-8", "replace"))
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def render(
    clips: pa.Table,
    sources: pa.Table,
    ledger: Mapping[str, Any],
    tiers: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    thumbnail: Callable[[str], bytes | None],
    max_gallery_clips: int,
    balance: Weighted | None,
    requests: pa.Table | None,
) -> str:
    """The page as text. See :func:`write_report` for the arguments."""
    tiers = [{**tier, "gates": list(tier.get("gates") or ())} for tier in tiers]
    missing = [name for name in (f"reason_{tier['name']}" for tier in tiers) if name not in clips.column_names]
    if missing:  # without its column, every clip would seem to be kept
        raise ValueError(f"clips has no column {', '.join(missing)}: each tier needs reason_<tier> (null means kept)")
    stages = [str(stage["stage"]) for stage in ledger.get("stages") or ()]
    total = summary.totals(clips, sources)
    charts = score_charts(clips, tiers, stages)
    judged = [chart for chart in charts if chart["name"] in ISSUE_COLUMNS or chart["name"] == HIGH_QUALITY]
    gallery = {**gallery_payload(clips, tiers, stages, max_gallery_clips), "likely": LIKELY}
    scripts = [*(script(name) for name in SCRIPTS), get_plotlyjs()]
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=summary.number, duration=summary.duration, clock=clock_time, json=script_json, filesize=file_size
    )
    environment.globals.update(percent=summary.percent, counted=summary.counted, tier_colour=tier_colour)
    return environment.get_template("page.html.j2").render(
        policy=content_policy(scripts),
        style=Markup("\n".join((HERE / name).read_text("utf-8") for name in STYLES)),
        scripts=[Markup(text) for text in scripts],
        run={key: run.get(key) for key in RUN_FACTS},
        total=total,
        verdict=summary.verdict(total, tiers),
        tone=summary.tone(total),
        wall_s=run.get("wall_s") or ledger.get("wall_s"),
        tiers=tier_rows(tiers, clips),
        ledger=summary.ledger_rows(ledger),
        charts=charts,
        score_charts=[chart for chart in charts if chart not in judged],
        issue_charts=judged,
        issues=issue_summary(clips, tiers),
        actions=label_summary(clips, tiers, balance),
        requests=request_rows(requests),
        sources=summary.source_rows(sources),
        gallery=gallery,
        strips=thumbnails(gallery, thumbnail),
    )


def script(name: str) -> str:
    """A script of this folder. It must not be able to end its own tag."""
    text = (HERE / name).read_text("utf-8")
    assert "</script" not in text.lower(), name
    return text


def content_policy(scripts: Sequence[str]) -> str:
    """A policy under which the page can reach no network, and only the scripts listed here (by digest) can run.

    Escaping is the first defence against a hostile file name; this is the second. Styles stay open because plotly
    writes its own.
    """
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; form-action 'none'"


def script_json(value: Any) -> Markup:
    """JSON that is safe inside a script tag: no character that HTML gives a meaning survives unescaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text))


def tier_colour(index: int) -> Markup:
    """The style that gives an element its tier's colour."""
    return Markup(f"--tier: var(--tier-{index % TIER_COLOURS})")


def clock_time(started: Any) -> str:
    """An ISO time without the fraction and the T, as it stands; anything else unchanged."""
    return str(started).replace("T", " ", 1).split(".")[0].replace("+00:00", " UTC")


def file_size(size: int | None) -> str:
    """Bytes in decimal units."""
    if size is None:
        return "–"
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"

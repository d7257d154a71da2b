"""The report page: its numbers, its escaping, its edges, and (in a real browser) its behaviour."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from curation.report import write_report
from curation.report.charts import bin_grid, count_numbers, score_charts
from curation.report.gallery import fair_shares, jpeg_size, plain, sample_rows
from curation.report.render import script_json
from curation.report.summary import duration, number, percent, source_rows, totals, verdict
from curation.report.tiers import gate_text

NASTY = "</script><img src=x onerror=alert(1)>"
STAGES = ("ingest", "segment", "technical", "dedup", "aesthetic", "overlay", "motion", "caption")
# fmt: off
SCORES: list[tuple[str, str, str, str, Any]] = [
    ("technical_bitrate_kbps", "technical", "kbit/s", "Mean bit rate.", lambda g, n: g.lognormal(8, 0.9, n)),
    ("technical_bits_per_pixel", "technical", "bit/px", "Bit rate over pixel rate.", lambda g, n: g.gamma(2, 0.05, n)),
    ("technical_black_border_ratio", "technical", "", "Bars.", lambda g, n: (g.random(n) > 0.9) * g.random(n)),
    ("technical_short_side_px", "technical", "px", "Shorter side.", lambda g, n: g.choice([240, 480, 720, 1080], n)),
    ("technical_fps", "technical", "frame/s", "Frames a second.", lambda g, n: g.choice([24.0, 25.0, 30.0, 60.0], n)),
    ("dedup_similarity", "dedup", "", "Similarity to the nearest other clip.", lambda g, n: g.beta(2, 5, n)),
    ("aesthetic_score", "aesthetic", "1 to 10", "Pooled aesthetic score.", lambda g, n: g.normal(5, 0.9, n)),
    ("aesthetic_sharpness", "aesthetic", "", "Variance of the Laplacian.", lambda g, n: g.lognormal(4, 1.2, n)),
    ("overlay_text_area_ratio", "overlay", "", "Share that text covers.", lambda g, n: g.exponential(0.02, n)),
    ("overlay_text_boxes", "overlay", "boxes", "Boxes of text in a frame.", lambda g, n: g.poisson(1.5, n)),
    ("overlay_watermark", "overlay", "", "Probability of a watermark.", lambda g, n: g.beta(0.6, 4, n)),
    ("motion_foreground_px", "motion", "px", "Flow of the foreground, 2 fps. " * 4, lambda g, n: g.gamma(1.6, 4, n)),
    ("motion_background_px", "motion", "px", "Flow of the camera.", lambda g, n: g.gamma(1.2, 3, n)),
    ("motion_direction_entropy", "motion", "bit", "Spread of flow directions.", lambda g, n: 3 * g.beta(4, 2, n)),
]
# fmt: on
GATES: dict[str, list[dict[str, Any]]] = {
    "192p": [
        {"name": "text_area", "column": "overlay_text_area_ratio", "max": 0.05},
        {"name": "static", "column": "motion_foreground_px", "min": 1.0, "kind": "video"},
        {"name": "duplicate", "column": "dedup_similarity", "max": 0.6},
    ],
    "480p": [
        {"name": "aesthetic", "column": "aesthetic_score", "min": 4.5},
        {"name": "text_area", "column": "overlay_text_area_ratio", "max": 0.04},
        {"name": "motion", "column": "motion_foreground_px", "min": 2.0, "max": 20.0, "kind": "video"},
        {"name": "resolution", "column": "technical_short_side_px", "min": 480},
    ],
    "720p": [
        {"name": "aesthetic", "column": "aesthetic_score", "min": 4.8},
        {"name": "watermark", "column": "overlay_watermark", "max": 0.3},
        {"name": "resolution", "column": "technical_short_side_px", "min": 720},
        {"name": "bitrate", "column": "technical_bitrate_kbps", "min": 900},
        {"name": "shaky", "column": "motion_shaky", "equals": False},
    ],
}


def field(name: str, kind: pa.DataType, owner: str, unit: str = "", doc: str = "", score: bool = False) -> pa.Field:
    facts = {"owner": owner, "unit": unit, "doc": doc, **({"score": "1"} if score else {})}
    return pa.field(name, kind, metadata=facts)


def make_run(rows: int, seed: int = 0, sources: int = 12, reject_all: bool = False) -> dict[str, Any]:
    """Arguments of write_report for a made-up run whose reasons follow from its scores and gates."""
    g = np.random.default_rng(seed)
    source = np.sort(g.integers(0, max(sources - 2, 1), rows))
    images = g.random(rows) < 0.1
    uris = [f"/data/raw/{'deep/' * (30 * (i == 1))}reise_{i:02d}_straße-日本.mp4" for i in range(max(sources, 1))]
    uris[0] = f"/data/{NASTY}.mp4"
    start = g.integers(0, 900, rows) / 10
    length = np.where(images, np.nan, g.integers(20, 100, rows) / 10)
    columns: list[tuple[pa.Field, Any]] = [
        (
            field("clip_id", pa.string(), "ingest"),
            [f"{value:016x}-{i}" for i, value in enumerate(g.integers(0, 2**60, rows))],
        ),
        (field("source_id", pa.string(), "ingest"), [f"s{i}" for i in source]),
        (field("source_uri", pa.string(), "ingest"), [uris[i] for i in source]),
        (field("kind", pa.string(), "ingest"), ["image" if image else "video" for image in images]),
        (field("start_s", pa.float64(), "segment", "s"), start),
        (field("end_s", pa.float64(), "segment", "s"), start + length),
        (field("duration_s", pa.float64(), "segment", "s", "Length of the clip.", True), length),
        (field("display_width_px", pa.int32(), "technical", "px"), np.full(rows, 1280)),
        (field("display_height_px", pa.int32(), "technical", "px"), np.full(rows, 720)),
        (field("fps", pa.float64(), "technical"), np.full(rows, 24.0)),
        (field("thumbnail_frames", pa.int32(), "publish"), np.where(images, 1, 8)),
    ]
    scores: dict[str, Any] = {"motion_shaky": g.random(rows) < 0.15}
    for name, owner, unit, doc, draw in SCORES:
        scores[name] = draw(g, rows)
        whole = scores[name].dtype.kind == "i"
        values = [None if lost else v for v, lost in zip(scores[name].tolist(), g.random(rows) < 0.03, strict=True)]
        scores[name] = np.array([np.nan if v is None else v for v in values], dtype=float)
        columns.append((field(name, pa.int64() if whole else pa.float64(), owner, unit, doc, True), values))
    moves, odds = ["static", "pan", "tilt", "zoom", "handheld", f"<b>{NASTY}"], [0.4, 0.2, 0.1, 0.1, 0.19, 0.01]
    camera = g.choice(moves, rows, p=odds)
    errors = [f"cannot decode {NASTY}" if i % 37 == 5 else None for i in range(rows)]
    columns += [
        (field("motion_shaky", pa.bool_(), "motion", "", "Unsteady camera.", True), scores["motion_shaky"].tolist()),
        (field("motion_camera", pa.string(), "motion", "", "Kind of camera move.", True), camera.tolist()),
        (field("caption_text", pa.string(), "caption"), [f"A clip {NASTY} number {i}" for i in range(rows)]),
        (field("caption_tags", pa.list_(pa.string()), "caption"), [["calm", "wide"]] * rows),
        (field("overlay_error", pa.string(), "overlay"), errors),
        (field("dedup_embedding", pa.list_(pa.float32(), 4), "dedup"), [[0.0] * 4] * rows),
    ]
    verdicts: dict[str, list[str | None]] = {}
    parent: list[str | None] = [None] * rows
    tiers: list[dict[str, Any]] = []
    for tier, gates in GATES.items():
        reasons, rejected = list(parent), dict.fromkeys([gate["name"] for gate in gates], 0)
        for i in range(rows):
            if parent[i] is not None:
                continue
            for gate in gates:
                v = scores[gate["column"]][i]
                passes = (v >= gate.get("min", -np.inf)) & (v <= gate.get("max", np.inf)) & (v == gate.get("equals", v))
                if reject_all or not passes:
                    reasons[i] = gate["name"]
                    rejected[gate["name"]] += 1
                    break
        kept = np.array([reason is None for reason in reasons], dtype=bool)
        verdicts[tier] = parent = reasons
        tiers.append({
            "name": tier, "from": tiers[-1]["name"] if tiers else None, "clips": int(kept.sum()), "rejected": rejected,
            "hours": float(np.nansum(length[kept])) / 3600, "images": int(images[kept].sum()), "gates": gates,
        })  # fmt: skip
    first = verdicts["192p"]
    columns += [(field(f"reason_{tier}", pa.string(), "publish"), reasons) for tier, reasons in verdicts.items()]
    columns.append((field("reject_reason", pa.string(), "publish"), first))
    columns.append((field("reject_stage", pa.string(), "publish"), [reason and "overlay" for reason in first]))
    frames = dict(zip(columns[0][1], (1 if image else 8 for image in images), strict=True))
    status = (["quarantined", "duplicate"] + ["ok"] * sources)[:sources][::-1]
    stages: list[dict[str, Any]] = [
        {"stage": stage, "rows_in": rows, "kept": rows, "rejected": {}, "errors": 0, "seconds": 2.5 * i * i}
        for i, stage in enumerate(STAGES)
    ]
    stages[5]["errors"] = len(errors) - errors.count(None)
    stages[0]["rejected"] = {"duplicate_source": 1}
    stages[-1]["rejected"] = {reason: first.count(reason) for reason in set(first) - {None}}
    arrays = [pa.array(values, facts.type, from_pandas=False) for facts, values in columns]
    ids = [f"s{i}" for i in range(sources)]
    return {
        "clips": pa.Table.from_arrays(arrays, schema=pa.schema([facts for facts, _ in columns])),
        "sources": pa.table({
            "source_id": ids, "uri": uris[:sources], "kind": ["video"] * sources, "status": status,
            "reason": pa.array([None if s == "ok" else s for s in status], pa.string()),
            "error": pa.array([f"no moov {NASTY}" if s == "quarantined" else None for s in status], pa.string()),
            "duration_s": [61.5 * (i + 1) for i in range(sources)], "bytes": [10**6 * (i + 1) for i in range(sources)],
            "n_clips": pa.array([int((source == i).sum()) for i in range(sources)], pa.int64()),
        }),
        "ledger": {"stages": stages, "wall_s": 93.0},
        "tiers": tiers,
        "run": {
            "input": f"/data/{NASTY}", "output": "/out/run-7", "config_digest": "9f2c" * 16, "profiles": ["embedded"],
            "version": "0.1.0", "started": "2026-01-02T03:04:05.678+00:00", "wall_s": 93.0, "seed": 7,
        },
        "thumbnail": lambda clip_id: filmstrip(clip_id, frames[clip_id]),
    }  # fmt: skip


def filmstrip(clip_id: str, frames: int = 8, height: int = 90) -> bytes | None:
    """A JPEG of frames side by side: a disc that crosses a coloured ground. Every 29th clip has none."""
    seed, width = sum(clip_id.encode()), height * 16 // 9
    if seed % 29 == 0:
        return None
    hue = np.asarray(cv2.cvtColor(np.array([[[seed % 180, 150, 190]]], np.uint8), cv2.COLOR_HSV2BGR))[0, 0]
    strip = np.empty((height, width * frames, 3), np.uint8)
    for i in range(frames):
        strip[:, i * width : (i + 1) * width] = np.linspace(0.4, 1.0, height)[:, None, None] * hue
        centre = (i * width + 20 + i * (width - 40) // max(frames - 1, 1), height // 2 + (seed % 30) - 15)
        cv2.circle(strip, centre, 14, [int(255 - c) for c in hue], -1, cv2.LINE_AA)
    return cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def write(folder: Path, run: dict[str, Any], **more: Any) -> str:
    path = folder / "deeper" / "report.html"
    write_report(path, **run, **more)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"], "a draft was left behind"
    return path.read_text("utf-8")


def embedded(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page, re.S)
    assert found, name
    return json.loads(found[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    run, folder = make_run(180), tmp_path_factory.mktemp("report")
    return folder / "deeper" / "report.html", run, write(folder, run)


def test_embedded_data_equals_the_table(made: tuple[Path, dict[str, Any], str]) -> None:
    _, run, page = made
    gallery, strips, clips = embedded(page, "gallery"), embedded(page, "strips"), run["clips"].to_pylist()
    assert gallery["total"] == len(gallery["clips"]) == len(strips) == 180
    names = [column["name"] for column in gallery["columns"]]
    assert {"dedup_embedding", "overlay_error"} & set(names) == {"overlay_error"}
    for card, row in zip(gallery["clips"], clips, strict=True):
        assert (card["id"], card["reason"]) == (row["clip_id"], row["reject_reason"])
        assert card["verdicts"] == [row[f"reason_{tier}"] for tier in GATES]
        score, want = card["values"][names.index("aesthetic_score")], row["aesthetic_score"]
        assert score == (None if want is None else pytest.approx(want, rel=1e-5))
    for index, tier in enumerate(run["tiers"]):
        assert sum(card["verdicts"][index] is None for card in gallery["clips"]) == tier["clips"]
        assert f'data-tier="{index}" data-verdict="kept"' in page
    assert html.escape(verdict(totals(run["clips"], run["sources"]), run["tiers"])) in page
    assert "overlay_text_area_ratio ≤ 0.05" in page
    assert "motion_foreground_px ≥ 1.0 (video only)" in page


def test_charts_count_every_row(made: tuple[Path, dict[str, Any], str]) -> None:
    _, run, page = made
    charts = embedded(page, "charts")
    assert [chart["stage"] for chart in charts] == sorted((c["stage"] for c in charts), key=STAGES.index)
    assert len(charts) == len(SCORES) + 3  # and duration_s, motion_shaky, motion_camera
    for chart in charts:
        assert sum(chart["kept"]) + sum(chart["rejected"]) + chart["missing"] == 180, chart["name"]
        assert sum(chart["kept"]) <= run["clips"]["reject_reason"].null_count
    marks = {chart["name"]: chart["marks"] for chart in charts}
    assert [(m["sign"], m["value"], m["tiers"]) for m in marks["aesthetic_score"]] == [("≥", 4.5, [1]), ("≥", 4.8, [2])]
    assert marks["motion_shaky"] == [{"sign": "=", "value": False, "text": "false", "tiers": [2]}]


def test_nothing_hostile_survives(made: tuple[Path, dict[str, Any], str]) -> None:
    _, _, page = made
    assert "<img" not in page, "markup came in with the data"
    assert page.count("</script>") == 10 == len(re.findall(r"<script( type=\"application/json\" id=\"[\w-]+\")?>", page))
    assert "default-src &#39;none&#39;; script-src &#39;sha256-" in page
    assert not re.search(r"<(?:link|img|script|iframe)[^>]+(?:src|href)=\"(?!data:|#)", page.split("plotly.js v")[0])
    assert script_json({"a": "</script><!--\u2028&"}) == '{"a":"\\u003c/script\\u003e\\u003c!--\\u2028\\u0026"}'


@pytest.mark.parametrize(("rows", "sources"), [(0, 0), (0, 3), (1, 1), (7, 2)])
def test_tiny_runs(tmp_path: Path, rows: int, sources: int) -> None:
    run = {**make_run(rows, sources=sources), "run": {"input": "in"}}
    assert len(embedded(page := write(tmp_path, run), "gallery")["clips"]) == rows
    if not rows:
        assert re.search(r'class="bad".*There are no clips to measure', page, re.S)


def test_all_rejected_names_the_reason(tmp_path: Path) -> None:
    page = write(tmp_path, make_run(20, reject_all=True))
    assert re.search(r'class="bad".*none reaches a tier, most often because of text_area \(20\)', page)


def test_bare_tables_and_a_missing_tier_column(tmp_path: Path) -> None:
    clips = pa.table({"clip_id": ["a"], "reason_x": pa.array([None], pa.string()), "score": [1.0]})
    run = {"clips": clips, "sources": pa.table({"status": ["ok"], "uri": ["a/b.mp4"]}), "ledger": {}, "run": {}}
    tier = {"name": "x", "clips": 1}
    assert "b.mp4" in write(tmp_path, {**run, "tiers": [tier], "thumbnail": lambda clip_id: None})
    with pytest.raises(ValueError, match="reason_y"):
        write(tmp_path, {**run, "tiers": [{"name": "y"}], "thumbnail": lambda clip_id: None})


def test_failed_write_keeps_the_old_report(tmp_path: Path) -> None:
    write(tmp_path, run := make_run(2, sources=1))
    run["thumbnail"] = lambda clip_id: 1 / 0
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, run)
    assert "OpenWaver curation report" in (tmp_path / "deeper" / "report.html").read_text("utf-8")


def test_sample_is_stratified_deterministic_and_independent_of_order() -> None:
    run = make_run(600, seed=3)
    clips, tiers = run["clips"], run["tiers"]
    rows, strata = sample_rows(clips, tiers, 60)
    assert len(rows) == 60
    assert list(rows) == sorted(set(rows.tolist()))
    patterns = {tuple(row.values()) for row in clips.select([f"reason_{tier}" for tier in GATES]).to_pylist()}
    taken = clips.take(pa.array(rows))
    assert strata == len(patterns)
    assert {tuple(r.values()) for r in taken.select([f"reason_{t}" for t in GATES]).to_pylist()} == patterns
    shuffled = clips.take(pa.array(np.random.default_rng(1).permutation(600)))
    again, _ = sample_rows(shuffled, tiers, 60)
    assert set(shuffled["clip_id"].take(pa.array(again)).to_pylist()) == set(taken["clip_id"].to_pylist())
    assert fair_shares(np.array([100, 2, 50]), 20).tolist() == [9, 2, 9]
    assert fair_shares(np.array([1, 2]), 20).tolist() == [1, 2]


def test_sampled_page_says_so(tmp_path: Path) -> None:
    gallery = embedded(page := write(tmp_path, make_run(120), max_gallery_clips=25), "gallery")
    assert (len(gallery["clips"]), gallery["total"]) == (25, 120)
    assert "A sample of 25 of 120 clips" in page


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ([None, float("nan"), float("inf")], 3), ([5.0] * 4, 0), ([1, 2, 3, None], 1), ([i / 10 for i in range(11)], 0),
        ([1.0] * 500 + [1e12], 0), (list(np.random.default_rng(0).lognormal(3, 3, 500)), 0), ([-1e-300, 1e-300], 0),
    ],
)  # fmt: skip
def test_histogram_sums(values: list[Any], missing: int) -> None:
    column = pa.chunked_array([pa.array(values, from_pandas=False)])
    chart = count_numbers(column, np.arange(len(values)) % 2 == 0, [{"value": 2.0}])
    assert chart["missing"] == missing
    assert sum(chart["kept"]) + sum(chart["rejected"]) + missing == len(values)
    json.dumps(chart, allow_nan=False)


def test_bins_are_round_and_whole_numbers_share_them_evenly() -> None:
    assert bin_grid(0.0, 1.0, whole=False, count=10_000) == (0.0, 0.05, 20)
    assert bin_grid(0, 100, whole=True, count=10_000) == (-0.5, 5.0, 21)
    table = pa.table({"reject_reason": pa.array([None, "x"], pa.string()), "v": [1.0, 2.0]})
    assert score_charts(table, [], []) == []  # nothing is marked as a score


def test_words() -> None:
    assert [number(v) for v in (None, 0, 12400, 3.14159, 0.03123, 1234.5, float("nan"), 2.5e-7)] == [
        "–", "0", "12,400", "3.14", "0.0312", "1,234", "–", "2.5e-07"]  # fmt: skip
    assert [percent(*v) for v in ((0, 5), (1, 10**6), (999_999, 10**6), (1, 3), (1, 0))] == [
        "0 %", "< 0.1 %", "> 99.9 %", "33 %", "–"]  # fmt: skip
    assert [duration(v) for v in (0, 3.14, 186, 3 * 3600, None)] == ["0 s", "3.1 s", "3.1 min", "3 h", "–"]
    assert gate_text({"name": "a", "column": "c", "min": 2, "max": 20}) == "2 ≤ c ≤ 20"
    assert gate_text({"name": "a", "column": "c", "equals": False}) == "c = false"
    assert [plain(v) for v in ([1.0, None, float("inf")], float("nan"))] == ["1.0, None, None", None]
    assert [jpeg_size(v or b"") for v in (filmstrip("ab", 3), b"no")] == [(480, 90), None]
    assert [row["status"] for row in source_rows(make_run(3)["sources"], limit=3)] == ["quarantined", "duplicate", "ok"]


def test_needs_no_ray() -> None:
    check = [sys.executable, "-c", "import sys, curation.report; sys.exit('ray' in sys.modules)"]
    assert subprocess.run(check, cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.browser
def test_in_a_browser(made: tuple[Path, dict[str, Any], str]) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("no system Chromium: install the chromium package to run the report's browser test")
    path, run, _ = made
    clips = run["clips"].to_pylist()
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=quiet)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        troubles: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        cards, found = page.locator("#cards .card"), page.locator("#found")
        assert page.locator(".main-svg").count() == 0, "charts are drawn only when they come into view"
        assert cards.count() == 60
        assert found.inner_text() == "180 of 180 clips."

        page.locator(".tier .reason[data-reason=text_area][data-tier='0']").click()
        want = [row for row in clips if row["reason_192p"] == "text_area"]
        assert found.inner_text() == f"{len(want)} of 180 clips."
        page.select_option("[name=sort]", "aesthetic_score")
        page.select_option("[name=order]", "down")
        ordered = sorted(want, key=lambda row: -(row["aesthetic_score"] or -1e9))
        shown = cards.evaluate_all("nodes => nodes.map((node) => node.dataset.clip)")
        assert shown == [row["clip_id"] for row in ordered][:60]

        cards.first.click()
        detail = page.locator("#detail")
        assert detail.is_visible()
        assert ordered[0]["clip_id"] in detail.inner_text()
        assert "asked overlay_text_area_ratio ≤ 0.05" in detail.inner_text()
        assert NASTY in detail.inner_text()
        page.keyboard.press("ArrowRight")
        assert ordered[1]["clip_id"] in detail.inner_text()
        page.keyboard.press("Escape")
        assert not detail.is_visible()

        page.get_by_role("button", name="Clear").click()
        page.fill("[name=text]", "no such clip anywhere")
        assert cards.count() == 0
        assert "Loosen" in found.inner_text()
        page.fill("[name=text]", "")
        page.get_by_role("button", name="Next", exact=True).click()
        assert page.locator("#page-number").inner_text() == "Page 2 of 3"

        card = page.locator("#cards .card:not(:has(.blank))").first
        before = card.locator(".frame").evaluate("node => node.style.backgroundPosition")
        card.hover()
        moved = "before => document.querySelector('.card:hover .frame').style.backgroundPosition !== before"
        page.wait_for_function(moved, arg=before)

        page.locator("[data-chart='1']").scroll_into_view_if_needed()
        page.wait_for_selector("[data-chart='1'] .main-svg")
        page.fill("#find-source", "moov")
        assert page.locator("#source-rows tr:visible").count() == 1
        browser.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]

"""The report's issues, actions, captions and rules in words: numbers, absence, escaping, and behaviour in a browser."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from markupsafe import escape

from curation.balance import REQUEST_SCHEMA
from curation.report import write_report
from curation.report.actions import MAX_REQUESTS, MAX_THIRD, label_summary, request_rows
from curation.report.issues import issue_summary
from curation.report.tiers import gate_text, gate_words, passage, tier_rows
from curation.report.words import MAX_CAPTION, row_words, training
from waver_core.backends.contracts import ISSUES

NASTY = "</script><script>alert('x')</script><img src=x onerror=\"alert(1)\"> & \"quotes\" 'and' `ticks`"
ACTION = pa.struct([("text", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())])
LABELS = [
    ("Ball Sports", "Basketball", "dribbling a ball"),
    ("Ball Sports", "Basketball", "shooting a hoop"),
    ("Ball Sports", "Tennis", "serving a ball"),
    ("Animals", "Dogs & <cats>", f"dog {NASTY}"),
    ("none", "none", "none"),
]
GATES: dict[str, list[dict[str, Any]]] = {
    "low": [{"name": "sharp", "column": "sharpness", "min": 0.2}],
    "high": [
        {"name": "sharp", "column": "sharpness", "min": 0.4},
        *({"name": f"judge_{i}", "column": f"quality_{i}", "max": 0.5, "kind": None} for i in ISSUES[:3]),
    ],
}


@dataclass(frozen=True)
class Weights:
    """Stands in for `curation.balance.Balance`."""

    groups: pa.Table
    weights: dict[str, np.ndarray]


def make_clips(rows: int = 70, seed: int = 0) -> pa.Table:
    """Clips of two tiers with everything that the four last stages write; every seventh was never judged."""
    g = np.random.default_rng(seed)
    judged = np.arange(rows) % 7 != 0
    columns: dict[str, Any] = {
        "clip_id": [f"clip-{i:03d}" for i in range(rows)],
        "source_id": ["s"] * rows,
        "source_uri": ["/data/film.mp4"] * rows,
        "kind": ["video"] * rows,
        "dataset": [["film", "phone"][i % 2] for i in range(rows)],
        "start_s": np.arange(rows) * 5.0,
        "end_s": np.arange(rows) * 5.0 + 4.0,
        "sharpness": g.random(rows),
    }
    for issue in (*ISSUES, "high"):
        columns[f"quality_{issue}"] = pa.array(np.where(judged, g.random(rows) ** 6, np.nan), pa.float64(), from_pandas=True)
    low = [None if value >= 0.2 else "sharp" for value in columns["sharpness"]]
    high = [reason or ("sharp" if value < 0.4 else None) for reason, value in zip(low, columns["sharpness"], strict=True)]
    for i in range(rows):
        asked = [f"judge_{issue}" for issue in ISSUES[:3] if not (columns[f"quality_{issue}"][i].as_py() or 0) <= 0.5]
        high[i] = high[i] or (asked[0] if asked else None)
    known = [LABELS[i % len(LABELS)] if judged[i] else None for i in range(rows)]
    text = [f"Clip {i} shows a red disc. {NASTY}" if judged[i] else None for i in range(rows)]
    columns |= {
        "caption": pa.array(text, pa.string()),
        "caption_short": pa.array([t and f"Short {i} {NASTY}" for i, t in enumerate(text)], pa.string()),
        "caption_actions": pa.array(
            [t and [{"text": f"it rolls {NASTY}", "start_s": 1.0, "end_s": 3.0}] for t in text], pa.list_(ACTION)
        ),
        "caption_camera": pa.array([t and "pan_left" for t in text], pa.string()),
        "caption_style": pa.array([t and "rendered" for t in text], pa.string()),
        "caption_spatial": pa.array([t and [f"left of {NASTY}"] for t in text], pa.list_(pa.string())),
        **{f"label_{k + 1}": pa.array([path and path[k] for path in known], pa.string()) for k in range(3)},
        "training_caption": pa.array([t and f"Drawn style. {t} Sharp." for t in text], pa.string()),
        "review": ["approved" if i == 1 else "real" for i in range(rows)],
        "reason_low": pa.array(low, pa.string()),
        "reason_high": pa.array(high, pa.string()),
        "reject_reason": pa.array(low, pa.string()),
    }
    scores = {f"quality_{issue}" for issue in (*ISSUES, "high")} | {"sharpness"}
    table = pa.table(columns)
    fields = [
        f.with_metadata({"owner": f.name.split("_")[0], **({"score": "1"} if f.name in scores else {})}) for f in table.schema
    ]
    return table.cast(pa.schema(fields))


def make_balance(clips: pa.Table, weight: float) -> Weights:
    """Groups as `curation.balance` counts them; basketball is drawn `weight` times as often in tier high, the rest once."""
    keys = [*(f"label_{k}" for k in (1, 2, 3)), "dataset"]
    rows = clips.to_pylist()
    paths = sorted({tuple(row[k] or "none" for k in keys) for row in rows})
    count = [
        [sum(tuple(r[k] or "none" for k in keys) == p and r[f"reason_{t}"] is None for r in rows) for p in paths] for t in GATES
    ]
    groups = pa.table({**{k: [p[i] for p in paths] for i, k in enumerate(keys)}, **dict(zip(GATES, count, strict=True))})
    return Weights(groups, {"high": np.array([weight if path[1] == "Basketball" else 1.0 for path in paths])})


def make_requests(rows: int) -> pa.Table:
    """A table of requests; every third has an image to start from."""
    place = {"tier": "high", "label_1": "Animals", "label_2": "Birds"}
    seed = {"seed_clip_id": "c", "seed_uri": NASTY, "seed_time_s": 1.0}
    each = [
        {
            **place,
            "label_3": f"bird {i}",
            "clips_wanted": i + 1,
            "share": 0.001,
            "prompt": f"A bird {i}. {NASTY}",
            **(seed if i % 3 == 0 else {}),
        }
        for i in range(rows)
    ]
    return pa.Table.from_pylist(each, schema=REQUEST_SCHEMA)


def write(folder: Path, clips: pa.Table, **more: Any) -> str:
    tiers: list[dict[str, Any]] = []
    for name, gates in GATES.items():
        kept = clips[f"reason_{name}"].null_count
        tiers.append({"name": name, "from": "low" if name == "high" else None, "clips": kept, "hours": 0.1, "gates": gates})
    sources = pa.table({"source_id": ["s"], "uri": ["/data/film.mp4"], "status": ["ok"]})
    path = folder / "report.html"
    write_report(path, clips=clips, sources=sources, ledger={}, tiers=tiers, run={}, thumbnail=lambda _: None, **more)
    return path.read_text("utf-8")


def embedded(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page, re.S)
    assert found, name
    return json.loads(found[1])


def test_issue_counts_equal_the_table() -> None:
    clips = make_clips()
    rows = clips.to_pylist()
    tiers = [{"name": name, "gates": gates} for name, gates in GATES.items()]
    summary = issue_summary(clips, tiers)
    assert summary is not None
    assert summary["judged"] == sum(row["quality_watermark"] is not None for row in rows) == 60
    for row in summary["rows"]:
        having = [clip for clip in rows if (clip[f"quality_{row['issue']}"] or 0) >= 0.5]
        assert row["count"] == len(having)
        assert row["kept"] == sum(clip["reject_reason"] is None for clip in having) == row["count"] - row["cut"]
    assert {row["issue"]: row["tier"] for row in summary["rows"]} == {i: 1 if i in ISSUES[:3] else None for i in ISSUES}
    counts = [row["count"] for row in summary["rows"]]
    assert counts == sorted(counts, reverse=True)
    probabilities = [[row[f"quality_{issue}"] for issue in ISSUES] for row in rows]
    assert summary["clean"]["count"] == sum(None not in p and max(p) < 0.5 for p in probabilities)


def test_labels_before_and_after_balancing() -> None:
    clips = make_clips()
    rows = clips.to_pylist()
    tiers = [{"name": name} for name in GATES]
    plain = label_summary(clips, tiers, None)
    assert plain is not None
    assert [view["weighted"] for view in plain["views"]] == [False] * 3
    balanced = label_summary(clips, tiers, make_balance(clips, 3.0))
    assert balanced is not None
    assert [view["weighted"] for view in balanced["views"]] == [False, False, True]
    assert [view["name"] for view in balanced["views"]] == ["All clips", "low", "high"]
    kept = [row for row in rows if row["reason_high"] is None and row["label_1"]]
    for first in balanced["classes"]:
        assert first["name"] != "none"
        assert first["n"][0] == sum(row["label_1"] == first["name"] for row in rows)
        assert first["n"][2] == sum(row["label_1"] == first["name"] for row in kept)
        assert first["n"] == [sum(n) for n in zip(*(second["n"] for second in first["children"]), strict=True)]
        for second in first["children"]:
            assert second["w"][2] == pytest.approx(second["n"][2] * (3 if second["name"] == "Basketball" else 1))
    assert balanced["none"]["n"][0] == sum(row["label_1"] == "none" for row in rows)
    assert balanced["unlabelled"][0] == 10
    assert balanced["total"]["n"][2] == len(kept)
    assert {row["name"] for row in balanced["datasets"]["2"]} == {"film", "phone"}
    many = pa.table({f"label_{k}": [["a", "b", f"c{i}"][k - 1] for i in range(MAX_THIRD + 5)] for k in (1, 2, 3)})
    summed = label_summary(many, [], None)
    assert summed is not None
    leaves = summed["classes"][0]["children"][0]["children"]
    assert (len(leaves), leaves[-1]["name"], leaves[-1]["n"]) == (MAX_THIRD + 1, "5 more labels", [5])


def test_requests_of_several_tiers_share_a_row() -> None:
    assert request_rows(None) is None
    assert request_rows(make_requests(0)) is None
    table = pa.concat_tables([make_requests(30), make_requests(30)])
    found = request_rows(table)
    assert found is not None
    assert (found["total"], found["different"], found["seeded"]) == (60, 30, 20)
    assert [row["wanted"] for row in found["rows"]] == [60 - 2 * i for i in range(MAX_REQUESTS)]


def test_tiers_count_what_is_lost_in_them() -> None:
    clips = make_clips()
    rows = clips.to_pylist()
    entered, lost, gained = passage(clips, "high", "low")
    passed = [row for row in rows if row["reason_low"] is None]
    assert (entered, gained) == (len(passed), 0)
    assert lost == {reason: n for reason in lost if (n := sum(row["reason_high"] == reason for row in passed))}
    tiers = [{"name": name, "from": "low" if name == "high" else None, "gates": gates} for name, gates in GATES.items()]
    tiers[1]["clips"] = entered - sum(lost.values())
    tiers[1]["gates"] = [*GATES["high"], {"name": "same", "column": "x", "min": 1}]
    tiers[0]["gates"] = [*GATES["low"], {"name": "same", "column": "x", "min": 1}]
    high = tier_rows(tiers, clips)[1]
    assert {gate["name"]: gate["change"] for gate in high["gates"]} == {"sharp": "changed", "judge": "new"}
    assert [gate["name"] for gate in high["inherited"]] == ["same"]
    judge = next(gate for gate in high["gates"] if gate["name"] == "judge")
    assert "none of 3 issues (each with a probability of at most 0.5)" in judge["words"]
    assert [one["words"] for one in judge["members"]] == ["low visual quality", "black border", "text overlay"]
    assert judge["count"] == sum(n for name, n in lost.items() if name.startswith("judge_"))
    # A tier that admits what its parent does not.
    table = pa.table({"reason_a": pa.array(["review", None], pa.string()), "reason_b": pa.array([None, None], pa.string())})
    assert passage(table, "b", "a") == (1, {}, 1)


@pytest.mark.parametrize(
    ("gate", "unit", "words", "text"),
    [
        ({"column": "text_area_ratio", "max": 0.03}, "", "text area ratio is at most 0.03", "text_area_ratio ≤ 0.03"),
        ({"column": "short_side_px", "min": 480.0}, "px", "short side is at least 480 px", "short_side_px ≥ 480.0"),
        (
            {"column": "motion_total_px", "min": 1, "max": 2.5, "kind": "video"},
            "px/step",
            "motion total is between 1 and 2.5 px/step, videos only",
            "1 ≤ motion_total_px ≤ 2.5 (video only)",
        ),
        ({"column": "fps", "min": 10}, "1/s", "fps is at least 10 per s", "fps ≥ 10"),
        (
            {"column": "review", "equals": ("real", "picked"), "only": {"style": "cg"}},
            "",
            "review is real or picked, where style is cg",
            "review = real or picked (where style = cg)",
        ),
        ({"column": "dedup_keep", "equals": True}, "", "dedup keep is true", "dedup_keep = true"),
    ],
)
def test_rules_in_words(gate: dict[str, Any], unit: str, words: str, text: str) -> None:
    assert (gate_words(gate, unit), gate_text(gate)) == (words, text)


def test_words_of_a_clip() -> None:
    assert row_words({}) == {}
    assert training("Real. A cat. Sharp.", "A cat.") == ["Real. ", None, " Sharp."]
    assert training("something else", "A cat.") == ["", "something else", ""]
    assert training("Real. A cat.", None) == ["", "Real. A cat.", ""]
    row = {"caption": "x" * 9000, "caption_actions": [{"text": None, "start_s": float("nan"), "end_s": 2.00049}]}
    found = row_words(row)
    assert len(found["caption"]) == MAX_CAPTION + 1
    assert found["actions"] == [["", None, 2.0]]
    assert row_words({"label_1": "a", "label_2": "b", "label_3": None, "review": "picked"}) == {
        "labels": ["a", "b"],
        "review": "picked",
    }


def test_nothing_hostile_survives_and_the_numbers_are_on_the_page(tmp_path: Path) -> None:
    clips = make_clips()
    page = write(tmp_path, clips, balance=make_balance(clips, 2.0), requests=make_requests(30))
    assert "<img" not in page
    assert page.count("</script>") == 10 == len(re.findall(r"<script( type=\"application/json\" id=\"[\w-]+\")?>", page))
    assert f'<span title="{escape("A bird 29. " + NASTY)}">' in page
    gallery = embedded(page, "gallery")
    names = [column["name"] for column in gallery["columns"]]
    assert [c["issue"] for c in gallery["columns"] if c["issue"]] == list(ISSUES)
    assert not {"caption", "label_1", "training_caption", "caption_actions"} & set(names)
    words = gallery["clips"][1]["words"]
    assert words["caption"] == clips["caption"][1].as_py()
    assert words["training"] == ["Drawn style. ", None, " Sharp."]
    assert words["review"] == "approved"
    assert gallery["clips"][0]["words"] == {"review": "real"}
    assert [tier["parent"] for tier in gallery["tiers"]] == [None, 0]
    charts, issues = page.split('id="quality"')
    assert 'aria-label="Histogram of quality_' not in charts
    assert issues.count('aria-label="Histogram of quality_') == 14
    assert "30 requests for 465 clips in all" in page
    assert "10 with an image to start from" in page


def test_a_run_without_the_stages_has_none_of_the_sections(tmp_path: Path) -> None:
    clips = make_clips()
    bare = clips.select([n for n in clips.column_names if not n.startswith(("quality_", "caption", "label_", "training"))])
    page = write(tmp_path, bare)
    assert not re.search(r'id="(?:quality|actions|requests)"', page)
    assert embedded(page, "actions") is None
    empty = clips.slice(0, 0)
    assert embedded(write(tmp_path, empty, balance=None, requests=make_requests(0)), "actions") is None
    nulls = clips.slice(0, 1)  # the stages are there, but saw nothing
    assert not re.search(r'id="(?:quality|actions)"', write(tmp_path, nulls))


@pytest.mark.browser
def test_in_a_browser(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("no system Chromium: install the chromium package to run the report's browser test")
    clips = make_clips()
    rows = clips.to_pylist()
    write(tmp_path, clips, balance=make_balance(clips, 3.0), requests=make_requests(3))
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=quiet)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        troubles: list[str] = []
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append("a caption ran as a script"))
        page.goto((tmp_path / "report.html").as_uri())
        cards, found = page.locator("#cards .card"), page.locator("#found")

        page.locator("#quality [data-issue=watermark]").click()
        having = [row for row in rows if (row["quality_watermark"] or 0) >= 0.5]
        assert found.inner_text() == f"{len(having)} of 70 clips."
        page.get_by_role("button", name="Clear").click()
        page.select_option("[name=issue]", "clean")
        clean = [row for row in rows if row["quality_watermark"] is not None and max(row[f"quality_{i}"] for i in ISSUES) < 0.5]
        assert found.inner_text() == f"{len(clean)} of 70 clips."
        page.get_by_role("button", name="Clear").click()

        page.locator(".tier .reason[data-tier='1'][data-reason=sharp]").click()
        lost = [row for row in rows if row["reason_low"] is None and row["reason_high"] == "sharp"]
        assert found.inner_text() == f"{len(lost)} of 70 clips."
        page.get_by_role("button", name="Clear").click()

        page.select_option("[name=action_label]", "Ball Sports › Tennis")
        tennis = sum(row["label_2"] == "Tennis" for row in rows)
        assert found.inner_text() == f"{tennis} of 70 clips."
        page.get_by_role("button", name="Clear").click()
        page.fill("[name=text]", "shooting hoop")
        assert cards.count() == sum(row["label_3"] == "shooting a hoop" for row in rows)
        page.fill("[name=text]", "clip 1 shows alert")
        card = page.locator("[data-clip=clip-001]")
        assert f"Short 1 {NASTY}" in card.inner_text()
        assert "shooting a hoop" in card.inner_text()

        card.click()
        detail = page.locator("#detail")
        words = detail.inner_text()
        for text in (rows[1]["caption"], f"it rolls {NASTY}", "1.0 to 3.0 s", "pan left", f"left of {NASTY}", "approved"):
            assert text in words
        assert "Ball Sports › Basketball › shooting a hoop" in words
        assert [mark.strip() for mark in detail.locator("mark").all_inner_texts()] == ["Drawn style.", "Sharp."]
        bar = detail.locator(".stretch i").evaluate("node => [node.style.left, node.style.width]")
        assert bar == ["25%", "50%"]
        assert detail.locator(".chip.issue").count() == sum(rows[1][f"quality_{issue}"] >= 0.5 for issue in ISSUES)
        assert not detail.locator(".probabilities").is_visible()
        detail.locator("summary").focus()
        page.keyboard.press("Enter")
        assert detail.locator(".probabilities li").count() == 14
        page.keyboard.press("Escape")

        bars = page.locator("#action-bars")
        page.select_option("#action-view [name=view]", label="high (balanced)")
        kept = [row for row in rows if row["reason_high"] is None and row["label_1"]]
        sports = sum(row["label_1"] == "Ball Sports" for row in kept)
        first = bars.locator("details", has_text="Ball Sports").first
        assert first.locator("> summary .num").first.inner_text() == str(sports)
        assert "→" in first.locator("> summary").inner_text()
        first.locator("> summary").click()
        page.select_option("#action-view [name=view]", label="All clips")
        assert first.get_attribute("open") is not None, "a class that is open stays open"
        assert "→" not in first.locator("> summary").inner_text()
        first.locator("details > summary").first.click()
        first.get_by_role("button", name="shooting a hoop", exact=True).click()
        assert found.inner_text() == f"{sum(row['label_3'] == 'shooting a hoop' for row in rows)} of 70 clips."
        page.set_viewport_size({"width": 360, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert troubles == []

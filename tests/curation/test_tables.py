"""The clip table between the passes: joins by id, errors that are tried again, and columns past Arrow's 32-bit offsets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import curation.tables
from curation.balance import Balance
from curation.tables import sort_rows, take
from waver_core.backends.contracts import ActionLabel
from waver_core.backends.embedded.lexical_labeler import LexicalLabeler
from waver_core.errors import RunFailed

SPANS = pa.list_(pa.struct([("text", pa.string()), ("start_s", pa.float64())]))


@pytest.mark.parametrize("narrow_bytes", [1 << 30, 0])
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None, "ccc", "d", ""], pa.string()),
        ([[1.5], [], None, [2.0, 3.0], [4.0]], pa.list_(pa.float32())),
        ([[{"text": "a", "start_s": 1.0}], [], None, [], [{"text": None, "start_s": 0.0}]], SPANS),
        ([1, 2, None, 4, 5], pa.int64()),
    ],
)
def test_rows_are_taken_whatever_the_size(
    values: list[Any], kind: pa.DataType, narrow_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curation.tables, "_NARROW_BYTES", narrow_bytes)
    monkeypatch.setattr(curation.tables, "_TAKE_ROWS", 3)
    column = pa.chunked_array([pa.array(values[:2], kind), pa.array(values[2:], kind)])
    at = [4, None, 0, 4, 1, 2, 3, None]
    found = take(column, pa.array(at))
    assert found.type == kind and found.to_pylist() == [None if i is None else values[i] for i in at]


def test_sorting_keeps_rows_together() -> None:
    table = pa.table({"k": [3, 1, 2], "text": ["c", "a", "b"]})
    assert sort_rows(table, [("k", "ascending")]).to_pydict() == {"k": [1, 2, 3], "text": ["a", "b", "c"]}


def test_weights_meet_their_clips_by_labels_and_source() -> None:
    labels = {"label_1": ["a", "a", "none"], "label_2": ["b", "b", "none"], "label_3": ["c", "d", "none"]}
    balance = Balance(pa.table({**labels, "dataset": ["x", "none", "x"]}), {"ct": np.array([1.0, 2.0, 3.0])})
    clips = pa.table(
        {
            "label_1": pa.array([None, "a", "a"], pa.string()),
            "label_2": pa.array([None, "b", "b"], pa.string()),
            "label_3": pa.array([None, "d", "c"], pa.string()),
            "dataset": pa.array(["x", None, "x"], pa.string()),
        }
    )
    assert balance.weight_of("ct", clips).to_pylist() == [3.0, 2.0, 1.0]
    assert balance.weight_of("192p", clips).to_pylist() == [1.0, 1.0, 1.0]


def test_a_failed_stage_is_tried_again_by_the_next_run(
    collection: Path, tmp_path: Path, curate: Any, rows_of: Any, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LexicalLabeler.label
    asked: list[int] = []

    def touchy(self: Any, captions: Sequence[str]) -> list[ActionLabel | Exception]:
        asked.append(len(captions))
        if len(captions) > 2:
            raise MemoryError("too many at once")
        return [
            ValueError("not today") if "left" in c else label for c, label in zip(captions, real(self, captions), strict=True)
        ]

    with monkeypatch.context() as patch:
        patch.setattr(LexicalLabeler, "label", touchy)
        curate(collection, tmp_path)
    rows = rows_of(tmp_path)
    failed = [r for r in rows if r["label_error"]]
    assert failed and all("left" in r["caption"] for r in failed) and any(r["label_1"] for r in rows)
    assert max(asked) > 2 and min(asked) <= 2  # a batch that fails is halved
    curate(collection, tmp_path)
    assert rows_of(tmp_path) == undisturbed


def test_the_budget_counts_captions_and_not_units(
    collection: Path, tmp_path: Path, curate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = "funnel.failure_budget={max_share: 0.3, min_items: 3}"
    real = LexicalLabeler.label

    def one_bad(self: Any, captions: Sequence[str]) -> list[Any]:
        return [ValueError("odd"), *real(self, captions[1:])]

    def all_bad(self: Any, captions: Sequence[str]) -> list[Any]:
        return [ValueError("odd")] * len(captions)

    monkeypatch.setattr(LexicalLabeler, "label", one_bad)
    curate(collection, tmp_path / "few", budget)
    monkeypatch.setattr(LexicalLabeler, "label", all_bad)
    with pytest.raises(RunFailed, match=r"\d of \d failed in the pass 'label'"):
        curate(collection, tmp_path / "all", budget)

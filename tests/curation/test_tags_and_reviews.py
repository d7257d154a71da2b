"""Prompt tags around captions, and the slot for what two people have looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.gates import pass_mask, passes
from curation.reviews import review_states
from curation.stage import load_stages
from curation.tags import add_training_captions, check_tags
from waver_core.config import Gate, QualityTag, Tags, load_config
from waver_core.errors import ConfigError, UserError

TAGS = Tags(
    style={"anime_2d": "2D anime style", "real": "Realistic."},
    quality={
        "sharp": QualityTag(column="aesthetic_sharpness", min=0.7, words="high definition"),
        "hdr": QualityTag(column="aesthetic_sharpness", min=0.92, words="HDR"),
        "slow": QualityTag(column="quality_slow_motion", min=0.5, kind="video", words="slow motion", negative=True),
    },
    negative=["flickering", "slow motion"],
)


def clips(**columns: list[Any]) -> pa.Table:
    kinds = {"aesthetic_sharpness": pa.float64(), "quality_slow_motion": pa.float64()}
    base = {"caption": ["A dog runs."], "style": [None], "caption_style": [""], "training_caption": [None], "kind": ["video"]}
    base |= {"aesthetic_sharpness": [0.5], "quality_slow_motion": [0.1]} | columns
    return pa.table({k: pa.array(v, kinds.get(k, pa.string())) for k, v in base.items()})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({}, "A dog runs."),
        ({"style": ["anime_2d"]}, "2D anime style. A dog runs."),
        ({"style": ["unheard of"]}, "A dog runs."),
        ({"caption_style": ["real"]}, "Realistic. A dog runs."),
        ({"style": ["anime_2d"], "caption_style": ["real"]}, "2D anime style. A dog runs."),
        ({"aesthetic_sharpness": [0.9]}, "A dog runs. High definition."),
        ({"aesthetic_sharpness": [0.9], "quality_slow_motion": [0.8]}, "A dog runs. High definition, slow motion."),
        ({"quality_slow_motion": [0.8], "kind": ["image"]}, "A dog runs."),
        ({"aesthetic_sharpness": [None]}, "A dog runs."),
        ({"aesthetic_sharpness": [0.95]}, "A dog runs. High definition, HDR."),
        ({"caption": [None], "style": ["real"]}, None),
    ],
)
def test_style_stands_before_and_quality_behind(columns: dict[str, list[Any]], expected: str | None) -> None:
    assert add_training_captions(clips(**columns), TAGS)["training_caption"].to_pylist() == [expected]


def test_negative_words_come_once_and_in_order() -> None:
    assert TAGS.negative_words() == ["slow motion", "flickering"]
    assert "low definition" in load_config().tags.negative_words()


def test_a_tag_on_an_unknown_column_is_refused() -> None:
    schema = load_stages(load_config()).schema
    check_tags(load_config().tags, schema)
    with pytest.raises(
        ConfigError, match=r"tags\.quality\.odd: no stage writes column 'aesthetic_sharpnes'.*aesthetic_sharpness"
    ):
        check_tags(Tags(quality={"odd": QualityTag(column="aesthetic_sharpnes", min=1, words="odd")}), schema)


def test_two_reviewers_must_agree(tmp_path: Path) -> None:
    table = pa.table({"clip_id": list("abcdefg"), "style": ["synthetic"] * 4 + [None, "real", None]})
    opinions = [
        ("a", "ann", True),
        ("a", "bob", True),
        ("b", "ann", True),
        ("b", "ann", True),  # the same person twice is one opinion
        ("c", "ann", True),
        ("c", "bob", True),
        ("c", "cyd", False),
        ("e", "ann", True),
        ("e", "bob", True),
        ("f", "bob", False),
    ]
    path = tmp_path / "reviews.parquet"
    names = ("clip_id", "reviewer", "approved")
    pq.write_table(pa.Table.from_pylist([dict(zip(names, o, strict=True)) for o in opinions]), path)
    assert review_states(table, str(path)).to_pylist() == [
        "approved",
        "pending",
        "rejected",
        "pending",
        "picked",
        "rejected",
        "real",
    ]
    assert review_states(table, None).to_pylist() == ["pending"] * 4 + ["real"] * 3


def test_an_opinion_with_a_null_is_none(tmp_path: Path) -> None:
    table = pa.table({"clip_id": ["a", "b"], "style": ["synthetic"] * 2})
    opinions = pa.table(
        {
            "clip_id": pa.array(["a", "a", "a", "b", "b", None], pa.string()),
            "reviewer": pa.array(["ann", "bob", "cyd", "ann", None, "dan"], pa.string()),
            "approved": pa.array([True, True, None, True, True, False], pa.bool_()),
        }
    )
    pq.write_table(opinions, tmp_path / "reviews.parquet")
    assert review_states(table, str(tmp_path / "reviews.parquet")).to_pylist() == ["approved", "pending"]
    pq.write_table(pa.table({"clip_id": ["a"], "reviewer": ["ann"], "approved": ["false"]}), tmp_path / "text.parquet")
    with pytest.raises(UserError, match="true or false"):
        review_states(table, str(tmp_path / "text.parquet"))


def test_a_file_that_is_no_list_of_opinions_is_refused(tmp_path: Path) -> None:
    table = pa.table({"clip_id": ["a"], "style": ["real"]})
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        review_states(table, str(tmp_path / "missing.parquet"))
    pq.write_table(pa.table({"clip_id": ["a"]}), tmp_path / "short.parquet")
    with pytest.raises(UserError, match="lacks reviewer, approved"):
        review_states(table, str(tmp_path / "short.parquet"))


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (Gate(column="review", equals=("real", "picked")), [True, False, True, False]),
        (Gate(column="short_side_px", min=1440, only={"review": "real"}), [False, True, True, True]),
        (Gate(column="short_side_px", min=1440, only={"review": "real"}, kind="image"), [True, True, True, True]),
    ],
)
def test_gates_with_lists_and_conditions(gate: Gate, expected: list[bool]) -> None:
    table = pa.table(
        {"review": ["real", "approved", "picked", None], "short_side_px": [720, 720, 720, None], "kind": ["video"] * 4}
    )
    assert pass_mask(gate, table).tolist() == expected
    assert [passes(gate, row) for row in table.to_pylist()] == expected

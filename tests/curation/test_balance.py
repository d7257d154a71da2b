"""Balancing: weights lift what is rare up to the cap, keep the mean at 1, and what they cannot mend is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.balance import KEYS, REQUEST_SCHEMA, SUBJECT_FIRST, Balance, _requests, _sentence, group_weights
from curation.executor import OnRay
from curation.serial import Serial
from waver_core.taxonomy import load_taxonomy

RULES = SimpleNamespace(label_power=0.5, source_power=0.5, cap=8.0)


def groups_of(rows: list[tuple[str, str, str, str, int]]) -> tuple[pa.Table, np.ndarray]:
    names = list(zip(*rows, strict=True))
    return pa.table(dict(zip(KEYS, (pa.array(n) for n in names[:4]), strict=True))), np.array(names[4])


@given(
    st.lists(
        st.tuples(
            st.sampled_from("ab"), st.sampled_from("cd"), st.sampled_from("efg"), st.sampled_from("xyz"), st.integers(0, 10_000)
        ),
        min_size=1,
        max_size=30,
        unique_by=lambda r: r[:4],
    ),
    st.floats(0, 1),
    st.floats(1, 50),
)
def test_the_mean_is_one_and_the_cap_holds(rows: list[Any], power: float, cap: float) -> None:
    groups, count = groups_of(rows)
    rules = SimpleNamespace(label_power=power, source_power=power, cap=cap)
    weights = group_weights(groups, count, rules)
    assert (weights >= 1 / cap - 1e-9).all() and (weights <= cap + 1e-9).all()
    if count.sum():
        assert (weights * count).sum() / count.sum() == pytest.approx(1.0, rel=1e-6)


def test_rare_labels_and_sources_are_lifted() -> None:
    groups, count = groups_of(
        [("sport", "ball", "serve", "web", 9000), ("sport", "ball", "dribble", "web", 900), ("home", "eat", "eat", "own", 100)]
    )
    serve, dribble, eat = group_weights(groups, count, RULES)
    assert serve < dribble < eat


def test_full_power_draws_the_classes_of_a_level_equally_often() -> None:
    groups, count = groups_of([("a", "b", "c", "web", 600), ("a", "b", "d", "web", 200), ("e", "f", "g", "web", 100)])
    weights = group_weights(groups, count, SimpleNamespace(label_power=1.0, source_power=0.0, cap=1000.0))
    drawn = weights * count
    assert drawn[0] == pytest.approx(drawn[1]) and drawn[0] + drawn[1] == pytest.approx(drawn[2])


def test_no_power_leaves_everything_alone_and_none_is_never_lifted() -> None:
    groups, count = groups_of([("a", "b", "c", "web", 900), ("none", "none", "none", "web", 10)])
    assert group_weights(groups, count, SimpleNamespace(label_power=0.0, source_power=0.0, cap=8.0)) == pytest.approx([1.0, 1.0])
    _, none = group_weights(groups, count, RULES)
    assert none < 2  # a class of the same size would be drawn about 7 times as often
    assert group_weights(*groups_of([("a", "b", "c", "web", 900), ("d", "e", "f", "web", 10)]), RULES)[1] > 5


def shards(folder: Path) -> list[str]:
    rng = np.random.default_rng(3)
    uris = []
    for number in range(3):
        n = 400
        one = rng.integers(0, 3, n)
        table = pa.table(
            {
                "label_1": pa.array([f"l{i}" if i else None for i in one], pa.string()),
                "label_2": pa.array([f"l{i}" for i in one]),
                "label_3": pa.array([f"l{i}" for i in rng.integers(0, 5, n)]),
                "dataset": pa.array([None] * n, pa.string()),
                "reason_ct": pa.array([None if keep else "text" for keep in rng.random(n) < 0.5], pa.string()),
                "reason_all": pa.array([None] * n, pa.string()),
            }
        )
        uris.append(str(folder / f"part-{number}.parquet"))
        pq.write_table(table, uris[-1])
    return uris


def test_counts_are_what_a_table_in_memory_gives(tmp_path: Path) -> None:
    uris = shards(tmp_path)
    counted = Serial().count(uris, KEYS, {"ct": "reason_ct", "all": "reason_all"})
    whole = pa.concat_tables([pq.read_table(u) for u in uris])
    assert counted.column_names == [*KEYS, "rows", "ct", "all"]
    assert sum(counted["rows"].to_pylist()) == sum(counted["all"].to_pylist()) == len(whole)
    assert sum(counted["ct"].to_pylist()) == whole["reason_ct"].null_count
    assert set(counted["label_1"].to_pylist()) == {"none", "l1", "l2"} and set(counted["dataset"].to_pylist()) == {"none"}


@pytest.mark.ray
def test_ray_data_counts_the_same(tmp_path: Path) -> None:
    uris = shards(tmp_path)
    order = [(k, "ascending") for k in KEYS]
    memberships = {"ct": "reason_ct", "all": "reason_all"}
    assert OnRay().count(uris, KEYS, memberships).sort_by(order) == Serial().count(uris, KEYS, memberships).sort_by(order)


def test_what_a_tier_lacks_is_asked_for_with_a_seed_where_there_is_one() -> None:
    path = next(iter(load_taxonomy()))
    groups = pa.table(
        {
            "label_1": [path.level1, "none"],
            "label_2": [path.level2, "none"],
            "label_3": [path.level3, "none"],
            "dataset": ["none"] * 2,
            "ct": [1, 9_999],
        }
    )
    clips = pa.table(
        {
            "clip_id": ["a", "b"],
            "source_uri": ["dull.mp4", "fine.mp4"],
            "start_s": [0.0, 4.0],
            "label_2": [path.level2] * 2,
            "label_3": [path.level3] * 2,
            "caption": ["Dull.", "Fine."],
            "aesthetic_score": [4.0, 6.0],
            "reason_ct": pa.array([None, None], pa.string()),
        }
    )
    options = SimpleNamespace(min_share=0.002, prompts_per_class=4, max_requests=100)
    rows = _requests("ct", Balance(groups, {"ct": np.ones(2)}), clips, options, load_taxonomy())
    pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)
    classes = {r["label_2"] for r in rows}
    assert classes == {two for below in load_taxonomy().tree.values() for two in below}
    own = [r for r in rows if r["label_2"] == path.level2]
    assert sum(r["clips_wanted"] for r in own) == 19  # 0.2 % of 10,000, less the one that is there
    assert sum(r["clips_wanted"] for r in rows if r["label_2"] == rows[-1]["label_2"]) == 20
    assert path.level3 not in {r["label_3"] for r in own}  # the labels it has none of come first
    # What the tier lacks may still start from a picture of the same class, with a prompt of its own.
    assert {r["seed_uri"] for r in own} == {"fine.mp4"} and "Fine." not in {r["prompt"] for r in own}
    assert not any(r.get("seed_uri") for r in rows if r["label_2"] != path.level2)
    options.prompts_per_class = 1000
    groups = groups.set_column(4, "ct", pa.array([1, 99_999]))
    many = _requests("ct", Balance(groups, {"ct": np.ones(2)}), clips, options, load_taxonomy())
    assert [r["prompt"] for r in many if r["label_3"] == path.level3] == ["Fine."]


def test_labels_become_prompts() -> None:
    assert _sentence({"label_1": "Ball Sports", "label_3": "dribbling a basketball"}) == "A person dribbling a basketball."
    assert _sentence({"label_1": "Animals", "label_3": "dog fetching a stick"}) == "Dog fetching a stick."
    assert set(SUBJECT_FIRST) <= set(load_taxonomy().tree)

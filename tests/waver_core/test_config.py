"""pipelines.yaml: how profiles and overrides merge, and that every mistake is one line which names the key and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from curation.gates import tier_gates
from curation.stage import load_stages
from waver_core.config import DEFAULT_PATH, Config, digest_of, load_config, merge
from waver_core.errors import ConfigError, did_you_mean

PROFILES = list(yaml.safe_load(DEFAULT_PATH.read_text())["profiles"])
ALL_STAGES = "[ingest, segment, technical, dedup, aesthetic, overlay, motion, quality, caption, label, balance, publish]"


def write(folder: Path, **changes: Any) -> Path:
    """A small valid file with some keys changed."""
    raw = {
        "version": 1,
        "funnel": {"order": ["ingest", "segment", "publish"], "stages": {"segment": {"adaptive_min_shot_s": 2.0, "max_s": 10.0}}},
        "tiers": {
            "low": {"long": {"column": "duration_s", "min": 2}},
            "high": {"from": "low", "long": {"column": "duration_s", "min": 4}},
        },
        "profiles": {
            "a": {"funnel": {"stages": {"segment": {"adaptive_min_shot_s": 3.0, "trim_frames": 2}}, "max_attempts": 5}},
            "b": {
                "funnel": {
                    "stages": {"segment": {"adaptive_min_shot_s": 4.0}},
                    "order": ["ingest", "segment", "dedup", "publish"],
                }
            },
        },
        **changes,
    }
    path = folder / "pipelines.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def refusal(*overrides: str, path: Path | None = None, profiles: tuple[str, ...] = ()) -> str:
    """The one line with which a configuration is refused, whether by the file's shape, a stage or a gate."""
    with pytest.raises(ConfigError) as caught:
        config = load_config(path, profiles, overrides)
        tier_gates(config, load_stages(config))
    text = str(caught.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def test_merge_goes_mapping_by_mapping_and_replaces_lists() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    assert merge(base, {"a": {"y": [9]}, "c": {"d": 4}}) == {"a": {"x": 1, "y": [9]}, "b": 3, "c": {"d": 4}}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 3}


def test_profiles_merge_in_the_order_given(tmp_path: Path) -> None:
    path = write(tmp_path)
    ab, ba = load_config(path, ["a", "b"]), load_config(path, ["b", "a"])
    assert ab.funnel.stages["segment"] == {"adaptive_min_shot_s": 4.0, "max_s": 10.0, "trim_frames": 2}
    assert ba.funnel.stages["segment"] == {"adaptive_min_shot_s": 3.0, "max_s": 10.0, "trim_frames": 2}
    assert ab.funnel.max_attempts == ba.funnel.max_attempts == 5
    assert ab.funnel.order == ["ingest", "segment", "dedup", "publish"]
    assert ab.profiles == ["a", "b"]


def test_a_profile_that_was_not_asked_for_changes_nothing(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.funnel.max_attempts == 3 and config.funnel.stages["segment"]["adaptive_min_shot_s"] == 2.0


def test_set_overrides_profiles_and_reads_values_as_yaml(tmp_path: Path) -> None:
    overrides = ["funnel.stages.segment.adaptive_min_shot_s=2.5", "funnel.passes.shots={cpus: 2}", "tiers.low.long.min=3"]
    config = load_config(
        write(tmp_path, funnel={"order": ["segment"], "stages": {"segment": {}}, "passes": {}}), ["a"], overrides
    )
    assert config.funnel.stages["segment"]["adaptive_min_shot_s"] == 2.5
    assert config.funnel.passes["shots"].cpus == 2.0
    assert config.tiers["low"]["long"].min == 3.0


def test_set_makes_a_new_gate_below_an_existing_tier() -> None:
    config = load_config(overrides=["tiers.720p.calm.column=motion_background_px", "tiers.720p.calm.max=40"])
    assert config.tiers["ct_720p"]["calm"].max == 40
    assert "calm" not in config.tiers["480p"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("abc", ["--set takes a.b=value", "'abc'"]),
        ("=3", ["--set takes a.b=value"]),
        ("funnel.decode_threads=[", ["funnel.decode_threads", "no valid YAML"]),
        ("funnl.decode_threads=2", ["no key 'funnl'", "did you mean 'funnel'?"]),
        ("funnel.passses.shots.cpus=2", ["no key 'funnel.passses'", "did you mean 'passes'?"]),
        ("funnel.passes.shots.cpu=2", ["funnel.passes.shots.cpu: unknown key", "'cpus'"]),
        ("funnel.failure_budget.max_shar=1", ["funnel.failure_budget.max_shar: unknown key", "did you mean 'max_share'?"]),
        ("funnel.decode_thread=2", ["funnel.decode_thread: unknown key", "did you mean 'decode_threads'?"]),
        ("funnel.order.x=1", ["'funnel.order' is a value, not a mapping"]),
        ("funnel.failure_budget.max_share=2", ["funnel.failure_budget.max_share", "got 2"]),
        ("funnel.passes.shots.min_actors=99", ["funnel.passes.shots: min_actors 99 is above max_actors 64"]),
        ("version=2", ["version", "got 2"]),
        ("tiers=5", ["tiers must map"]),
        ("tiers.x=5", ["tiers.x must map"]),
        ("tiers.480p.aesthetic=5", ["tiers.480p.aesthetic", "got 5"]),
        ("tiers.480p.size=null", ["tiers.480p.size", "got None"]),
        ("tiers.480p.from=192", ["tiers.480p.from: no earlier tier '192'", "did you mean '192p'?"]),
        ("tiers.192p.from=480p", ["tiers.192p.from: no earlier tier '480p'"]),
        ("tiers.480p.aesthetic.minimum=5", ["tiers.480p.aesthetic.minimum: unknown key", "'min'"]),
        ("tiers.480p.aesthetic.min=abc", ["tiers.480p.aesthetic.min", "got 'abc'"]),
        ("tiers.480p.aesthetic.min=null", ["tiers.480p.aesthetic: a gate needs min, max, equals or present"]),
        ("tiers.480p.motion.min=65", ["tiers.480p.motion: min 65.0 is above max 64.0"]),
        ("tiers.480p.aesthetic.kind=film", ["tiers.480p.aesthetic.kind", "'video' or 'image'"]),
        ("funnel.order=[ingest, segmnt, publish]", ["stage 'segment' has options but is not in funnel.order", "'segmnt'"]),
        (f"funnel.order={ALL_STAGES[:-1]}, motion]", ["a stage stands twice in funnel.order"]),
        (f"funnel.order={ALL_STAGES[:-1]}, balnce]", ["no stage 'balnce'"]),
    ],
)
def test_refusal_names_the_key_and_the_nearest(override: str, parts: list[str]) -> None:
    text = refusal(override)
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("funnel.stages.segment.max_z=1", ["funnel.stages.segment.max_z: unknown key", "did you mean 'max_s'"]),
        ("funnel.stages.segment.max_s=0", ["funnel.stages.segment.max_s", "greater than 0", "got 0"]),
        ("funnel.stages.segment.max_s=long", ["funnel.stages.segment.max_s", "got 'long'"]),
        ("funnel.stages.dedup.min_similarity=0.3", ["funnel.stages.dedup.min_similarity", "greater than 0.5"]),
        ("funnel.stages.publish.clip_files=all", ["funnel.stages.publish.clip_files", "got 'all'"]),
    ],
)
def test_options_of_a_stage_are_checked_under_their_full_name(override: str, parts: list[str]) -> None:
    text = refusal(override)
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("tiers.480p.aesthetic.column=aesthetic_scor", ["tiers.480p.aesthetic", "'aesthetic_scor'", "'aesthetic_score'"]),
        ("tiers.720p.new={column: motion_camra, equals: static}", ["tiers.720p.new", "'motion_camra'", "'motion_camera'"]),
        ("tiers.720p.new={column: motion_camera, min: 1}", ["tiers.720p.new", "'motion_camera' is string", "use equals"]),
        ("tiers.720p.new={column: dedup_keep, equals: 'yes'}", ["tiers.720p.new", "'yes'", "'dedup_keep'", "bool"]),
        ("tiers.720p.new={column: motion_camera, equals: true}", ["tiers.720p.new", "True", "'motion_camera'", "string"]),
        ("tiers.720p.new={column: fps, equals: '24'}", ["tiers.720p.new", "'24'", "'fps'", "double"]),
        ("tiers.720p.new={column: aesthetic_frames, min: 1}", ["tiers.720p.new", "'aesthetic_frames' is list"]),
        ("tiers={}", ["tiers: at least one tier"]),
    ],
)
def test_gates_on_columns_that_are_not_there_or_of_another_type(override: str, parts: list[str]) -> None:
    text = refusal(override)
    assert [part for part in parts if part not in text] == [], text


def test_unknown_profile_names_the_nearest() -> None:
    text = refusal(profiles=("clustr",))
    assert "no profile 'clustr' in pipelines.yaml" in text and "did you mean 'cluster'?" in text


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "--config" in refusal(path=tmp_path / "none.yaml")
    assert "cannot be read" in refusal(path=tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\nb: 2\n")
    assert "no valid YAML" in refusal(path=bad)
    bad.write_text("- 1\n- 2\n")
    assert "must hold a mapping" in refusal(path=bad)
    bad.write_bytes(b"\xff\xfe\x00a: 1")
    assert "bad.yaml" in refusal(path=bad)


def test_a_stage_that_reads_what_no_earlier_stage_writes_is_refused() -> None:
    text = refusal("funnel.order=" + ALL_STAGES.replace("technical, dedup", "dedup, technical"))
    assert text == "stage 'dedup' reads 'short_side_px', which no earlier stage of funnel.order writes"


@pytest.mark.parametrize(
    ("parent", "child", "expected"),
    [
        ({"min": 2}, {"min": 4}, (4, None)),
        ({"min": 4}, {"min": 2}, (4, None)),
        ({"max": 9}, {"max": 5}, (None, 5)),
        ({"max": 5}, {"max": 9}, (None, 5)),
        ({"min": 2, "max": 9}, {"max": 7}, (2, 7)),
        ({"min": 2}, {"max": 7}, (2, 7)),
        ({"min": 3, "max": 6}, {"min": 1, "max": 8}, (3, 6)),
    ],
)
def test_inheritance_takes_the_stricter_of_both_thresholds(
    tmp_path: Path, parent: dict[str, float], child: dict[str, float], expected: tuple[float | None, float | None]
) -> None:
    tiers = {
        "low": {"long": {"column": "duration_s", **parent}, "other": {"column": "fps", "min": 1}},
        "high": {"from": "low", "long": {"column": "duration_s", **child}},
        "top": {"from": "high"},
    }
    config = load_config(write(tmp_path, tiers=tiers))
    for tier in ("high", "top"):
        gate = config.tiers[tier]["long"]
        assert (gate.min, gate.max) == expected
        assert config.tiers[tier]["other"].min == 1
    assert config.tier_parents == {"low": None, "high": "low", "top": "high"}


def test_raising_a_gate_of_the_loosest_tier_raises_every_tier_below() -> None:
    config = load_config(overrides=["tiers.192p.size.min=2000"])
    assert {tier: gates["size"].min for tier, gates in config.tiers.items()} == dict.fromkeys(config.tiers, 2000.0)


@pytest.mark.parametrize("profile", [None, *PROFILES])
def test_the_shipped_file_is_valid_with_each_profile(profile: str | None) -> None:
    config = load_config(profiles=[profile] if profile else [])
    tiers = tier_gates(config, load_stages(config))
    assert list(tiers) == ["192p", "480p", "720p", "ct_720p", "sft_720p", "refine_1080p"]
    assert all(gates == sorted(gates, key=lambda g: g.stage) for gates in tiers.values())


@pytest.mark.parametrize(
    ("profiles", "overrides"),
    [
        ([], []),
        (["demo"], []),
        (["cluster", "demo"], ["tiers.192p.size.min=300", "funnel.stages.segment.max_s=8"]),
        ([], ["funnel.stages.overlay.text_backend=null"]),
        ([], ["tiers.720p.aesthetic.min=1.0", "funnel.passes.shots.memory_gb=2"]),
    ],
)
def test_the_resolved_file_loads_again_to_the_same_configuration(
    tmp_path: Path, profiles: list[str], overrides: list[str]
) -> None:
    config = load_config(None, profiles, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(config.resolved_yaml())
    again = load_config(path)
    assert again.digest == config.digest
    assert again.model_dump(exclude={"profiles"}) == config.model_dump(exclude={"profiles"})
    assert config.digest in path.read_text().splitlines()[0]


def test_an_override_of_a_resolved_file_still_reaches_the_tiers_below(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(load_config(profiles=["demo"]).resolved_yaml())
    again = load_config(path, overrides=["tiers.480p.aesthetic.min=9"])
    assert [again.tiers[t]["aesthetic"].min for t in ("480p", "720p", "sft_720p")] == [9.0, 9.0, 9.0]


def test_digest_changes_with_every_setting_but_not_with_the_profiles_names(tmp_path: Path) -> None:
    base = load_config()
    changed = [
        load_config(overrides=[s]) for s in ("tiers.480p.text.max=0.02", "funnel.max_attempts=2", "funnel.stages.segment.max_s=9")
    ]
    assert len({base.digest, *(c.digest for c in changed)}) == 4
    with_empty = tmp_path / "pipelines.yaml"
    with_empty.write_text(DEFAULT_PATH.read_text() + "\n  nothing: {}\n")
    assert load_config(with_empty, profiles=["nothing"]).digest == base.digest
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_configuration_cannot_be_changed_once_built() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.version = 2  # type: ignore[misc]
    assert isinstance(config, Config)


def test_did_you_mean_lists_what_is_known_where_nothing_is_near() -> None:
    assert did_you_mean("zzz", ["beta", "alpha"]) == "known: alpha, beta"
    assert did_you_mean("alpa", ["beta", "alpha"]) == "did you mean 'alpha'?"
    assert did_you_mean("x", []) == "nothing of that kind is known"

"""The entry script: bad input gets one line that names the fix, before any worker starts; a whole lineage runs and resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from training.trackers import read_metrics
from waver_core.manifest import publish, read_manifest

ROOT = Path(__file__).resolve().parents[2]
T2V = "t2v_192p_12fps"
FAST = (
    "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 1, heads: 2, head_dim: 16}}",
    "training.schedule={max_steps: 2, checkpoint_every_steps: 1, log_every_steps: 1, validate_every_steps: 0, trackers: []}",
)


def _stage(output: Path, *arguments: str, sets: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run training/stage.py without Ray."""
    chosen = [word for setting in (*FAST, *sets) for word in ("--set", setting)]
    command = [sys.executable, "training/stage.py", "--serial", "--output", str(output), *chosen, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


def _refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error that a user can mend."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def base(curated: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one trained stage."""
    output = tmp_path_factory.mktemp("base")
    done = _stage(output, "--stage", T2V, "--from-scratch", "--curated", curated)
    assert done.returncode == 0, done.stderr
    assert "2 steps. Averaged weights:" in done.stdout
    return output


def test_a_stage_that_is_done_is_not_trained_again(base: Path) -> None:
    before = read_metrics(base / T2V)
    again = _stage(base, "--stage", T2V, "--from-scratch")
    assert again.returncode == 0, again.stderr
    assert read_metrics(base / T2V) == before


def test_the_next_stage_starts_from_it(base: Path, curated: str) -> None:
    sets = (f"training.stages.t2v_480p.after={T2V}",)
    done = _stage(base, "--stage", "t2v_480p", "--curated", curated, sets=sets)
    assert done.returncode == 0, done.stderr
    record = yaml.safe_load((base / "t2v_480p" / "export" / "recipe.yaml").read_text())
    assert [entry["stage"] for entry in record["lineage"]] == [T2V, "t2v_480p"]


def test_a_parent_that_is_not_there(curated: str, tmp_path: Path) -> None:
    line = _refused(_stage(tmp_path, "--stage", "sft", "--curated", curated))
    assert "sft starts from ct_720p" in line and "--from" in line


def test_a_parent_of_another_stage(base: Path, curated: str, tmp_path: Path) -> None:
    line = _refused(_stage(tmp_path, "--stage", "sft", "--curated", curated, "--from", str(base / T2V / "export")))
    assert f"sft starts from ct_720p, but {base / T2V / 'export'} holds {T2V}" in line


def test_a_parent_of_another_shape(base: Path, curated: str, tmp_path: Path) -> None:
    sets = (f"training.stages.t2v_480p.after={T2V}", "training.model.overrides.heads=4")
    line = _refused(
        _stage(tmp_path, "--stage", "t2v_480p", "--curated", curated, "--from", str(base / T2V / "export"), sets=sets)
    )
    assert "heads 2" in line and "trains one with 4" in line


def test_no_manifest(tmp_path: Path) -> None:
    line = _refused(_stage(tmp_path, "--stage", T2V, "--from-scratch", "--curated", str(tmp_path / "nothing")))
    assert "no manifest at" in line and "curation/run_funnel.py" in line
    line = _refused(_stage(tmp_path, "--stage", T2V, "--from-scratch"))
    assert "no encoded samples at" in line and "--curated" in line


def test_manifests_of_other_backends(curated: str, tmp_path: Path) -> None:
    table = read_manifest(f"{curated}/tiers/192p")
    for name, captioner in (("a", "attributes-1"), ("b", "smolvlm2")):
        facts = {"tier": "192p", "backends": {"caption": {"captioner": captioner}}}
        publish(str(tmp_path / name / "tiers" / "192p"), table, rows_per_shard=100, facts=facts)
    sources = ("--curated", str(tmp_path / "a"), "--curated", str(tmp_path / "b"))
    line = _refused(_stage(tmp_path / "run", "--stage", T2V, "--from-scratch", *sources))
    assert "caption" in line and "attributes-1" in line and "smolvlm2" in line


def test_a_tier_that_selects_nothing(
    clip_rows: list[dict[str, Any]], publish_clips: Callable[..., str], curated: str, tmp_path: Path
) -> None:
    table = read_manifest(f"{curated}/tiers/192p")
    publish(str(tmp_path / "tiers" / "192p"), table.slice(0, 0), rows_per_shard=100, facts={"tier": "192p"})
    line = _refused(_stage(tmp_path / "run", "--stage", T2V, "--from-scratch", "--curated", str(tmp_path)))
    assert "192p" in line
    images = publish_clips(tmp_path / "images", [row for row in clip_rows if row["kind"] == "image"])
    line = _refused(_stage(tmp_path / "run", "--stage", T2V, "--from-scratch", "--curated", images))
    assert "video" in line


def test_an_impossible_size(tmp_path: Path, curated: str) -> None:
    sets = ("training.resolutions.tiny={'1:1': [60, 64]}",)
    line = _refused(_stage(tmp_path, "--stage", T2V, "--from-scratch", "--curated", curated, sets=sets))
    assert "60x64" in line and "multiples of 8" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--stage", "t2v_480"), "did you mean 't2v_480p'"),
        (("--stage", T2V, "--set", "training.optimizer.learning_rate=1"), "optimizer.learning_rate: unknown key"),
        (("--stage", T2V, "--set", f"training.stages.{T2V}.tier=193p"), "no tier '193p'"),
        (("--stage", T2V, "--set", "training.model.preset=tinny"), "no model preset 'tinny'"),
        (("--stage", T2V, "--profile", "embeded"), "no profile 'embeded'"),
    ],
)
def test_wrong_words_are_answered_with_the_nearest(arguments: tuple[str, ...], told: str, tmp_path: Path, curated: str) -> None:
    assert told in _refused(_stage(tmp_path, "--from-scratch", "--curated", curated, *arguments))


def test_more_clips_unusable_than_the_limit(curated: str, tmp_path: Path) -> None:
    sets = ("training.data.seconds=[30]", "training.data.max_dropped_share=0.5")
    line = _refused(_stage(tmp_path, "--stage", T2V, "--from-scratch", "--curated", curated, sets=sets))
    assert "video" in line

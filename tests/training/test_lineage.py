"""All eleven stages of Waver Table 2, each from the export of the one before, as `embedded` declares them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.encode import Resources, encode
from training.group import Worker
from training.job import Job
from training.loop import train
from training.recipe import Recipe, stages
from training.trackers import read_metrics
from waver_core.command_line import new_console
from waver_core.config import load_config
from waver_core.weights import load_export

SMALL = (
    "training.model={preset: tiny, overrides: {dual_blocks: 1, single_blocks: 3, heads: 2, head_dim: 16}}",
    "training.data.max_per_pack=4",
    "training.schedule={max_steps: 2, checkpoint_every_steps: 10, log_every_steps: 1, validate_every_steps: 0, trackers: []}",
)


@pytest.mark.slow
def test_every_stage_trains_from_the_one_before(encoding_recipe: Callable[..., Recipe], curated: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    declared = list(stages(load_config(None, ["embedded"])))
    assert len(declared) == 11
    for stage in declared:
        sets = [*SMALL, f"training.stages.{stage}.schedule.max_steps=2"]
        recipe = encoding_recipe(stage, *sets)
        encode(recipe, [curated], str(tmp_path), new_console(), Resources(serial=True))
        parent = None if recipe.after is None else str(tmp_path / recipe.after / "export")
        job = Job(recipe, str(tmp_path), str(tmp_path / "encoded" / stage), parent=parent)
        train(job, Worker(), lambda news: None)
        assert len([line for line in read_metrics(job.folder) if "loss" in line]) == 2
    last = load_export(str(tmp_path / "refine_sft_1080p" / "export"))
    assert [entry["stage"] for entry in last.lineage] == [s for s in declared if s != "sft"]
    assert last.model["windowed"] is True
    assert [e["stage"] for e in load_export(str(tmp_path / "sft" / "export")).lineage] == declared[:9]

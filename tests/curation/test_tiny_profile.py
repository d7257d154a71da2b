"""The training collection through the funnel under the profile `tiny`: kept, and captioned as it was rendered."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from curation.funnel import run_funnel
from curation.serial import Serial
from waver_core.captions.parsing import parse
from waver_core.config import load_config
from waver_core.synthetic import training_collection, write_collection


def test_clips_reach_the_tiers_of_every_stage_with_captions_that_are_right(tmp_path: Path) -> None:
    videos = training_collection(14, 4)
    write_collection(videos, tmp_path / "videos")
    config = load_config(profiles=["tiny"])
    result = run_funnel(config, str(tmp_path / "videos"), str(tmp_path / "out"), Serial(), Console(quiet=True))
    assert result.tier_rows["192p"] == len(videos)
    assert result.tier_rows["480p"] >= 12 and result.tier_rows["refine_1080p"] >= 7
    rows = {Path(row["source_uri"]).stem: row for row in result.clips.to_pylist()}
    for video in videos:
        truth, row = video.shots[0].shapes[0], rows[video.name]
        (thing,) = parse(row["caption"]).objects
        assert (thing.colour, thing.shape) == (truth.colour, truth.kind)
        assert thing.motion == (truth.direction if row["kind"] == "video" else None)
        assert "motion" not in row["training_caption"].removeprefix(row["caption"])

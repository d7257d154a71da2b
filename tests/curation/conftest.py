"""Small rendered collections and helpers for tests that run the whole funnel."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from curation.funnel import FunnelResult, run_funnel
from curation.serial import Serial
from waver_core.config import load_config
from waver_core.manifest import read_manifest
from waver_core.synthetic import random_video, single_shot, write_video
from waver_core.video import open_video, to_rgb

SIZES = ("tiers.192p.size.min=96", "tiers.480p.size.min=120", "tiers.720p.size.min=160", "tiers.192p.text.max=1")
"""Thresholds for 320x180 material; text is let through, for the tests are not about RapidOCR's taste in textures."""


@pytest.fixture(scope="session")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five small videos, one exact copy among them, and a picture's worth of everything the funnel decides on."""
    folder = tmp_path_factory.mktemp("collection")
    for seed in (1, 2, 3):
        video = random_video(seed, n_shots=3, width_px=320, height_px=180, fps=24, transitions=("cut",), durations_s=(2.1, 2.6))
        write_video(video, folder / f"mixed_{seed}.mp4")
    still = single_shot(
        9, camera="static", colour="red", shape="disc", direction="rest", duration_s=2.5, width_px=320, height_px=180
    )
    write_video(still, folder / "still.mp4")
    (folder / "copy.mp4").write_bytes((folder / "mixed_1.mp4").read_bytes())
    return folder


@pytest.fixture(scope="session")
def curate() -> Callable[..., FunnelResult]:
    """Run the funnel in this process: curate(input, output, *overrides)."""

    def run(source: Path | str, output: Path | str, *overrides: str, execute: Any = None) -> FunnelResult:
        console = Console(file=io.StringIO(), width=140)
        config = load_config(None, [], [*SIZES, *overrides])
        return run_funnel(config, str(source), str(output), execute or Serial(), console)

    return run


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Path | str], list[dict[str, Any]]]:
    """The published clip table of an output as rows, in their published order."""
    return lambda output: read_manifest(f"{output}/clips").to_pylist()


@pytest.fixture(scope="session")
def undisturbed(collection: Path, tmp_path_factory: pytest.TempPathFactory, curate: Any, rows_of: Any) -> list[dict[str, Any]]:
    """What a run that nothing interrupts makes of the collection."""
    output = tmp_path_factory.mktemp("undisturbed")
    curate(collection, output)
    rows: list[dict[str, Any]] = rows_of(output)
    assert len(rows) >= 8
    return rows


@pytest.fixture(scope="session")
def pictures_of() -> Callable[[dict[str, Any]], list[np.ndarray]]:
    """The frames of a row's span, decoded on their own at a short side of 90 px: what a caption of it must be about."""

    def decode(row: dict[str, Any]) -> list[np.ndarray]:
        first_s, end_s = row["start_s"] - 1e-3, row["end_s"] - 1e-3
        with open_video(row["source_uri"]) as video:
            return [to_rgb(f.picture, short_side_px=90) for f in video.frames() if first_s <= f.time_s < end_s]

    return decode


@pytest.fixture(scope="session")
def sizes() -> tuple[str, ...]:
    """The overrides that `curate` uses, for runs in another process."""
    return SIZES

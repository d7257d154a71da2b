"""A few rendered clips, a manifest of them as curation would publish it, and recipes small enough to encode in a test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from training.recipe import Recipe, load_recipe
from waver_core.config import load_config
from waver_core.manifest import publish
from waver_core.synthetic import single_shot, write_video

ENCODING_SETS = (
    "training.encoders.autoencoder={backend: dct}",
    "training.encoders.text=[{backend: hashed_words, options: {dim: 16}}, {backend: hashed_pairs, options: {dim: 24}}]",
    "training.encoders.features={backend: frame_statistics}",
    "training.resolutions.192p={'1:1': [64, 64]}",
    "training.resolutions.480p={'1:1': [64, 64]}",
    "training.resolutions.1080p={'1:1': [64, 64]}",
    "training.stages.t2v_192p_12fps.fps=4",
    "training.stages.t2v_480p.fps=4",
    "training.stages.refine_1080p.fps=4",
    "training.data={captions: {training_caption: 0.8, caption_short: 0.2}, seconds: [2.25], max_dropped_share: 1.0}",
)
TIERS = ("192p", "480p", "720p", "ct_720p", "sft_720p", "refine_1080p")
_SCENES = [("red", "right"), ("blue", "left"), ("green", "up"), ("yellow", "down"), ("red", "left"), ("blue", "up")]


@pytest.fixture(scope="session")
def encoding_sets() -> tuple[str, ...]:
    """Overrides under which stages encode 64x64 px, 9 frames at 4 fps, with the embedded encoders."""
    return ENCODING_SETS


@pytest.fixture(scope="session")
def encoding_recipe() -> Callable[..., Recipe]:
    """`encoding_recipe(stage, *overrides)` under those overrides."""
    return lambda stage="t2v_192p_12fps", *sets: load_recipe(load_config(None, ["embedded"], [*ENCODING_SETS, *sets]), stage)


@pytest.fixture(scope="session")
def clip_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of a manifest: six videos of 2.5 s in 96x96 px and two images; one video's picture stands between black bars."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for k, (colour, direction) in enumerate(_SCENES):
        path = folder / f"{k}_{colour}_{direction}.mp4"
        write_video(
            single_shot(k, colour=colour, direction=direction, duration_s=2.5, width_px=96, height_px=96, fps=12, name=path.stem),
            path,
        )
        words = f"A {colour} disc moves {direction}"
        rows.append(_row(path, "video", words, active_box=[8, 8, 88, 88] if k == 0 else None))
    for k, colour in enumerate(((200, 40, 40), (40, 40, 200))):
        path = folder / f"image_{k}.png"
        picture = np.full((96, 128, 3), 220, np.uint8)
        cv2.circle(picture, (64, 48), 20, colour, -1)
        cv2.imwrite(str(path), picture)
        rows.append(_row(path, "image", f"A disc, number {k}", width_px=128))
    return rows


def _row(path: Path, kind: str, words: str, width_px: int = 96, active_box: list[int] | None = None) -> dict[str, Any]:
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    video = kind == "video"
    return {
        "clip_id": digest[::-1],
        "source_id": digest,
        "source_uri": str(path),
        "kind": kind,
        "start_s": 0.0,
        "end_s": 2.5 if video else 0.0,
        "duration_s": 2.5 if video else 0.0,
        "fps": 12.0 if video else None,
        "width_px": width_px,
        "height_px": 96,
        "short_side_px": 96,
        "training_caption": f"{words} over a plain ground. High definition.",
        "caption_short": f"{words}.",
        "sampling_weight": 1.0,
        "technical_active_box": active_box,
    }


@pytest.fixture(scope="session")
def publish_clips() -> Callable[..., str]:
    """`publish_clips(folder, rows)`: the output of a funnel whose tiers have these rows, as far as training reads it."""

    def write(folder: Path, rows: list[dict[str, Any]]) -> str:
        box = {"technical_active_box": pa.list_(pa.int32(), 4)}
        whole = {"width_px": pa.int32(), "height_px": pa.int32(), "short_side_px": pa.int32()}
        number = {name: pa.float64() for name in ("start_s", "end_s", "duration_s", "fps", "sampling_weight")}
        known = {**box, **whole, **number}
        table = pa.Table.from_pylist(rows, schema=pa.schema([(name, known.get(name, pa.string())) for name in rows[0]]))
        for tier in TIERS:
            publish(str(folder / "tiers" / tier), table, rows_per_shard=100, facts={"tier": tier})
        return str(folder)

    return write


@pytest.fixture(scope="session")
def curated(tmp_path_factory: pytest.TempPathFactory, clip_rows: list[dict[str, Any]], publish_clips: Callable[..., str]) -> str:
    """The output of a funnel with the eight clips in every tier."""
    return publish_clips(tmp_path_factory.mktemp("curated"), clip_rows)

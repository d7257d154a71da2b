"""DINOv2 from a small random checkpoint on disk: the library's own preprocessing and numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from curation.stage import SourceFacts, StreamFrame
from curation.stages import dedup, segment
from waver_core.backends.contracts import FrameEmbedder
from waver_core.backends.pretrained import dinov2
from waver_core.checkpoints import FETCHED_NAME
from waver_core.errors import ConfigError
from waver_core.registry import create
from waver_core.synthetic import single_shot
from waver_core.video import VideoInfo

pytestmark = pytest.mark.models
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The layout of facebook/dinov2-small: config, weights, and the processor's published settings at half the size."""
    folder = tmp_path / "dinov2-tiny"
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=14, layerscale_value=1.0
    )
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 128}, "crop_size": {"height": 112, "width": 112}}
    BitImageProcessor(do_center_crop=True, do_convert_rgb=True, resample=3, **size, **IMAGENET).save_pretrained(folder)
    return folder


def test_embeddings_equal_the_library_s_own(checkpoint: Path, frames: np.ndarray) -> None:
    embedder = create("frame_embedder", "dinov2", checkpoint=str(checkpoint), device="cpu")
    assert isinstance(embedder, FrameEmbedder)
    vectors = embedder.embed(frames)
    processor = BitImageProcessor.from_pretrained(checkpoint)
    model = Dinov2Model.from_pretrained(checkpoint).eval()
    inputs = processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")
    assert inputs["pixel_values"].shape == (5, 3, 112, 112)
    with torch.inference_mode():
        token = model(**inputs).pooler_output
    expected = (token / token.norm(dim=1, keepdim=True)).numpy()
    assert vectors.dtype == np.float32 and vectors.shape == (5, 32)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_batch_gives_what_single_frames_give(checkpoint: Path, frames: np.ndarray) -> None:
    embedder = create("frame_embedder", "dinov2", checkpoint=str(checkpoint), device="cpu", batch_size=2)
    vectors = embedder.embed(frames)
    single = np.concatenate([embedder.embed(f[None]) for f in frames])
    np.testing.assert_allclose(vectors, single, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    assert embedder.embed(frames[:0]).shape == (0, 32)
    assert embedder.embed(frames.transpose(0, 2, 1, 3)).shape == (5, 32)


def test_bfloat16_comes_near(checkpoint: Path, frames: np.ndarray) -> None:
    exact = create("frame_embedder", "dinov2", checkpoint=str(checkpoint), device="cpu").embed(frames)
    half = create("frame_embedder", "dinov2", checkpoint=str(checkpoint), device="cpu", dtype="bfloat16").embed(frames)
    assert half.dtype == np.float32 and (exact * half).sum(axis=1).min() > 0.99


def test_the_fingerprint_names_the_commit_that_was_fetched(checkpoint: Path) -> None:
    before = create("frame_embedder", "dinov2", checkpoint=str(checkpoint)).fingerprint
    (checkpoint / FETCHED_NAME).write_text('{"revision": "0123abc"}')
    after = create("frame_embedder", "dinov2", checkpoint=str(checkpoint)).fingerprint
    assert "@main" in before and "@0123abc" in after and "dinov2" in after
    assert "@v2" in create("frame_embedder", "dinov2", revision="v2").fingerprint
    assert create("frame_embedder", "dinov2", dtype="float32").fingerprint != create("frame_embedder", "dinov2").fingerprint


def test_what_is_missing_is_named_with_its_remedy(frames: np.ndarray, check_missing: Callable) -> None:
    embedder = create("frame_embedder", "dinov2", device="cpu")
    check_missing(embedder, lambda: embedder.embed(frames))
    with pytest.raises(ConfigError, match="no_such_option"):
        create("frame_embedder", "dinov2", no_such_option=1)


def test_segment_and_dedup_share_one_model(checkpoint: Path, frames_of: Callable) -> None:
    options = {"checkpoint": str(checkpoint), "device": "cpu"}
    stages = (
        segment.Stage(segment.Options(scene_backend="dinov2", scene_backend_options=options, max_s=1.0, max_windows=1)),
        dedup.Stage(dedup.Options(backend="dinov2", backend_options=options)),
    )
    info = VideoInfo("mp4", "h264", "yuv420p", 160, 90, 1.0, 24.0, 2.0, None, False, 1, 0.0)
    watchers = [stage.watch(SourceFacts(info, "video", 0)) for stage in stages]
    before = dinov2._load.cache_info().currsize
    for k, frame in enumerate(frames_of(single_shot(1, width_px=160, height_px=90, duration_s=2.0))):
        for watcher in watchers:
            watcher.add(StreamFrame(k, k / 24, frame, None, frame, False))
    (clip,) = watchers[0].clips()
    (described,) = watchers[1].describe([clip])
    assert dinov2._load.cache_info().currsize <= before + 1
    assert clip["duration_s"] == pytest.approx(1.0) and 0 < clip["segment_similarity"] <= 1.001
    assert described["dedup_embedding"].shape == (32,) and described["dedup_embedding"].dtype == np.float16

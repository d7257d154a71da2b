"""The watermark classifier from a small random SigLIP checkpoint: transformers' own probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import SiglipConfig, SiglipForImageClassification, SiglipImageProcessor

from waver_core.backends.contracts import Overlay, WatermarkScorer
from waver_core.errors import ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The layout of prithivMLmods/Watermark-Detection-SigLIP2, smaller."""
    folder = tmp_path / "siglip-tiny"
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
    labels = {0: "No Watermark", 1: "Watermark"}
    config = SiglipConfig(vision_config=vision, id2label=labels, label2id={v: k for k, v in labels.items()})
    model = SiglipForImageClassification(config)
    with torch.no_grad():  # a fresh head is near zero: everything would be 0.5
        model.classifier.weight.normal_()
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def reference(folder: Path, frames: np.ndarray, index: int) -> np.ndarray:
    inputs = SiglipImageProcessor.from_pretrained(folder)(
        images=list(frames), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.inference_mode():
        logits = SiglipForImageClassification.from_pretrained(folder).eval()(**inputs).logits
    return logits.softmax(dim=1)[:, index].numpy()


def test_probability_is_the_mean_of_the_library_s(checkpoint: Path, frames: np.ndarray) -> None:
    scorer = create("watermark_scorer", "classifier", checkpoint=str(checkpoint), device="cpu", batch_size=2)
    assert isinstance(scorer, WatermarkScorer)
    expected = reference(checkpoint, frames, 1)
    found = scorer.score(frames)
    assert isinstance(found, Overlay) and found.area_ratio == 0.0 and found.box is None
    assert np.ptp(expected) > 1e-3 and found.probability == pytest.approx(expected.mean(), abs=1e-5)
    singles = [scorer.score(f[None]).probability for f in frames]
    np.testing.assert_allclose(singles, expected, atol=1e-5)
    other = create("watermark_scorer", "classifier", checkpoint=str(checkpoint), device="cpu", label="no watermark")
    assert other.score(frames).probability == pytest.approx(1 - expected.mean(), abs=1e-5)


def test_a_few_frames_stand_for_many(checkpoint: Path, frames: np.ndarray) -> None:
    scorer = create("watermark_scorer", "classifier", checkpoint=str(checkpoint), device="cpu", max_frames=3)
    expected = reference(checkpoint, frames[[0, 2, 4]], 1).mean()
    assert scorer.score(frames).probability == pytest.approx(expected, abs=1e-5)
    assert scorer.score(frames[:0]) == Overlay(None, 0.0, None)


def test_options_and_what_is_missing(checkpoint: Path, frames: np.ndarray, check_missing: Callable) -> None:
    scorer = create("watermark_scorer", "classifier", device="cpu")
    check_missing(scorer, lambda: scorer.score(frames))
    wrong = create("watermark_scorer", "classifier", checkpoint=str(checkpoint), device="cpu", label="logo")
    with pytest.raises(ConfigError, match=r"no label 'logo'.*no watermark"):
        wrong.score(frames)
    with pytest.raises(ConfigError, match="max_frames"):
        create("watermark_scorer", "classifier", max_frames=0)
    assert scorer.fingerprint != create("watermark_scorer", "classifier", label="yes").fingerprint

"""Instance segmentation from a small random checkpoint of RF-DETR Seg: the library's own masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RfDetrConfig, RfDetrForInstanceSegmentation, RfDetrForObjectDetection, RfDetrImageProcessor
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from waver_core.backends.contracts import ForegroundSegmenter
from waver_core.errors import ConfigError
from waver_core.registry import create

pytestmark = pytest.mark.models
LABELS = {0: "person", 1: "dog", 2: "couch"}
NAMES = {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}


def save_checkpoint(folder: Path) -> tuple[Any, Any]:
    backbone = RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8, num_windows=2, out_indices=[1, 2]
    )
    config = RfDetrConfig(
        backbone_config=backbone,
        d_model=16,
        num_queries=20,
        group_detr=1,
        decoder_layers=1,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        **NAMES,
    )
    model = RfDetrForInstanceSegmentation(config).eval()
    model.save_pretrained(folder)
    RfDetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False).save_pretrained(folder)
    return RfDetrForInstanceSegmentation.from_pretrained(folder).eval(), RfDetrImageProcessor.from_pretrained(folder)


def test_masks_are_the_union_of_the_library_s_instances(tmp_path: Path, frames: np.ndarray) -> None:
    model, processor = save_checkpoint(tmp_path / "tiny")
    inputs = processor(images=list(frames[:-1]), return_tensors="pt", input_data_format="channels_last")
    with torch.inference_mode():
        outputs = model(**inputs)
    maps = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(45, 80)] * 4)
    scores = [s["score"] for one in maps for s in one["segments_info"]]
    threshold = float(np.median(scores))  # random weights are sure of nothing
    maps = processor.post_process_instance_segmentation(outputs, threshold=threshold, target_sizes=[(45, 80)] * 4)
    expected = np.stack([one["segmentation"].numpy() >= 0 for one in maps])
    assert expected.any() and any(one["segments_info"] for one in maps)
    residual = np.zeros((4, 45, 80), np.float32)
    options = {"checkpoint": str(tmp_path / "tiny"), "device": "cpu", "min_score": threshold}
    segmenter = create("foreground_segmenter", "rf_detr", batch_size=3, **options)
    assert isinstance(segmenter, ForegroundSegmenter)
    masks = segmenter.segment(frames, residual)
    assert masks.dtype == bool and masks.shape == residual.shape
    assert (masks == expected).mean() > 0.999
    single = np.concatenate([segmenter.segment(frames[t : t + 2], residual[:1]) for t in range(4)])
    assert (masks == single).mean() > 0.999

    wanted = maps[0]["segments_info"][0]["label_id"]
    only = create("foreground_segmenter", "rf_detr", labels=[LABELS[wanted]], **options).segment(frames, residual)
    for mask, one in zip(only, maps, strict=True):
        ids = [s["id"] for s in one["segments_info"] if s["label_id"] == wanted]
        assert (mask == np.isin(one["segmentation"].numpy(), ids)).mean() > 0.999


def test_a_single_frame_has_no_masks(tmp_path: Path, frames: np.ndarray) -> None:
    save_checkpoint(tmp_path / "tiny")
    segmenter = create("foreground_segmenter", "rf_detr", checkpoint=str(tmp_path / "tiny"), device="cpu")
    assert segmenter.segment(frames[:1], np.zeros((0, 45, 80), np.float32)).shape == (0, 45, 80)


def test_labels_and_architectures_are_checked(tmp_path: Path, frames: np.ndarray) -> None:
    save_checkpoint(tmp_path / "tiny")
    residual = np.zeros((4, 45, 80), np.float32)
    segmenter = create("foreground_segmenter", "rf_detr", checkpoint=str(tmp_path / "tiny"), device="cpu", labels=["persn"])
    with pytest.raises(ConfigError, match="did you mean 'person'"):
        segmenter.segment(frames, residual)
    config = RfDetrConfig.from_pretrained(tmp_path / "tiny")
    RfDetrForObjectDetection(config).save_pretrained(tmp_path / "detector")
    with pytest.raises(ConfigError, match=r"RfDetrForObjectDetection.*needs a RfDetrForInstanceSegmentation"):
        create("foreground_segmenter", "rf_detr", checkpoint=str(tmp_path / "detector"), device="cpu").segment(frames, residual)


def test_what_is_missing_is_named_with_its_remedy(frames: np.ndarray, check_missing: Callable) -> None:
    segmenter = create("foreground_segmenter", "rf_detr", device="cpu")
    check_missing(segmenter, lambda: segmenter.segment(frames, np.zeros((4, 45, 80), np.float32)))
    prints = {create("foreground_segmenter", "rf_detr", **o).fingerprint for o in ({}, {"labels": ["dog"]}, {"min_score": 0.7})}
    assert len(prints) == 3

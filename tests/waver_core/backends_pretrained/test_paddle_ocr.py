"""PP-OCR text detection from a random checkpoint: the library's own boxes, and whole boxes from a map drawn by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, PPOCRV5MobileDetConfig, PPOCRV5MobileDetForObjectDetection
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from transformers.models.pp_ocrv5_server_det.image_processing_pp_ocrv5_server_det import PPOCRV5ServerDetImageProcessor

from waver_core.backends.contracts import TextDetector
from waver_core.registry import create

pytestmark = pytest.mark.models


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The layout of PaddlePaddle/PP-OCRv5_mobile_det_safetensors, at the true size (it is small)."""
    folder = tmp_path / "det"
    PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig()).save_pretrained(folder)
    PPOCRV5ServerDetImageProcessor().save_pretrained(folder)
    return folder


def test_the_map_is_the_library_s_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (90, 160, 3)).astype(np.uint8)
    detector = create("text_detector", "paddleocr", checkpoint=str(checkpoint), device="cpu", longest_side_px=128)
    assert isinstance(detector, TextDetector)
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    inputs = processor(images=frame, limit_side_len=128, return_tensors="pt", input_data_format="channels_last")
    assert inputs["pixel_values"].shape == (1, 3, 64, 128)
    with torch.inference_mode():
        expected = PPOCRV5MobileDetForObjectDetection.from_pretrained(checkpoint).eval()(inputs["pixel_values"])
    seen = []
    original = PPOCRV5ServerDetImageProcessor.post_process_object_detection

    def spy(self: PPOCRV5ServerDetImageProcessor, outputs: BaseModelOutputWithNoAttention, **options: object) -> list[dict]:
        seen.append(outputs.last_hidden_state)
        return original(self, outputs, **options)

    monkeypatch.setattr(PPOCRV5ServerDetImageProcessor, "post_process_object_detection", spy)
    boxes = detector.detect(frame)
    torch.testing.assert_close(seen[0], expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    assert all(0 <= v <= 1 for box in boxes for v in box)


def test_boxes_come_back_as_shares_of_the_frame(checkpoint: Path) -> None:
    detector = create("text_detector", "paddleocr", checkpoint=str(checkpoint), device="cpu", max_box_area=0.3)
    _, processor = detector._loaded
    drawn = torch.zeros(1, 1, 192, 320)
    drawn[:, :, 150:170, 60:260] = 0.9  # a line of subtitles
    drawn[:, :, 20:30, 20:60] = 0.5  # less sure than min_score
    model = SimpleNamespace(dtype=torch.float32)
    model_call = lambda pixel_values: BaseModelOutputWithNoAttention(last_hidden_state=drawn)  # noqa: E731

    class Drawn:
        dtype = model.dtype
        __call__ = staticmethod(model_call)

    detector._loaded = (Drawn(), processor)
    frame = np.zeros((180, 320, 3), np.uint8)
    (box,) = detector.detect(frame)
    assert box.score == pytest.approx(0.9, abs=1e-3)
    # DB shrinks text when it learns; the library grows boxes by area * 1.5 / perimeter again, 13.6 px here.
    grown = 200 * 20 * 1.5 / 440
    expected = ((60 - grown) / 320, (150 - grown) / 192, (260 + grown) / 320, (170 + grown) / 192)
    np.testing.assert_allclose(box[:4], expected, atol=0.012)
    drawn[:] = 0.9
    assert detector.detect(frame) == []  # the whole frame is no line of text
    drawn[:] = 0
    assert detector.detect(frame) == []


def test_options_and_what_is_missing(frames: np.ndarray, check_missing: Callable) -> None:
    detector = create("text_detector", "paddleocr", device="cpu")
    check_missing(detector, lambda: detector.detect(frames[0]))
    prints = {create("text_detector", "paddleocr", **o).fingerprint for o in ({}, {"longest_side_px": 480}, {"min_score": 0.7})}
    assert len(prints) == 3

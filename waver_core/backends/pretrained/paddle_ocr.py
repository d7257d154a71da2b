"""Text boxes with PaddleOCR's detection networks (PP-OCRv5, PP-OCRv6; Waver §3.1: OCR measures overlaid text).

PaddlePaddle publishes them for transformers too, and that is how they run here: same weights, batches on the same GPU, no
second framework. The packages paddleocr 3.7 and paddlex 3.7 are not used: they pin opencv-contrib-python 4.10, whose cv2
overwrites the headless one of this project, PyYAML 6.0.2 and numpy below 2.4.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.contracts import TextBox
from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.registry import register

# The size is that of the same weights in Paddle's own format.
CHECKPOINTS = (
    Checkpoint("PaddlePaddle/PP-OCRv5_server_det_safetensors", size_mb=88, licence="Apache-2.0"),
    Checkpoint("PaddlePaddle/PP-OCRv5_mobile_det_safetensors", licence="Apache-2.0"),
    Checkpoint("PaddlePaddle/PP-OCRv6_medium_det_safetensors", licence="Apache-2.0"),
    Checkpoint("PaddlePaddle/PP-OCRv6_small_det_safetensors", licence="Apache-2.0"),
)


@register("text_detector", "paddleocr")
class PaddleOcrDetector(Pretrained):
    """Detection only: area ratios need no reading. Frames are shrunk to a longest side, never enlarged."""

    packages = ("torch", "torchvision", "transformers")

    def __init__(
        self,
        checkpoint: str = "PaddlePaddle/PP-OCRv5_server_det_safetensors",
        revision: str | None = None,
        longest_side_px: int = 960,
        min_score: float = 0.6,
        max_box_area: float = 0.4,
        **runtime: Any,
    ) -> None:
        super().__init__(**runtime)
        self._checkpoint = known_or(checkpoint, CHECKPOINTS, revision)
        self._longest_side_px, self._min_score, self._max_box_area = longest_side_px, min_score, max_box_area
        self.fingerprint = self.identity(
            "paddleocr-1", longest_side_px=longest_side_px, min_score=min_score, max_box_area=max_box_area
        )

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen."""
        return (self._checkpoint,)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        self.require()
        transformers, folder = self.module("transformers"), self._checkpoint.locate()
        model = transformers.AutoModelForObjectDetection.from_pretrained(
            folder, dtype=self.dtype, local_files_only=True, use_safetensors=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return model.to(self.device).eval(), processor

    def detect(self, frame: np.ndarray) -> list[TextBox]:
        """uint8 [H, W, 3] RGB -> upright boxes around the (maybe turned) boxes of text above the score."""
        model, processor = self._loaded
        torch = self.module("torch")
        height, width = frame.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(frame)).to(self.device).permute(2, 0, 1)
        inputs = processor(
            images=[pixels],
            input_data_format="channels_first",
            limit_side_len=self._longest_side_px,
            limit_type="max",
            return_tensors="pt",
        )
        with torch.inference_mode():
            outputs = model(pixel_values=inputs["pixel_values"].to(model.dtype))
        outputs.last_hidden_state = outputs.last_hidden_state.float()
        found = processor.post_process_object_detection(
            outputs, target_sizes=inputs["target_sizes"], box_threshold=self._min_score
        )[0]
        corners = (found["boxes"].cpu().numpy().reshape(-1, 4, 2) / np.array([width, height])).clip(0, 1)
        rows = np.column_stack([corners.min(axis=1), corners.max(axis=1), found["scores"].cpu().numpy()])
        boxes = [TextBox(*row) for row in rows.tolist()]
        # Now and then half of a blank or misty frame is called one line of text.
        return [b for b in boxes if 0 < b.area <= self._max_box_area]

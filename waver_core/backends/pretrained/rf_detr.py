"""Foreground as the things in the picture: instance segmentation before flow (Waver §3.1).

The report first segments the foreground and then measures flow inside and outside of it, so every thing counts here,
moving or not: a person who stands still is foreground of speed 0. (The stage drops regions that the camera's own move
explains.) The report does not name its model. RF-DETR Seg (Roboflow, 2025; on a DINOv2 backbone) is Apache-2.0, code and
weights, and made for real time. Mask2Former's weights bear no open licence, and transformers builds it with scipy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError, did_you_mean
from waver_core.registry import register

CHECKPOINTS = (Checkpoint("Roboflow/rf-detr-seg-medium", size_mb=140, licence="Apache-2.0"),)

_ARCHITECTURE = "RfDetrForInstanceSegmentation"


@register("foreground_segmenter", "rf_detr")
class RfDetrSegmenter(Pretrained):
    """The union of all instances above a score. `labels` narrows down what counts as a thing (COCO: person, dog, car)."""

    packages = ("torch", "torchvision", "transformers")
    gpu_dtype = "float32"  # its decoder samples features at coordinates, which half precision rounds to pixels

    def __init__(
        self,
        checkpoint: str = "Roboflow/rf-detr-seg-medium",
        revision: str | None = None,
        min_score: float = 0.5,
        labels: Sequence[str] | None = None,
        **runtime: Any,
    ) -> None:
        super().__init__(**runtime)
        self._checkpoint = known_or(checkpoint, CHECKPOINTS, revision)
        self._min_score, self._labels = min_score, labels
        self.fingerprint = self.identity("rf_detr-1", min_score=min_score, labels=sorted(labels) if labels else "all")

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen."""
        return (self._checkpoint,)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, frozenset[int] | None]:
        """Model, processor, and the ids of the labels that count; None where all do."""
        self.require()
        transformers, folder = self.module("transformers"), self._checkpoint.locate()
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.architectures != [_ARCHITECTURE]:  # a detector would load too, with masks at random
            raise ConfigError(f"{self._checkpoint.repo} holds {config.architectures}, and this backend needs a {_ARCHITECTURE}")
        model = transformers.RfDetrForInstanceSegmentation.from_pretrained(
            folder, dtype=self.dtype, local_files_only=True, use_safetensors=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        ids = {label: i for i, label in model.config.id2label.items()}
        for label in self._labels or ():
            if label not in ids:
                raise ConfigError(f"{self._checkpoint.repo} knows no label '{label}': {did_you_mean(label, ids)}")
        return model.to(self.device).eval(), processor, frozenset(ids[n] for n in self._labels) if self._labels else None

    def segment(self, frames: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """frames uint8 [T, H, W, 3], residual [T-1, h, w] -> bool [T-1, h, w], of the first frame of each pair.

        Of the residual only the size matters: what moves is not asked, see above.
        """
        model, processor, wanted = self._loaded
        torch = self.module("torch")
        masks = np.zeros(residual.shape, bool)
        for part in self.batches(len(masks)):
            pixels = torch.from_numpy(np.ascontiguousarray(frames[part])).to(self.device).permute(0, 3, 1, 2)
            inputs = processor(images=list(pixels), input_data_format="channels_first", return_tensors="pt")
            with torch.inference_mode():
                outputs = model(inputs["pixel_values"].to(model.dtype), pixel_mask=inputs.get("pixel_mask"))
            outputs.logits, outputs.pred_masks = outputs.logits.float(), outputs.pred_masks.float()
            sizes = [masks.shape[1:]] * len(pixels)
            found = processor.post_process_instance_segmentation(outputs, threshold=self._min_score, target_sizes=sizes)
            for mask, one in zip(masks[part], found, strict=True):
                things = [s["id"] for s in one["segments_info"] if wanted is None or s["label_id"] in wanted]
                mask[:] = np.isin(one["segmentation"].cpu().numpy(), things)
        return masks

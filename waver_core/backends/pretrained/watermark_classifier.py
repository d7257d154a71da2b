"""Watermarks by an image classifier of transformers (Waver §3.1 names watermark detection, but no model).

The default checkpoint is SigLIP2 fine-tuned on 22 thousand annotated landscapes (accuracy 94 % by its card); the older
amrul-hzz/watermark_detector reports 66 % on its own test set. It tells of lettering and logos on a single frame, moving
or not, and says nothing of where they are.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.contracts import Overlay
from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError, did_you_mean
from waver_core.registry import register

CHECKPOINTS = (
    # Its training set (qwertyforce/scenery_watermarks) is CC-BY-NC-4.0.
    Checkpoint("prithivMLmods/Watermark-Detection-SigLIP2", size_mb=372, licence="unknown; training data CC-BY-NC-4.0"),
)


@register("watermark_scorer", "classifier")
class WatermarkClassifier(Pretrained):
    """Probability of the watermark's label, the mean over at most `max_frames` frames evenly spread."""

    packages = ("torch", "torchvision", "transformers")

    def __init__(
        self,
        checkpoint: str = "prithivMLmods/Watermark-Detection-SigLIP2",
        revision: str | None = None,
        label: str = "Watermark",
        max_frames: int = 8,
        **runtime: Any,
    ) -> None:
        super().__init__(**runtime)
        if max_frames < 1:
            raise ConfigError(f"max_frames must be at least 1, not {max_frames}")
        self._checkpoint = known_or(checkpoint, CHECKPOINTS, revision)
        self._label, self._max_frames = label, max_frames
        self.fingerprint = self.identity("watermark_classifier-1", label=label, max_frames=max_frames)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen."""
        return (self._checkpoint,)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, int]:
        """Model, processor and the index of the watermark's label."""
        self.require()
        transformers, folder = self.module("transformers"), self._checkpoint.locate()
        model = transformers.AutoModelForImageClassification.from_pretrained(
            folder, dtype=self.dtype, local_files_only=True, use_safetensors=True
        )
        ids = {str(label).casefold(): int(i) for i, label in model.config.id2label.items()}
        if self._label.casefold() not in ids:
            raise ConfigError(f"{self._checkpoint.repo} knows no label '{self._label}': {did_you_mean(self._label, ids)}")
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return model.to(self.device).eval(), processor, ids[self._label.casefold()]

    def score(self, frames: np.ndarray) -> Overlay:
        """uint8 [T, H, W, 3] -> mean probability (None without frames); no area and no box: a classifier does not know where."""
        if not len(frames):
            return Overlay(None, 0.0, None)
        model, processor, index = self._loaded
        torch = self.module("torch")
        frames = frames[np.linspace(0, len(frames) - 1, min(len(frames), self._max_frames)).round().astype(int)]
        probabilities = []
        for part in self.batches(len(frames)):
            pixels = torch.from_numpy(np.ascontiguousarray(frames[part])).to(self.device).permute(0, 3, 1, 2)
            inputs = processor(images=list(pixels), input_data_format="channels_first", return_tensors="pt")
            with torch.inference_mode():
                logits = model(pixel_values=inputs["pixel_values"].to(model.dtype)).logits
            probabilities.append(logits.float().softmax(dim=1)[:, index].cpu().numpy())
        return Overlay(float(np.concatenate(probabilities).mean()), 0.0, None)

"""Frame descriptors from DINOv2 (Oquab et al., 2023; Waver §3.1): alike where the scene is, whatever the camera does.

The class token of a ViT, after the library's own processor (short side 256, centre 224 x 224, ImageNet statistics): of a
wide frame it sees the middle. Cost: ViT-S/14 takes about 11 GFLOP a frame, ViT-B 46, ViT-L 160, ViT-g 580.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.registry import register

CHECKPOINTS = (
    Checkpoint("facebook/dinov2-small", size_mb=88, licence="Apache-2.0"),
    Checkpoint("facebook/dinov2-base", size_mb=346, licence="Apache-2.0"),
    Checkpoint("facebook/dinov2-large", size_mb=1217, licence="Apache-2.0"),
    Checkpoint("facebook/dinov2-giant", size_mb=4546, licence="Apache-2.0"),
)


@register("frame_embedder", "dinov2")
class Dinov2(Pretrained):
    """Embeds frames of any size; those at a short side of 256 px need no resizing."""

    packages = ("torch", "torchvision", "transformers")
    short_side_px = 256

    def __init__(self, checkpoint: str = "facebook/dinov2-small", revision: str | None = None, **runtime: Any) -> None:
        super().__init__(**{"batch_size": 32, **runtime})
        self._checkpoint = known_or(checkpoint, CHECKPOINTS, revision)
        self.fingerprint = self.identity("dinov2-1")

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen."""
        return (self._checkpoint,)

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] RGB -> float32 [T, D], rows of unit length."""
        self.require()  # without torchvision the processor would quietly be another one
        torch = self.module("torch")
        model, processor = _load(self.module("transformers"), self._checkpoint.locate(), self.device, self.dtype)
        vectors = np.empty((len(frames), model.config.hidden_size), np.float32)
        for part in self.batches(len(frames)):
            pixels = torch.from_numpy(np.ascontiguousarray(frames[part])).to(self.device).permute(0, 3, 1, 2)
            inputs = processor(images=list(pixels), input_data_format="channels_first", return_tensors="pt")
            with torch.inference_mode():
                token = model(inputs["pixel_values"].to(model.dtype)).last_hidden_state[:, 0].float()
            vectors[part] = torch.nn.functional.normalize(token, dim=1).cpu().numpy()
        return vectors


@lru_cache(maxsize=2)
def _load(transformers: Any, folder: Path, device: str, dtype: Any) -> tuple[Any, Any]:
    """Model and processor. Kept per process: segment and dedup of one worker share them."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), processor

"""LAION's aesthetic predictors on CLIP embeddings (Waver §3.1: a pretrained aesthetic model scores each frame).

Two heads, both linear maps of the image embedding of unit length, fitted to votes from 1 to 10: version 1 (one layer; for
ViT-L/14, B/16 and B/32) and version 2 ("sac+logos+ava1-l14-linearMSE": five layers without anything between them; for
ViT-L/14), whose scores are what the usual thresholds of 4.5 to 5.5 are about. Scores may fall a little outside 1 to 10.

The parts (exposure, sharpness and so on) are the photographic backend's: taste knows nothing of definition, and a gate
asks for it.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.contracts import Aesthetics
from waver_core.backends.embedded.photographic import Photographic
from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError, did_you_mean
from waver_core.registry import register

_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
CHECKPOINTS = (
    Checkpoint("timm/vit_large_patch14_clip_224.openai", size_mb=1710, licence="Apache-2.0", files=_FILES),
    Checkpoint("timm/vit_base_patch16_clip_224.openai", size_mb=599, licence="Apache-2.0", files=_FILES),
    Checkpoint("timm/vit_base_patch32_clip_224.openai", size_mb=605, licence="Apache-2.0", files=_FILES),
)
"""OpenAI's CLIP in open_clip's own layout; sizes are those of all parameters in float32."""

_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_{}_linear.pth"
_V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth"
HEADS = {
    "v2_l14": Checkpoint("laion/aesthetic-v2-l14", size_mb=4, licence="unknown", url=_V2),
    "v1_l14": Checkpoint("laion/aesthetic-v1-l14", size_mb=1, licence="MIT", url=_V1.format("vit_l_14")),
    "v1_b16": Checkpoint("laion/aesthetic-v1-b16", size_mb=1, licence="MIT", url=_V1.format("vit_b_16")),
    "v1_b32": Checkpoint("laion/aesthetic-v1-b32", size_mb=1, licence="MIT", url=_V1.format("vit_b_32")),
}


@register("aesthetic_scorer", "open_clip_laion")
class OpenClipLaion(Pretrained):
    """Scores frames with open_clip's own preprocessing (short side and centre 224 px, bicubic)."""

    packages = ("torch", "open_clip")

    def __init__(
        self,
        checkpoint: str = "timm/vit_large_patch14_clip_224.openai",
        revision: str | None = None,
        head: str = "v2_l14",
        **runtime: Any,
    ) -> None:
        super().__init__(**runtime)
        if head not in HEADS:
            raise ConfigError(f"open_clip_laion has no head '{head}': {did_you_mean(head, HEADS)}")
        self._checkpoint, self._head = known_or(checkpoint, CHECKPOINTS, revision), HEADS[head]
        self._photographic = Photographic()
        self.fingerprint = self.identity("open_clip_laion-1", head=head, parts=self._photographic.fingerprint)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """CLIP and the head."""
        return (self._checkpoint, self._head)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, list[tuple[Any, Any]]]:
        """Image tower, preprocessing, and weight and bias of every layer of the head."""
        self.require()
        torch, folder = self.module("torch"), self._checkpoint.locate()
        model, preprocess = self.module("open_clip").create_model_from_pretrained(
            f"local-dir:{folder}",
            # OpenAI trained with x * sigmoid(1.702 x); with the usual GELU the same weights give other embeddings.
            force_quick_gelu=self._checkpoint.repo.endswith(".openai"),
        )
        state = torch.load(self._head.locate(), map_location="cpu", weights_only=True)
        layers = [name.removesuffix("weight") for name in state if name.endswith("weight")]
        head = [(state[f"{n}weight"].float().to(self.device), state[f"{n}bias"].float().to(self.device)) for n in layers]
        tower = model.visual.to(self.device, self.dtype).eval()
        wanted, given = head[0][0].shape[1], tower.output_dim
        if wanted != given:
            raise ConfigError(f"{self._head.repo} wants embeddings of {wanted}, {self._checkpoint.repo} gives {given}")
        return tower, preprocess, head

    def score(self, frames: np.ndarray) -> Aesthetics:
        """uint8 [T, H, W, 3] -> score [T], about 1 to 10, and the photographic parts, each [T]."""
        tower, preprocess, head = self._loaded
        torch, image = self.module("torch"), self.module("PIL.Image")
        scores = np.empty(len(frames), np.float32)
        for part in self.batches(len(frames)):
            pixels = torch.stack([preprocess(image.fromarray(f)) for f in frames[part]]).to(self.device, self.dtype)
            with torch.inference_mode():
                values = torch.nn.functional.normalize(tower(pixels).float(), dim=1)
                for weight, bias in head:
                    values = torch.nn.functional.linear(values, weight, bias)
            scores[part] = values[:, 0].cpu().numpy()
        return Aesthetics(scores, self._photographic.score(frames).parts)

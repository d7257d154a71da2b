"""Dense optical flow by RAFT (Teed and Deng, 2020; Waver §3.1), in torchvision's implementation and with its weights.

RAFT works on an eighth of the size and looks up correlations on four scales: sides must be multiples of 8 and at least
128 px. Other frames are enlarged and padded by repeating their edges, and the flow is brought back to their own pixels.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint
from waver_core.errors import ConfigError, did_you_mean
from waver_core.registry import register

_MIN_SIDE_PX = 128
_LICENCE = "BSD-3-Clause; its training sets FlyingChairs and FlyingThings3D have terms of their own"
CHECKPOINTS = {
    "small": Checkpoint(
        "torchvision/raft_small",
        size_mb=4,
        licence=_LICENCE,
        url="https://download.pytorch.org/models/raft_small_C_T_V2-01064c6d.pth",
    ),
    "large": Checkpoint(
        "torchvision/raft_large",
        size_mb=21,
        licence=_LICENCE,
        url="https://download.pytorch.org/models/raft_large_C_T_V2-1bb1363a.pth",
    ),
}
"""`Raft_Small_Weights.C_T_V2` and `Raft_Large_Weights.C_T_V2` of torchvision; a test holds the two together."""


@register("flow_estimator", "raft")
class Raft(Pretrained):
    """Flow of every pair of neighbours, in batches of pairs."""

    packages = ("torch", "torchvision")
    gpu_dtype = "float32"  # it adds small steps to coordinates in pixels, which half precision rounds away

    def __init__(self, variant: str = "small", iterations: int = 12, **runtime: Any) -> None:
        super().__init__(**{"batch_size": 8, **runtime})
        if variant not in CHECKPOINTS:
            raise ConfigError(f"raft has no variant '{variant}': {did_you_mean(variant, CHECKPOINTS)}")
        if iterations < 1:
            raise ConfigError(f"iterations must be at least 1, not {iterations}")
        self._variant, self._iterations = variant, iterations
        self.fingerprint = self.identity("raft-1", url=CHECKPOINTS[variant].url, iterations=iterations, min_side=_MIN_SIDE_PX)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The variant's."""
        return (CHECKPOINTS[self._variant],)

    @cached_property
    def _model(self) -> Any:
        self.require()
        torch, models = self.module("torch"), self.module("torchvision").models.optical_flow
        build = models.raft_small if self._variant == "small" else models.raft_large
        model = build(weights=None, progress=False)
        model.load_state_dict(torch.load(self.checkpoints()[0].locate(), map_location="cpu", weights_only=True))
        return model.to(self.device, self.dtype).eval()

    def flow(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T-1, H, W, 2], (x, y) in pixels; a pair's flow does not depend on the others."""
        n_pairs, (height, width) = max(0, len(frames) - 1), frames.shape[1:3]
        flow = np.zeros((n_pairs, height, width, 2), np.float32)
        torch = self.module("torch")
        for part in self.batches(n_pairs):
            window = np.ascontiguousarray(frames[part.start : part.stop + 1])
            images, (wide, high) = self._prepare(torch.from_numpy(window).to(self.device))
            with torch.inference_mode():
                found = self._model(images[:-1], images[1:], num_flow_updates=self._iterations)[-1].float()
            found = found[..., :high, :wide]
            if (high, wide) != (height, width):
                found = torch.nn.functional.interpolate(found, (height, width), mode="bilinear", align_corners=False)
                found = found * found.new_tensor([width / wide, height / high]).view(1, 2, 1, 1)
            flow[part] = found.permute(0, 2, 3, 1).cpu().numpy()
        return flow

    def _prepare(self, frames: Any) -> tuple[Any, tuple[int, int]]:
        """uint8 [T, H, W, 3] -> [T, 3, H', W'] in [-1, 1] as `torchvision`'s own preset, padded; (width, height) without pad."""
        resize, pad = (getattr(self.module("torch").nn.functional, name) for name in ("interpolate", "pad"))
        images = frames.permute(0, 3, 1, 2).to(self.dtype) / 127.5 - 1
        height, width = images.shape[-2:]
        scale = max(1.0, _MIN_SIDE_PX / min(height, width))
        if scale > 1:
            height, width = round(height * scale), round(width * scale)
            images = resize(images, (height, width), mode="bilinear", align_corners=False)
        return pad(images, (0, -width % 8, 0, -height % 8), mode="replicate"), (width, height)

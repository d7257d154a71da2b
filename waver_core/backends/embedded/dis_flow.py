"""Dense inverse search optical flow (Kroeger et al., ECCV 2016) from OpenCV: the embedded stand-in for RAFT."""

from __future__ import annotations

import cv2
import numpy as np

from waver_core.errors import ConfigError, did_you_mean
from waver_core.registry import register

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


@register("flow_estimator", "dis")
class DisFlow:
    """About 1.5 ms a pair at 456x256; the finer presets cost two to five times that and change no label here."""

    def __init__(self, preset: str = "ultrafast") -> None:
        if preset not in _PRESETS:
            raise ConfigError(f"dis flow has no preset '{preset}': {did_you_mean(preset, _PRESETS)}")
        self.fingerprint = f"dis-1-{preset}"
        self._dis = cv2.DISOpticalFlow_create(_PRESETS[preset])

    def flow(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3] -> float32 [T-1, H, W, 2]; every pair starts afresh, so results do not depend on order."""
        grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
        out = np.zeros((max(0, len(frames) - 1), *frames.shape[1:3], 2), np.float32)
        for t in range(len(out)):
            out[t] = self._dis.calc(grey[t], grey[t + 1], None)
        return out

"""Semantic features of clips from Qwen2.5-VL (Waver §4.2), to which the DiT's own are aligned: its visual tower's output.

The tower reads frames in pairs and cells of 28x28 px and gives, after its merger, one vector for each: what the language
model would be shown. They are laid out on their grid [t, h, w] and brought to the wanted one by trilinear interpolation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.backends.pretrained.qwen2_5_vl import Qwen25VLCaptioner
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import BackendUnavailable, ConfigError
from waver_core.registry import register


@register("feature_extractor", "qwen2_5_vl")
class Qwen25VLFeatures(Pretrained):
    """The visual tower of Qwen2.5-VL, 7B by default; the language model's weights are not loaded.

    max_pixels: frames larger than this (height times width) are made smaller before they are read, 0 for the checkpoint's
    own limit. Clips go through one at a time; frames of different pairs attend to one another nowhere in this tower.
    """

    packages = ("torch", "torchvision", "transformers")

    def __init__(
        self,
        checkpoint: str = "Qwen/Qwen2.5-VL-7B-Instruct",
        revision: str | None = None,
        max_pixels: int = 0,
        **runtime: Any,
    ) -> None:
        super().__init__(**runtime)
        if max_pixels < 0:
            raise ConfigError(f"max_pixels must be positive, or 0 for the checkpoint's own limit, not {max_pixels}")
        self._max_pixels = max_pixels
        self._checkpoint = known_or(checkpoint, Qwen25VLCaptioner.known, revision)
        self.fingerprint = self.identity("qwen2_5_vl-features-1", max_pixels=max_pixels)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen."""
        return (self._checkpoint,)

    @cached_property
    def dim(self) -> int:
        """Length of a vector, from the checkpoint's config; no weights are read. Raises `BackendUnavailable` without it."""
        self.require()
        return int(self._vision_config.out_hidden_size)

    def extract(self, clips: Sequence[np.ndarray], grids: Sequence[tuple[int, int, int]]) -> list[np.ndarray]:
        """See `FeatureExtractor`."""
        self.require()
        torch = self.module("torch")
        found = []
        for clip, grid in zip(clips, grids, strict=True):
            native = self.native(clip)[None].permute(0, 4, 1, 2, 3)
            resampled = torch.nn.functional.interpolate(native, size=tuple(grid), mode="trilinear", align_corners=False)
            found.append(resampled[0].permute(1, 2, 3, 0).contiguous().cpu().numpy())
        return found

    def native(self, clip: np.ndarray) -> Any:
        """uint8 [T, H, W, 3] -> float32 tensor [t, h, w, dim] on the tower's own grid: t = ceil(T / 2), cells of 28 px."""
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not clip.size:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], not {clip.dtype} {list(clip.shape)}")
        torch, tower, processor = self.module("torch"), self._tower, self._processor
        frames = torch.from_numpy(np.ascontiguousarray(clip)).to(self.device).permute(0, 3, 1, 2)
        size = dict(processor.size)
        if self._max_pixels:
            size |= {"longest_edge": self._max_pixels, "shortest_edge": min(size["shortest_edge"], self._max_pixels)}
        inputs = processor(
            videos=[frames], do_sample_frames=False, cap_pixels_per_frame=False, size=size, return_tensors="pt"
        ).to(self.device)
        grid = inputs["video_grid_thw"]
        with torch.inference_mode():
            merged = tower(inputs["pixel_values_videos"].to(tower.dtype), grid_thw=grid).pooler_output.float()
        t, h, w = grid[0].tolist()
        side = tower.spatial_merge_size
        return merged.reshape(t, h // side, w // side, -1)

    @cached_property
    def _vision_config(self) -> Any:
        transformers = self.module("transformers")
        return transformers.AutoConfig.from_pretrained(self._checkpoint.locate(), local_files_only=True).vision_config

    @cached_property
    def _processor(self) -> Any:
        return self.module("transformers").AutoVideoProcessor.from_pretrained(self._checkpoint.locate(), local_files_only=True)

    @cached_property
    def _tower(self) -> Any:
        folder, modeling = self._checkpoint.locate(), self.module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
        base = modeling.Qwen2_5_VisionTransformerPretrainedModel
        # The language model's weights in the same files are no cause for a warning.
        kind = type("VisualTower", (base,), {"_keys_to_ignore_on_load_unexpected": [r"^(model|language_model|lm_head)\."]})
        tower, told = kind.from_pretrained(  # type: ignore[attr-defined]
            folder,
            config=self._vision_config,
            key_mapping={r"^(model\.)?visual\.": ""},
            dtype=self.dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
        if told["missing_keys"]:
            raise BackendUnavailable(
                f"{folder} has no weights of a Qwen2.5-VL visual tower ({sorted(told['missing_keys'])[0]} is missing): give a "
                "folder of Qwen2.5-VL as checkpoint"
            )
        return tower.to(self.device).eval()

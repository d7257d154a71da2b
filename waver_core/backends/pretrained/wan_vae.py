"""The Wan 2.1 video autoencoder (Wan et al., 2025; Waver §2) through diffusers: 16 channels, strides 4 x 8 x 8, causal.

Latents are the mode of the posterior, not a sample: one clip has one latent, so that it can be encoded once and kept. They
are normalised by the statistics of the checkpoint's own config, `z = (mode - mean) / std` per channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from waver_core.backends.pretrained._runtime import Pretrained
from waver_core.checkpoints import Checkpoint, known_or
from waver_core.errors import ConfigError
from waver_core.registry import register
from waver_core.shapes import LATENT_CHANNELS, VideoShape

_VAE_ONLY = ("vae/*",)
CHECKPOINTS = (
    Checkpoint("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", size_mb=508, licence="Apache-2.0", files=_VAE_ONLY),
    Checkpoint("Wan-AI/Wan2.1-T2V-14B-Diffusers", size_mb=508, licence="Apache-2.0", files=_VAE_ONLY),
)


@register("video_autoencoder", "wan_vae")
class WanVae(Pretrained):
    """Clips of one shape go through together, `batch_size` at a time; the network sees four frames at a time, so memory
    grows with the size of the frames far more than with their number.

    tile_px: side of overlapping tiles (by a quarter) for frames that do not fit into memory whole, 0 for none. Tiles change
    the numbers a little, so the fingerprint names them.
    """

    packages = ("torch", "diffusers")
    gpu_dtype = "float32"  # what its latents lose, every later step has lost; the model is small

    def __init__(
        self,
        checkpoint: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        revision: str | None = None,
        tile_px: int = 0,
        **runtime: Any,
    ) -> None:
        super().__init__(**{"batch_size": 1, **runtime})
        if tile_px < 0 or tile_px % 32:
            raise ConfigError(f"tile_px must be a multiple of 32, or 0 for no tiles, not {tile_px}")
        self._tile_px = tile_px
        self._checkpoint = known_or(checkpoint, CHECKPOINTS, revision)
        self.fingerprint = self.identity("wan_vae-1", tile_px=tile_px)

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The one that was chosen; of its repository only the folder `vae`."""
        return (self._checkpoint,)

    def encode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `VideoAutoencoder`: uint8 [1+4k, 8h, 8w, 3] -> float32 [16, 1+k, h, w]."""
        for clip in clips:
            if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
                raise ValueError(f"frames must be uint8 [T, H, W, 3], not {clip.dtype} {list(clip.shape)}")
            _ = VideoShape(*clip.shape[:3]).latent
        torch, (model, mean, std) = self.module("torch"), self._load()
        latents: list[np.ndarray] = [np.empty(0)] * len(clips)
        for part in self._alike(clips):
            pixels = torch.from_numpy(np.stack([clips[k] for k in part])).to(self.device).permute(0, 4, 1, 2, 3)
            with torch.inference_mode():
                mode = model.encode(pixels.to(model.dtype) / 127.5 - 1).latent_dist.mode()
                found = ((mode.float() - mean) / std).cpu().numpy()
            for k, latent in zip(part, found, strict=True):
                latents[k] = latent
        return latents

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `VideoAutoencoder`: float32 [16, 1+k, h, w] -> uint8 [1+4k, 8h, 8w, 3]."""
        for latent in latents:
            if latent.ndim != 4 or latent.shape[0] != LATENT_CHANNELS or not latent.shape[1]:
                raise ValueError(f"latents must be [{LATENT_CHANNELS}, 1+k, h, w], not {list(latent.shape)}")
        torch, (model, mean, std) = self.module("torch"), self._load()
        clips: list[np.ndarray] = [np.empty(0)] * len(latents)
        for part in self._alike(latents):
            stacked = torch.from_numpy(np.stack([latents[k] for k in part])).to(self.device).float()
            with torch.inference_mode():
                pixels = model.decode((stacked * std + mean).to(model.dtype)).sample.float()
                levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            for k, clip in zip(part, levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy(), strict=True):
                clips[k] = clip
        return clips

    def _alike(self, arrays: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Places of arrays of one shape, at most `batch_size` at a time."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for k, array in enumerate(arrays):
            groups.setdefault(array.shape, []).append(k)
        for group in groups.values():
            for part in self.batches(len(group)):
                yield group[part]

    def _load(self) -> tuple[Any, Any, Any]:
        self.require()
        return _load(self.module("torch"), self.module("diffusers"), self._folder(), self.device, self.dtype, self._tile_px)

    def _folder(self) -> Path:
        """The folder of the autoencoder: `vae` in a published pipeline, or the given folder itself."""
        folder = self._checkpoint.locate()
        return folder / "vae" if (folder / "vae").is_dir() else folder


@lru_cache(maxsize=2)
def _load(torch: Any, diffusers: Any, folder: Path, device: str, dtype: Any, tile_px: int) -> tuple[Any, Any, Any]:
    """The model, and mean and deviation of its latents as [16, 1, 1, 1]."""
    model = diffusers.AutoencoderKLWan.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True)
    if model.config.z_dim != LATENT_CHANNELS:
        raise ConfigError(f"the autoencoder in {folder} has {model.config.z_dim} channels: take one of Wan 2.1, with 16")
    if tile_px:
        stride = tile_px * 3 // 4
        model.enable_tiling(tile_px, tile_px, stride, stride)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
        for values in (model.config.latents_mean, model.config.latents_std)
    )
    return model.to(device).eval(), mean, std

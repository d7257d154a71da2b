"""The network's numbers (Waver Table 1) and the presets made of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from waver_core.errors import ConfigError, did_you_mean
from waver_core.shapes import LATENT_CHANNELS, PATCH, TEMPORAL_STRIDE


@dataclass(frozen=True)
class DiTConfig:
    """A hybrid-stream transformer. Raises `ConfigError` when it is built from numbers that do not fit together."""

    dual_blocks: int
    """M of Table 1: blocks in which text and video have weights of their own."""
    single_blocks: int
    """N of Table 1: blocks in which they share them."""
    heads: int
    head_dim: int
    text_dims: tuple[int, ...] = (4096, 5120)
    """Widths of the text encoders' vectors (flan-t5-xxl, Qwen2.5-32B); their tokens are joined."""
    mlp_ratio: float = 4.0
    max_grid: tuple[int, int, int] = (64, 128, 128)
    """Most tokens along time, height and width: the length of the learned position tables."""
    rope_theta: float = 10_000.0
    windowed: bool = False
    """The refiner: attention in windows but for the first and last `full_blocks` blocks (§2.2)."""
    full_blocks: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "text_dims", tuple(self.text_dims))
        object.__setattr__(self, "max_grid", tuple(self.max_grid))
        if self.blocks < 1 or min(self.dual_blocks, self.single_blocks) < 0:
            raise ConfigError(f"a model needs blocks: {self.dual_blocks} dual and {self.single_blocks} single are none")
        if self.heads < 1 or self.head_dim < 8 or self.head_dim % 2:
            raise ConfigError(f"{self.heads} heads of {self.head_dim}: at least one head of an even size of 8 or more is needed")
        if len(self.max_grid) != 3 or min(self.max_grid) < 1:
            raise ConfigError(f"max_grid is {self.max_grid}: it holds three numbers, most tokens along time, height and width")
        if not self.text_dims:
            raise ConfigError("text_dims is empty: the model reads at least one text encoder")

    @property
    def width(self) -> int:
        """D, the size of a token inside the model."""
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Dual and single blocks together."""
        return self.dual_blocks + self.single_blocks

    @property
    def in_channels(self) -> int:
        """36: noisy latents, condition latents, and a mask with a channel for each pixel frame of a latent frame."""
        return 2 * LATENT_CHANNELS + TEMPORAL_STRIDE

    @property
    def in_features(self) -> int:
        """Numbers in one input patch of 1 x 2 x 2 latent cells."""
        return self.in_channels * PATCH * PATCH

    @property
    def out_features(self) -> int:
        """Numbers in one output patch."""
        return LATENT_CHANNELS * PATCH * PATCH

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """How a head's dimensions are shared out to time, height and width; each is even (44, 42, 42 of 128)."""
        space = self.head_dim // 6 * 2
        return self.head_dim - 2 * space, space, space

    def attention_kind(self, block: int) -> str:
        """ "full", "space" or "time" for a block counted from 0 (§2.2: 2x2x1 and 1x1x2 windows in turn)."""
        if not self.windowed or block < self.full_blocks or block >= self.blocks - self.full_blocks:
            return "full"
        return "space" if (block - self.full_blocks) % 2 == 0 else "time"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `recipe.yaml`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


PRESETS: dict[str, DiTConfig] = {
    # Waver Table 1. 16 x 36 D^2 + 40 x 18 D^2 with D = 3072: 12.3 B parameters (tests count them on the meta device).
    "waver_12b": DiTConfig(dual_blocks=16, single_blocks=40, heads=24, head_dim=128),
    "waver_1b": DiTConfig(dual_blocks=8, single_blocks=20, heads=12, head_dim=128, full_blocks=4),
    "waver_200m": DiTConfig(dual_blocks=4, single_blocks=10, heads=12, head_dim=64, full_blocks=2),
    "tiny": DiTConfig(dual_blocks=2, single_blocks=4, heads=4, head_dim=32, max_grid=(16, 32, 32), full_blocks=1),
    # Fig. 5: the same number of parameters in pure streams; a dual block has twice those of a single one.
    "waver_12b_dual": DiTConfig(dual_blocks=36, single_blocks=0, heads=24, head_dim=128),
    "waver_12b_single": DiTConfig(dual_blocks=0, single_blocks=72, heads=24, head_dim=128),
    "tiny_dual": DiTConfig(dual_blocks=4, single_blocks=0, heads=4, head_dim=32, max_grid=(16, 32, 32), full_blocks=1),
    "tiny_single": DiTConfig(dual_blocks=0, single_blocks=8, heads=4, head_dim=32, max_grid=(16, 32, 32), full_blocks=1),
}


def preset(name: str, **overrides: Any) -> DiTConfig:
    """A preset with some fields changed. Raises `ConfigError` that names the nearest preset or field."""
    if name not in PRESETS:
        raise ConfigError(f"no model preset '{name}': {did_you_mean(name, PRESETS)}")
    known = [f.name for f in fields(DiTConfig)]
    for key in overrides:
        if key not in known:
            raise ConfigError(f"the model has no field '{key}': {did_you_mean(key, known)}")
    return replace(PRESETS[name], **overrides)

"""Balance (Waver §3.4, §3.5): how often each clip of a tier is to be drawn, and what must be generated besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from curation import stage
from waver_core.config import Strict
from waver_core.errors import ConfigError, did_you_mean
from waver_core.manifest import Column


class Options(Strict):
    """How strongly rare labels and sources are lifted, and when generated video is asked for."""

    tiers: list[str] = ["ct_720p", "sft_720p", "refine_1080p"]
    """Tiers that are balanced; in the others every weight is 1."""
    label_power: float = Field(0.5, ge=0, le=1)
    """0 leaves the labels' distribution alone, 1 draws the classes of a level equally often."""
    source_power: float = Field(0.5, ge=0, le=1)
    """The same for the collections (`dataset`) that files came from."""
    cap: float = Field(8.0, ge=1)
    """No clip is drawn more than this many times as often as the mean clip, nor less than its inverse."""
    min_share: float = Field(0.002, ge=0, lt=0.01)
    """A second-level class that stays below this share of a tier in spite of its weights is asked of the generator."""
    prompts_per_class: int = Field(8, ge=1)
    max_requests: int = Field(2000, ge=0)
    """Rows of the table of requests, the most lacking classes first."""


class Stage(stage.Stage):
    """Weights over the published tiers; the work is in `curation.balance`."""

    name = "balance"
    Options = Options
    hooks: ClassVar[tuple[str, ...]] = ("balance",)
    reads = ("label_1", "label_2", "label_3", "caption", "aesthetic_score")
    columns = (
        Column(
            "sampling_weight", pa.float64(), "how often to draw this clip, mean 1 in its tier; null in the table of all clips"
        ),
    )

    def check_tiers(self, tiers: Sequence[str]) -> None:
        """Raises `ConfigError` for a tier to balance that there is not."""
        for name in self.options.tiers:
            if name not in tiers:
                raise ConfigError(f"funnel.stages.balance.tiers: no tier '{name}': {did_you_mean(name, tiers)}")

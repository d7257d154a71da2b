"""How much of a job is done, weighted by what each stage costs (network operations and pixels, at rates measured here)."""

from __future__ import annotations

from collections.abc import Mapping

from serving.plan import Plan
from waver_core.dit import DiTConfig
from waver_core.dit.flops import step_flops
from waver_core.shapes import LatentShape

STAGES = ("rewrite", "encode", "base", "upscale", "refine", "decode")
_TEXT_TOKENS = 64
"""Texts are short beside videos; their true length is known only once they are encoded."""
_MEMORY = 0.7
"""What a new measurement leaves of the rate that was believed before it."""


def work(plan: Plan, base: DiTConfig, refiner: DiTConfig | None) -> dict[str, float]:
    """Units of work of every stage that the plan has: 1 for texts, operations for the networks, pixels for the autoencoder."""
    small = float(plan.frames * plan.base_width_px * plan.base_height_px)
    large = float(plan.frames * plan.width_px * plan.height_px)
    units = {"rewrite": 1.0, "encode": 1.0, "base": 2.0 * plan.steps * _forward(base, plan.base_shape.latent)}
    if plan.refine and refiner is not None:
        units |= {"upscale": small + large, "refine": plan.refiner_steps * _forward(refiner, plan.shape.latent)}
    return {**units, "decode": large}


class Rates:
    """Seconds a unit of each stage, believed at first and then learned from finished stages."""

    def __init__(self) -> None:
        self._seconds = {"rewrite": 0.05, "encode": 0.05, "base": 2e-11, "upscale": 1e-7, "refine": 2e-11, "decode": 1e-7}
        self._learned: set[str] = set()

    def learn(self, stage: str, units: float, seconds: float) -> None:
        """One finished stage."""
        if units <= 0 or seconds <= 0:
            return
        rate = seconds / units
        known = self._seconds[stage]
        self._seconds[stage] = _MEMORY * known + (1 - _MEMORY) * rate if stage in self._learned else rate
        self._learned.add(stage)

    def expected_s(self, units: Mapping[str, float]) -> dict[str, float]:
        """Seconds that each stage is likely to take, in the order in which they come."""
        return {stage: units[stage] * self._seconds[stage] for stage in STAGES if stage in units}


class Progress:
    """The share of a job that is done; never falls, and stays below 1: only the store says that a job is completed."""

    def __init__(self, expected_s: Mapping[str, float]) -> None:
        self._expected, self._best = dict(expected_s), 0.0

    def at(self, stage: str, done: int = 0, steps: int = 1) -> float:
        """After so many steps of a stage, in 0 to 0.999."""
        before = 0.0
        for name, seconds in self._expected.items():
            if name == stage:
                before += seconds * min(1.0, done / max(1, steps))
                break
            before += seconds
        self._best = max(self._best, min(0.999, before / (sum(self._expected.values()) or 1.0)))
        return self._best


def _forward(config: DiTConfig, shape: LatentShape) -> float:
    return float(step_flops(config, [shape], [_TEXT_TOKENS]).forward)

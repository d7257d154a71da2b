"""From noise to latents, and from degraded latents to clean ones: Euler's method along the learned flow (Waver §2.2, §4.3).

The state is one tensor or a list of `[C, T, H, W]` tensors with shapes of their own, kept in fp32 whatever the network computes
in. A straight flow is solved exactly by any number of steps; the error of a curved one halves where they double.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch

from waver_core.errors import UserError
from waver_core.flow.objectives import at_least_fp32
from waver_core.flow.timesteps import shift as shifted

INFERENCE_SHIFT = 7.0
"""Shift of the timesteps at inference: most steps are spent near noise, where layout and motion are decided."""

State = TypeVar("State", bound=torch.Tensor | list[torch.Tensor])
VelocityFn: TypeAlias = Callable[[Any, torch.Tensor], Any]
"""`velocity_fn(state, t)`: the (guided) prediction for a state at time t, an fp32 scalar on the state's device. It
returns what it was given, a tensor or a sequence of them, in the same shapes and any floating type."""
OnStep: TypeAlias = Callable[[int, int, Any], bool | None]
"""`on_step(done, steps, state)`: called before the first step and after every one, so `done` runs from 0 to `steps`. Returning
False, or raising `Stop`, ends sampling there. On several ranks it must answer the same on each, or the others wait for ever in
their next collective: let one rank decide and broadcast."""


class Stop(Exception):
    """Sampling was ended from outside between two steps. A state that is half noise is never returned as if it were a result."""

    def __init__(self, done: int = 0, steps: int = 0) -> None:
        super().__init__(done, steps)
        self.done, self.steps = done, steps

    def __str__(self) -> str:
        return f"stopped after {self.done} of {self.steps} steps"


def timesteps(steps: int, shift: float = INFERENCE_SHIFT) -> torch.Tensor:
    """The times at which `steps` steps begin and end: fp32 [steps + 1], falling from 1 to 0 exactly, evenly before the shift.

    Raises `UserError` for fewer than one step or a shift that is not above 0.
    """
    if steps < 1:
        raise UserError(f"{steps} sampling steps are too few: take at least 1")
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def sample(
    velocity_fn: VelocityFn, noise: State, steps: int, shift: float = INFERENCE_SHIFT, on_step: OnStep | None = None
) -> State:
    """Follow the velocity `n - x_0` from noise (t = 1) to latents (t = 0); shapes as `noise`, fp32.

    Raises `Stop` where `on_step` ends it, and `ValueError` where a prediction has not the shape of its state.
    """
    latents: State = _euler(velocity_fn, noise, timesteps(steps, shift), 1.0, on_step)
    return latents


def refine(
    velocity_fn: VelocityFn, x_n: State, steps: int, shift: float = INFERENCE_SHIFT, on_step: OnStep | None = None
) -> State:
    """Follow the refiner's target `x_0 - x_n` from degraded latents (w = 1) to clean ones (w = 0) (Waver §2.2); fp32.

    `x_n` are latents of the enlarged video after `degrade_latents`. The report names neither steps nor a shift for it. Raises as
    `sample` does.
    """
    latents: State = _euler(velocity_fn, x_n, timesteps(steps, shift), -1.0, on_step)
    return latents


@torch.no_grad()
def _euler(velocity_fn: VelocityFn, start: Any, times: torch.Tensor, sign: float, on_step: OnStep | None) -> Any:
    """Integrate `dx/dt = sign * velocity_fn(x, t)` along `times`."""
    single = isinstance(start, torch.Tensor)
    state = [at_least_fp32(x) for x in ([start] if single else start)]
    if not state:
        raise ValueError("there is nothing to sample: the list is empty")
    widths = times.double().diff().tolist()  # on the CPU, so that no step waits for a device
    times = times.to(state[0].device)
    steps = len(widths)
    for step, width in enumerate(widths):
        _report(on_step, step, steps, state[0] if single else state)
        answer = velocity_fn(state[0] if single else list(state), times[step])
        velocities = [answer] if single else list(answer)
        if [v.shape for v in velocities] != [x.shape for x in state]:
            shapes = [list(v.shape) for v in velocities], [list(x.shape) for x in state]
            raise ValueError(f"predictions have the shapes {shapes[0]}, their states {shapes[1]}")
        state = [x + sign * width * v.to(x.dtype) for x, v in zip(state, velocities)]
    _report(on_step, steps, steps, state[0] if single else state)
    return state[0] if single else state


def _report(on_step: OnStep | None, done: int, steps: int, state: Any) -> None:
    if on_step is not None and on_step(done, steps, state) is False:
        raise Stop(done, steps)

"""Gradient norms: a spike is skipped, many in succession or a NaN stop the run loudly."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

from waver_core.errors import RunFailed

_WINDOW = 100
_MIN_HISTORY = 20


class SpikeGuard:
    """Compares each step's gradient norm with the median of the last hundred. A step below the clipping norm is never a spike."""

    def __init__(self, ratio: float, max_spikes: int, max_grad_norm: float) -> None:
        self.ratio, self.max_spikes, self.max_grad_norm = ratio, max_spikes, max_grad_norm
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._in_succession = 0
        self.skipped = 0

    def accepts(self, step: int, loss: float, norm: float) -> bool:
        """Whether the optimiser may take this step. Raises `RunFailed` on a NaN, an infinity, or too many spikes on end."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunFailed(
                f"step {step}: loss {loss}, gradient norm {norm}. Nothing was written since the last checkpoint; lower "
                "optimizer.lr or look at the data of this step, then start again: it goes on from that checkpoint"
            )
        usual = median(self._norms) if len(self._norms) >= _MIN_HISTORY else math.inf
        if norm <= max(self.ratio * usual, self.max_grad_norm):
            self._norms.append(norm)
            self._in_succession = 0
            return True
        self.skipped += 1
        self._in_succession += 1
        if self._in_succession >= self.max_spikes:
            raise RunFailed(
                f"step {step}: {self._in_succession} steps in succession had gradient norms more than {self.ratio:g} times the "
                f"usual {usual:.3g} (now {norm:.3g}): lower optimizer.lr, or raise optimizer.spike_ratio"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes, in JSON's types."""
        return {"norms": list(self._norms), "in_succession": self._in_succession, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another guard was."""
        self._norms = deque(state["norms"], maxlen=_WINDOW)
        self._in_succession, self.skipped = state["in_succession"], state["skipped"]

"""The task-unified diffusion transformer of Waver §2.1 and the refiner's windowed variant of it (§2.2), in plain torch.

Parallelism, recomputation and compilation are applied from outside; nothing here knows of backends or configuration files.
"""

from waver_core.dit.config import PRESETS, DiTConfig, preset
from waver_core.dit.layout import Layout
from waver_core.dit.model import DiTOutput, WaverDiT
from waver_core.dit.patches import condition, patchify, unpatchify

__all__ = ["PRESETS", "DiTConfig", "DiTOutput", "Layout", "WaverDiT", "condition", "patchify", "preset", "unpatchify"]

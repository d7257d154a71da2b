"""What every backend with weights needs: packages that may be missing, a device, a dtype, batches."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, ClassVar

from waver_core.checkpoints import Checkpoint
from waver_core.errors import BackendUnavailable, ConfigError


class Pretrained:
    """Base of backends with weights: building one is cheap; weights are loaded at the first use, inside the worker.

    device: "auto" takes a GPU where there is one. dtype: "auto" is `gpu_dtype` on a GPU and float32 on a CPU.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    """Modules that must be importable."""
    extra: ClassVar[str] = "models"
    """The extra of this project that installs them."""
    gpu_dtype: ClassVar[str] = "bfloat16"
    """What dtype "auto" means on a GPU; float32 where half precision is known to hurt."""

    def __init__(self, *, device: str = "auto", dtype: str = "auto", batch_size: int = 16) -> None:
        if dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(f"dtype must be auto, float32, float16 or bfloat16, not '{dtype}'")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        self._device, self._dtype, self.batch_size = device, dtype, batch_size

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """What must have been fetched before the first use."""
        return ()

    def identity(self, name: str, **parameters: Any) -> str:
        """A fingerprint: the backend's name, the exact revision of its checkpoints, and whatever else changes its numbers.

        Made without loading anything. The dtype goes in as it was asked for: what "auto" comes to, only the worker knows.
        """
        revisions = [f"{c.repo}@{c.exact_revision}" for c in self.checkpoints()]
        return " ".join([name, *revisions, self._dtype, *(f"{key}={value}" for key, value in parameters.items())])

    def module(self, name: str) -> Any:
        """Import a package; raises `BackendUnavailable` with the command that installs it."""
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise BackendUnavailable(
                f"{type(self).__name__} needs the package {name} ({error}): pip install -e '.[{self.extra}]'"
            ) from error

    def require(self) -> None:
        """Import every package of `packages`, so that a missing one is told of before weights are read."""
        for name in self.packages:
            self.module(name)

    @property
    def device(self) -> str:
        """The torch device."""
        if self._device != "auto":
            return self._device
        return "cuda" if self.module("torch").cuda.is_available() else "cpu"

    @property
    def dtype(self) -> Any:
        """The torch dtype of the weights."""
        name = self._dtype
        if name == "auto":
            name = self.gpu_dtype if self.device.startswith("cuda") else "float32"
        return getattr(self.module("torch"), name)

    def batches(self, n: int) -> Iterator[slice]:
        """Slices of at most `batch_size` over n items."""
        for start in range(0, n, self.batch_size):
            yield slice(start, min(n, start + self.batch_size))

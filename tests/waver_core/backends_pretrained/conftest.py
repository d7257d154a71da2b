"""What the tests of pretrained backends share: few threads, a folder of models of their own, and frames to look at."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from waver_core.errors import BackendUnavailable


@pytest.fixture(autouse=True)
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of models, so that nothing on this machine leaks in; two threads, whatever the machine has."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    folder = tmp_path / "models"
    monkeypatch.setenv("OPENWAVER_MODELS", str(folder))
    return folder


@pytest.fixture
def frames() -> np.ndarray:
    """Five different smooth pictures, uint8 [5, 90, 160, 3]."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 90, 160, 3)).astype(np.uint8)
    return np.stack([cv2.normalize(cv2.GaussianBlur(f, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX) for f in noise])


@pytest.fixture
def check_missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, Callable[[], Any]], None]:
    """`check_missing(backend, use)`: without its checkpoint, and without any of its packages, `use` says what to run."""

    def check(backend: Any, use: Callable[[], Any]) -> None:
        for checkpoint in backend.checkpoints()[:1]:
            with pytest.raises(BackendUnavailable) as raised:
                use()
            assert f"fetch --checkpoint {checkpoint.repo}" in str(raised.value)
            assert checkpoint.licence in str(raised.value)
        found = importlib.import_module
        for package in backend.packages:

            def absent(name: str, *args: Any, package: str = package) -> Any:
                if name == package:
                    raise ModuleNotFoundError(f"No module named '{name}'")
                return found(name, *args)

            with monkeypatch.context() as patch:
                patch.setattr(importlib, "import_module", absent)
                with pytest.raises(BackendUnavailable, match=f"needs the package {package} ") as raised:
                    use()
            assert f"pip install -e '.[{backend.extra}]'" in str(raised.value)

    return check

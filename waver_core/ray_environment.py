"""What every plane tells Ray before Ray is imported, and how an error for the user is read out of one of Ray's. No Ray here."""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)


def prepare_private_cluster() -> None:
    """Settings that Ray reads when it is imported, and never again; nothing where RAY_ADDRESS names a cluster to join."""
    if os.environ.get("RAY_ADDRESS") or "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else every actor pool prints a warning meant for Ray's authors
    # A replica that fails its health checks cannot be trusted to end its work: its GPUs are needed by the one that replaces it.
    os.environ.setdefault("RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS", "1")
    # Ray listens on more than loopback: guard the cluster by a token of its own, and leave no token file in the home.
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def init_options() -> dict[str, Any]:
    """Arguments of `ray.init`: quiet, one thread per worker (parallelism comes from many), and the models folder."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    environment = {"OMP_NUM_THREADS": "1"}
    if os.environ.get("OPENWAVER_MODELS"):
        environment["OPENWAVER_MODELS"] = os.environ["OPENWAVER_MODELS"]
    if not os.environ.get("RAY_ADDRESS"):
        options["include_dashboard"] = False
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH", "")]))
    return {**options, "runtime_env": {"env_vars": environment}}


def user_error_in(text: str) -> str | None:
    """The message of a `UserError` that a worker raised, from the text in which Ray wraps it; None where there is none."""
    told = re.search(r"waver_core\.errors\.(?:UserError|ConfigError|BackendUnavailable): (.+)", text)
    return told.group(1) if told else None

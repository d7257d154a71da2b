"""The rules of the house that no linter holds: names, pins, sizes, and what the files of deployment promise."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PLANES = ("curation", "training", "serving", "evaluation")
PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+( *; *[^;]+)?")
MAX_LINES = 400
LIBRARIES_TO_COME = {"datasets", "diffusers", "evaluate", "fastapi", "timm", "torch", "torchvision", "transformers", "vllm"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pin_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def entry_folders() -> list[Path]:
    """Folders with scripts that are run as files: Python puts such a folder first on sys.path."""
    scripts = [path for top in (*PLANES, "benchmarks") for path in sorted((ROOT / top).glob("*.py"))]
    return sorted({path.parent for path in scripts if "__main__" in path.read_text()})


def test_no_module_beside_an_entry_script_shadows_another() -> None:
    ours = {*PLANES, "waver_core"}
    taken = sys.stdlib_module_names | set(importlib.metadata.packages_distributions()) | LIBRARIES_TO_COME
    shadows = [
        str(path.relative_to(ROOT))
        for folder in entry_folders()
        for path in sorted(folder.iterdir())
        if path.stem in taken - ours and (path.suffix == ".py" or (path / "__init__.py").is_file())
    ]
    assert shadows == []


def test_constraints_hold_versions_and_nothing_else() -> None:
    assert [line for line in pin_lines() if not PIN.fullmatch(line)] == []
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_every_direct_dependency_is_pinned_within_its_bounds(project: dict[str, Any]) -> None:
    pins = {canonicalize_name(line.split("==")[0]): re.split(r"==|;", line)[1].strip() for line in pin_lines()}
    extras = project["project"]["optional-dependencies"]
    for text in [*project["project"]["dependencies"], *(text for group in extras.values() for text in group)]:
        requirement = Requirement(text)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin: run `make constraints`"
        assert requirement.specifier.contains(pin), f"{requirement.name}=={pin} does not fit {text!r}"


def test_one_cv2_and_the_headless_one() -> None:
    wheels = {canonicalize_name(name) for name in importlib.metadata.packages_distributions().get("cv2", [])}
    assert wheels == {"opencv-python-headless"}


def test_every_plane_is_packaged_and_under_the_import_contracts(project: dict[str, Any]) -> None:
    present = {plane for plane in PLANES if (ROOT / plane / "__init__.py").is_file()} | {"waver_core"}
    assert present == set(project["tool"]["importlinter"]["root_packages"])
    assert {f"{name}*" for name in present} == set(project["tool"]["setuptools"]["packages"]["find"]["include"])


def test_no_module_is_longer_than_the_house_allows() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"git cannot read this checkout: {listed.stderr.strip()}")
    modules = [ROOT / name for name in listed.stdout.splitlines() if not name.startswith("tests/")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules if path.is_file()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_licence_is_apache_2(project: dict[str, Any]) -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert project["project"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("target", ["help", "demo", "test", "check", "format", "bench", "clean"])
def test_makefile_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)

"""The command line: every wrong call ends with one line that says what to mend, a code, and nothing written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from curation import run_funnel
from waver_core import command_line
from waver_core.config import load_config

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the entry script's main in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run_funnel.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command_line.run(run_funnel.app)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with inputs of several wrong kinds and one that is good enough to get past the listing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "list.csv").write_text("path,licence\na.mp4,CC0\n")
    (tmp_path / "bad.yaml").write_text("a: [\n")
    return tmp_path


WRONG = {
    "no arguments": ([], "give --input and --output"),
    "no input": (["--output", "{here}/out"], "give --input and --output"),
    "no output": (["--input", "{here}/videos"], "give --input and --output"),
    "input not there": (["--input", "{here}/none", "--output", "{here}/out"], "no such input: "),
    "empty folder": (["--input", "{here}/empty", "--output", "{here}/out"], "no files in "),
    "glob without hits": (["--input", "{here}/*.mkv", "--output", "{here}/out"], "no files in "),
    "list not there": (["--input", "{here}/none.csv", "--output", "{here}/out"], "no such list: "),
    "list without uri": (["--input", "{here}/list.csv", "--output", "{here}/out"], "has no column 'uri', only: path, licence"),
    "unknown profile": (["--input", "{here}/videos", "--output", "{here}/out", "--profile", "clustr"], "did you mean 'cluster'?"),
    "unknown key": (
        ["--input", "{here}/videos", "--output", "{here}/out", "--set", "funnel.passes.shots.cpu=2"],
        "funnel.passes.shots.cpu: unknown key",
    ),
    "unknown option of a stage": (
        ["--input", "{here}/videos", "--output", "{here}/out", "--set", "funnel.stages.segment.min_length=2"],
        "funnel.stages.segment.min_length: unknown key",
    ),
    "gate on an unknown column": (
        ["--input", "{here}/videos", "--output", "{here}/out", "--set", "tiers.480p.motion.column=motion_foregroud_px"],
        "did you mean 'motion_foreground_px'",
    ),
    "set without value": (["--input", "{here}/videos", "--output", "{here}/out", "--set", "funnel"], "--set takes a.b=value"),
    "configuration not there": (
        ["--input", "{here}/videos", "--output", "{here}/out", "--config", "{here}/none.yaml"],
        "no configuration file at ",
    ),
    "configuration is no YAML": (
        ["--input", "{here}/videos", "--output", "{here}/out", "--config", "{here}/bad.yaml"],
        "no valid YAML",
    ),
    "configuration is a folder": (["--input", "{here}/videos", "--output", "{here}/out", "--config", "{here}"], "cannot be read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_one_line_and_writes_nothing(call: Call, here: Path, what: str) -> None:
    arguments, expected = WRONG[what]
    before = tree(here)
    code, out, err = call("--serial", *(a.format(here=here) for a in arguments))
    assert code == 2
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert expected in err and "Traceback" not in err
    assert out == ""
    assert tree(here) == before


PREVIEW_WRONG = {
    "no run": ([], "no finished run at "),
    "unknown key": (["--set", "tiers.480p.aesthetic.mn=3"], "tiers.480p.aesthetic.mn: unknown key"),
    "unknown profile": (["--profile", "dmo"], "did you mean 'demo'?"),
    "no clips yet": ([], "no clip table at "),
}


@pytest.mark.parametrize("what", PREVIEW_WRONG)
def test_a_wrong_preview_is_one_line_and_writes_nothing(call: Call, here: Path, what: str) -> None:
    arguments, expected = PREVIEW_WRONG[what]
    if what != "no run":
        (here / "out").mkdir()
        (here / "out" / "config.yaml").write_text(load_config().resolved_yaml())
    before = tree(here)
    code, out, err = call("preview", "--output", here / "out", *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert out == ""
    assert tree(here) == before


def test_an_unknown_option_is_refused_with_a_usage_line(call: Call, here: Path) -> None:
    before = tree(here)
    code, out, err = call("--imput", here / "videos", "--output", here / "out")
    assert code == 2 and "--imput" in err and "--input" in err and out == ""
    assert "Traceback" not in err and tree(here) == before


def test_help_names_every_option(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert [o for o in ("--input", "--output", "--config", "--profile", "--set", "--serial", "preview") if o not in out] == []


def test_a_run_in_which_no_source_can_be_used_is_no_success(call: Call, here: Path) -> None:
    code, out, err = call("--serial", "--input", here / "videos", "--output", here / "out")
    assert code == 3
    assert err == "error: no source could be used: 1 not_media\n"
    assert "Report:" not in out
    assert (here / "out" / "report.html").is_file()  # what went wrong can still be looked up


def test_the_script_runs_as_a_file_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "curation" / "run_funnel.py"), "--serial", "--input", "none", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: no such input: {tmp_path.resolve()}/none\n"
    assert done.stdout == "" and tree(tmp_path) == []

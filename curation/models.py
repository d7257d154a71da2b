"""Entry script for the models that a run needs: list them, fetch them, and check that every backend answers.

python curation/models.py list --profile small
python curation/models.py fetch --profile small
python curation/models.py check --profile small
Where there is no network: fetch elsewhere, copy the models folder, set OPENWAVER_MODELS to it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from curation.backend_check import Need, Verdict, check, needs_of
from curation.stage import load_stages
from waver_core.checkpoints import Checkpoint, models_folder
from waver_core.command_line import ConfigPath, Profiles, Sets, new_console
from waver_core.command_line import run as run_command_line
from waver_core.config import Config, load_config
from waver_core.errors import UserError
from waver_core.fetching import FetchFailed, distinct, fetch, known_checkpoint, require_space, state_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


class NotReady(UserError):
    """At least one backend of the configuration would fail in a run."""

    exit_code = 1


@app.command("list")
def list_(config: ConfigPath = None, profile: Profiles = None, set_: Sets = None) -> None:
    """Show which checkpoints and packages the backends of a profile need, and which of them are here."""
    needs = _needs(load_config(config, profile or [], set_ or []))
    table = _table(
        "stage", "capability", "backend", "checkpoint", "revision", "MB", "licence", "gated", "state", "packages missing"
    )
    for need in needs:
        packages = ", ".join(need.packages_missing)
        use = (need.stage, need.use.capability, need.use.name)
        if not need.checkpoints:
            table.add_row(*use, "none", "", "", "", "", escape(need.refused) or "needs none", packages)
        for c in need.checkpoints:
            size, gated = f"{c.size_mb:,}" if c.size_mb is not None else "?", "yes" if c.gated else "no"
            table.add_row(*use, c.repo, c.exact_revision[:12], size, escape(c.licence), gated, state_of(c), packages)
    console = new_console(200)
    console.print(table)
    wanted = distinct(c for n in needs for c in n.checkpoints)
    absent = [c for c in wanted if state_of(c) != "present"]
    console.print(f"{_count(wanted)}, {len(absent)} to fetch ({_size_text(absent)}). Models folder: {models_folder()}")
    for line in _remedies(needs, _options(config, profile, set_)):
        console.out(line)


@app.command("fetch")
def fetch_(
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
    checkpoint: Annotated[str | None, typer.Option("--checkpoint", help="Fetch this one alone: owner/name.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit, with --checkpoint.")] = None,
) -> None:
    """Download what a profile needs and is not in the models folder. Run it again to go on where it stopped."""
    console = new_console(200)
    if checkpoint is not None:
        wanted = [known_checkpoint(checkpoint, revision)]
        asked = shlex.join(["--checkpoint", checkpoint, *(["--revision", revision] if revision else [])])
    else:
        needs = _needs(load_config(config, profile or [], set_ or []))
        if refused := [n for n in needs if n.refused]:
            raise UserError("; ".join(dict.fromkeys(f"{n.stage}: {n.refused}" for n in refused)))
        wanted, asked = distinct(c for n in needs for c in n.checkpoints), _options(config, profile, set_)
    absent = [c for c in wanted if state_of(c) != "present"]
    require_space(models_folder(), sum(c.size_mb or 0 for c in absent) * 10**6)
    failed: dict[str, FetchFailed] = {}
    for one in absent:
        try:
            fetch(one, console.out)
        except FetchFailed as error:
            failed[one.repo] = error
            if len(absent) > 1:
                console.out(f"not fetched: {error}")
    if failed:
        # A single failure says itself what is wrong; of several the reasons stand above.
        reason = str(next(iter(failed.values()))) if len(absent) == 1 else f"not fetched: {', '.join(failed)}"
        raise UserError(
            f"{reason}. Without network here: run `python curation/models.py fetch {asked}` on a machine that has one, copy the "
            f"models folder that it names, and set OPENWAVER_MODELS to the copy (now {models_folder()})"
        )
    console.out(f"{_count(wanted)} in {models_folder()}, {len(absent)} of them fetched now")


@app.command("check")
def check_(
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a backend may take to load and answer.")] = 1800.0,
) -> None:
    """Load every backend of a profile and let it answer on one rendered clip; tells of all that would fail in a run."""
    settings = load_config(config, profile or [], set_ or [])
    console = new_console(200)
    verdicts = check(settings, _needs(settings), timeout, lambda verdict: console.out(_progress(verdict)))
    table = _table("stage", "capability", "backend", "seconds", "memory MB", "GPU MB", "result")
    for v in verdicts:
        use = (v.need.stage, v.need.use.capability, v.need.use.name)
        spent = (f"{v.seconds:.1f}", f"{v.memory_mb:,.0f}", f"{v.gpu_mb:,.0f}") if v.seconds else ("", "", "")
        result = "\n".join(v.problems) or (f"ok: {v.answer}" if v.seconds else f"not asked: {v.answer}")
        table.add_row(*use, *spent, escape(result))
    console.print(table)
    bad = [v for v in verdicts if v.problems]
    if bad:
        remedies = _remedies([v.need for v in bad], _options(config, profile, set_))
        if others := [v for v in bad if v.need.refused or not v.need.problems]:
            remedies.append(f"of {', '.join(f'{v.need.stage}/{v.need.use.name}' for v in others)} the table says why")
        raise NotReady(f"{len(bad)} of {len(verdicts)} backends cannot run: {'; '.join(remedies)}")
    console.out(f"{len(verdicts)} backends can run")


def _needs(config: Config) -> list[Need]:
    return needs_of(config, load_stages(config))


def _remedies(needs: Sequence[Need], options: str) -> list[str]:
    """The commands that bring what is missing."""
    lines = []
    for extra in sorted({n.extra for n in needs if n.packages_missing}):
        packages = sorted({p for n in needs if n.extra == extra for p in n.packages_missing})
        command = "`make setup-models`, or pip install -e '.[models]'," if extra == "models" else f"pip install -e '.[{extra}]'"
        lines.append(f"{command} installs {', '.join(packages)}")
    absent = distinct(c for n in needs for c in n.checkpoints if state_of(c) != "present")
    if absent:
        lines.append(f"`python curation/models.py fetch {options}` brings {_count(absent)} ({_size_text(absent)})")
    return lines


def _count(checkpoints: Sequence[Checkpoint]) -> str:
    return f"{len(checkpoints)} checkpoint{'' if len(checkpoints) == 1 else 's'}"


def _size_text(checkpoints: Sequence[Checkpoint]) -> str:
    unknown = sum(c.size_mb is None for c in checkpoints)
    total = f"{sum(c.size_mb or 0 for c in checkpoints):,} MB"
    return f"{total} and {unknown} of unknown size" if unknown else total


def _options(config: str | None, profiles: list[str] | None, sets: list[str] | None) -> str:
    """The configuration's options as they were given, to be pasted into another command."""
    given = [*(["--config", config] if config else [])]
    for name, values in (("--profile", profiles), ("--set", sets)):
        given += [part for value in values or [] for part in (name, value)]
    return shlex.join(given) if given else "--profile embedded"


def _progress(verdict: Verdict) -> str:
    how = f"problem: {verdict.problems[0]}" if verdict.problems else f"ok ({verdict.seconds:.1f} s)"
    return f"{verdict.need.stage} {verdict.need.use.capability}/{verdict.need.use.name}: {how}"


def _table(*columns: str) -> Table:
    table = Table(header_style="bold")
    for name in columns:
        numeric = name.endswith("MB") or name == "seconds"
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table


if __name__ == "__main__":
    run_command_line(app)

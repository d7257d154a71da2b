"""Entry script of the curation plane.

python curation/run_funnel.py --input DIR --output DIR
python curation/run_funnel.py preview --output DIR --set tiers.480p.aesthetic.min=5
ray job submit --working-dir . -- python curation/run_funnel.py --input /abs/in --output /abs/out
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file: the root, not this folder, holds the packages

from typing import Annotated

import typer
from rich.table import Table

from curation.gates import tier_gates
from curation.selection import preview as preview_tiers
from curation.stage import load_stages
from waver_core.command_line import ConfigPath, Profiles, Sets, new_console
from waver_core.command_line import run as run_command_line
from waver_core.config import load_config
from waver_core.errors import UserError
from waver_core.storage import exists, is_local, join, local_path
from waver_core.telemetry import duration_text

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Output = Annotated[str, typer.Option("--output", help="Folder or URL for manifests, report and work files.")]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    input_uri: Annotated[str | None, typer.Option("--input", help="Folder, glob, URL, or list (.parquet, .csv, .jsonl).")] = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder or URL for manifests, report and work files.")] = None,
    config: ConfigPath = None,
    profile: Profiles = None,
    set_: Sets = None,
    serial: Annotated[bool, typer.Option("--serial", help="Run in this process, without Ray (for debugging).")] = False,
) -> None:
    """Curate raw videos and images into tier manifests and a report. Run it again to go on where it stopped."""
    if context.invoked_subcommand is not None:
        return
    if not input_uri or not output:
        raise UserError("give --input and --output, for example: python curation/run_funnel.py --input videos --output out")
    from curation.funnel import run_funnel
    from curation.serial import Executor, Serial

    console = new_console()
    settings = load_config(config, profile or [], set_ or [])
    tier_gates(settings, load_stages(settings))  # configuration errors come before a cluster is started
    source, target = (str(Path(local_path(uri)).resolve()) if is_local(uri) else uri for uri in (input_uri, output))
    execute: Executor = Serial()
    if not serial:
        from curation.executor import OnRay  # importing Ray takes a second; --help and errors need it not

        execute = OnRay()
    run_funnel(settings, source, target, execute, console)
    console.print(f"Report: {join(target, 'report.html')}")


@app.command()
def preview(output: Output, config: ConfigPath = None, profile: Profiles = None, set_: Sets = None) -> None:
    """Print what each tier would keep under other thresholds, from stored scores alone; decodes and writes nothing."""
    stored = join(output, "config.yaml")
    if not exists(stored):
        raise UserError(f"no finished run at {output} (config.yaml is missing): run the funnel with this output first")
    # Without a file or profile of its own the change is made to what the run used.
    other = config or profile
    base = load_config(stored)
    changed = load_config(config, profile or [], set_ or []) if other else load_config(stored, [], set_ or [])
    before, after = (tier_gates(c, load_stages(c)) for c in (base, changed))
    result = preview_tiers(join(output, "clips"), before, after)
    table = Table(title=f"{result.rows:,} clips under other thresholds", title_justify="left", header_style="bold")
    for name in ("tier", "clips before", "clips after", "change", "video before", "video after"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for tier in {**before, **after}:
        old, new = result.before.get(tier), result.after.get(tier)
        clips = [c.clips if c else 0 for c in (old, new)]
        hours = [duration_text((c.hours if c else 0.0) * 3600) for c in (old, new)]
        table.add_row(tier, f"{clips[0]:,}", f"{clips[1]:,}", f"{clips[1] - clips[0]:+,}", *hours)
    console = new_console()
    console.print(table)
    if result.unscored:
        console.print(
            f"{result.unscored:,} clips were rejected before all their scores were made; a run with these thresholds makes them."
        )


if __name__ == "__main__":
    run_command_line(app)

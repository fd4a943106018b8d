"""The command ``camshaft``: what runs there are, what they reached, and what this machine has.

It ends with 0; with 1 if there is not what was asked for, or `doctor` found a problem; with 2 for wrong arguments.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from .html import duration, flat, shown
from .run import Mode, Row, Run, RunNotFoundError, runs_in

RUNS = Path("runs")  # where RunDirectory() makes them
LAST = "last"


class _CannotError(Exception):
    """What was asked for cannot be done, with what to write instead."""


class _RunName(click.ParamType[Run]):
    """A run: a path, the name of one in ``runs/``, or "last"."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Run:
        if isinstance(value, Run):
            return value
        if value == LAST:
            runs = runs_in(RUNS)
            if not runs:
                raise RunNotFoundError("There is no run in runs. Pass the path of a run directory.")
            return runs[-1]
        path = Path(value)
        return Run(path if path.exists() or not (RUNS / value).is_dir() else RUNS / value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [run.name for run in runs_in(RUNS)] if RUNS.is_dir() else []
        paths = [CompletionItem(incomplete, type="dir")] if "/" in incomplete else []
        return [CompletionItem(name) for name in [*names, LAST] if name.startswith(incomplete)] + paths


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="camshaft")
def app() -> None:
    """Look at runs, and at what this machine has for training.

    A RUN is the path of a run directory, the name of one in runs/, or "last".

    For completion in the shell, put into ~/.bashrc: eval "$(_CAMSHAFT_COMPLETE=bash_source camshaft)"; into ~/.zshrc
    the same with zsh_source.
    """


@app.command("list")
@click.argument("directory", type=click.Path(path_type=Path), default=RUNS)
@click.option("--by", metavar="VALUE", help="Sort by the best of this value, such as val_acc; by default by time.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="Which is better, if the runs do not say so.")
@_as_json
def list_runs(directory: Path, by: str | None, mode: Mode | None, as_json: bool) -> None:
    """List the runs in DIRECTORY (runs, if it is left out), the newest last."""
    runs = runs_in(directory)
    value = by or next((run.watched for run in reversed(runs) if run.watched), None)
    mode = mode or next((found for run in reversed(runs) if value and (found := run.better(value))), None)
    if by is not None:
        _check_value(by, mode, runs)
    bests = {id(run): run.best(value, mode) for run in runs} if value else {}
    reached = {key: row[value] for key, row in bests.items() if row is not None and value}
    if by is not None:
        sign = -1 if mode == "max" else 1
        runs.sort(key=lambda run: sign * reached.get(id(run), math.inf * sign))
    best = (min if mode == "min" else max)(reached.values()) if reached else None
    if as_json:
        _print_json([_facts(run, value, bests.get(id(run))) for run in runs])
        return
    rows = [
        [
            run.name, run.status, duration(run.seconds), str(len(run.epochs)), _number(reached.get(id(run))),
            "" if bests.get(id(run)) is None else str(int((bests[id(run)] or {})["epoch"])),
            "★" if reached and reached.get(id(run)) == best else "",
        ]
        for run in runs
    ]  # fmt: skip
    if not rows:
        click.echo(f"There is no run in {directory}.")
        return
    columns = ["run", "status", "took", "epochs", f"best {value}" if value else "best", "epoch", ""]
    _print_table(columns, rows, drop=["took", "epochs", "epoch", "status"])


def _check_value(by: str, mode: Mode | None, runs: Sequence[Run]) -> None:
    known = list(dict.fromkeys(name for run in runs for row in run.epochs[-1:] for name in row))
    if by not in known:
        values = [name for name in known if name not in ("epoch", "step")]
        close = "".join(f'Did you mean "{one}"? ' for one in get_close_matches(by, values, 1))
        raise _CannotError(f'No run has a value "{by}". {close}Values: {", ".join(values) or "none"}.')
    if mode is None:
        raise _CannotError(f'No run says whether more or less of "{by}" is better. Write --mode min or --mode max.')


@app.command()
@click.argument("run", type=_RunName())
@click.option("--page", is_flag=True, help="Write its page anew, as report.html.")
@_as_json
def show(run: Run, page: bool, as_json: bool) -> None:
    """Show what RUN has reached, with which settings, and where its page is."""
    best = run.best_row
    path = run.path / "report.html"
    if page:
        from .page import run_page
        from .plotly_script import plotly_script

        _write(path, lambda: run_page(run, plotly_script(run.path.resolve().parent)))
    if as_json:
        _print_json({**_facts(run, run.watched, best), "settings": run.settings, "environment": run.environment,
                     "history": run.epochs, "remarks": run.remarks})  # fmt: skip
        return
    facts = [
        ("run", str(run.path)), ("status", f"{run.status}{f': {run.reason}' if run.reason else ''}"),
        ("started", "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M:%S}"),
        ("took", duration(run.seconds)), ("epochs", str(len(run.epochs))),
        ("best", "" if best is None else f"{run.watched} {best[run.watched or '']:.6g} in epoch {int(best['epoch'])}"),
        ("page", str(path) if path.exists() else f"none yet; write: camshaft show {run.path} --page"),
    ]  # fmt: skip
    _print_table(None, [[name, value] for name, value in facts if value])
    if run.settings:
        click.echo("\nSettings")
        _print_table(None, [[name, shown(value)] for name, value in flat(run.settings)])
    if run.epochs:
        names = list(dict.fromkeys(name for row in run.epochs for name in row))
        last = run.epochs[-10:]
        click.echo("\nEpochs" if len(last) == len(run.epochs) else f"\nThe last 10 of {len(run.epochs)} epochs")
        rows = [[*(_number(row.get(name)) for name in names), _star(row, best)] for row in last]
        _print_table([*names, ""], rows, drop=[name for name in names if name not in ("epoch", run.watched)])
    if run.remarks:
        click.echo("\nRemarks")
        _print_table(None, [[f"epoch {one['epoch']}, step {one['step']}", str(one["text"])] for one in run.remarks])


def _star(row: Row, best: Row | None) -> str:
    return "★" if best is not None and row["epoch"] == best["epoch"] else ""


@app.command()
@click.argument("runs", type=_RunName(), nargs=-1, required=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("comparison.html"), show_default=True,
              help="Where to write the page.")  # fmt: skip
@_as_json
def compare(runs: tuple[Run, ...], output: Path, as_json: bool) -> None:
    """Write a page with the curves of the RUNS over one another, and print which settings differ."""
    from .comparison import comparison_page, differing, short_names
    from .plotly_script import plotly_script

    names = short_names(runs)
    columns, rows = differing([run.settings for run in runs], names)
    if as_json:
        facts = [_facts(run, run.watched, run.best_row) for run in runs]
        settings = {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}
        _print_json({"runs": facts, "differing_settings": settings})
        return
    script = plotly_script(runs[0].path.resolve().parent)
    _write(output, lambda: comparison_page(runs, output.resolve().parent, script))
    if rows:
        _print_table(columns, rows)
    else:
        click.echo("The settings are the same.")
    click.echo(f"\nThe curves are in {output}.")
    if script is None:
        click.echo('They need plotly, which is not installed. Write: pip install "camshaft[report]".', err=True)


@app.command()
@click.argument("runs", type=_RunName(), nargs=2)
@_as_json
def diff(runs: tuple[Run, Run], as_json: bool) -> None:
    """Find the first step in which two RUNS differ, by what a Fingerprint has written; exit with 1 if they do."""
    from .difference import first_difference

    for run in runs:
        if not run.text("fingerprints.jsonl"):
            raise _CannotError(f"{run.path} has no fingerprints.jsonl. Attach Fingerprint(every=...) to a run.")
    found = first_difference(*runs)
    if as_json:
        _print_json(found.as_json())
    else:
        click.echo(found.in_words())
    if found.step is not None:
        sys.exit(1)


@app.command("replay")
@click.argument("run", type=_RunName())
@click.option("--step", type=click.IntRange(min=1), required=True, help="Which step to make again.")
@click.option("--debug", is_flag=True, help="Stop in Python's debugger at the first line of your code in the step.")
@click.option("--anomaly/--no-anomaly", default=True, show_default=True,
              help="Let torch find the operation whose gradient is NaN.")  # fmt: skip
@click.option("--hook", metavar="FILE:FUNCTION", help="Call function(engine) just before the step's batch is used.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def replay_step(run: Run, step: int, debug: bool, anomaly: bool, hook: str | None, command: tuple[str, ...]) -> None:
    """Make one step of RUN again, from the checkpoint before it, and say what was computed in it.

    COMMAND is what started the run, after "--"; it can be left out if it would be the same. Its handlers write into a
    directory that is removed, and it ends after the step. The exit code is 0 if the step was made again and no digest
    of a Fingerprint differs.
    """
    from .replay import CannotReplayError, replay

    try:
        made = replay(run, step, command, debug=debug, anomaly=anomaly, hook=hook)
    except CannotReplayError as error:
        raise _CannotError(str(error)) from error
    click.echo("\n" + "\n".join(_plain(line) for line in made.in_words().splitlines()))
    if not made.is_good:
        sys.exit(1)


@app.command()
@click.argument("run", type=_RunName())
@click.argument("order", nargs=-1, required=True)
@click.option("--after", type=click.Choice(["epoch"]), help="When to stop; by default after the present step.")
@click.option("--timeout", type=click.FloatRange(min=0), default=60.0, show_default=True,
              help="Seconds to wait for the answer.")  # fmt: skip
def steer(run: Run, order: tuple[str, ...], after: str | None, timeout: float) -> None:
    """Send an ORDER to a RUN that goes on, with a Steering, and print the answer; exit with 1 if it is not taken.

    \b
    validate                      make a validation after the next step
    checkpoint                    save the run after the next step
    stop [--after epoch]          end the run
    lr x0.5                       multiply the learning rates
    set HANDLER.SETTING=VALUE     change a setting, such as EarlyStopping.patience=10
    """  # noqa: D301 - click keeps the lines after a real backspace
    from .steering import NoOrderError, NotTakenError, parsed, send

    try:
        click.echo(_plain(send(run, parsed(order, after), timeout)))
    except NoOrderError as error:
        raise click.UsageError(str(error)) from error
    except NotTakenError as error:
        raise _CannotError(str(error)) from error


@app.command()
@_as_json
def doctor(as_json: bool) -> None:
    """Look at devices, versions and compilers, and say what is missing and how to install it."""
    from .doctor import findings

    found = []
    for one in findings():
        found.append(one)
        if not as_json:
            _print_finding(one.name, one.state, one.found, one.advice)
    if as_json:
        _print_json([asdict(one) for one in found])
    problems = [one.name for one in found if one.state == "problem"]
    if not as_json:
        click.echo(f"\n{len(problems)} problems: {', '.join(problems)}." if problems else "\nNo problem was found.")
    if problems:
        sys.exit(1)


def _print_finding(name: str, state: str, found: str, advice: str) -> None:
    from rich.text import Text

    colour = {"ok": "green", "missing": "yellow", "problem": "red"}[state]
    line = Text.assemble((f"{state:8}", colour), (f"{name:18} ", "bold"), _plain(found))
    if advice:
        line.append(f"\n        {_plain(advice)}", "dim")
    _console().print(line, soft_wrap=True, highlight=False)


# What is printed --------------------------------------------------------------------------------------


def _facts(run: Run, value: str | None, best: Row | None) -> dict[str, Any]:
    return {
        "run": run.name,
        "path": str(run.path),
        "status": run.status,
        "reason": run.reason,
        "started": None if run.started is None else run.started.isoformat(timespec="seconds"),
        "seconds": run.seconds,
        "epochs": len(run.epochs),
        "best": None if best is None else {"name": value, "value": best[value or ""], "epoch": int(best["epoch"])},
    }


def _number(value: float | None) -> str:
    return "" if value is None else shown(value)


def _plain(text: str) -> str:
    """Return text in one line and without what would steer the terminal."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _console() -> Any:
    from rich.console import Console

    is_bounded = sys.stdout.isatty() or "COLUMNS" in os.environ  # a file has room for whole lines
    return Console(highlight=False, emoji=False, markup=False, width=None if is_bounded else 1000)


def _print_table(columns: Sequence[str] | None, rows: Sequence[Sequence[str]], *, drop: Sequence[str] = ()) -> None:
    """Print a table; where it is too wide, without the columns of ``drop``, one after the other."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    kept = list(range(len(rows[0])))
    for name in drop if columns is not None else ():
        if sum(max(len(line[at]) for line in (columns or (), *rows)) + 2 for at in kept) - 2 > console.width:
            kept = [at for at in kept if (columns or ())[at] != name]
    table = Table(box=None, show_header=columns is not None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for at in kept:
        if columns is None:
            table.add_column(overflow="fold")
        else:
            table.add_column(Text(_plain(columns[at])), no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(Text(_plain(row[at])) for at in kept))
    console.print(table)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(_without_nan(value), indent=2, default=str))


def _without_nan(value: Any) -> Any:
    """Return the value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, make: Callable[[], str]) -> None:
    try:
        path.write_text(make(), encoding="utf-8")
    except OSError as error:
        raise _CannotError(f"{path} could not be written: {error.strerror}. Choose another place.") from error


def main() -> NoReturn:
    """Run the command."""
    try:
        app(standalone_mode=False)
    except (RunNotFoundError, _CannotError) as error:
        click.echo(_plain(str(error)), err=True)
        sys.exit(1)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "camshaft"
        fact = _plain(error.format_message()).removesuffix(".")
        click.echo(f"{fact}{'' if fact.endswith('?') else '.'} Write: {command} --help.", err=True)
        sys.exit(2)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:  # of a pager that was closed
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)

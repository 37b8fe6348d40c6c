"""Commands that work on runs: compress, build, profile, report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mmedge.errors import UsageError, needs_extra

if TYPE_CHECKING:
    from mmedge.pipeline.folder import RunFolder
    from mmedge.report.model import Report

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def result_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--json``, ``-q`` and ``-v``, the same on every command with a result."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show where an error came from."),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
        click.option("--json", "as_json", is_flag=True, help="The result as JSON on standard output."),
    ):
        function = option(function)
    return function


def require_workstation() -> None:
    """Refuse before work starts where the workstation side is not installed.

    Raises:
        UsageError: names the extra.
    """
    from importlib.util import find_spec

    for package in (
        "torch",
        "torchao",
        "torch_pruning",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "safetensors",
        "accelerate",
    ):
        if find_spec(package) is None:
            raise UsageError(needs_extra(package, "compress"))


def command_line() -> str:
    """The command that goes on with what this one does: as the user typed it, but for ``--fresh``."""
    return shlex.join(["mmedge", *(word for word in sys.argv[1:] if word != "--fresh")])


@click.command()
@click.option("--recipe", "recipe_name", required=True, metavar="NAME|FILE", help="A shipped recipe, or ./file.yaml.")
@click.option(
    "--task",
    "task_spec",
    metavar="SPEC",
    help="Instead of the recipe's: NAME, file.py:function or package.module:function.",
)
@click.option("--target", "targets", multiple=True, metavar="NAME", help="Instead of the recipe's targets; repeatable.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="Run folder [default: runs/RECIPE-TASK-HASH]."
)
@click.option(
    "--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe: stages.0.width=0.3; repeatable."
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of every random choice.")
@click.option("--fresh", is_flag=True, help="Keep an existing run aside and start anew.")
@result_options
def compress(
    recipe_name: str,
    task_spec: str | None,
    targets: tuple[str, ...],
    output: Path | None,
    changes: tuple[str, ...],
    seed: int,
    fresh: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Compress a trained model as a recipe says, and measure every stage on every target.

    The same command again resumes: what is finished is not done twice.
    """
    require_workstation()
    from mmedge.cli.console import progress_for
    from mmedge.recipe import find_recipe, load_recipe

    path = find_recipe(recipe_name)
    recipe = load_recipe(path, task=task_spec, targets=targets, changes=changes)
    from mmedge.pipeline.compress import Job, train_along
    from mmedge.pipeline.compress import compress as run
    from mmedge.pipeline.team import follows

    job = Job(recipe, path.name, seed, output, command_line(), fresh)
    if follows():
        train_along(job)
        return 0
    progress = progress_for(quiet)
    progress.say(f"recipe {recipe.name}, task {recipe.task}, targets {', '.join(recipe.targets)}")
    return _show(*run(job, progress), as_json)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--target", required=True, metavar="NAME", help="The target to build engines for.")
@result_options
def build(run: Path, target: str, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Build and measure the engines of an existing RUN for one more target, or on the device itself.

    On a device, where torch is not installed, the engines are built from the graphs that the
    workstation lowered for it.
    """
    from mmedge.cli.console import progress_for

    if _on_a_device(run, target):
        from mmedge.pipeline.device import build_here

        return _show(*build_here(run, target, command_line(), progress_for(quiet)), as_json)
    require_workstation()
    from mmedge.pipeline.compress import add_target

    return _show(*add_target(run, target, command_line(), progress_for(quiet)), as_json)


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN|ARTIFACT")
@click.option("--target", metavar="NAME", help="Measure a RUN on this target too.")
@click.option("--queries", type=click.IntRange(1), help="Timed queries per engine.")
@click.option("--processes", type=click.IntRange(1, 64), help="That share them, each with all engines opened anew.")
@click.option(
    "--duration", type=click.FloatRange(0, min_open=True), metavar="S", help="Stop timing a target after this long."
)
@click.option("--threads", type=click.IntRange(1, 256), help="Threads of a CPU engine.")
@result_options
def profile(
    path: Path,
    target: str | None,
    queries: int | None,
    processes: int | None,
    duration: float | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Measure latency and memory again: all engines of a RUN side by side, or one engine ARTIFACT.

    A RUN keeps its earlier timing aside and gets the new one into its report. An ARTIFACT (a folder
    under artifacts/) is timed alone, on random inputs.
    """
    from mmedge.cli.console import progress_for
    from mmedge.profile.single import time_artifact

    wanted: dict[str, Any] = {"queries": queries, "processes": processes, "budget_s": duration, "threads": threads}
    changes = {name: value for name, value in wanted.items() if value is not None}
    if (path / "manifest.json").is_file():
        if target:
            raise UsageError("--target goes with a RUN; an ARTIFACT knows its own")
        _print_engine(time_artifact(path, progress_for(quiet), **changes), as_json)
        return 0
    from mmedge.pipeline.folder import open_run

    open_run(path)  # a wrong path is said to be one, also on a device without torch
    if target and _on_a_device(path, target):
        from mmedge.pipeline.device import build_here

        return _show(*build_here(path, target, command_line(), progress_for(quiet), True, changes), as_json)
    require_workstation()
    from mmedge.pipeline.compress import compress as run
    from mmedge.pipeline.compress import job_of

    job = job_of(path, [target] if target else [], command_line(), "timing", changes)
    return _show(*run(job, progress_for(quiet)), as_json)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the HTML page here."
)
@result_options
def report(run: Path, html: Path | None, as_json: bool, quiet: bool, verbose: bool) -> int:
    """Show the report of a RUN; exit status 3 when a gate failed."""
    from mmedge.report.model import Report

    found = Report.load(run)
    if html is not None:
        if not html.name or not html.parent.is_dir():
            raise UsageError(
                "no file can be written there", where=f"--html {str(html)!r}", fix="name a file in a folder that exists"
            )
        from mmedge.report.html import write_html

        write_html(found, html)
        if not quiet:
            print(f"wrote {html}", file=sys.stderr)
    _print_report(found, run, as_json)
    return 0 if found.verdict == "pass" else 3


def _on_a_device(run: Path, target: str) -> bool:
    """Whether to go on from what a workstation lowered: without torch there is no other way."""
    from importlib.util import find_spec

    from mmedge.pipeline.device import holds

    return find_spec("torch") is None and holds(run, target)


def _show(found: Report, folder: RunFolder, as_json: bool) -> int:
    _print_report(found, folder.path, as_json)
    return 0 if found.verdict == "pass" else 3


def _print_report(found: Report, folder: Path, as_json: bool) -> None:
    if as_json:
        print(found.model_dump_json(by_alias=True, indent=2))
        return
    from mmedge.report.terminal import show

    show(found, folder)


def _print_engine(found: dict[str, Any], as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(found, indent=2))
        return
    latency = found["latency_ms"]
    how = f"{found['threads']} thread(s), {latency['queries']} queries of random data"
    how += f" in {len(latency['p50_per_process'])} process(es)"
    print(f"{found['name']} on {found['target']}, {how}")
    for name in ("p50", "p90", "p99", "mean"):
        value = latency[name]
        print(f"  {name:5s} {value:.3f} ms" if value is not None else f"  {name:5s} not measured: {latency['reason']}")
    print(f"  memory {found['peak_memory_mib']:.1f} MiB above the bare process")

"""Commands that list, show, check and start things: recipe, task, target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from mmedge.cli.runs import require_workstation, result_options
from mmedge.errors import MmedgeError, TargetError, UsageError, unknown


@click.group()
def recipe() -> None:
    """List, show and check recipes."""


@recipe.command("list")
@result_options
def recipe_list(as_json: bool, quiet: bool, verbose: bool) -> None:
    """The shipped recipes."""
    from mmedge.recipe import load_recipe, recipe_files

    found = {name: load_recipe(path).description for name, path in recipe_files().items()}
    _table(found, as_json)


@recipe.command("show")
@click.argument("name", metavar="NAME|FILE")
@result_options
def recipe_show(name: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print a recipe, comments included: a file to start from."""
    from mmedge.recipe import find_recipe, load_recipe, read_recipe

    path = find_recipe(name)
    click.echo(json.dumps(load_recipe(path).as_json(), indent=2) if as_json else read_recipe(path), nl=False)


@recipe.command("check")
@click.argument("name", metavar="NAME|FILE")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change the recipe first; repeatable.")
@result_options
def recipe_check(name: str, changes: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool) -> None:
    """Check a recipe without running it: keys, types, ranges, names, targets' options, and the order of its stages."""
    require_workstation()
    from mmedge import plugins
    from mmedge.recipe import find_recipe, load_recipe, plan

    path = find_recipe(name)
    checked = load_recipe(path, changes=changes)
    for target in checked.targets:
        plugins.target(target)  # refuses options; whether it can be used here is another question
    stages = plan(checked, path.name)
    names = [stage.name for stage in stages]
    click.echo(json.dumps({"valid": True, "stages": names}) if as_json else f"{path.name}: good, {' → '.join(names)}")


@recipe.command("schema")
@result_options
def recipe_schema(as_json: bool, quiet: bool, verbose: bool) -> None:
    """A JSON schema of recipes, for editors."""
    require_workstation()
    from mmedge.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


@click.group()
def task() -> None:
    """List, check and start tasks: the models that are compressed."""


@task.command("list")
@result_options
def task_list(as_json: bool, quiet: bool, verbose: bool) -> None:
    """The installed tasks."""
    from mmedge import plugins

    _table(dict.fromkeys(plugins.names("task"), ""), as_json)


@task.command("new")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.py")
@result_options
def task_new(file: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Write a commented task file to start from; it runs as it is."""
    from importlib.resources import files

    if file.suffix != ".py" or not file.stem.isidentifier():
        raise UsageError(f"{str(file)!r} is not fit for a Python file", fix="choose a name such as my_task.py")
    text = (files("mmedge.tasks") / "template.py").read_text(encoding="utf-8").replace("THIS_FILE.py", str(file))
    try:
        with file.open("x", encoding="utf-8") as handle:  # never overwrite
            handle.write(text)
    except FileExistsError as err:
        raise UsageError("exists already, and is left as it is", where=str(file), fix="choose another name") from err
    except OSError as err:
        raise UsageError(f"cannot be written: {err.strerror}", where=str(file)) from err
    click.echo(json.dumps({"file": str(file)}) if as_json else f"wrote {file}\nnext: mmedge task check {file}:task")


@task.command("check")
@click.argument("spec", metavar="SPEC")
@result_options
def task_check(spec: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Find out what is wrong with a task before any work: data, splits, model, loss, metric, export."""
    require_workstation()
    from mmedge import plugins
    from mmedge.cli.console import progress_for
    from mmedge.loading import load_task
    from mmedge.pipeline.check import check_export, check_model, check_repeatable, check_splits, untrainable

    progress = progress_for(quiet)
    found = load_task(spec, plugins.loaders("task"))
    done: dict[str, Any] = {"task": found.name}
    progress.say("model: weights, outputs, loss, metric")
    done["untrainable"] = untrainable(found, check_model(found))
    progress.say("data: every batch of every split")
    check_repeatable(found)
    done["samples"] = check_splits(found, None)
    progress.say("export: ONNX, run beside PyTorch")
    check_export(found)
    counts = ", ".join(f"{name} {count:,}" for name, count in done["samples"].items())
    click.echo(json.dumps(done) if as_json else f"{found.name}: good ({counts} samples)")
    if done["untrainable"] and not as_json:
        click.echo(f"good for stages that do not train; others will refuse it: {done['untrainable']}")


@click.group()
def target() -> None:
    """List and show targets: backends that build and run engines, and the devices they build for."""


@target.command("list")
@result_options
def target_list(as_json: bool, quiet: bool, verbose: bool) -> None:
    """Every backend and whether it works here, and every device of the table."""
    from mmedge import plugins
    from mmedge.cli.devices import print_targets
    from mmedge.targets.devices import devices

    backends = {}
    for name in plugins.names("target"):
        facts = _target_facts(name)
        backends[name] = facts["problem"] or ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
        backends[name] += f"; builds here, does not run: {facts['cannot_run']}" if facts["cannot_run"] else ""
    print_targets(backends, devices(), as_json)


@target.command("show")
@click.argument("name")
@result_options
def target_show(name: str, as_json: bool, quiet: bool, verbose: bool) -> None:
    """A backend: what it needs, has and wants of a graph. A device: every figure with its source.

    Exit status 4 when a backend cannot be used here.
    """
    from mmedge import plugins
    from mmedge.cli.devices import print_device
    from mmedge.targets.devices import devices

    backends, table = plugins.names("target"), devices()
    if name not in (*backends, *table):
        problem, fix = unknown("target", name, (*backends, *table))
        raise UsageError(problem, fix=fix)
    if name not in backends:
        print_device(table[name], plugins.target_options(name), as_json)
        return
    facts = _target_facts(name)
    if facts["problem"] and not as_json:
        raise TargetError(facts["problem"], where=name, fix=facts["fix"])
    text = "\n".join(f"{key}: {_words(value)}" for key, value in facts.items() if value)
    click.echo(json.dumps(facts, indent=2) if as_json else text)
    if facts["problem"]:
        raise click.exceptions.Exit(TargetError.exit_status)


def _words(value: Any) -> str:
    return ", ".join(f"{key}={each}" for key, each in value.items()) if isinstance(value, dict) else str(value)


def _target_facts(name: str) -> dict[str, Any]:
    from mmedge import plugins

    facts: dict[str, Any] = {"name": name, "about": None, "problem": None, "fix": None}
    facts |= {"versions": {}, "cannot_run": None, "options": {}, "lowering": {}}
    try:
        found = plugins.load("target", name)()
        facts |= {"about": (found.__doc__ or "").strip().split("\n")[0], "options": plugins.target_options(name)}
        facts["lowering"] = vars(found.lowering)
        facts["versions"] = found.check()
        facts["cannot_run"] = found.cannot_run()
    except MmedgeError as err:
        facts |= {"problem": err.problem, "fix": err.fix}
    return facts


def _table(rows: dict[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    width = max((len(name) for name in rows), default=0)
    for name, text in rows.items():
        click.echo(f"{name:{width}}  {text}".rstrip())

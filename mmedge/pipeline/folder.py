"""The folder of a run: who may use it, and what lies where."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mmedge.artifact import digest_of, write_text
from mmedge.errors import ArtifactError, UsageError
from mmedge.recipe import Recipe

RUN = "run.json"


class RunFolder:
    """Where a run keeps its report, recipe, artifacts and log; ``run.json`` says whose it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.artifacts = path / "artifacts"
        self.report = path / "report.json"
        self.unfinished = path / "report.unfinished.json"
        self.html = path / "report.html"
        self.recipe = path / "recipe.yaml"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out while the block runs.

        Raises:
            UsageError: another process is working in this folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as err:
            raise UsageError(
                f"cannot write there: {err.strerror}", where=str(self.path), fix="choose another --output"
            ) from err
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                fix = "wait for it, or choose another --output"
                raise UsageError("another mmedge is working in this folder", where=str(self.path), fix=fix) from err
            yield

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder this run's, or find that it already is.

        Raises:
            UsageError: it is another run's, or holds something else.
        """
        note = self.path / RUN
        if note.exists():
            theirs = read_json(note)
            changed = [key for key in identity if theirs.get(key) != identity[key]]
            if changed:
                raise UsageError(
                    f"this folder belongs to another run (it differs in {', '.join(changed)})",
                    where=str(self.path),
                    fix="choose another --output, or --fresh to keep the old run aside and start anew",
                )
            return
        ours = (".lock", f".{RUN}.partial")  # all that a process killed right here can have left
        strangers = [entry.name for entry in self.path.iterdir() if entry.name not in ours]
        if strangers:
            raise UsageError(
                f"the folder is not empty and no run's: {', '.join(sorted(strangers)[:3])}",
                where=str(self.path),
                fix="choose another --output",
            )
        write_text(note, json.dumps(dict(identity), indent=2) + "\n")

    def set_aside(self) -> Path | None:
        """Rename an existing run so that a fresh one can begin; nothing is deleted."""
        if not self.path.exists():
            return None
        aside = self.path.with_name(f"{self.path.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        self.path.rename(aside)
        return aside

    def save_recipe(self, recipe: Recipe) -> None:
        """Write the recipe as resolved, in a form that ``--recipe`` takes."""
        write_text(self.recipe, yaml.safe_dump(recipe.as_json(), sort_keys=False, allow_unicode=True))

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to ``log.jsonl``."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **facts})
        try:
            with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as err:
            raise ArtifactError(f"log.jsonl cannot be written: {err.strerror}", where=str(self.path)) from err


def identity_of(recipe: Recipe, seed: int) -> dict[str, Any]:
    """What makes a run that run: task, stages and seed. Targets, gates and profile may change between commands."""
    return {
        "schema": 1,
        "task": recipe.task,
        "recipe": recipe.name,
        "stages": digest_of(list(recipe.stages)),
        "seed": seed,
    }


def default_folder(recipe: Recipe, seed: int) -> Path:
    """``runs/RECIPE-TASK-HASH``: the same command always finds its own folder."""
    task = Path(recipe.task.partition(":")[0]).stem if ":" in recipe.task else recipe.task
    return Path("runs") / f"{recipe.name}-{task}-{digest_of(identity_of(recipe, seed))[:6]}"


def open_run(path: Path) -> tuple[RunFolder, dict[str, Any]]:
    """An existing run and its ``run.json``.

    Raises:
        UsageError: it is not a run.
    """
    if not (path / RUN).is_file():
        fix = "give the folder that `mmedge compress` printed, for example runs/int8_distill-av_digits-…"
        raise UsageError("not a run folder: it has no run.json", where=str(path), fix=fix)
    return RunFolder(path), read_json(path / RUN)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtifactError: the file is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ArtifactError(f"cannot be read: {err}", where=str(path)) from err
    if not isinstance(value, dict):
        raise ArtifactError("not a JSON object", where=str(path))
    return value


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

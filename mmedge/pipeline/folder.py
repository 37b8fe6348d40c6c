"""The folder of a run: who may use it, and what lies where."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmedge.artifact import digest_of, write_text
from mmedge.errors import ArtifactError, UsageError
from mmedge.recipe import Recipe

RUN = "run.json"
SCHEMA = 1
# What a device compares engines with, by the name of its artifact behind the stage's.
SAMPLES = "samples"
FLOAT_ATTENTION = "float-attention-samples"
Content = TypeVar("Content", bound=BaseModel)


class Note(BaseModel):
    """``run.json``: whose run a folder is.

    Attributes:
        task: what ``--task`` takes.
        stages: digest of the recipe's stages.
        task_digest: of the task that the report is about; None in runs that were made before it was kept.
        command: the ``mmedge compress`` that makes the run again; None likewise.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = Field(alias="schema")
    task: str
    recipe: str
    stages: str
    seed: int
    task_digest: str | None = None
    command: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As it is written."""
        return self.model_dump(by_alias=True)


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

    def claim(self, identity: Mapping[str, Any], task_digest: str | None = None, command: str | None = None) -> None:
        """Make the folder this run's, or find that it already is.

        Args:
            identity: see ``identity_of``.
            task_digest: of the task as it is now.
            command: the ``mmedge compress`` that makes the run again.

        Raises:
            UsageError: it is another run's, its report is of the task as it was before a change, or it holds
                something else.
        """
        if (self.path / RUN).exists():
            self._expect(identity, task_digest)
        else:
            self._expect_nothing()
        note = Note(**identity, task_digest=task_digest, command=command)
        write_text(self.path / RUN, json.dumps(note.as_json(), indent=2) + "\n")

    def _expect(self, identity: Mapping[str, Any], task_digest: str | None) -> None:
        theirs = read_note(self.path)
        changed = [key for key, value in identity.items() if theirs.as_json()[key] != value]
        if changed:
            raise UsageError(
                f"this folder belongs to another run (it differs in {', '.join(changed)})",
                where=str(self.path),
                fix="choose another --output, or --fresh to keep the old run aside and start anew",
            )
        # Without a report nobody was told anything of the task before the change: correcting a task and going on is
        # how runs begin. A run without a digest is older than this check, and may be the task's as it is.
        if self.report.exists() and theirs.task_digest not in (None, task_digest):
            raise UsageError(
                f"the task {theirs.task} is not the one that this run was made of: its code, weights or data differ",
                where=str(self.path),
                fix="for a new run: `mmedge compress` with another --output, or --fresh to keep this one aside",
            )

    def _expect_nothing(self) -> None:
        ours = (".lock", f".{RUN}.partial")  # all that a process killed right here can have left
        strangers = [entry.name for entry in self.path.iterdir() if entry.name not in ours]
        if strangers:
            raise UsageError(
                f"the folder is not empty and no run's: {', '.join(sorted(strangers)[:3])}",
                where=str(self.path),
                fix="choose another --output",
            )

    def set_aside(self) -> Path | None:
        """Rename an existing run so that a fresh one can begin; nothing is deleted. What is no run stays.

        Call it with the folder locked: a run that is worked on keeps its name.

        Raises:
            UsageError: the folder cannot be renamed.
        """
        if not (self.path / RUN).exists():
            return None
        fix = "choose another --output"
        if self.path.name in ("", ".."):
            raise UsageError("--fresh cannot rename a folder that has no name here", where=str(self.path), fix=fix)
        aside = self.path.with_name(f"{self.path.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        try:
            self.path.rename(aside)
        except OSError as err:
            raise UsageError(f"cannot be kept aside: {err.strerror}", where=str(self.path), fix=fix) from err
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
        "schema": SCHEMA,
        "task": recipe.task,
        "recipe": recipe.name,
        "stages": digest_of(list(recipe.stages)),
        "seed": seed,
    }


def default_folder(recipe: Recipe, seed: int) -> Path:
    """``runs/RECIPE-TASK-HASH``: the same command always finds its own folder."""
    task = Path(recipe.task.partition(":")[0]).stem if ":" in recipe.task else recipe.task
    return Path("runs") / f"{recipe.name}-{task}-{digest_of(identity_of(recipe, seed))[:6]}"


def open_run(path: Path) -> tuple[RunFolder, Note]:
    """An existing run and its ``run.json``.

    Raises:
        UsageError: it is not a run, or a newer mmedge's.
        ArtifactError: ``run.json`` is damaged.
    """
    if not (path / RUN).is_file():
        fix = "give the folder that `mmedge compress` printed, for example runs/int8_distill-av_digits-…"
        raise UsageError("not a run folder: it has no run.json", where=str(path), fix=fix)
    return RunFolder(path), read_note(path)


def read_note(path: Path) -> Note:
    """The ``run.json`` of a run folder.

    Raises:
        UsageError: a newer mmedge wrote it.
        ArtifactError: it is damaged.
    """
    note = read_json(path / RUN, Note, "put it back, or keep the folder aside: `mmedge compress` with --fresh")
    if note.schema_version != SCHEMA:
        problem = f"a run of schema {note.schema_version!r}, this mmedge reads {SCHEMA}"
        fix = "use the mmedge that made the run, or make it anew"
        raise UsageError(problem, where=str(path / RUN), fix=fix)
    return note


def read_json(path: Path, content: type[Content], fix: str) -> Content:
    """What a JSON file of a run holds.

    Raises:
        ArtifactError: the file is damaged; ``fix`` says what to do then.
    """
    try:
        return content.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        where = f"{path}: {place}" if place else str(path)
        raise ArtifactError(f"damaged: {first['msg']}", where=where, fix=fix) from err
    except (OSError, ValueError) as err:
        raise ArtifactError(f"cannot be read: {err}", where=str(path), fix=fix) from err


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Recipes: one readable YAML file that says what is done to a network, for which targets, and what must hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from mmedge import plugins
from mmedge.errors import RecipeError, UsageError, unknown
from mmedge.report.gates import GatesConfig, modality_names, stage_names
from mmedge.strict_yaml import parse, words

FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")  # wheel, editable install
LONGEST_NAME = 100  # bytes; with the task's name and a hash it is one part of a path, of which systems take 255


class ProfileConfig(BaseModel):
    """How engines are measured.

    Attributes:
        threads: threads per engine on CPU targets.
        queries: timed queries per engine; p90 needs 64, p99 662 (MLPerf's early-stopping estimate).
        processes: that share the queries, each with all engines opened anew, for an engine may be faster in one process
            than in the next; of fewer than 64 queries each there are fewer processes.
        budget_s: timing of one target stops after this many seconds even if not all queries were made.
        health_samples: test samples for the accuracy with a modality missing or noisy.
        parity_samples: test samples on which engine and PyTorch are compared value by value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int = Field(1, ge=1, le=256)
    queries: int = Field(700, ge=1)
    processes: int = Field(3, ge=1, le=64)
    budget_s: float = Field(60.0, gt=0)
    health_samples: int = Field(512, ge=1)
    parity_samples: int = Field(64, ge=1)

    @property
    def timing(self) -> dict[str, Any]:
        """What bears on latencies, as ``interleaved`` takes it."""
        return self.model_dump(include={"threads", "queries", "processes", "budget_s"})


class BatchConfig(BaseModel):
    """Batches that an engine takes; it is tuned for ``opt``. All inputs share the batch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Literal[1] = 1  # no engine that refuses single samples could be timed: a query is one
    opt: int = Field(1, ge=1)
    max: int = Field(8, ge=1, le=4096)

    @field_validator("min", mode="before")
    @classmethod
    def _is_one(cls, value: Any) -> Any:
        if value != 1:
            raise ValueError("must be 1 (every query that is timed is one sample)")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError("must be min <= opt <= max")
        return self


class ExportConfig(BaseModel):
    """What engines are built for: ``export:`` of a recipe. Everything but the batch has a fixed size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: BatchConfig = BatchConfig()


class TwinConfig(BaseModel):
    """When INT8 is worth it: ``twin:`` of a recipe.

    Every INT8 engine is compared with its fastest higher-precision twin on the same runtime. Below ``min_speedup`` or
    beyond ``max_drop`` groups of layers go back to floating point; if nothing helps, the twin is shipped.

    Attributes:
        min_speedup: times faster than the twin.
        max_drop: accuracy lost against the float network before, in the metric's unit (0.003 is 0.3 points).
        queries: of the quick comparison; the report's figures come from the longer one.
        processes: that share them.
        budget_s: seconds for one quick comparison.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_speedup: float = Field(1.02, ge=0)
    max_drop: float = Field(0.003, ge=0)
    queries: int = Field(200, ge=1)
    processes: int = Field(3, ge=1, le=64)
    budget_s: float = Field(20.0, gt=0)

    @property
    def timing(self) -> dict[str, Any]:
        """What bears on latencies but for the threads, as ``interleaved`` takes it."""
        return self.model_dump(include={"queries", "processes", "budget_s"})


def _one_name(entry: Any) -> Any:
    """``quantize``, ``{quantize: null}`` and ``{quantize: {}}`` mean the same."""
    entry = {entry: {}} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError("must be one stage name with its settings, as in `- quantize: {}`")
    return {name: {} if settings is None else settings for name, settings in entry.items()}


class Recipe(BaseModel):
    """A validated recipe. ``stages`` keeps the order of the file; each entry is one stage name with its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str = ""
    description: str = ""
    task: str
    targets: tuple[str, ...] = Field(min_length=1)
    stages: tuple[Annotated[dict[str, dict[str, Any]], BeforeValidator(_one_name)], ...] = ()
    export: ExportConfig = ExportConfig()
    twin: TwinConfig = TwinConfig()
    profile: ProfileConfig = ProfileConfig()
    gates: GatesConfig = GatesConfig()

    @field_validator("name")
    @classmethod
    def _fit_for_a_folder(cls, name: str) -> str:
        if "/" in name or "\\" in name:
            raise ValueError("must have no slash: run folders are named after it")
        if not name.isprintable() or len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"must be printable and at most {LONGEST_NAME} bytes: run folders are named after it")
        return name

    @field_validator("targets")
    @classmethod
    def _no_repeats(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) != len(targets):
            raise ValueError("a target is named twice")
        return targets

    @property
    def stage_names(self) -> list[str]:
        """The unique name of every stage: a repeated one gets a number (``distill-2``)."""
        return _numbered(kind for entry in self.stages for kind in entry)

    def as_json(self) -> dict[str, Any]:
        """The resolved recipe, defaults included."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True)
class PlannedStage:
    """One stage, ready to run. ``name`` is unique: a repeated stage gets a number (``distill-2``)."""

    name: str
    kind: str
    stage: Any  # mmedge.stages.base.Stage; typed loosely because importing it loads torch


def recipe_files() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for folder in FOLDERS if folder.is_dir() for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file behind ``--recipe``: a path when it has a slash or ends in ``.yaml``, else a shipped recipe.

    Raises:
        UsageError: there is no such recipe.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no recipe file {name!r}", fix="`mmedge recipe list` shows the shipped ones")
        return path
    known = recipe_files()
    if name not in known:
        problem, fix = unknown("recipe", name, known)
        raise UsageError(problem, fix=f"{fix}; your own file: --recipe ./my.yaml")
    return known[name]


def load_recipe(
    path: Path, *, task: str | None = None, targets: Sequence[str] = (), changes: Iterable[str] = ()
) -> Recipe:
    """Read and check a recipe file.

    Args:
        path: the YAML file.
        task: takes the place of the recipe's task.
        targets: take the place of the recipe's targets.
        changes: ``--set`` arguments, ``stages.0.ratio=0.3``; a stage may be named by its index or by its name.

    Raises:
        RecipeError: names the place in the file, what is allowed and what to do.
    """
    raw = _read(path)
    for change in changes:
        _apply(raw, change)
    raw |= {"name": path.stem} if raw.get("name") in (None, "") else {}
    raw |= {"task": task} if task is not None else {}
    raw |= {"targets": list(targets)} if targets else {}
    try:
        recipe = _validated(Recipe, raw)
    except ValidationError as err:
        raise _explained(err, path.name, Recipe) from err
    _check_names(recipe, path.name)
    return recipe


def plan(recipe: Recipe, where: str) -> tuple[PlannedStage, ...]:
    """Build every stage and check that their order can work. Loads torch.

    Raises:
        RecipeError: settings are wrong, or a stage cannot take what the one before gives.
    """
    form, giver, closed, planned = "float", "", "", []
    for index, (entry, name) in enumerate(zip(recipe.stages, recipe.stage_names, strict=True)):
        ((kind, settings),) = entry.items()
        stage_class = plugins.load("stage", kind)
        place = f"{where}: stages[{index}].{kind}"
        try:
            stage = stage_class(_validated(stage_class.Config, settings))
        except ValidationError as err:
            raise _explained(err, place, stage_class.Config) from err
        if closed:
            raise RecipeError(f"nothing may follow {closed}", where=place, fix=f"put it before {closed}")
        if form not in stage_class.accepts:
            takes, fix = " or ".join(sorted(stage_class.accepts)), f"put it before {giver}, or leave it out"
            raise RecipeError(f"takes a {takes} network, but gets {form} from {giver}", where=place, fix=fix)
        if stage_class.gives:
            form, giver = stage_class.gives, f"stages[{index}].{kind}"
        closed = f"stages[{index}].{kind}" if stage_class.closes else ""
        planned.append(PlannedStage(name, kind, stage))
    names = {stage.name for stage in planned}
    for name in stage_names(recipe.gates):
        if name not in names:
            problem, fix = unknown("stage", name, names)
            raise RecipeError(problem, where=f"{where}: gates.after", fix=fix)
    return tuple(planned)


def resolved(recipe: Recipe, planned: Sequence[PlannedStage]) -> Recipe:
    """The recipe with every default of its stages written out."""
    stages = tuple({stage.kind: stage.stage.config.model_dump(mode="json")} for stage in planned)
    return recipe.model_copy(update={"stages": stages})


def check_modalities(recipe: Recipe, modalities: Sequence[str], where: str) -> None:
    """Gates may only name modalities that the task has.

    Raises:
        RecipeError: with a suggestion.
    """
    for name in modality_names(recipe.gates):
        if name not in modalities:
            problem, fix = unknown("modality", name, modalities)
            raise RecipeError(problem, where=f"{where}: gates.max_modality_drop", fix=fix)


def _validated(model: type[BaseModel], raw: Mapping[str, Any]) -> Any:
    """``raw`` as JSON, where a list may stand for a tuple but ``true`` and ``"4"`` are no numbers."""
    return model.model_validate_json(json.dumps(raw, default=str), strict=True)


def _numbered(kinds: Iterable[str]) -> list[str]:
    """Unique names: ``distill``, ``prune``, ``distill-2``."""
    counts: dict[str, int] = {}
    names = []
    for kind in kinds:
        counts[kind] = counts.get(kind, 0) + 1
        names.append(kind if counts[kind] == 1 else f"{kind}-{counts[kind]}")
    return names


def _check_names(recipe: Recipe, where: str) -> None:
    named = [("stage", f"stages[{index}]", name) for index, entry in enumerate(recipe.stages) for name in entry]
    named += [("target", f"targets[{index}]", name.partition(":")[0]) for index, name in enumerate(recipe.targets)]
    named += [("task", "task", recipe.task)] if ":" not in recipe.task else []
    for kind, place, name in named:
        if name not in (known := plugins.target_names() if kind == "target" else plugins.names(kind)):
            problem, fix = unknown(kind, name, known)
            raise RecipeError(problem, where=f"{where}: {place}", fix=fix)


def read_recipe(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise RecipeError(f"cannot be read: {err}", where=path.name) from err


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = parse(read_recipe(path))
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        place = f"{path.name}: line {mark.line + 1}" if mark else path.name
        raise RecipeError(f"not good YAML: {words(err)}", where=place) from err
    if not isinstance(raw, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=path.name)
    return raw


def _apply(raw: dict[str, Any], change: str) -> None:
    """Carry out one ``--set a.b.0=value``; the value is YAML."""
    path, equals, text = change.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {change!r}", fix="write --set key.key=value, for example --set stages.0.ratio=0.3")
    try:
        value = parse(text)
    except yaml.YAMLError as err:
        raise UsageError(f"--set {change!r}: the value is not good YAML: {words(err)}") from err
    place: Any = raw
    if keys[0] == "stages" and len(keys) > 1 and isinstance(raw.get("stages"), list):
        place, keys = _settings(raw["stages"], keys[1], change), keys[2:]
        if not keys:
            raise UsageError(f"--set {change!r} would replace a whole stage", fix="name one of its settings")
    for key in keys[:-1]:
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[_key(place, key, change)]
    place[_key(place, keys[-1], change)] = value


def _key(place: Any, key: str, change: str) -> str | int:
    """``key`` as what indexes ``place``."""
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise UsageError(f"--set {change!r}: {place!r} is a value, it has no key {key!r}")
    if not key.isdecimal() or int(key) >= len(place):
        raise UsageError(f"--set {change!r}: no entry {key!r} in a list of {len(place)}", fix="count from 0")
    return int(key)


def _settings(stages: list[Any], key: str, change: str) -> Any:
    """The settings behind a stage's index or name."""
    try:
        entries = [_one_name(stage) for stage in stages]
    except ValueError as err:
        raise UsageError(f"--set {change!r}: an entry of stages {err}", fix="correct the file first") from err
    kinds = [kind for entry in entries for kind in entry]
    names = _numbered(kinds)
    index = int(key) if key.isdecimal() else names.index(key) if key in names else -1
    if not 0 <= index < len(stages):
        problem, fix = unknown("stage", key, names)
        raise UsageError(f"--set {change!r}: {problem}", fix=f"{fix}; or an index from 0 to {len(stages) - 1}")
    stages[index] = entries[index]
    return entries[index][kinds[index]]


def _explained(err: ValidationError, where: str, model: type[BaseModel]) -> RecipeError:
    """The first complaint of pydantic, at its place in the file, with a suggestion for a misspelt key."""
    first = err.errors()[0]
    path = [part for part in first["loc"] if part != "[key]"]
    if first["type"] == "extra_forbidden":
        problem, fix = unknown("key", str(path[-1]), _keys(model, path[:-1]))
        return RecipeError(problem, where=_place(where, path[:-1]), fix=fix)
    problem = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "missing" else f", not {first['input']!r}"
    return RecipeError(f"{problem}{given}", where=_place(where, path))


def _place(where: str, path: Sequence[int | str]) -> str:
    inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return f"{where}{inside}" if not path or ": " in where else f"{where}: {inside.lstrip('.')}"


def _keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys allowed at a place in a settings model."""
    for part in path:
        field = model.model_fields.get(str(part))
        if field is not None:  # else an index, or a free key of a mapping
            model = next(iter(_models(field.annotation)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def schema() -> dict[str, Any]:
    """A JSON schema for recipe files, with the settings of every installed stage. Loads torch."""
    found = Recipe.model_json_schema(by_alias=True)
    stages: list[dict[str, Any]] = []
    for name in plugins.names("stage"):
        settings = plugins.load("stage", name).Config.model_json_schema()
        found.setdefault("$defs", {}).update(settings.pop("$defs", {}))
        stages.append({"const": name})
        stages.append(
            {
                "type": "object",
                "properties": {name: {"anyOf": [settings, {"type": "null"}]}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    found["properties"]["stages"] = {"type": "array", "items": {"anyOf": stages}}
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return found

"""Recipes: one readable YAML file that says what is done to a network, for which targets, and what must hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mmedge import plugins
from mmedge.errors import RecipeError, UsageError, unknown
from mmedge.report.gates import GatesConfig, stage_names

FOLDERS = (Path(__file__).parent / "recipes", Path(__file__).parent.parent / "recipes")  # wheel, editable install


class ProfileConfig(BaseModel):
    """How engines are measured.

    Attributes:
        threads: threads per engine on CPU targets.
        queries: timed queries per engine; p90 needs 64, p99 662 (MLPerf's early-stopping estimate).
        budget_s: timing of one target stops after this many seconds even if not all queries were made.
        health_samples: test samples for the accuracy with a modality missing or noisy.
        parity_samples: test samples on which engine and PyTorch are compared value by value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int = Field(1, ge=1, le=256)
    queries: int = Field(700, ge=1)
    budget_s: float = Field(60, gt=0)
    health_samples: int = Field(512, ge=1)
    parity_samples: int = Field(64, ge=1)


class Recipe(BaseModel):
    """A validated recipe. ``stages`` keeps the order of the file; each entry is one stage name with its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str = ""
    description: str = ""
    task: str
    targets: tuple[str, ...] = Field(min_length=1)
    stages: tuple[dict[str, dict[str, Any]], ...] = ()
    profile: ProfileConfig = ProfileConfig()
    gates: GatesConfig = GatesConfig()

    @field_validator("stages", mode="before")
    @classmethod
    def _one_name_each(cls, stages: Any) -> Any:
        if not isinstance(stages, (list, tuple)):
            raise ValueError("a list of stages, each `- name: {settings}`")
        entries = [{stage: {}} if isinstance(stage, str) else stage for stage in stages]
        for index, entry in enumerate(entries):
            if not isinstance(entry, Mapping) or len(entry) != 1:
                raise ValueError(f"stages[{index}]: one stage name with its settings, as in `- quantize: {{}}`")
        return [{name: settings or {} for name, settings in entry.items()} for entry in entries]

    @field_validator("targets")
    @classmethod
    def _no_repeats(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(targets)) != len(targets):
            raise ValueError("a target is named twice")
        return targets

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
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as err:
        raise RecipeError(f"cannot be read: {err}", where=path.name) from err
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        place = f"{path.name}: line {mark.line + 1}" if mark else path.name
        raise RecipeError(f"not YAML: {getattr(err, 'problem', err)}", where=place) from err
    if not isinstance(raw, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=path.name)
    for change in changes:
        _apply(raw, change)
    raw |= {"name": raw.get("name") or path.stem}
    raw |= {"task": task} if task else {}
    raw |= {"targets": list(targets)} if targets else {}
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as err:
        raise _explained(err, path.name, Recipe) from err
    _check_names(recipe, path.name)
    return recipe


def plan(recipe: Recipe, where: str) -> tuple[PlannedStage, ...]:
    """Build every stage and check that their order can work. Loads torch.

    Raises:
        RecipeError: settings are wrong, or a stage cannot take what the one before gives.
    """
    form, planned, counts = "float", [], dict[str, int]()
    for index, entry in enumerate(recipe.stages):
        ((kind, settings),) = entry.items()
        stage_class = plugins.load("stage", kind)
        place = f"{where}: stages[{index}].{kind}"
        try:
            stage = stage_class(stage_class.Config.model_validate(settings))
        except ValidationError as err:
            raise _explained(err, place, stage_class.Config) from err
        if form not in stage_class.accepts:
            takes = " or ".join(sorted(stage_class.accepts))
            raise RecipeError(
                f"takes a {takes} network, but the stage before gives {form}", where=place, fix="put it before quantize"
            )
        form = stage_class.gives or form
        counts[kind] = counts.get(kind, 0) + 1
        planned.append(PlannedStage(kind if counts[kind] == 1 else f"{kind}-{counts[kind]}", kind, stage))
    names = {stage.name for stage in planned}
    for name in stage_names(recipe.gates):
        if name not in names:
            problem, fix = unknown("stage", name, names)
            raise RecipeError(problem, where=f"{where}: gates.after", fix=fix)
    return tuple(planned)


def _check_names(recipe: Recipe, where: str) -> None:
    for kind, found in (("target", recipe.targets), ("stage", [name for entry in recipe.stages for name in entry])):
        known = plugins.names(kind)
        for index, name in enumerate(found):
            if name not in known:
                problem, fix = unknown(kind, name, known)
                raise RecipeError(problem, where=f"{where}: {kind}s[{index}]", fix=fix)


def _apply(raw: dict[str, Any], change: str) -> None:
    """Carry out one ``--set a.b.0=value``; the value is YAML."""
    path, equals, text = change.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UsageError(f"--set {change!r}", fix="write --set key.key=value, for example --set stages.0.ratio=0.3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise UsageError(f"--set {change!r}: the value is not YAML") from err
    place: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            place, key = _entry(place, key, change)
            if last:
                raise UsageError(f"--set {change!r} would replace a whole stage", fix="name one of its settings")
        elif last:
            place[key] = value
            return
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, (dict, list)):
            raise UsageError(f"--set {change!r}: {'.'.join(keys[: depth + 1])} is a value, it has no keys")


def _entry(stages: list[Any], key: str, change: str) -> tuple[Any, str]:
    """The stage entry and the stage's name behind an index or a name."""
    names = [stage if isinstance(stage, str) else next(iter(stage), "") for stage in stages]
    index = int(key) if key.isdigit() else names.index(key) if key in names else -1
    if not 0 <= index < len(stages):
        problem, fix = unknown("stage", key, names)
        raise UsageError(f"--set {change!r}: {problem}", fix=f"{fix}; or an index from 0 to {len(stages) - 1}")
    if isinstance(stages[index], str):
        stages[index] = {names[index]: {}}
    return stages[index], names[index]


def _explained(err: ValidationError, where: str, model: type[BaseModel]) -> RecipeError:
    """The first complaint of pydantic, at its place in the file, with a suggestion for a misspelt key."""
    first = err.errors()[0]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    place = f"{where}{path}" if "stages[" in where else f"{where}: {path.lstrip('.')}"
    if first["type"] == "extra_forbidden":
        problem, fix = unknown("key", str(first["loc"][-1]), _keys(model, first["loc"][:-1]))
        return RecipeError(problem, where=place.rpartition(".")[0] or where, fix=fix)
    problem = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "missing" else f", not {first['input']!r}"
    return RecipeError(f"{problem}{given}", where=place)


def _keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys allowed at a place in a settings model."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = [kind for kind in _models(field.annotation)] if field is not None else []
        if not inner:
            return []
        model = inner[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> list[type[BaseModel]]:
    from typing import get_args

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
            {"type": "object", "properties": {name: settings}, "required": [name], "additionalProperties": False}
        )
    found["properties"]["stages"] = {"type": "array", "items": {"anyOf": stages}}
    found["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return found

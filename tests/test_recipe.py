"""Recipes: every mistake is named at its place in the file, before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from command import mmedge

from mmedge.errors import MmedgeError, RecipeError, UsageError
from mmedge.recipe import Recipe, find_recipe, load_recipe, plan, recipe_files, resolved, schema

GOOD = """
task: av_digits
targets: [onnxruntime, torch]
stages:
  - prune: {width: 0.5}
  - distill: {epochs: 1}
  - prune: {width: 0.75}
  - distill:
  - quantize
gates:
  max_drop: 0.01
  after:
    distill-2: {min_speedup: 1.5}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def planned(file: Path, **changes: Any) -> tuple[Recipe, list[Any]]:
    recipe = load_recipe(file, **changes)
    return recipe, list(plan(recipe, file.name))


@pytest.mark.parametrize("name", recipe_files())
def test_shipped_recipe_loads_and_plans(name: str) -> None:
    recipe, stages = planned(find_recipe(name))
    assert recipe.name == name
    assert recipe.description
    assert len(stages) == len(recipe.stages)


def test_good_recipe(tmp_path: Path) -> None:
    recipe, stages = planned(written(tmp_path, GOOD))
    assert recipe.name == "mine"
    assert [stage.name for stage in stages] == ["prune", "distill", "prune-2", "distill-2", "quantize"]
    assert stages[0].stage.config.width == 0.5
    assert stages[3].stage.config.epochs == type(stages[3].stage).Config().epochs
    assert recipe.profile.threads == 1
    assert recipe.gates.after["distill-2"].min_speedup == 1.5


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """``1e-3`` is a number in YAML 1.2, and a whole number will do for a fraction."""
    text = "task: av_digits\ntargets: [torch]\nstages: [distill: {learning_rate: 1e-3, temperature: 2}]"
    (stage,) = planned(written(tmp_path, text))[1]
    assert stage.stage.config.learning_rate == 0.001
    assert stage.stage.config.temperature == 2.0


HEAD = "task: av_digits\ntargets: [torch]\n"

# What is written, the place that is named, and what is said.
MISTAKES = {
    "empty file": ("", "mine.yaml", "a recipe is a mapping"),
    "a list": ("- task", "mine.yaml", "a recipe is a mapping"),
    "open bracket": (HEAD + "stages: [", "mine.yaml: line 3", "not good YAML"),
    "tab": (HEAD + "stages:\n\t- prune", "mine.yaml: line 4", "not good YAML"),
    "code": (HEAD + "name: !!python/name:os.system", "mine.yaml: line 3", "could not determine a constructor"),
    "control character": (HEAD + "name: \x00", "mine.yaml", "not good YAML"),
    "contains itself": (HEAD + "name: &a [*a]", "mine.yaml", "not good YAML: nested too deep"),
    "aliases of aliases": (
        HEAD + "".join(f"l{k}: &l{k} [{', '.join(10 * [f'*l{k - 1}' if k else 'x'])}]\n" for k in range(9)),
        "mine.yaml",
        "not good YAML: aliases make 1.2e+09 values of it, more than 100,000",
    ),
    "very deep": (HEAD + "name: " + "[" * 5000, "mine.yaml", "not good YAML: nested too deep"),
    "key twice": (HEAD + "task: other", "mine.yaml: line 3", "the key 'task' is there twice"),
    "setting twice": (
        HEAD + "stages:\n- prune:\n    width: 1\n    width: 0.5",
        "mine.yaml: line 6",
        "'width' is there",
    ),
    "key is a number": (HEAD + "1: 2", "mine.yaml: line 3", "the key 1 is not text"),
    "no task": ("targets: [torch]", "mine.yaml: task", "required"),
    "no targets": ("task: av_digits", "mine.yaml: targets", "required"),
    "empty targets": ("task: av_digits\ntargets: []", "mine.yaml: targets", "at least 1"),
    "targets as text": ("task: av_digits\ntargets: torch", "mine.yaml: targets", "not 'torch'"),
    "target twice": ("task: av_digits\ntargets: [torch, torch]", "mine.yaml: targets", "named twice"),
    "unknown task": ("task: av_digit\ntargets: [torch]", "mine.yaml: task", "did you mean 'av_digits'?"),
    "task is a number": ("task: 5\ntargets: [torch]", "mine.yaml: task", "valid string, not 5"),
    "unknown target": (
        "task: av_digits\ntargets: [torch, openvin]",
        "mine.yaml: targets[1]",
        "did you mean 'openvino'?",
    ),
    "unknown key": (HEAD + "stage: []", "mine.yaml", "unknown key 'stage'\n  did you mean 'stages'?"),
    "unknown stage": (HEAD + "stages: [prune, quantise]", "mine.yaml: stages[1]", "did you mean 'quantize'?"),
    "unknown setting": (
        HEAD + "stages: [prune: {widht: 0.5}]",
        "mine.yaml: stages[0].prune",
        "unknown key 'widht'\n  did you mean 'width'?",
    ),
    "unknown inner setting": (
        HEAD + "stages: [quantize: {calibration: {sample: 5}}]",
        "mine.yaml: stages[0].quantize.calibration",
        "did you mean 'samples'?",
    ),
    "unknown setting of an optional part": (
        HEAD + "stages: [prune: {recover: {epoch: 5}}]",
        "mine.yaml: stages[0].prune.recover",
        "did you mean 'epochs'?",
    ),
    "unknown gate": (HEAD + "gates: {max_dropp: 1}", "mine.yaml: gates", "did you mean 'max_drop'?"),
    "unknown gate after": (
        HEAD + "stages: [prune]\ngates: {after: {prune: {min_speedupp: 1}}}",
        "mine.yaml: gates.after.prune",
        "did you mean 'min_speedup'?",
    ),
    "unknown percentile": (HEAD + "gates: {max_latency_ms: {p95: 1}}", "mine.yaml: gates.max_latency_ms.p95", "'p90'"),
    "gate after no stage": (
        HEAD + "stages: [prune]\ngates: {after: {distill: {max_drop: 1}}}",
        "mine.yaml: gates.after",
        "unknown stage 'distill'",
    ),
    "unknown profile key": (HEAD + "profile: {thread: 1}", "mine.yaml: profile", "did you mean 'threads'?"),
    "later schema": (HEAD + "schema: 2", "mine.yaml: schema", "should be 1, not 2"),
    "text for a number": (HEAD + "stages: [prune: {width: half}]", "mine.yaml: stages[0].prune.width", "not 'half'"),
    "quoted number": (HEAD + "profile: {threads: '4'}", "mine.yaml: profile.threads", "integer, not '4'"),
    "yes for a number": (HEAD + "profile: {threads: yes}", "mine.yaml: profile.threads", "integer, not True"),
    "yes for a fraction": (HEAD + "stages: [prune: {width: yes}]", "mine.yaml: stages[0].prune.width", "not True"),
    "part of a sample": (
        HEAD + "stages: [quantize: {calibration: {samples: 1.5}}]",
        "mine.yaml: stages[0].quantize.calibration.samples",
        "integer, not 1.5",
    ),
    "out of range": (
        HEAD + "stages: [prune: {width: 1.5}]",
        "mine.yaml: stages[0].prune.width",
        "less than or equal to 1",
    ),
    "engines that refuse single samples": (
        HEAD + "export: {batch: {min: 4, opt: 4, max: 8}}",
        "mine.yaml: export.batch.min",
        "must be 1 (every query that is timed is one sample), not 4",
    ),
    "batch for none": (HEAD + "export: {batch: {opt: 9}}", "mine.yaml: export.batch", "must be min <= opt <= max"),
    "nothing left": (HEAD + "stages: [prune: {width: 0}]", "mine.yaml: stages[0].prune.width", "greater than 0"),
    "inner range": (
        HEAD + "stages: [distill, prune: {recover: {epochs: 0}}]",
        "mine.yaml: stages[1].prune.recover.epochs",
        "greater than or equal to 1, not 0",
    ),
    "no such choice": (
        HEAD + "stages: [distill: {student: other}]",
        "mine.yaml: stages[0].distill.student",
        "not 'other'",
    ),
    "NaN": (HEAD + "stages:\n- prune: {width: .nan}", "mine.yaml: line 4", ".nan is not a number"),
    "infinite": (HEAD + "profile:\n  budget_s: .inf", "mine.yaml: line 4", ".inf is not a number"),
    "infinite gate": (HEAD + "gates: {max_drop: -.inf}", "mine.yaml: line 3", "-.inf is not a number"),
    "too large for a number": (HEAD + "gates: {max_drop: 1e999}", "mine.yaml: line 3", "1e999 is not a number"),
    "list for settings": (HEAD + "stages: [prune: [0.5]]", "mine.yaml: stages[0].prune", "not [0.5]"),
    "number for a stage": (HEAD + "stages: [prune, 5]", "mine.yaml: stages[1]", "one stage name with its settings"),
    "two stages in one": (HEAD + "stages: [{prune: {}, distill: {}}]", "mine.yaml: stages[0]", "one stage name"),
    "empty stage": (HEAD + "stages: [{}]", "mine.yaml: stages[0]", "one stage name"),
    "stages as mapping": (HEAD + "stages: {prune: {}}", "mine.yaml: stages", "array"),
    "name with a slash": (HEAD + "name: ../mine", "mine.yaml: name", "must have no slash"),
    "name with a line break": (HEAD + 'name: "a\\nb"', "mine.yaml: name", "must be printable"),
    "name with a null": (HEAD + 'name: "a\\0b"', "mine.yaml: name", "must be printable"),
    "name too long": (HEAD + "name: " + 51 * "ä", "mine.yaml: name", "at most 100 bytes"),
    "name is zero": (HEAD + "name: 0", "mine.yaml: name", "valid string, not 0"),
    "prune after quantize": (
        HEAD + "stages: [distill, quantize, prune]",
        "mine.yaml: stages[2].prune",
        "takes a float network, but gets qdq from stages[1].quantize\n  put it before stages[1].quantize",
    ),
    "distill after fp16": (
        HEAD + "stages: [quantize, fp16, distill]",
        "mine.yaml: stages[2].distill",
        "nothing may follow stages[1].fp16\n  put it before stages[1].fp16",
    ),
    "quantize twice": (HEAD + "stages: [quantize, quantize]", "mine.yaml: stages[1].quantize", "or leave it out"),
}


@pytest.mark.parametrize(("text", "place", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_named_at_its_place(tmp_path: Path, text: str, place: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        planned(written(tmp_path, text))
    assert caught.value.where == place
    assert said in str(caught.value)
    assert caught.value.exit_status == 2


def test_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"task: \xff\xfe")
    with pytest.raises(RecipeError, match=r"mine\.yaml: cannot be read"):
        load_recipe(tmp_path / "mine.yaml")
    outcome = mmedge(monkeypatch, capsys, "recipe", "show", tmp_path / "mine.yaml")
    assert outcome.status == 2
    assert "mine.yaml: cannot be read" in outcome.err
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_find_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert find_recipe(str(file)) == file
    assert find_recipe("mine.yaml").samefile(file)
    for name, said in {
        "int8_distil": r"did you mean 'int8_distill'\?",
        "mine": r"your own file: --recipe \./my\.yaml",
        "nowhere.yaml": "no recipe file",
        "./int8_distill": "no recipe file",
        str(tmp_path) + "/": "no recipe file",
    }.items():
        with pytest.raises(UsageError, match=said):
            find_recipe(name)


# --- --task, --target, --set


def test_task_and_targets_are_replaced(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD), task="other.py:task", targets=["openvino"])
    assert (recipe.task, recipe.targets) == ("other.py:task", ("openvino",))
    with pytest.raises(RecipeError, match="unknown task ''"):
        load_recipe(written(tmp_path, GOOD), task="")


SETS = {
    "stages.0.width=0.3": lambda recipe: recipe.stages[0]["prune"] == {"width": 0.3},
    "stages.prune.width=0.3": lambda recipe: recipe.stages[0]["prune"] == {"width": 0.3},
    "stages.prune-2.width=0.3": lambda recipe: (
        [entry["prune"]["width"] for entry in recipe.stages if "prune" in entry] == [0.5, 0.3]
    ),
    "stages.distill-2.epochs=7": lambda recipe: recipe.stages[3]["distill"] == {"epochs": 7},
    "stages.4.keep_float=[head, 'audio.*']": lambda recipe: recipe.stages[4]["quantize"]["keep_float"][1] == "audio.*",
    "stages.quantize.calibration.samples=32": lambda recipe: (
        recipe.stages[4]["quantize"] == {"calibration": {"samples": 32}}
    ),
    "stages.distill.learning_rate=1e-4": lambda recipe: recipe.stages[1]["distill"]["learning_rate"] == 1e-4,
    "stages=[]": lambda recipe: recipe.stages == (),
    "targets.1=openvino": lambda recipe: recipe.targets == ("onnxruntime", "openvino"),
    "profile.threads=2": lambda recipe: recipe.profile.threads == 2,
    "gates.after.quantize.max_drop=0.5": lambda recipe: recipe.gates.after["quantize"].max_drop == 0.5,
    "description=a=b": lambda recipe: recipe.description == "a=b",
}


@pytest.mark.parametrize("change", SETS)
def test_set(tmp_path: Path, change: str) -> None:
    assert SETS[change](load_recipe(written(tmp_path, GOOD), changes=[change]))


def test_later_set_wins(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    recipe = load_recipe(file, changes=["stages.prune.width=0.3", "stages.0.width=0.4", "stages.0.depth=0.5"])
    assert recipe.stages[0] == {"prune": {"width": 0.4, "depth": 0.5}}


WRONG_SETS = {
    "stages.0.width": "write --set key.key=value",
    "=3": "write --set key.key=value",
    "stages..width=3": "write --set key.key=value",
    "stages.0=prune": "would replace a whole stage",
    "stages.9.width=3": "or an index from 0 to 4",
    "stages.-1.width=3": "unknown stage '-1'",
    "stages.².width=3": "unknown stage '²'",
    "stages.pruen.width=3": "did you mean 'prune'?",
    "stages.0.widht=3": "stages[0].prune: unknown key 'widht'",
    "stages.0.width=wide": "stages[0].prune.width: ",
    "stages.0.width=.nan": ".nan is not a number",
    "profile.threads=[": "not good YAML",
    "profile.threads=": "profile.threads: Input should be a valid integer, not None",
    "profil.threads=2": "did you mean 'profile'?",
    "task.name=2": "'av_digits' is a value, it has no key 'name'",
    "targets.2=torch": "no entry '2' in a list of 2",
    "targets.first=torch": "no entry 'first'",
}


@pytest.mark.parametrize("change", WRONG_SETS)
def test_wrong_set(tmp_path: Path, change: str) -> None:
    with pytest.raises(MmedgeError) as caught:
        planned(written(tmp_path, GOOD), changes=[change])
    assert WRONG_SETS[change] in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("stages", ["[5]", "[null]", "[{}]", "[{prune: {}, distill: {}}]"])
def test_set_in_stages_that_are_none(tmp_path: Path, stages: str) -> None:
    with pytest.raises(UsageError, match="one stage name with its settings"):
        load_recipe(written(tmp_path, f"{HEAD}stages: {stages}"), changes=["stages.0.width=1"])


# --- what is kept, and the schema


@pytest.mark.parametrize("name", ["mine", *recipe_files()])
def test_resolved_recipe_round_trip(tmp_path: Path, name: str) -> None:
    """The ``recipe.yaml`` of a run is a recipe, and means the same."""
    file = written(tmp_path, GOOD) if name == "mine" else find_recipe(name)
    kinds = {kind for stage in load_recipe(file).stages for kind in stage}
    changes = ["stages.distill.learning_rate=1e-5"] if "distill" in kinds else []
    changes += ["stages.prune.round_to=8"] if "prune" in kinds else []
    changes.append("name=other")
    recipe = load_recipe(file, changes=changes, targets=["torch"])
    recipe = resolved(recipe, plan(recipe, "other"))
    kept = tmp_path / "recipe.yaml"
    kept.write_text(yaml.safe_dump(recipe.as_json(), sort_keys=False))
    again, stages = planned(kept)
    assert again == recipe
    # As text: artifacts are found by a hash of it, and 60 and 60.0 are equal but hash differently.
    assert json.dumps(resolved(again, stages).model_dump()) == json.dumps(recipe.model_dump())
    assert [stage.stage.config for stage in stages] == [stage.stage.config for stage in plan(recipe, "other")]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    return jsonschema.Draft202012Validator(found)


@pytest.mark.parametrize("name", recipe_files())
def test_schema_takes_shipped_recipes(validator: jsonschema.Draft202012Validator, name: str) -> None:
    validator.validate(yaml.safe_load(find_recipe(name).read_text()))
    validator.validate(load_recipe(find_recipe(name)).as_json())


def test_schema_takes_what_the_loader_takes(validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(yaml.safe_load(GOOD))


@pytest.mark.parametrize("name", ["unknown key", "unknown stage", "unknown setting", "out of range", "no task"])
def test_schema_refuses_mistakes(validator: jsonschema.Draft202012Validator, name: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(yaml.safe_load(MISTAKES[name][0]))


# --- through the command


def test_check_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = mmedge(monkeypatch, capsys, "recipe", "check", written(tmp_path, GOOD), "--json")
    assert outcome.status == 0
    assert json.loads(outcome.out) == {
        "valid": True,
        "stages": ["prune", "distill", "prune-2", "distill-2", "quantize"],
    }


def test_show_command_gives_what_load_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--json"]):
        outcome = mmedge(monkeypatch, capsys, "recipe", "show", "int8_distill", *options)
        assert outcome.status == 0
        again = load_recipe(written(tmp_path, outcome.out))
        assert again.stages == load_recipe(find_recipe("int8_distill")).stages


@pytest.mark.parametrize("command", [["recipe", "check"], ["compress", "--recipe"]])
@pytest.mark.parametrize("name", ["unknown setting", "out of range", "unknown stage", "prune after quantize", "NaN"])
def test_mistakes_end_commands_with_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    name: str,
) -> None:
    text, place, said = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    outcome = mmedge(monkeypatch, capsys, *command, written(tmp_path, text), "--json")
    assert outcome.status == 2
    assert f"error: {place}: " in outcome.err
    assert said in outcome.err
    assert json.loads(outcome.out)["error"]["where"] == place
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]  # no work was begun


USAGE = {
    "no recipe": ["compress"],
    "unknown recipe": ["compress", "--recipe", "int8_distil"],
    "unknown target": ["compress", "--recipe", "int8_distill", "--target", "onnxruntim"],
    "unknown task": ["compress", "--recipe", "int8_distill", "--task", "av_digit"],
    "unknown option": ["compress", "--recip", "int8_distill"],
    "unknown command": ["compres"],
    "unknown subcommand": ["recipe", "chek"],
    "bad seed": ["compress", "--recipe", "int8_distill", "--seed", "-1"],
    "bad set": ["recipe", "check", "int8_distill", "--set", "stages.prun.width=1"],
    "unknown target to show": ["target", "show", "openvin"],
    "no run": ["report", "nowhere"],
    "no run to build": ["build", "nowhere", "--target", "torch"],
    "no run to profile": ["profile", "nowhere"],
    "too many threads": ["profile", "nowhere", "--threads", "257"],
    "bytes for a folder": ["report", "caf\udce9"],
    "bytes for a recipe": ["recipe", "check", "./caf\udce9.yaml"],
    "unknown option of a target": ["recipe", "check", "int8_distill", "--set", "targets.0=onnxruntime:provder=cuda"],
}
SUGGESTIONS = {
    "unknown recipe": "int8_distill",
    "unknown target": "onnxruntime",
    "unknown task": "av_digits",
    "unknown option": "--recipe",
    "unknown command": "compress",
    "unknown subcommand": "check",
    "bad set": "prune",
    "unknown target to show": "openvino",
    "unknown option of a target": "provider",
}
SAID = {
    "too many threads": "1<=x<=256",
    "bytes for a folder": "not UTF-8 text",
    "bytes for a recipe": "not UTF-8 text",
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_errors_end_with_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = mmedge(monkeypatch, capsys, *USAGE[name])
    assert outcome.status == 2
    assert outcome.err.strip()
    assert SAID.get(name, "") in outcome.err
    if name in SUGGESTIONS:
        assert "did you mean" in outcome.err.lower()
        assert f"'{SUGGESTIONS[name]}'" in outcome.err
    assert not list(tmp_path.iterdir())


# Each hides a package as if it were not installed; only a process of its own can do that.
HIDDEN = {
    "target": ("openvino", ["compress", "--recipe", "int8_distill", "--target", "openvino"], 4, "mmedge[openvino]"),
    "workstation": ("torchao", ["compress", "--recipe", "int8_distill"], 2, "mmedge[compress]"),
}


@pytest.mark.parametrize(("package", "arguments", "status", "said"), HIDDEN.values(), ids=HIDDEN)
def test_missing_parts_name_their_extra(
    tmp_path: Path, package: str, arguments: list[str], status: int, said: str
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from mmedge.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())

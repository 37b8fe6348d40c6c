"""``quantize``: post-training static INT8 by PyTorch's export quantization (PT2E)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.fx import GraphModule
from typing_extensions import Self

from mmedge.errors import StageError, unknown
from mmedge.stages.base import Context, Judgement, Network, Saved, Stage, StageConfig, as_tensors, outputs_of
from mmedge.stages.quantization.settings import Calibration
from mmedge.stages.trace import graph_of, quiet, without_wrappers
from mmedge.task import Task

if TYPE_CHECKING:
    from mmedge.stages.quantization.tuning import Candidate

EXACT = "exact:"  # before the names of tensors as they were; no path in a module has a colon
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)  # known without a trace


class Tune(StageConfig):
    """Search for the cheapest settings that keep the accuracy and are not slower than the float network.

    Every trial is built for the first target that runs here and judged by that engine on the calibration split.

    Attributes:
        max_drop: accuracy that may be lost against the network before, in the metric's unit.
        min_speedup: over the same network in its fastest higher precision.
        trials: at most so many.
    """

    max_drop: float = Field(0.003, ge=0)
    min_speedup: float = Field(1.0, gt=0)
    trials: int = Field(12, ge=1, le=100)


class Quantize(Stage):
    """Float in, Q/DQ out.

    What is kept is the state of the prepared graph: weights and ranges, and as they were before, the weights and biases
    that a repair changed. Restoring traces the float network again, places the same quantizers and loads that state, so
    no graph, code or pickle is stored.
    """

    name = "quantize"
    gives = "qdq"
    version = 10

    class Config(StageConfig):
        """Settings of ``quantize``.

        Attributes:
            dtype: ``int8``; symmetric, per tensor for activations, per output channel for weights.
            placement: ``tensorrt`` can be lowered to every target; ``x86`` is neural-compressor's, for processors alone
                (uint8 activations with zero points) and without the repairs below.
            calibration: how ranges are found.
            keep_float: patterns of layer names that stay floating point (``head``, ``audio.*``).
            smooth: SmoothQuant's alpha: moves outliers of activations into weights, exactly; null leaves it out.
            rounding: ``nearest``, or ``compensated``: each weight's rounding error is made up for by the weights that
                are rounded after it.
            bias_correction: shift biases by what rounding the weights changes on average.
            sensitivity_samples: calibration samples on which each group's damage is measured; 0: not at all.
            tune: search these settings instead of taking them as they are.
        """

        dtype: Literal["int8"] = "int8"
        placement: Literal["tensorrt", "x86"] = "tensorrt"
        calibration: Calibration = Calibration()
        keep_float: tuple[str, ...] = ()
        smooth: float | None = Field(None, ge=0, le=1)
        rounding: Literal["nearest", "compensated"] = "nearest"
        bias_correction: bool = False
        sensitivity_samples: int = Field(32, ge=0)
        tune: Tune | None = None

        @model_validator(mode="after")
        def _x86_stands_alone(self) -> Self:
            given = {name: getattr(self, name) for name in ("keep_float", "smooth", "bias_correction")}
            given["rounding"] = self.rounding != "nearest"
            if self.placement == "x86" and (unused := [name for name, value in given.items() if value]):
                raise ValueError(f"placement x86 has no {', '.join(unused)}: leave them out, or the placement")
            return self

    def expect(self, context: Context) -> None:
        """There are samples enough, and what ``tune`` and the x86 form need."""
        self.config.calibration.expect_samples(context.task)
        if self.config.tune is not None:
            _judge_of(context)
        if self.config.tune is not None or self.config.placement == "x86":
            from mmedge.stages.quantization.tuning import missing

            if find_spec("neural_compressor") is None:
                raise missing("the search for settings" if self.config.tune else "the x86 form of INT8")

    def check(self, network: Network, context: Context) -> None:
        """``keep_float`` names layers."""
        modules = network.module.named_modules()
        layers = [without_wrappers(path) for path, module in modules if isinstance(module, LAYERS)]
        if not all(_names_any(pattern, layers) for pattern in self.config.keep_float):
            prepare(network, context.task, self.config.keep_float)  # a trace knows what else is a layer

    def judged_on(self, first: str | None) -> str | None:
        """The tuner takes what is good on one target."""
        return first if self.config.tune is not None else None

    def run(self, network: Network, context: Context) -> Saved:
        """Calibrate and repair; keep the prepared graph's state, and what was done to which layers."""
        if self.config.tune is not None:
            return tuned(self.config, self.config.tune, network, context)
        return quantized(self.config, network, context)

    def restore(self, network: Network, saved: Saved, context: Context) -> Network:
        """The Q/DQ graph with the ranges that calibration found."""
        return restored(network, context.task, saved)


def _for_x86(config: Quantize.Config, network: Network, context: Context) -> Saved:
    from mmedge.stages.quantization.calibration import varied
    from mmedge.stages.quantization.x86 import x86_state

    samples = config.calibration.samples
    batches = varied(context.task, samples, size=samples)  # as the task gives them: its ranges depend on that
    graph = _float_graph(network, context.task)
    _same_values(network, graph, context.task)
    state, layers = x86_state(graph, batches)
    # None of them can go back to floating point alone, so they are only counted.
    edits = {"quantized": [], "layers": len(layers), "attention": [], "skipped": {}, "groups": {}}
    return Saved(state, {"placement": "x86", "keep_float": [], **edits})


@dataclass
class _Work:
    """A prepared graph on its way through calibration and repair."""

    prepared: GraphModule
    config: Quantize.Config
    context: Context
    edits: dict[str, Any]


def quantized(config: Quantize.Config, network: Network, context: Context) -> Saved:
    """Quantize with fixed settings.

    Raises:
        StageError: there is nothing to quantize, or calibration data does not fit.
    """
    from mmedge.stages.quantization.prepared import measure_weights, own_weights, state_of

    if config.placement == "x86":
        return _for_x86(config, network, context)
    prepared, edits = prepare(network, context.task, config.keep_float)
    _same_values(network, prepared, context.task)
    if config.smooth is not None or config.rounding != "nearest" or config.bias_correction:
        own_weights(prepared)
    work = _Work(prepared, config, context, edits)
    seen = _calibrated(work)
    measure_weights(prepared)
    exact = _repair(work, seen)
    if config.sensitivity_samples:
        edits["sensitivity"] = _sensitivity(work, network)
    return Saved({**state_of(prepared), **{f"{EXACT}{path}": tensor for path, tensor in exact.items()}}, edits)


def tuned(config: Quantize.Config, tune: Tune, network: Network, context: Context) -> Saved:
    """Quantize with the first settings, cheapest first, that are good enough; else with those that lose least.

    Raises:
        StageError: no target of the run can run engines here, so that nothing can be judged.
    """
    from mmedge.stages.quantization.tuning import search

    judge = _judge_of(context)

    def apply(candidate: Candidate) -> Network:
        quick = _with(config, candidate.settings).model_copy(update={"sensitivity_samples": 0})
        return restored(network, context.task, quantized(quick, network, context))

    first = quantized(config.model_copy(update={"placement": "tensorrt"}), network, context).edits
    damage = first.get("sensitivity", {})
    worst_first = sorted(first.get("groups", {}).items(), key=lambda group: -damage[group[0]])
    accepted, trials = search(
        network.module,
        _space(config, worst_first),
        apply,
        lambda result: judge(network, result),
        max_drop=tune.max_drop,
        min_speedup=tune.min_speedup,
        max_trials=tune.trials,
        progress=context.progress,
    )
    judged = [trial for trial in trials if trial.drop is not None]
    if not judged:
        where = f"task {context.task.name}: quantize.tune"
        raise StageError(f"no trial could be judged: {trials[0].reason}", where=where)
    chosen = accepted or min(judged, key=lambda trial: trial.drop or 0.0)
    # Made once more, not kept: weights of every trial would not fit in memory, and calibration is remembered.
    saved = quantized(_with(config, chosen.candidate.settings), network, context)
    told = [
        {"name": trial.candidate.name, "drop": trial.drop, "speedup": trial.speedup, "accepted": trial.accepted}
        | {"reason": trial.reason, "chosen": trial is chosen}
        for trial in trials
    ]
    return Saved(saved.tensors, {**saved.edits, "trials": told})


def _judge_of(context: Context) -> Callable[[Network, Network], Judgement]:
    if context.judge is None:
        where = f"task {context.task.name}: quantize.tune"
        raise StageError("no target of this run can run engines here", where=where, fix="leave tune out, or add one")
    return context.judge


def _space(config: Quantize.Config, worst_first: Sequence[tuple[str, list[str]]]) -> list[Candidate]:
    """What to try: the recipe's placement first, and the other one; x86 has no settings to vary and keeps no layer."""
    from mmedge.stages.quantization.tuning import Candidate, candidates

    given = _settings_of(config)
    own = candidates({**given, "placement": "tensorrt"}, worst_first)
    x86 = {**given, "placement": "x86"}
    if config.keep_float:
        return own
    if config.placement == "tensorrt":
        return [*own, Candidate("neural-compressor's x86 placement", x86)]
    return [Candidate(own[0].name, x86), Candidate("mmedge's own placement", own[0].settings), *own[1:]]


def _settings_of(config: Quantize.Config) -> dict[str, Any]:
    """What the search may change, flat."""
    return {
        "placement": config.placement,
        "observer": config.calibration.observer,
        "percentile": config.calibration.percentile,
        "smooth": config.smooth,
        "rounding": config.rounding,
        "bias_correction": config.bias_correction,
        "keep_float": list(config.keep_float),
    }


def _with(config: Quantize.Config, settings: Mapping[str, Any]) -> Quantize.Config:
    own = {name: settings[name] for name in ("placement", "smooth", "rounding", "bias_correction")}
    ranges = {name: settings[name] for name in ("observer", "percentile")}
    calibration = config.calibration.model_copy(update=ranges)
    return config.model_copy(update={**own, "calibration": calibration, "keep_float": tuple(settings["keep_float"])})


def restored(network: Network, task: Task, saved: Saved) -> Network:
    """The Q/DQ network of a float one, from what was kept of it."""
    if saved.edits.get("placement") == "x86":
        from mmedge.stages.quantization.x86 import x86_restore

        return Network(x86_restore(_float_graph(network, task), saved.tensors), "qdq")
    from mmedge.stages.quantization.prepared import converted, load_state

    prepared, _ = prepare(network, task, saved.edits["keep_float"])
    exact = {name.removeprefix(EXACT): saved.tensors[name] for name in saved.tensors if name.startswith(EXACT)}
    load_state(prepared, {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(EXACT)})
    return Network(converted(prepared), "qdq", prepared, exact)


def prepare(network: Network, task: Task, keep_float: tuple[str, ...]) -> tuple[GraphModule, dict[str, Any]]:
    """Trace a float network and put a ``Range`` on every edge that will carry INT8.

    Returns:
        The prepared graph, and as JSON which layers were quantized and which not, with reasons.
    """
    with quiet():  # torchao reports accelerator libraries that a CPU does not need
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        from mmedge.stages.quantization.placement import Int8Placement
        from mmedge.stages.quantization.spelled import spelled_out

    placement = Int8Placement(keep_float)
    with quiet():
        prepared = prepare_pt2e(spelled_out(_float_graph(network, task)), placement)
    skipped = {each.layer: each.reason for each in placement.skipped}
    for pattern in keep_float:
        if not _names_any(pattern, placement.names):
            problem, fix = _why_unknown(pattern, {*placement.quantized, *skipped}, network)
            raise StageError(problem, where=f"task {task.name}: quantize.keep_float", fix=fix)
    if not placement.quantized:
        reasons = sorted(set(skipped.values())) or ["no convolution or linear layer"]
        raise StageError(
            f"nothing to quantize: {'; '.join(reasons)}",
            where=f"task {task.name}: quantize",
            fix="check keep_float, or leave the stage out",
        )
    found = {"quantized": placement.quantized, "attention": placement.attention, "skipped": skipped}
    return prepared, {"keep_float": list(keep_float), **found}


def _float_graph(network: Network, task: Task) -> GraphModule:
    """The network traced, every layer with a weight of its own and the norms behind it."""
    from mmedge.stages.quantization.canonical import canonical

    return canonical(graph_of(network.module, task))


def _names_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _why_unknown(pattern: str, layers: Collection[str], network: Network) -> tuple[str, str]:
    """Problem and fix for a pattern that keeps no layer in floating point."""
    problem, fix = unknown("layer", pattern, layers)
    if _names_any(f"{pattern}.*", layers):
        return problem, f"use '{pattern}.*' for all that is in it"
    if _names_any(pattern, (without_wrappers(path) for path, _ in network.module.named_modules())):
        problem = f"{pattern!r} is a module without a layer that could be kept in floating point"
        return problem, f"leave it out; known: {', '.join(sorted(layers))}"
    return problem, f"{fix}; `NAME.*` stands for all layers within a module"


def _same_values(network: Network, graph: GraphModule, task: Task) -> None:
    """Refuse a graph that, before anything is rounded, gives other values than the network: no repair would see it.

    Raises:
        StageError: an output differs by more than a thousandth of its largest value.
    """
    inputs = {name: tensor[:2] for name, tensor in as_tensors(task.example().inputs).items()}
    with torch.no_grad():
        exact, found = (outputs_of(module, inputs, task.outputs) for module in (network.module, graph))
    for name, values in exact.items():
        if values.is_floating_point() and not _is_close(found[name].double(), values.double()):
            raise StageError(
                f"the graph that would be quantized gives other values of {name!r} than the network",
                where=f"task {task.name}: quantize",
                fix="avoid code in forward() that writes into tensors or shares layers in unusual ways, and report it",
            )


def _is_close(found: Tensor, exact: Tensor) -> bool:
    """Whether it is the same to a thousandth of the largest value; the network's own NaN and infinity may stay."""
    largest = float(exact.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(found, exact, rtol=0, atol=1e-3 * largest, equal_nan=True)


def _calibrated(work: _Work) -> Mapping[str, Any]:
    """Ranges from the calibration split; with SmoothQuant folded in, from a second pass."""
    from mmedge.stages.quantization.calibration import observe, outliers
    from mmedge.stages.quantization.prepared import seen_by
    from mmedge.stages.quantization.ranges import set_ranges
    from mmedge.stages.quantization.smoothing import smooth

    settings = work.config.calibration
    seen = observe(work.prepared, work.context, settings.samples)
    if work.config.smooth is not None:
        largest = {path: each.channel_largest for path, each in seen.items()}
        done = smooth(work.prepared, largest, work.config.smooth)
        work.edits["smoothed"] = [_told(each) for each in done]
        seen = observe(work.prepared, work.context, settings.samples)
    set_ranges(work.prepared, seen, settings)
    work.edits["outliers"] = [_told(each) for each in outliers(seen, seen_by(work.prepared))]
    return seen


def _repair(work: _Work, seen: Mapping[str, Any]) -> dict[str, Tensor]:
    """Change weights and biases so that rounding harms less; gives back those that changed, by path, as they were."""
    from mmedge.stages.quantization.prepared import layers_of, tensor_at

    compensated, corrected = work.config.rounding == "compensated", work.config.bias_correction
    layers = layers_of(work.prepared)
    paths = [layer.weight_path for layer in layers if compensated]
    paths += [layer.bias_path for layer in layers if corrected and layer.bias_path is not None]
    before = {path: tensor_at(work.prepared, path).detach().clone() for path in paths}
    if compensated:
        from mmedge.stages.quantization.rounding import compensate

        work.edits["rounded"] = [_told(each) for each in compensate(work.prepared, _inputs(work.context.task, 128))]
    if corrected:
        from mmedge.stages.quantization.bias import correct

        means = {path: each.channel_mean for path, each in seen.items()}
        work.edits["biases"] = [_told(each) for each in correct(work.prepared, means, before)]
    return {path: tensor for path, tensor in before.items() if not torch.equal(tensor, tensor_at(work.prepared, path))}


def _sensitivity(work: _Work, network: Network) -> dict[str, float]:
    from mmedge.stages.quantization.sensitivity import groups, sensitivity, towers

    layers = [*work.edits["quantized"], *work.edits["attention"]]
    named = groups(layers)
    whole = {f"{name} (tower)": layers for name, layers in towers(layers).items()}
    whole = {name: layers for name, layers in whole.items() if layers not in named.values()}
    work.edits["groups"] = named
    work.context.progress.say(f"sensitivity of {len(named)} groups of layers")
    inputs = _inputs(work.context.task, work.config.sensitivity_samples)
    return sensitivity(work.prepared, network.module, inputs, work.context.task.outputs, {**named, **whole})


def _told(found: Any) -> dict[str, Any]:
    """What a repair did to a layer as JSON, without what it could not measure."""
    return {name: value for name, value in vars(found).items() if value == value}


def _inputs(task: Task, samples: int) -> list[dict[str, Tensor]]:
    """The first calibration samples, batch by batch."""
    found: list[dict[str, Tensor]] = []
    count = 0
    with torch.no_grad():
        for batch in task.stream("calibration"):
            size = min(len(batch), samples - count)
            found.append(as_tensors({name: array[:size] for name, array in batch.inputs.items()}))
            count += size
            if count >= samples:
                break
    return found

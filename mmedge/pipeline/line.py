"""One pass along the line: networks to artifacts, artifacts to engines, engines to rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from mmedge.artifact import Artifact, Store
from mmedge.errors import ArtifactError
from mmedge.lower.versions import OPSET, PASSES, PIECES
from mmedge.pipeline.engines import build_engine, place_name
from mmedge.pipeline.environment import versions_of
from mmedge.pipeline.judge import Judge, Stopwatch
from mmedge.pipeline.team import Team
from mmedge.progress import Progress
from mmedge.recipe import PlannedStage
from mmedge.stages.base import Context, Network, Saved, as_tensors, outputs_of
from mmedge.stages.structure import count
from mmedge.targets.base import Target
from mmedge.targets.lowered import write_description
from mmedge.targets.onnx_graph import place
from mmedge.task import Piece, Task
from mmedge.tensors import Array

if TYPE_CHECKING:
    from mmedge.lower.shape import Release

BASELINE = "baseline"
PROBED_SAMPLES = 32  # on which activations are compared with what float16 can hold


@dataclass
class Step:
    """One network of the line: the trained model, or what a stage made of it.

    Attributes:
        name: ``baseline`` or the stage's name.
        artifact: its weights and edits.
        parent: the step before.
        planned: the stage that made it, None for the baseline.
    """

    name: str
    artifact: Artifact
    line: Line
    parent: Step | None = None
    planned: PlannedStage | None = None

    @cached_property
    def network(self) -> Network:
        """The network, rebuilt from what was saved; what is measured is always what a later run would load."""
        if self.parent is None or self.planned is None:
            return Network(self.line.task.model)
        return self.planned.stage.restore(self.parent.network, saved_in(self.artifact), self.line.context)

    def origins(self) -> list[Path]:
        """The artifacts that lead to this network, in order, without the baseline's."""
        return [] if self.parent is None else [*self.parent.origins(), self.artifact.path]

    @property
    def form(self) -> str:
        """``float`` or ``qdq``."""
        return str(self.artifact.about["form"])

    def forget(self) -> None:
        """Let go of the network's memory; it is rebuilt when it is asked for again."""
        self.__dict__.pop("network", None)

    def float_ancestor(self) -> Step:
        """The latest network before this one, or this one, that is in floating point."""
        step = self
        while step.form != "float" and step.parent is not None:
            step = step.parent
        return step

    @property
    def half(self) -> tuple[str, ...] | None:
        """Of a network that is to run in float16, the modules that stay float32."""
        found = self.artifact.about["edits"].get("float16_islands")
        return None if found is None else tuple(found)

    def float_name(self, target: Target) -> Literal["fp32", "bf16", "fp16"]:
        """What a target computes this network's layers in that are not INT8: float16 is written into an ONNX graph."""
        asked = self.half is not None and target.lowering.format == "onnx"
        return "fp16" if asked else target.float_name

    @property
    def groups(self) -> dict[str, list[str]]:
        """INT8 layers of a Q/DQ network by the group in which they may go back to floating point."""
        layers = list(self._quantization.get("quantized", ()))
        return dict(self._quantization.get("groups") or ({"all": layers} if layers else {}))

    @property
    def attention(self) -> tuple[str, ...]:
        """Modules of a Q/DQ network whose products of attention can run in INT8."""
        return tuple(self._quantization.get("attention", ()))

    @property
    def damage(self) -> dict[str, float]:
        """By how much the outputs change when one group alone is rounded: see the ``quantize`` stage."""
        return dict(self._quantization.get("sensitivity", {}))

    @property
    def _quantization(self) -> dict[str, Any]:
        """What the ``quantize`` stage noted, also of a step that was trained after it."""
        step: Step | None = self
        while step is not None and "quantized" not in step.artifact.about["edits"]:
            step = step.parent
        return step.artifact.about["edits"] if step is not None else {}


@dataclass
class Line:
    """What all steps share."""

    task: Task
    task_digest: str
    store: Store
    seed: int
    progress: Progress
    batch: dict[str, int]  # min, opt and max that engines are built for
    judge: Judge | None = None  # None where no target of the run can run engines here
    stopwatch: Stopwatch | None = None
    team: Team = field(default_factory=Team)

    @cached_property
    def context(self) -> Context:
        """What stages may use."""
        return Context(self.task, self.task.model, self.seed, self.progress, self._remember, self.judge, self.stopwatch)

    def _remember(
        self, name: str, inputs: Mapping[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        full = {**inputs, "task": self.task_digest, "versions": versions_of("torch")}

        def fill(folder: Path) -> dict[str, Any]:
            save_tensors(compute(), folder / "tensors.safetensors")
            return {}

        return load_tensors(self.store.make("cache", name, full, fill).file("tensors.safetensors"))

    def baseline(self) -> Step:
        """The trained model as the first step."""
        inputs = {"task": self.task_digest, "versions": versions_of("torch")}

        def fill(folder: Path) -> dict[str, Any]:
            module = self.task.model
            save_tensors(module.state_dict(), folder / "weights.safetensors")
            return {"form": "float", "edits": {}, **self._counted(module)}

        return Step(BASELINE, self.store.make("torch", BASELINE, inputs, fill), self)

    def _counted(self, module: torch.nn.Module) -> dict[str, int]:
        return count(module, as_tensors(self.task.example().inputs), self.task.outputs)

    def _inputs(self, parent: Step, planned: PlannedStage) -> dict[str, Any]:
        judged_on = planned.stage.judged_on(self.judge.target.name if self.judge else None)
        return ({"judged_on": judged_on} if judged_on else {}) | {
            "parent": parent.artifact.digest,
            "task": self.task_digest,
            "stage": planned.kind,
            "stage_version": planned.stage.version,
            "settings": planned.stage.config.model_dump(mode="json"),
            "seed": self.seed,
            "threads": torch.get_num_threads(),  # sums in another order give other roundings
            "versions": versions_of("torch", "torchao", "torch-pruning"),
        }

    def expect(self, planned: PlannedStage) -> None:
        """Ask a stage whether it can work with this task, once.

        Raises:
            StageError: it cannot.
        """

        def ask() -> dict[str, Any]:
            planned.stage.expect(self.context)
            return {}

        settings = planned.stage.config.model_dump(mode="json")
        inputs = {"task": self.task_digest, "settings": settings, "judge": self.judge is not None}
        self.store.values(f"{planned.name}-expected", inputs, ask)

    def check(self, parent: Step, planned: PlannedStage) -> None:
        """Ask a stage whether its settings fit ``parent``, once.

        Raises:
            StageError: they do not.
        """

        def ask() -> dict[str, Any]:
            planned.stage.check(parent.network, replace(self.context, progress=Progress()))  # ``run`` speaks
            return {}

        self.store.values(f"{planned.name}-check", self._inputs(parent, planned), ask)

    def follow(self, parent: Step, planned: PlannedStage) -> Step:
        """The step that a stage makes of ``parent``: found, or made now."""
        stage = planned.stage
        inputs = self._inputs(parent, planned)
        made: list[Network] = []

        def fill(folder: Path) -> dict[str, Any]:
            scratch = self.store.scratch("torch", planned.name, inputs)
            with self.team.at_hand(planned, parent.origins()) as summon:
                saved = stage.run(parent.network, replace(self.context, scratch=scratch, summon=summon))
            weights = folder / "weights.safetensors"
            save_tensors(saved.tensors, weights)
            saved = Saved(load_tensors(weights), saved.edits)  # what a later run loads; the first ones are let go
            network = stage.restore(parent.network, saved, self.context)
            made.append(network)
            facts = self._counted(network.module)
            if network.form == "qdq":  # the graph holds the same weights as integers
                facts["parameters"] = parent.artifact.about["parameters"]
            return {"form": network.form, "edits": dict(saved.edits), **facts}

        artifact = self.store.make("torch", planned.name, inputs, fill, parent.artifact)
        step = Step(planned.name, artifact, self, parent, planned)
        if made:  # tracing it again would take seconds
            step.network = made[0]
        return step

    def portable(self, step: Step, form: str) -> Artifact:
        """The step's network as ``model.onnx`` or ``model.pt2``."""
        inputs = {"torch": step.artifact.digest, "task": self.task_digest, "form": form, "opset": OPSET}
        inputs |= {"versions": versions_of("torch", "onnxscript"), "lower": PASSES}

        def fill(folder: Path) -> dict[str, Any]:
            from mmedge.lower.export import archive_of, onnx_of, write

            if form == "pt2":
                (folder / "model.pt2").write_bytes(archive_of(step.network, self.task))
            else:
                write(onnx_of(step.network, self.task), folder / "model.onnx")
            return {"inputs": [spec.as_json() for spec in self.task.inputs], "outputs": list(self.task.outputs)}

        return self.store.make("onnx", f"{step.name}-{form}", inputs, fill, step.artifact)

    def part(self, step: Step, piece: Piece) -> Artifact:
        """A component of the step's network, or what a decoder with a cache is made of, as ``model.onnx``."""
        whole = self.portable(step, "onnx")
        inputs: dict[str, Any] = {"whole": whole.digest, "component": vars(piece.component), "role": piece.role}
        if piece.role != "whole":
            inputs["version"] = PIECES

        def fill(folder: Path) -> dict[str, Any]:
            from mmedge.lower.cut import specs_of
            from mmedge.lower.export import write
            from mmedge.lower.step import piece_of

            model, cache = piece_of(whole.file("model.onnx"), piece)
            write(model, folder / "model.onnx")
            modality = {spec.name: spec.modality for spec in self.task.inputs}
            specs = [spec | {"modality": modality.get(spec["name"], "")} for spec in specs_of(model)]
            about = {"inputs": specs, "outputs": [str(value.name) for value in model.graph.outputs]}
            return about | ({"cache": cache.as_json()} if cache else {})

        return self.store.make("onnx", f"{step.name}-{piece.name}", inputs, fill, whole)

    def lowered(
        self, step: Step, target: Target, released: tuple[str, ...] = (), piece: Piece | None = None
    ) -> Artifact:
        """The step's network in the form that a target builds from: ``model.onnx`` (or ``.pt2``) and what it must know.

        Args:
            step: which network.
            target: in the form that is wanted.
            released: INT8 layers that this engine keeps in floating point.
            piece: which part of the network, None for all of it; from ONNX only.
        """
        lowering = target.lowering
        portable = self.part(step, piece) if piece else self.portable(step, lowering.format)
        if step.half is not None and lowering.format == "onnx":
            lowering = replace(lowering, float_type="float16")
        islands = self.islands(step) if lowering.float_type == "float16" else ()
        inputs = {
            "released": sorted(released),
            "islands": list(islands),
            "model": portable.digest,
            "target": target.name,
            "target_version": target.version,
            "options": target.options(),
            "lowering": vars(lowering) | {"passes": PASSES},
            "batch": self.batch,
        }

        def fill(folder: Path) -> dict[str, Any]:
            from mmedge.lower.shape import shape_for

            lowered = folder / f"model.{lowering.format}"
            if lowering.format == "pt2":
                place(portable.file("model.pt2"), folder, lowered.name)
            else:
                release = release_of(step.network, released) if released else None
                shape_for(portable.file("model.onnx"), lowering, lowered, release, islands)
            kept = ("inputs", "outputs", "cache")
            names: dict[str, Any] = {key: portable.about[key] for key in kept if key in portable.about}
            names["batch"] = self.batch
            if step.form == "qdq":
                names["weight_bits"] = lowering.weight_bits
            part = {"component": piece.name} if piece else {}
            described = {**names, **target.describe(lowered, self.batch)}
            write_description(lowered, described)
            for script, text in target.scripts(lowered.name, described).items():
                (folder / script).write_text(text, encoding="utf-8")
                (folder / script).chmod(0o755)
            return {**names, **part, "target": target.name, "precision": step.float_name(target)}

        name = place_name(f"{step.name}-{target.name}") + (f"-{piece.name}" if piece else "")
        name += "-part" if released else ""
        return self.store.make("onnx", f"{name}-lowered", inputs, fill, portable)

    def engine(
        self,
        step: Step,
        target: Target,
        versions: Mapping[str, str],
        released: tuple[str, ...] = (),
        piece: Piece | None = None,
    ) -> Artifact:
        """The step's engine for a target: found, or lowered and built now."""
        lowered = self.lowered(step, target, released, piece)
        return build_engine(self.store, lowered, target, versions, self.progress)

    def islands(self, step: Step) -> tuple[str, ...]:
        """Modules whose values float16 cannot hold, found on calibration data."""
        if step.half is not None:
            return step.half
        from mmedge.stages.overflow import islands, magnitudes

        source = step.float_ancestor()
        inputs = {"torch": source.artifact.digest, "task": self.task_digest, "samples": PROBED_SAMPLES}

        def probe() -> dict[str, Any]:
            found = magnitudes(source.network.module, self.task, PROBED_SAMPLES, self.progress)
            return {"islands": list(islands(found))}

        return tuple(self.store.values(f"{source.name}-float16-range", inputs, probe)["islands"])

    def reference(
        self, step: Step, samples: int, in_float: Collection[str] | None = None, keep_convolutions: bool = False
    ) -> dict[str, Any]:
        """PyTorch's own answers of the step's network to the first test samples, for parity.

        Args:
            step: which network.
            samples: how many.
            in_float: of a Q/DQ network, INT8 layers that are in floating point in what is compared, modules whose
                attention is among them; what no INT8 layer reads is not rounded then. None: the network as it is, which
                rounds on every edge.
            keep_convolutions: where ``in_float`` is given, round what INT8 convolutions give, whoever reads it.
        """
        network = step.network
        module = network.module
        if in_float is not None and network.prepared is not None:
            from mmedge.stages.quantization.released import released

            module = released(network.prepared, network.exact, in_float, keep_convolutions)
        parts: dict[str, list[Tensor]] = {}
        seen = 0
        with torch.no_grad():
            for batch in self.task.stream("test"):
                count = min(len(batch), samples - seen)
                inputs = as_tensors({name: array[:count] for name, array in batch.inputs.items()})
                for name, value in outputs_of(module, inputs, self.task.outputs).items():
                    parts.setdefault(name, []).append(value)
                seen += count
                if seen >= samples:
                    break
        return {name: torch.cat(values).numpy() for name, values in parts.items()}


def saved_in(artifact: Artifact) -> Saved:
    """What was kept of a stage's result."""
    return Saved(load_tensors(artifact.file("weights.safetensors")), artifact.about["edits"])


def release_of(network: Network, layers: Collection[str]) -> Release:
    """What lowering needs to take INT8 layers of a Q/DQ network back to floating point.

    Args:
        network: Q/DQ; its weights as they were before any rounding.
        layers: module paths of INT8 layers, and of modules that attend.
    """
    from mmedge.lower.shape import Release
    from mmedge.stages.quantization.prepared import layers_of, tensor_at

    prepared = network.prepared
    if prepared is None:
        return Release(layers)
    found, exact = layers_of(prepared), network.exact

    def weight(path: str) -> Array:
        kept: Array = exact.get(path, tensor_at(prepared, path)).detach().numpy()
        return kept

    weights = {layer.name: weight(layer.weight_path) for layer in found}
    paths = {layer.name: layer.bias_path for layer in found if layer.bias_path is not None}
    biases = {name: exact[path].numpy() for name, path in paths.items() if path in exact}
    return Release(layers, weights, biases)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write safetensors; tensors that share memory are written once each.

    Raises:
        ArtifactError: the disk is full or the place cannot be written.
    """
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        plain = tensor.is_contiguous() and place not in seen and tensor.untyped_storage().nbytes() == tensor.nbytes
        separate[name] = tensor.detach() if plain else tensor.detach().clone(memory_format=torch.contiguous_format)
        seen.add(place)
    try:
        safetensors.torch.save_file(separate, path)
    except SafetensorError as err:
        fix = "free some space or choose another --output, then run the same command: it resumes"
        raise ArtifactError(f"the weights could not be written: {err}", where=str(path.parent.parent), fix=fix) from err


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        return dict(safetensors.torch.load_file(path))
    except (SafetensorError, OSError) as err:
        raise ArtifactError(f"cannot be read: {err}", where=str(path)) from err

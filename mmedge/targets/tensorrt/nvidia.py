"""What the targets ``tensorrt`` and ``tensorrt-rtx`` have in common: lint, build, seal, admit, run."""

from __future__ import annotations

import importlib
import os
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from mmedge.artifact import file_digest
from mmedge.errors import TargetError
from mmedge.targets.base import Build, Lowering, Runner, Target
from mmedge.targets.checked import TimedRunner, checked, in_batches, reported
from mmedge.targets.devices import Device
from mmedge.targets.lowered import described
from mmedge.targets.onnx_graph import Graph, files_of, label, read_graph
from mmedge.targets.tensorrt.building import BuildOptions, Plan, build_plan
from mmedge.targets.tensorrt.gpu import compute_capability
from mmedge.targets.tensorrt.jetpack import jetpack_release
from mmedge.targets.tensorrt.layers import fusion
from mmedge.targets.tensorrt.log import Kernel
from mmedge.targets.tensorrt.plan import (
    PLAN,
    EngineManifest,
    Here,
    Trust,
    differences,
    read_admitted,
    seal,
    write_manifest,
)
from mmedge.tensors import Array

BATCH = {"min": 1, "opt": 1, "max": 8}
_KEPT_WARNINGS = 20
_TOLD_REMARKS = 5


class Nvidia(Target):
    """One of the two targets.

    Attributes:
        module: the Python module.
        runtime: what plans are for.
        lowering: with float16 between INT8 layers where ``half``.
    """

    module: str
    runtime: Literal["tensorrt", "tensorrt-rtx"]
    version = 3

    def __init__(
        self,
        device: Device | None,
        half: bool,
        cuda_graph: bool,
        allow_unsigned: bool,
        trusted_keys: list[Path] | None,
    ) -> None:
        self.device, self.cuda_graph = device, cuda_graph
        self.lowering = Lowering(float_type="float16" if half else "float32")
        self.trust = Trust(tuple(trusted_keys or ()), allow_unsigned)

    def describe(self, model: Path, batch: Mapping[str, int]) -> dict[str, Any]:
        """Names of weighted layers, opset; refuses what TensorRT would refuse or not run as written."""
        from mmedge.targets.tensorrt.ceiling import over_ceiling
        from mmedge.targets.tensorrt.lint import lint_tensorrt

        with reported("reading the model", str(model)):
            graph = read_graph(model)
        problems = lint_tensorrt(graph) + over_ceiling(graph, *self._ceiling()) + self._lint(graph, batch)
        if problems:
            raise TargetError(
                f"TensorRT would refuse this graph or not run it as written ({len(problems)} places)",
                where=str(model),
                fix="\n  ".join(problems[:10]),
            )
        opset = next((each.version for each in graph.opset_import if each.domain in ("", "ai.onnx")), None)
        return {
            "weighted": [label(node) for node, _ in Graph(graph).weighted()],
            "opset": opset,
            "remarks": self._remarks(graph),
        }

    def _remarks(self, graph: Any) -> list[str]:
        """What the user must know of the graph although it is built."""
        from mmedge.targets.tensorrt.ceiling import narrowed

        return narrowed(graph)

    def _ceiling(self) -> tuple[int | None, str | None]:
        """Highest opset and TensorRT version of the device, None where any current one will do."""
        return None, None

    def _lint(self, graph: Any, batch: Mapping[str, int]) -> list[str]:
        """What else this target cannot do."""
        return []

    def build(self, model: Path, folder: Path) -> Build:
        """Parse, build and seal; the coverage is what the builder itself tells. Needs no onnx where described."""
        versions = self.check()
        trt = self._module()
        about = described(model) or {**self.describe(model, BATCH), "batch": BATCH}
        remarks = about.get("remarks", [])
        self._tell(remarks)
        plan = build_plan(trt, model, self._options(about["batch"]), self.progress)
        (folder / PLAN).write_bytes(plan.content)
        found = fusion(self._kernels(trt, plan), about["weighted"])
        facts = {
            "versions": versions,
            **plan.flags,
            "engine_bytes": len(plan.content),
            "weights_bytes": weights_bytes(plan),
            "warnings": plan.warnings[:_KEPT_WARNINGS],
            **found.facts(),
            "remarks": remarks,
        }
        write_manifest(folder, self._manifest(trt, model, plan, about, facts))
        seal(folder)
        reformats = tuple(f"{before} → {after}" for before, after in found.reformats)
        return Build(replace(found.coverage, reformats=reformats), facts)

    def _tell(self, remarks: Sequence[str]) -> None:
        for text in remarks[:_TOLD_REMARKS]:
            self.progress.say(f"{self.name}: {text}")
        if (rest := len(remarks) - _TOLD_REMARKS) > 0:
            self.progress.say(f"{self.name}: {rest} more such remarks are in the engine's manifest.json")

    @abstractmethod
    def _options(self, batch: dict[str, int]) -> BuildOptions:
        """How engines of this target are built."""

    @abstractmethod
    def _kernels(self, trt: Any, plan: Plan) -> list[Kernel]:
        """What the engine runs, by the builder's or the engine's own account."""

    @abstractmethod
    def _capabilities(self) -> tuple[str, ...]:
        """Compute capabilities of GPUs that the engine runs on."""

    def _manifest(
        self, trt: Any, model: Path, plan: Plan, about: dict[str, Any], facts: dict[str, Any]
    ) -> EngineManifest:
        return EngineManifest(
            runtime=self.runtime,
            runtime_version=str(trt.__version__),
            sms=self._capabilities(),
            jetpack=jetpack_release(),
            dla_core=plan.flags.get("dla_core"),
            flags=plan.flags,
            onnx_sha256="+".join(file_digest(file) for file in files_of(model)),
            plan_sha256=file_digest_of(plan.content),
            plan_bytes=len(plan.content),
            timing_cache_sha256=plan.timing_cache_sha256,
            inputs=plan.inputs,
            outputs=plan.outputs,
            batch=about["batch"],
            log={key: facts[key] for key in ("kernels", "conversions", "warnings") if key in facts},
            built=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )

    def cannot_run(self) -> str | None:
        """Why there is no GPU here that the engines run on; asks the driver, if there is one."""
        wanted, found = self._capabilities(), compute_capability()
        if found and (not wanted or self._runs_on(found)):
            return None
        here = f"the one here is SM {found}" if found else "none here"
        return f"{self.name} engines need an NVIDIA GPU ({', '.join(f'SM {each}' for each in wanted) or 'any'}); {here}"

    def _runs_on(self, sm: str) -> bool:
        """Whether engines run on a GPU of this compute capability."""
        return sm in self._capabilities()

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``; ``threads`` means nothing on a GPU. The first calls of an RTX engine compile kernels.

        What is not this machine's own, another version's or another GPU's engine is refused before it is loaded.
        """
        if reason := self.cannot_run():
            raise TargetError(reason, fix="copy the engine to such a machine and profile it there")
        from mmedge.targets.tensorrt.execution import execution

        trt = self._module()
        here = Here(self.runtime, str(trt.__version__), compute_capability() or "", jetpack_release())
        manifest, plan = read_admitted(folder, here, self.trust)
        description = {"inputs": manifest.inputs, "outputs": manifest.outputs, "batch": manifest.batch}
        with execution(
            trt,
            plan,
            description,
            where=str(folder / PLAN),
            runtime_cache=user_cache() / f"{manifest.plan_sha256[:32]}-sm{here.sm}.rtx",
            graphs=self.cuda_graph,
            dla_core=manifest.dla_core,
            host_code=bool(manifest.flags.get("version_compatible")),
        ) as running:
            dtypes = {each["name"]: each["dtype"] for each in manifest.inputs}
            run = checked(in_batches(running, manifest.batch["max"]), dtypes, self.name)

            def parts_ms(inputs: Mapping[str, Array]) -> dict[str, float]:
                _, timing = running.timed(inputs)
                return {"h2d": timing.h2d_ms, "device": timing.device_ms, "d2h": timing.d2h_ms}

            def remarks() -> list[str]:
                why = running.no_graph
                slower = [f"runs without the CUDA graph that was asked for: {why}"] if why else []
                return differences(manifest, here) + slower

            yield TimedRunner(run, parts_ms, remarks)

    def _in_half(self) -> Target:
        other = copy(self)
        other.lowering = Lowering(float_type="float16")
        return other

    def _module(self) -> Any:
        try:
            return importlib.import_module(self.module)
        except ImportError as err:
            raise TargetError(f"{self.name}: the Python package {self.module} is missing", fix=self._install()) from err

    @abstractmethod
    def _install(self) -> str:
        """How to get the module."""


def user_cache() -> Path:
    """The folder for what may be lost: measured and compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmedge"


def file_digest_of(content: bytes) -> str:
    """The sha256 of an engine in memory."""
    import hashlib

    return hashlib.sha256(content).hexdigest()


def weights_bytes(plan: Plan) -> int | None:
    """What the weights take: ``Total Weights Memory: N bytes`` of the builder's log, None where it is silent."""
    for _, text in plan.messages:
        for line in text.splitlines():
            if line.startswith("Total Weights Memory:"):
                return int(line.split()[3])
    return None

"""Real engines of TensorRT for RTX, as small as they come, in folders as the targets leave them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from small_onnx import value

from mmedge.artifact import file_digest
from mmedge.targets.tensorrt import plan
from mmedge.targets.tensorrt.plan import EngineManifest, Here, Trust, seal, write_manifest

SMS = ("8.6", "8.9")
NOBODY = Trust()


def small_plan(folder: Path, sms: tuple[str, ...]) -> Path:
    """A real engine of one matrix product, about 150 KB."""
    pytest.importorskip("tensorrt_rtx")
    import tensorrt_rtx

    from mmedge.progress import Progress
    from mmedge.targets.tensorrt.building import BuildOptions, build_plan

    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")]
    graph = helper.make_graph(nodes, "net", [value("x", ["batch", 4])], [value("y", ["batch", 3])], [weight])
    model = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), model)
    options = BuildOptions({"min": 1, "opt": 1, "max": 4}, sms)
    path = folder / f"{'_'.join(sms)}.plan"
    path.write_bytes(build_plan(tensorrt_rtx, model, options, Progress()).content)
    return path


def manifest_of(content: Path, **changes: Any) -> EngineManifest:
    fields: dict[str, Any] = {
        "runtime": "tensorrt-rtx",
        "runtime_version": "1.7.1.116",
        "sms": SMS,
        "jetpack": None,
        "dla_core": None,
        "flags": {"strongly_typed": True},
        "onnx_sha256": "0" * 64,
        "plan_sha256": file_digest(content),
        "plan_bytes": content.stat().st_size,
        "timing_cache_sha256": None,
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 3]}],
        "batch": {"min": 1, "opt": 1, "max": 4},
        "log": {"kernels": 1, "warnings": []},
        "built": "2026-01-01T00:00:00Z",
    }
    return EngineManifest(**{**fields, **changes})


HERE = Here("tensorrt-rtx", "1.7.1.116", "8.9")


def sealed_engine(folder: Path, content: Path, **changes: Any) -> Path:
    folder.mkdir()
    shutil.copyfile(content, folder / plan.PLAN)
    write_manifest(folder, manifest_of(content, **changes))
    seal(folder)
    return folder


def tensorrt_engine(folder: Path, version: str, **changes: Any) -> Path:
    """A folder whose plan has nothing but the documented header: admission reads no further."""
    folder.mkdir()
    numbers = [int(part) for part in version.split(".")]
    start = bytearray(256)
    start[:4], start[24:27] = b"ftrt", bytes(numbers[:3])
    (folder / plan.PLAN).write_bytes(start)
    about = {"runtime": "tensorrt", "runtime_version": version, "sms": ("8.7",), "jetpack": "6.2", **changes}
    write_manifest(folder, manifest_of(folder / plan.PLAN, **about))
    seal(folder)
    return folder

"""Running TensorRT engines: buffers, order of CUDA calls, errors.

There is no GPU here. What needs one is tested against a stand-in made of host memory (``cuda_standin``), which checks
our calls, not CUDA or TensorRT.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cuda_standin import DESCRIPTION, Cache, Device, Engine, Status, tensorrt
from small_engine import tensorrt_engine

from mmedge.errors import TargetError
from mmedge.targets.checked import TimedRunner, checked
from mmedge.targets.devices import find_device
from mmedge.targets.tensorrt import execution as module
from mmedge.targets.tensorrt import nvidia
from mmedge.targets.tensorrt.cuda import cuda_runtime
from mmedge.targets.tensorrt.execution import Execution, execution
from mmedge.targets.tensorrt.lane import plan_buffers, shape_at
from mmedge.targets.tensorrt.target import TensorRt


def sample(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, 3, 2)).astype(np.float32)
    return {"image": image, "tokens": rng.integers(0, 9, (batch, 5))}


def expected(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"double": inputs["image"] * 2, "total": inputs["tokens"].sum(axis=1).astype(np.float16)}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """In place of the GPU; whatever a test does, all of its memory, streams and graphs must be given back."""
    device = Device()
    monkeypatch.setattr(module, "cuda_runtime", lambda: device)
    yield device
    assert device.kept == {place: {} for place in device.kept}


@pytest.fixture
def engine(device: Device) -> Engine:
    return Engine(device)


@pytest.fixture
def plan() -> bytes:
    return b"plan"


def same(outputs: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]) -> None:
    right = expected(inputs)
    assert list(outputs) == list(right)
    for name, array in right.items():
        assert outputs[name].dtype == array.dtype
        np.testing.assert_array_equal(outputs[name], array)


# --- without any device


def test_buffers_hold_the_largest_batch_and_do_not_overlap() -> None:
    tensors = {each["name"]: (shape_at(each, 4), each["dtype"]) for each in DESCRIPTION["inputs"]}
    assert tensors == {"image": ((4, 3, 2), "float32"), "tokens": ((4, 5), "int64")}
    tensors |= {"large": ((4, 100), "float16"), "scalar": ((), "float32")}
    assert plan_buffers(tensors) == ({"image": 0, "tokens": 256, "large": 512, "scalar": 1536}, 1792)
    assert plan_buffers({"empty": ((0, 3), "float32")}) == ({"empty": 0}, 256)
    assert shape_at({"shape": [7, 2]}, 4) == (7, 2)


def test_missing_cuda_python_says_which_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TargetError, match=r'needs CUDA Python.*\n.*"cuda-bindings>=12.8,<13" for CUDA 12') as caught:
        cuda_runtime()
    assert caught.value.exit_status == 4


def test_no_driver_by_the_real_package() -> None:
    """With ``cuda-bindings`` installed and no driver, as on a build server."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    with pytest.raises(TargetError, match="no NVIDIA driver here") as caught:
        cuda_runtime()
    assert caught.value.exit_status == 4


@pytest.mark.parametrize(
    ("status", "count", "driver", "message"),
    [
        (Status.cudaErrorInsufficientDriver, None, 0, "no NVIDIA driver here"),
        (Status.cudaErrorInsufficientDriver, None, 12060, "driver is of CUDA 12.6, the installed .* of 13.5"),
        (Status.cudaErrorNoDevice, None, 13050, "no GPU that it shows"),
        (Status.cudaSuccess, 0, 13050, "no GPU that it shows"),
        (Status.cudaErrorIllegalAddress, None, 13050, "CUDA: cudaErrorIllegalAddress"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, status: Status, count: int | None, driver: int, message: str
) -> None:
    runtime = ModuleType("cuda.bindings.runtime")
    vars(runtime).update(
        cudaError_t=Status,
        cudaGetErrorString=lambda status: (Status.cudaSuccess, status.name.encode()),
        cudaGetDeviceCount=lambda: (status, count),
        cudaDriverGetVersion=lambda: (Status.cudaSuccess, driver),
        cudaRuntimeGetVersion=lambda: (Status.cudaSuccess, 13050),
    )
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["cuda.bindings"], "runtime", runtime, raising=False)
    with pytest.raises(TargetError, match=message):
        cuda_runtime()


# --- against the stand-in


def test_any_batch_by_name(device: Device, engine: Engine, plan: bytes) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION) as run:
        kept = []
        for batch in (1, 4, 2, 1, 3, 4):
            inputs = sample(batch, seed=batch)
            kept.append((run(dict(reversed(inputs.items()))), inputs))
        wide = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32).transpose(0, 2, 1)
        kept.append((run({**sample(2), "image": wide}), {**sample(2), "image": wide}))  # not contiguous
        for outputs, inputs in kept:  # later queries wrote elsewhere
            same(outputs, inputs)
        assert device.calls.count("cudaMalloc") == device.calls.count("cudaHostAlloc") == 1
        assert engine.contexts == 1


def test_an_engine_of_one_batch_size(device: Device, engine: Engine, plan: bytes) -> None:
    fixed = {
        key: [{**each, "shape": [2, *each["shape"][1:]]} for each in DESCRIPTION[key]] for key in ("inputs", "outputs")
    }
    with execution(tensorrt(engine), plan, {**fixed, "batch": {"min": 1, "opt": 1, "max": 8}}) as run:
        same(run(sample(2)), sample(2))
        with pytest.raises(TargetError, match=r"shape \(3, 3, 2\), the engine takes \(2, 3, 2\)"):
            run(sample(3))


BAD: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "batch too large": (lambda good: sample(5), r"batch of 5 is outside the engine's 1 to 4"),
    "no sample": (lambda good: sample(0), r"batch of 0 is outside"),
    "two batches": (lambda good: {**good, "image": sample(3)["image"]}, r"differ between inputs: \[2, 3\]"),
    "size": (lambda good: {**good, "image": np.zeros((2, 3, 9), np.float32)}, r"has shape \(2, 3, 9\)"),
    "rank": (lambda good: {**good, "image": np.zeros((2, 3), np.float32)}, r"takes \('batch', 3, 2\)"),
    "dtype": (lambda good: {**good, "tokens": good["tokens"].astype(np.int32)}, r'tokens.astype\("int64"\)'),
    "missing": (lambda good: {"image": good["image"]}, "inputs are missing: tokens"),
    "unknown": (lambda good: {**good, "tokns": good["tokens"]}, "did you mean 'tokens'"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_inputs_are_refused_and_do_no_harm(device: Device, engine: Engine, plan: bytes, case: str) -> None:
    spoil, message = BAD[case]
    with execution(tensorrt(engine), plan, DESCRIPTION) as run:
        same(run(sample(3)), sample(3))
        with pytest.raises(TargetError, match=message):
            run(spoil(sample(2)))
        same(run(sample(3)), sample(3))


def test_it_is_a_runner(device: Device, engine: Engine, plan: bytes) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION) as run:
        same(checked(run, {"image": "float32", "tokens": "int64"}, "tensorrt")(sample(2)), sample(2))


def test_times_apart(device: Device, engine: Engine, plan: bytes) -> None:
    """The stand-in's clock ticks once per event: each part takes one tick, by events in the right places."""
    with execution(tensorrt(engine), plan, DESCRIPTION) as run:
        runs = engine.runs
        device.calls.clear()
        outputs, timing = run.timed(sample(4))
        same(outputs, sample(4))
        assert (timing.h2d_ms, timing.device_ms, timing.d2h_ms) == (1.0, 1.0, 1.0)
        assert 0.0 < timing.wall_ms < 1000.0
        assert engine.runs == runs + 2  # a batch size's first call is warmed up
        marks = [name for name in device.calls if name in ("cudaEventRecord", "cudaMemcpyAsync")]
        record, copy = "cudaEventRecord", "cudaMemcpyAsync"
        assert marks == [record, copy, copy, record, record, copy, copy, record]
        device.calls.clear()
        run(sample(4))
        assert record not in device.calls


def test_graphs_are_captured_once_per_batch_and_replayed(device: Device, engine: Engine, plan: bytes) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION, graphs=True) as run:
        for seed, batch in enumerate((2, 3, 2, 3, 3)):
            same(run(sample(batch, seed)), sample(batch, seed))
        assert device.calls.count("cudaGraphInstantiate") == 2
        assert device.calls.count("cudaGraphLaunch") == 5
        assert engine.contexts == 2  # one each
        assert run.no_graph is None
        assert not device.kept["graph"]  # the templates are gone, the executables stay


def test_the_target_tells_what_its_figures_lack(
    device: Device, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph that was asked for and could not be, and a JetPack that is not the one it was built on."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(nvidia, "compute_capability", lambda: "8.7")
    monkeypatch.setattr(nvidia, "jetpack_release", lambda: "6.1")
    monkeypatch.setattr(TensorRt, "_module", lambda self: tensorrt(engine))
    folder = tensorrt_engine(tmp_path / "engine", "10.3.0", **DESCRIPTION)
    jetpack = "built on JetPack 6.2, here is 6.1; TensorRT is the same"
    graph = "runs without the CUDA graph that was asked for: TensorRT cannot be captured: a loop cannot be captured"
    for uncapturable, remarks in ((False, [jetpack]), (True, [jetpack, graph])):
        engine.uncapturable = uncapturable
        with TensorRt(find_device("jetson-agx-orin"), cuda_graph=True).runner(folder, threads=1) as run:
            assert isinstance(run, TimedRunner)
            same(run(sample(1)), sample(1))
            assert run.remarks() == remarks


@pytest.mark.parametrize("call", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", None])
def test_without_a_graph_it_runs_and_says_why(device: Device, engine: Engine, plan: bytes, call: str | None) -> None:
    if call is None:
        engine.uncapturable = True
    else:
        device.failing[call] = 1, Status.cudaErrorStreamCaptureInvalidated  # the second batch size fails
    with execution(tensorrt(engine), plan, DESCRIPTION, graphs=True) as run:
        for batch in (2, 3, 1, 2, 3):
            same(run(sample(batch)), sample(batch))
        assert run.no_graph == (
            "TensorRT cannot be captured: a loop cannot be captured"
            if call is None
            else "CUDA: cudaErrorStreamCaptureInvalidated"
        )
        assert device.calls.count("cudaStreamBeginCapture") == (1 if call is None else 2)


def test_several_contexts_serve_threads(device: Device, engine: Engine, plan: bytes) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION, contexts=3) as run, ThreadPoolExecutor(8) as threads:
        inputs = [sample(1 + seed % 4, seed) for seed in range(60)]
        for outputs, given in zip(threads.map(run, inputs), inputs, strict=True):
            same(outputs, given)
        assert engine.contexts == len(device.kept["stream"]) == len(device.kept["device"]) == 3


def test_closed_is_closed(device: Device, engine: Engine, plan: bytes) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION) as run:
        assert isinstance(run, Execution)
    for _ in range(2):
        with pytest.raises(TargetError, match="was closed"):
            run(sample(1))


@pytest.mark.parametrize("contexts", [1, 2])
@pytest.mark.parametrize(
    "call",
    ["cudaStreamCreateWithFlags", "cudaEventCreate", "cudaMalloc", "cudaHostAlloc", "cudaMemsetAsync"],
)
def test_what_was_taken_is_given_back_when_opening_fails(
    device: Device, engine: Engine, plan: bytes, call: str, contexts: int
) -> None:
    device.failing[call] = contexts - 1, Status.cudaErrorMemoryAllocation  # ``device`` looks whether anything is left
    opening = execution(tensorrt(engine), plan, DESCRIPTION, contexts=contexts)
    with pytest.raises(TargetError, match="CUDA: cudaErrorMemoryAllocation"):
        opening.__enter__()


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_what_was_taken_is_given_back_when_a_query_fails(
    device: Device, engine: Engine, plan: bytes, call: str
) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION, graphs=True) as run:
        run(sample(2))
        device.failing[call] = 0, Status.cudaErrorIllegalAddress
        with pytest.raises(TargetError, match="CUDA: cudaErrorIllegalAddress"):
            run(sample(2))
        device.failing.clear()


def test_a_batch_size_that_could_not_be_made_ready_leaves_the_others_right(
    device: Device, engine: Engine, plan: bytes
) -> None:
    with execution(tensorrt(engine), plan, DESCRIPTION) as run:
        same(run(sample(2)), sample(2))
        device.failing["cudaStreamSynchronize"] = 0, Status.cudaErrorIllegalAddress
        with pytest.raises(TargetError, match="CUDA: cudaErrorIllegalAddress"):
            run(sample(1))
        device.failing.clear()
        for batch in (2, 1, 2):
            same(run(sample(batch, seed=5)), sample(batch, seed=5))


def test_an_error_of_the_caller_passes_and_leaves_nothing(
    device: Device, engine: Engine, plan: bytes, tmp_path: Path
) -> None:
    cache, trt = tmp_path / "runtime.cache", tensorrt(engine, rtx=True)
    with pytest.raises(ZeroDivisionError), execution(trt, plan, DESCRIPTION, runtime_cache=cache) as run:
        run({**sample(1), "image": 1 // 0})
    assert not cache.exists()


def test_a_shape_that_depends_on_data_is_refused(device: Device, engine: Engine, plan: bytes) -> None:
    engine.data_dependent = True
    with pytest.raises(TargetError, match="output 'total' depends on the data"):
        execution(tensorrt(engine), plan, DESCRIPTION).__enter__()


def test_an_engine_of_another_gpu_is_named(device: Device, plan: bytes) -> None:
    message = "tensorrt 10.3.0 on a GPU of SM 8.7: expecting compute 8.9 got compute 8.7"
    with pytest.raises(TargetError, match=re.escape(message)) as caught:
        execution(tensorrt(None), plan, DESCRIPTION).__enter__()
    assert caught.value.exit_status == 4
    assert "mmedge build RUN" in str(caught.value)


def test_a_description_of_another_engine_is_refused(device: Device, engine: Engine, plan: bytes) -> None:
    other = {**DESCRIPTION, "outputs": DESCRIPTION["outputs"][:1]}
    with pytest.raises(TargetError, match="described are"), execution(tensorrt(engine), plan, other):
        pass
    other = {**DESCRIPTION, "outputs": [DESCRIPTION["outputs"][0], {**DESCRIPTION["outputs"][1], "dtype": "float32"}]}
    with pytest.raises(TargetError, match="'total' is float16 in the engine"), execution(tensorrt(engine), plan, other):
        pass


def test_rtx_keeps_what_it_compiled_and_captures_by_itself(
    device: Device, engine: Engine, plan: bytes, tmp_path: Path
) -> None:
    cache = tmp_path / "not yet" / "there" / "runtime.cache"
    Cache.known.clear()
    trt = tensorrt(engine, rtx=True)
    with execution(trt, plan, DESCRIPTION, runtime_cache=cache, graphs=True) as run:
        same(run(sample(2)), sample(2))
        assert engine.config.cuda_graph_strategy == "whole graph"
        assert engine.config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert "cudaStreamBeginCapture" not in device.calls
    assert cache.read_bytes() == b"compiled kernels"
    written = cache.stat().st_ino
    with execution(trt, plan, DESCRIPTION, runtime_cache=cache):
        pass
    assert cache.stat().st_ino == written  # nothing new, nothing to write
    cache.write_bytes(b"of another GPU")
    with execution(trt, plan, DESCRIPTION, runtime_cache=cache):
        pass
    assert Cache.known == [b"compiled kernels", b"of another GPU", b"reset"]
    assert cache.read_bytes() == b"compiled kernels"
    assert [file.name for file in cache.parent.iterdir()] == ["runtime.cache"]


# --- the real TensorRT for RTX, as far as it goes without a GPU


def test_real_tensorrt_says_why_it_loads_nothing(device: Device) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    plan = b"no plan" * 100
    with pytest.raises(TargetError, match=r"tensorrt_rtx \d.* on a GPU of SM 8.7: .*magicTag"):
        execution(trt, plan, DESCRIPTION).__enter__()


def test_real_tensorrt_has_what_is_asked_of_it() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    used = {
        trt.IExecutionContext: "set_input_shape get_tensor_shape set_tensor_address execute_async_v3",
        trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_location create_execution_context "
        "create_runtime_config",
        trt.IRuntimeConfig: "create_runtime_cache set_runtime_cache cuda_graph_strategy "
        "dynamic_shapes_kernel_specialization_strategy",
        trt.IRuntimeCache: "deserialize serialize reset",
        trt.Runtime: "deserialize_cuda_engine DLA_core engine_host_code_allowed",
        trt.CudaGraphStrategy: "WHOLE_GRAPH_CAPTURE",
        trt.DynamicShapesKernelSpecializationStrategy: "EAGER",
        trt.TensorLocation: "DEVICE",
    }
    assert [
        f"{owner} {name}" for owner, names in used.items() for name in names.split() if not hasattr(owner, name)
    ] == []


def test_real_cuda_has_what_is_asked_of_it() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = [f"cuda{name}" for name in vars(Device) if name[0].isupper()] + list(Device.gives_back)
    names += [name for name in vars(Device) if name.startswith("cuda")]
    assert len(names) > 25
    assert [name for name in names if not hasattr(runtime, name)] == []
    for name in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
        assert [each for each in vars(getattr(Device, name)) if not hasattr(getattr(runtime, name), each)] == []
    assert [each.name for each in Status if int(getattr(runtime.cudaError_t, each.name)) != each] == []

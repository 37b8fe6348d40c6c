"""Engines timed and weighed in worker processes."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorder import Recorder

from mmedge.errors import TargetError, UsageError
from mmedge.profile.latency import EngineRef, Series, interleaved, peak_memory_mib
from mmedge.profile.statistics import Latency, Speedup
from mmedge.profile.worker import SETTLE, TURN, WARM_QUERIES, Spec, spent, write_arrays

TARGET = """
import json, os, signal, sys
from contextlib import contextmanager
import numpy as np
from mmedge.errors import TargetError
from mmedge.targets.checked import TimedRunner

class Tiny:
    @contextmanager
    def runner(self, folder, threads):
        engine = json.loads((folder / "engine.json").read_text())
        does = engine.get("does", "log")
        if does == "refuse":
            raise TargetError("this engine is not for here", fix="build it again")
        hoard = np.ones(64 << 17) if does == "hoard" else None  # 64 MiB
        log = (folder / "log").open("a")
        log.write(f"{threads} {os.environ['OMP_NUM_THREADS']} {os.environ['ORT_DISABLE_TELEMETRY']}\\n")
        calls = 0
        def run(inputs):
            nonlocal calls
            calls += 1
            (name, array), = inputs.items()
            if does == "chat":
                os.write(1, b"a runtime prints this\\n")
            if does == "raise":
                raise ValueError("no such kernel")
            if does == "die" and calls == 20:
                print("last words", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            with open(folder.parent / "order", "a") as order:
                order.write(f"{folder.name} {name} {array.shape} {array.sum()}\\n")
            return {"y": array}
        remarks = engine.get("remarks")
        yield TimedRunner(run, lambda inputs: {"device": 0.5}, lambda: remarks) if remarks else run
        log.write("closed")
        log.close()
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EngineRef]:
    """Makes engines of the target ``tiny``, which a package on the import path offers."""
    package = tmp_path / "site"
    info = package / "tiny_target-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "tiny_target.py").write_text(TARGET)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-target\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mmedge.targets]\ntiny = tiny_target:Tiny\n")
    monkeypatch.syspath_prepend(str(package))

    def make(name: str, **engine: Any) -> EngineRef:
        folder = tmp_path / "engines" / name
        folder.mkdir(parents=True)
        (folder / "engine.json").write_text(json.dumps(engine))
        return EngineRef(name, "tiny", str(folder))

    return make


SAMPLES = {"file": np.arange(6, dtype=np.float32).reshape(3, 2)}  # a name that numpy.savez would take for its own


def test_rounds_give_every_engine_the_same_samples_in_shuffled_order(
    tiny: Callable[..., EngineRef], tmp_path: Path
) -> None:
    engines = [tiny("a"), tiny("b", does="chat"), tiny("c")]
    progress = Recorder()
    times = interleaved(engines, SAMPLES, threads=2, queries=30, warmup_s=0.0, progress=progress, workdir=tmp_path)
    assert list(times) == ["a", "b", "c"]
    assert all(series.shape == (30,) and series.dtype == np.int64 and (series > 0).all() for series in times.values())
    assert (progress.total, progress.done) == (30, 30)
    calls = [line.split(" ", 1) for line in (tmp_path / "engines/order").read_text().splitlines()][3 * WARM_QUERIES :]
    order = []
    for first in range(0, 30, TURN):  # a round: one turn of each engine, on the same samples
        numbers = range(first - SETTLE, min(first + TURN, 30))
        expected = [f"file (1, 2) {SAMPLES['file'][k % 3].sum()}" for k in numbers]
        parts = [calls[k * len(numbers) : (k + 1) * len(numbers)] for k in range(3)]
        calls = calls[3 * len(numbers) :]
        order.append([part[0][0] for part in parts])
        assert [seen for part in parts for _, seen in part] == 3 * expected
        assert all(len({name for name, _ in part}) == 1 for part in parts)
        assert sorted(order[-1]) == ["a", "b", "c"]
    assert not calls
    assert len(set(map(tuple, order))) > 1
    assert (tmp_path / "engines/a/log").read_text() == "2 2 1\nclosed"
    assert not list(tmp_path.glob("mmedge-profile-*"))


def test_processes_share_the_queries_and_open_engines_anew(tiny: Callable[..., EngineRef], tmp_path: Path) -> None:
    engines, progress = [tiny("a"), tiny("b")], Recorder()
    settings = {"warmup_s": 0.0, "progress": progress, "workdir": tmp_path}
    times = interleaved(engines, SAMPLES, queries=200, processes=3, **settings)
    assert times.processes == (67, 67, 66)
    assert (progress.total, progress.done, len(times["a"])) == (200, 200, 200)
    assert (tmp_path / "engines/a/log").read_text().count("closed") == 3
    first, second = (np.split(times["a"], [67, 134])[number] for number in (0, 1))
    assert times.latency("a").p50_per_process[:2] == (np.median(first) / 1e6, np.median(second) / 1e6)
    assert times.speedup("a", over="a").value == 1.0
    assert len(times.speedup("a", over="b").per_process) == 3
    few = interleaved(engines, SAMPLES, queries=127, processes=3, warmup_s=0.0)
    assert few.processes == (127,)  # two of 63 could not tell a p90


def test_what_must_be_known_of_the_figures_is_said_once(tiny: Callable[..., EngineRef]) -> None:
    engines, progress = [tiny("a", remarks=["runs without a graph", "is of another JetPack"]), tiny("b")], Recorder()
    times = interleaved(engines, SAMPLES, queries=128, processes=2, warmup_s=0.0, progress=progress)
    assert progress.said == ["a on tiny: runs without a graph", "a on tiny: is of another JetPack"]
    assert times.parts_ms("a") == {"device": 0.5}


def test_parts_of_a_query_are_the_medians_over_processes() -> None:
    times = {"gpu": np.array([4, 5, 6]), "cpu": np.array([1, 2, 3])}
    parts = [{"gpu": {"h2d": ms, "device": 10 * ms}} for ms in (0.1, 0.3, 0.2)]
    series = Series([times] * 3, parts)
    assert series.parts_ms("gpu") == {"h2d": 0.2, "device": 2.0}
    assert series.parts_ms("cpu") is None


def test_budget_ends_the_rounds_but_leaves_enough_for_a_p90() -> None:
    assert not spent(0, 1e9, 0.0)
    assert not spent(63, 3.9, 1.0)
    assert spent(63, 4.1, 1.0)
    assert not spent(64, 0.9, 1.0)
    assert spent(64, 1.1, 1.0)


def test_used_up_budget_is_reported_as_fewer_rounds(tiny: Callable[..., EngineRef]) -> None:
    times = interleaved([tiny("a"), tiny("b")], SAMPLES, queries=10_000_000 // 2, warmup_s=0.0, budget_s=0.05)
    assert len(times["a"]) == len(times["b"])
    assert 1 <= len(times["a"]) < 1_000_000


def test_engine_that_kills_the_process_is_a_target_error(tiny: Callable[..., EngineRef]) -> None:
    with pytest.raises(TargetError, match="SIGSEGV: last words") as caught:
        interleaved([tiny("a"), tiny("b", does="die")], SAMPLES, warmup_s=0.0)
    assert caught.value.where == "timing"


def test_errors_of_an_engine_reach_the_parent_whole(tiny: Callable[..., EngineRef]) -> None:
    with pytest.raises(TargetError, match="not for here") as caught:
        interleaved([tiny("a"), tiny("b", does="refuse")], SAMPLES, warmup_s=0.0)
    assert (caught.value.where, caught.value.fix) == ("b", "build it again")
    with pytest.raises(TargetError, match="ValueError: no such kernel") as caught:
        interleaved([tiny("c", does="raise")], SAMPLES, warmup_s=0.0)
    assert caught.value.where == "c on tiny"
    with pytest.raises(TargetError, match="unknown target 'tinny'"):
        interleaved([EngineRef("x", "tinny", ".")], SAMPLES)
    with pytest.raises(TargetError, match="share an id"):
        interleaved([EngineRef("x", "tiny", ".")] * 2, SAMPLES)


class Interrupted(Recorder):
    def advance(self, steps: int = 1, **facts: float) -> None:
        raise KeyboardInterrupt


def test_interrupt_kills_the_worker(tiny: Callable[..., EngineRef], tmp_path: Path) -> None:
    slow = {"queries": 100_000_000, "budget_s": 600.0, "warmup_s": 0.0}
    with pytest.raises(KeyboardInterrupt):
        interleaved([tiny("a")], SAMPLES, **slow, progress=Interrupted(), workdir=tmp_path)
    assert (tmp_path / "engines/order").exists()  # it was at work …
    assert not [cwd for cwd in Path("/proc").glob("[0-9]*/cwd") if is_below(tmp_path, cwd)]  # … and is gone


def is_below(folder: Path, link: Path) -> bool:
    try:
        return os.readlink(link).startswith(str(folder))
    except OSError:
        return False  # the process ended, or is not ours


def test_memory_counts_what_the_engine_holds(tiny: Callable[..., EngineRef]) -> None:
    light = peak_memory_mib(tiny("light"), SAMPLES)
    heavy = peak_memory_mib(tiny("heavy", does="hoard"), SAMPLES)
    assert 0 <= light < 12  # without the interpreter and NumPy, some 30 MiB
    assert 56 < heavy - light < 80


def test_bad_spec_is_a_usage_error(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    good = {"engines": [{"id": "a", "target": "t", "folder": "f"}], "inputs": "i.npz", "output": "o.npz"}
    for change in ({"querys": 3}, {"mode": "power"}, {"engines": []}, {"engines": [{"id": "a"}]}):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UsageError):
            Spec.read(path)
    path.write_text(json.dumps(good))
    assert Spec.read(path).queries == 700


def test_arrays_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    write_arrays(path, SAMPLES)
    with pytest.raises(ValueError, match="allow_pickle"):
        write_arrays(path, {"a": np.ones(3), "b": np.array([object()])})
    with np.load(path) as file:
        assert file["file"].tolist() == SAMPLES["file"].tolist()


def test_device_side_imports_neither_torch_nor_onnx() -> None:
    code = (
        "import sys, mmedge.profile.worker, mmedge.profile.latency, mmedge.profile.accuracy, mmedge.profile.statistics;"
        "sys.exit(', '.join({'torch', 'onnx', 'onnxruntime', 'scipy'} & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# on ONNX Runtime


def mlp(path: Path, width: int, depth: int) -> Path:
    """An ONNX model: x (batch, 64) float32 through ``depth`` matrix products of ``width``, y (batch, 64)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    sizes = [64, *[width] * depth, 64]
    nodes, weights, last = [], [], "x"
    for k, (wide, high) in enumerate(itertools.pairwise(sizes)):
        weight = (rng.standard_normal((wide, high)) / math.sqrt(wide)).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{k}"))
        out = "y" if k == len(sizes) - 2 else f"h{k}"
        nodes.append(helper.make_node("MatMul", [last, f"w{k}"], [out], name=f"mm{k}"))
        last = out
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "mlp", value[:1], value[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def test_onnxruntime_engines_are_timed_and_weighed(tmp_path: Path) -> None:
    from mmedge import plugins

    target = plugins.target("onnxruntime")
    engines = []
    for name, width, depth in (("large", 1024, 12), ("small", 16, 1)):
        folder = tmp_path / name
        folder.mkdir()
        target.build(mlp(tmp_path / f"{name}.onnx", width, depth), folder)
        engines.append(EngineRef(name, "onnxruntime", str(folder)))
    inputs = {"x": np.random.default_rng(1).standard_normal((4, 64), dtype=np.float32)}
    times = interleaved(engines, inputs, queries=80, warmup_s=0.05)
    assert Latency.of(times["large"]).p90 is not None
    assert Speedup.of(times["large"], times["small"]).value > 1  # 11 million multiplications against 2 thousand
    weights_mib = 11 * 1024 * 1024 * 4 / 2**20
    assert peak_memory_mib(engines[0], inputs) - peak_memory_mib(engines[1], inputs) > 0.7 * weights_mib

"""A made-up report of four stages on two targets, for the tests of its model, gates and pages."""

from __future__ import annotations

from typing import Any

from mmedge.report.model import Report, Result

BASE_MS, BASE_BYTES, BASE_SCORE = 9.81, 13_820_416, 0.9758
TOO_FEW = "400 queries; p99 needs 662"
NO_RAILS = "this machine has no power rails"
ROWS = {  # stage: latency and size as fractions of the baseline, drop, coverage
    "baseline": (1.0, 1.0, 0.0, 0),
    "distill": (0.42, 0.31, 0.0034, 0),
    "prune": (0.29, 0.18, 0.0062, 0),
    "quantize": (0.17, 0.055, 0.0071, 15),
}
LAYERS = [
    f"{side}.blocks.{index}.{part}" for side in ("image", "audio") for index in range(4) for part in ("qkv", "mlp")
]


def result(stage: str, target: str, slower: float = 1.0) -> dict[str, Any]:
    time, size, drop, covered = ROWS[stage]
    p50 = BASE_MS * slower * time
    first = stage == "baseline"
    parent_time = ROWS[before(stage) or stage][0]
    reasons = {"latency_ms.p99": TOO_FEW, "energy_mj": NO_RAILS}
    if first:
        reasons |= dict.fromkeys(("speedup.vs_parent", "accuracy.drop_vs_parent"), "the baseline has no parent")
    return {
        "target": target,
        "precision": "int8" if stage == "quantize" else "fp32",
        "artifact": f"artifacts/{stage}-{target}",
        "size_bytes": int(BASE_BYTES * size),
        "shrink": 1 / size,
        "accuracy": {
            "value": BASE_SCORE - drop,
            "samples": 5000,
            "ci95": [BASE_SCORE - drop - 0.004, BASE_SCORE - drop + 0.004],
            "drop": drop,
            "drop_ci95": None if first else [drop - 0.0021, drop + 0.0021],
            "drop_vs_parent": None if first else drop - ROWS[before(stage) or stage][2],
        },
        "latency_ms": {
            "p50": p50,
            "p90": p50 * 1.06,
            "p99": None,
            "mean": p50 * 1.02,
            "queries": 400,
            "ci95": [p50 * 0.97, p50 * 1.04],
            "p50_per_process": [p50, p50 * 0.97, p50 * 1.04],
        },
        "speedup": {
            "vs_baseline": 1 / time,
            "vs_parent": None if first else parent_time / time,
            "ci95": [0.96 / time, 1.04 / time],
        },
        "peak_memory_mib": 182.0 * size + 60,
        "energy_mj": None,
        "parity": {"max_abs": 3.1e-5, "cosine": 0.99998},
        "int8_coverage": covered / 16,
        "coverage": {"int8": LAYERS[:covered], "other": dict.fromkeys(LAYERS[covered:], "fp32: faster in float here")},
        "threads": 1,
        "versions": {target: "1.30.0"},
        "reasons": reasons,
    }


def not_run(stage: str) -> dict[str, Any]:
    why = "no NVIDIA GPU here: build and profile it on the device"
    empty = result(stage, "tensorrt-rtx")
    keep = ("target", "precision", "artifact", "size_bytes", "shrink", "versions")
    nothing = {name: None for name in empty if name not in (*keep, "reasons")}
    return {**{name: empty[name] for name in keep}, **nothing, "reasons": {name: why for name in nothing}}


def before(stage: str) -> str | None:
    names = list(ROWS)
    return names[names.index(stage) - 1] if names.index(stage) else None


def sample(**changes: Any) -> dict[str, Any]:
    stages = [
        {
            "name": stage,
            "parent": before(stage),
            "digest": f"{index:064x}",
            "parameters": int(3_400_000 * min(1.0, ROWS[stage][1] * 1.4)),
            "macs": 410_000_000,
            "results": [result(stage, "onnxruntime"), result(stage, "openvino", 0.8), not_run(stage)],
            "modalities": {
                "image": {"missing": 0.611 - index * 0.011, "noisy": 0.93, "clean": 0.9758, "samples": 5000},
                "audio": {"missing": 0.902, "noisy": 0.951, "clean": 0.9758, "samples": 5000},
            },
        }
        for index, stage in enumerate(ROWS)
    ]
    return {
        "schema": 1,
        "verdict": "pass",
        "recipe": {
            "task": "av_digits",
            "targets": ["onnxruntime", "openvino"],
            "stages": [{"distill": {"epochs": 12}}],
        },
        "command": "mmedge compress --recipe int8_distill --task av_digits --output runs/av_digits",
        "seed": 0,
        "created": "2026-01-02T03:04:05Z",
        "task": {
            "name": "av_digits",
            "inputs": [
                {"name": "image", "modality": "image", "dtype": "float32", "shape": ["batch", 1, 28, 28]},
                {"name": "audio", "modality": "audio", "dtype": "float32", "shape": ["batch", 1, 40, 64]},
            ],
            "metric": {"name": "accuracy", "higher_is_better": True},
        },
        "environment": {
            "cpu": "Some CPU @ 2.60GHz",
            "threads": 1,
            "gpu": None,
            "versions": {"mmedge": "0.1.0", "numpy": "2.3.0", "onnxruntime": "1.30.0"},
            "os": "Linux 6.8",
            "facts": {"memory_mib": 16000, "governor": "performance"},
            "reasons": {"gpu": "none found"},
        },
        "stages": stages,
        "gates": [],
        **changes,
    }


def report(**changes: Any) -> Report:
    return Report.model_validate(sample(**changes))


def final(found: Report, target: str = "onnxruntime") -> Result:
    return next(result for result in found.stages[-1].results if result.target == target)


def only(found: Report, *targets: str) -> Report:
    for stage in found.stages:
        stage.results = [result for result in stage.results if result.target in targets]
    return found

"""Print the README's tables from result files of benchmarks/run.py.

python benchmarks/table.py FILE          every stage on every target
python benchmarks/table.py FILE FILE …   the last stage of each run against its float network and its twin
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    report, costs = result["report"], result["costs"]
    print(f"Machine: {report['environment']['cpu']}, {report['environment']['threads']} cores; engines on one thread.")
    print(f"The command took {costs['wall_s']:.0f} s and {costs['peak_memory_mib'] / 1024:.1f} GiB at its peak;")
    print(f"again, with everything found, {costs['again_s']:.0f} s.\n")
    print("| target | stage | accuracy | p50 | p99 | speedup (95 % CI) | size | INT8 coverage |")
    print("|---|---|---|---|---|---|---|---|")
    for stage in report["stages"]:
        for row in stage["results"]:
            print(line(stage["name"], row))


def line(stage: str, row: dict) -> str:
    size = f"{row['size_bytes'] / 2**20:.2f} MiB ({row['shrink']:.1f}× smaller)"
    coverage = f"{row['int8_coverage']:.0%}"
    if row["latency_ms"] is None or row["accuracy"] is None:
        return f"| {row['target']} | {stage} | – | – | – | not measured: no GPU | {size} | {coverage} |"
    latency, speedup = row["latency_ms"], row["speedup"]
    accuracy = f"{row['accuracy']['value']:.2%} (drop {100 * row['accuracy']['drop']:.2f})"
    ratio = f"{speedup['vs_baseline']:.1f}× ({speedup['ci95'][0]:.1f}–{speedup['ci95'][1]:.1f})"
    p99 = f"{latency['p99']:.2f} ms" if latency["p99"] is not None else "–"
    cells = [row["target"], stage, accuracy, f"{latency['p50']:.2f} ms", p99, ratio, size, coverage]
    return f"| {' | '.join(cells)} |"


def interval(found: list[float] | None) -> str:
    """In points; empty where there is none, as in earlier result files."""
    return " ({:.2f} to {:.2f})".format(*(100 * bound for bound in found)) if found else ""


def summary(paths: list[Path]) -> None:
    heads = ["recipe, task", "target", "metric, float → INT8", "drop, points", "p50, float → INT8", "over float"]
    heads += ["over its twin", "layers in INT8"]
    print(f"| {' | '.join(heads)} |")
    print(f"|{'---|' * len(heads)}")
    for path in paths:
        report = json.loads(path.read_text(encoding="utf-8"))["report"]
        name = f"{report['recipe']['name']}, {report['task']['name']}"
        first = {row["target"]: row for row in report["stages"][0]["results"]}
        for row in report["stages"][-1]["results"]:
            if row["latency_ms"] is not None:
                print(short(name, first[row["target"]], row))


def short(name: str, before: dict, after: dict) -> str:
    values = [f"{100 * row['accuracy']['value']:.2f}" for row in (before, after)]
    speedup, twin = after["speedup"], after["twin"]
    over = (
        f"{twin['speedup']:.2f}× ({twin['precision']})" if twin["shipped"] != "twin" else f"ships {twin['precision']}"
    )
    cells = [
        name,
        after["target"],
        f"{' → '.join(values)} %",
        f"{100 * after['accuracy']['drop']:.2f}{interval(after['accuracy'].get('drop_ci95'))}",
        f"{before['latency_ms']['p50']:.2f} → {after['latency_ms']['p50']:.2f} ms",
        f"{speedup['vs_baseline']:.2f}× ({speedup['ci95'][0]:.2f}–{speedup['ci95'][1]:.2f})",
        over,
        f"{after['int8_coverage']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]]
    main(files[0]) if len(files) == 1 else summary(files)

"""Print the README's table from a result file: python benchmarks/table.py benchmarks/results/FILE.json."""

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


if __name__ == "__main__":
    main(Path(sys.argv[1]))

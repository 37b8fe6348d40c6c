"""Print the comparison as Markdown: python benchmarks/peers/table.py [benchmarks/results/peers-TASK.json ...]."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent.parent / "results"
FLOATS = ("fp32", "bf16")
OURS = "mmedge"
HEAD = "| runtime | tool | accuracy | drop | cosine | {} | vs. FP32 | vs. fastest peer | INT8 | conversion | memory |"

Row = dict[str, Any]


def main(paths: list[Path]) -> None:
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        show(result)


def show(result: dict[str, Any]) -> None:
    """One task: what was measured how, the headline, the table."""
    machine, timing, task = result["machine"], result["timing"], result["task"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"### {task['name']}\n")
    print(f"`{result['command']}` took {result['wall_s'] / 60:.0f} minutes on {machine['cpu']},")
    print(f"{machine['processors']} processors; {versions}; {task['calibration_samples']} calibration samples;")
    print(f"{timing['processes']} processes of up to {timing['queries']} rounds.\n")
    threads = [str(count) for count in timing["threads"]]
    for runtime in ("onnxruntime", "openvino"):
        rows = [row for row in result["rows"] if row["runtime"] == runtime]
        best = {count: fastest(rows, count, result["max_drop"]) for count in threads}
        for count in threads:
            print(headline(runtime, rows, best[count], count, result["max_drop"]))
        print()
        print(HEAD.format(" | ".join(f"p50, {count} thr." for count in threads)))
        print("|" + "---|" * (10 + len(threads)))
        for row in rows:
            print(line(row, threads, best[threads[0]], task["metric"]))
        print()


def brief(paths: list[Path]) -> None:
    """One line per task and runtime: the float network, the fastest peer that keeps the accuracy, mmedge."""
    heads = ["task, runtime (threads)", "float", "fastest peer within the budget", "drop", "mmedge", "drop"]
    heads += ["mmedge over that peer", "mmedge's drop less that peer's"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        for runtime in ("onnxruntime", "openvino"):
            rows = [row for row in result["rows"] if row["runtime"] == runtime]
            for count in map(str, result["timing"]["threads"]):
                best = fastest(rows, count, result["max_drop"])
                named = {row["tool"]: row for row in rows if row.get("latency_ms")}
                if best is not None and OURS in named:
                    label = f"{result['task']['name']}, {runtime} ({count})"
                    print(brief_line(label, count, named["fp32"], best, named[OURS]))
        for run in result.get("again", {}).get("runs", []):
            print(again_line(result["task"]["name"], run, result["rows"]))


def again_line(task: str, run: dict[str, Any], rows: list[Row]) -> str:
    """A line of ``brief`` for the engines that were timed in many processes: medians over processes, one value each."""
    ours, *peers = run["rows"]
    best = min(peers, key=lambda row: row["over_mmedge"]["median"])
    ratios = np.array(best["over_mmedge"]["all"])
    drawn = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    lost = {(row["tool"], row["variant"]): row.get("drop") for row in rows if row["runtime"] == run["runtime"]}
    cells = [f"{task}, {run['runtime']} ({run['threads']}), {len(ratios)} processes", "–"]
    for row, label in ((best, f"{best['tool']} {best['variant']}: "), (ours, "")):
        cells += [f"{label}{np.median(row['p50_ms']):.2f} ms", f"{100 * lost[row['tool'], row['variant']]:.2f}"]
    return f"| {' | '.join([*cells, f'{np.median(ratios):.2f}× ({low:.2f}–{high:.2f})', '–'])} |"


def brief_line(label: str, threads: str, reference: Row, best: Row, ours: Row) -> str:
    """The line of ``brief`` for one runtime."""
    ratio = best["latency_ms"][threads]["vs_mmedge"]
    low, high = (1 / bound for bound in reversed(ratio["ci95"]))
    cells = [
        label,
        f"{reference['latency_ms'][threads]['p50']:.2f} ms",
        f"{best['tool']} {best['variant']}: {best['latency_ms'][threads]['p50']:.2f} ms",
        f"{100 * best['drop']:.2f}",
        f"{ours['latency_ms'][threads]['p50']:.2f} ms",
        f"{100 * ours['drop']:.2f}",
        f"{1 / ratio['value']:.2f}× ({low:.2f}–{high:.2f})",
        difference(best.get("mmedge_loses")),
    ]
    return f"| {' | '.join(cells)} |"


def difference(found: dict[str, Any] | None) -> str:
    """What mmedge loses against a row, in points, with its interval; a dash in result files without it."""
    if not found:
        return "–"
    interval = " ({:.2f} to {:.2f})".format(*(100 * bound for bound in found["ci95"])) if found["ci95"] else ""
    return f"{100 * found['value'] + 0.0:.2f}{interval}"


def fastest(rows: list[Row], threads: str, max_drop: float) -> Row | None:
    """The peer's row that is fastest among those that keep the accuracy."""
    return max(able(rows, max_drop), key=lambda row: speedup(row, threads), default=None)


def speedup(row: Row, threads: str) -> float:
    """Over the float network on the same runtime."""
    return float(row["latency_ms"][threads]["vs_fp32"]["value"])


def able(rows: list[Row], max_drop: float) -> list[Row]:
    """The peers' rows that run and keep the accuracy."""
    peers = [row for row in rows if row["tool"] not in FLOATS and not row["tool"].startswith(OURS)]
    return [row for row in peers if row.get("latency_ms") and row["drop"] <= max_drop]


def setting(row: Row) -> str:
    """What a peer's row is called in the cache: the best of a sweep is one of its grid."""
    if row["variant"] == "best-of-sweep":
        return f"grid-{row['conversion']['note'].rsplit(': ', 1)[1]}"
    return str(row["variant"])


def headline(runtime: str, rows: list[Row], best: Row | None, threads: str, max_drop: float) -> str:
    """mmedge against the fastest peer; a blank where there is no such pair."""
    ours = next((row for row in rows if row["tool"] == OURS and row.get("latency_ms")), None)
    if best is None or ours is None:
        return f"- {runtime}, {threads} thread(s): nothing to compare"
    found = best["latency_ms"][threads]["vs_mmedge"]
    ratio = f"{1 / found['value']:.2f}×"
    if found["ci95"]:
        ratio += f" ({1 / found['ci95'][1]:.2f}–{1 / found['ci95'][0]:.2f})"
    each = [1 / value for value in found["per_process"]]
    spread = f"{min(each):.2f}–{max(each):.2f} between processes"
    whom = f"the fastest peer with a drop of at most {max_drop:g} ({best['tool']} {best['variant']})"
    return f"- {runtime}, {threads} thread(s): mmedge runs at {ratio} the speed of {whom}; {spread}"


def line(row: Row, threads: list[str], best: Row | None, metric: str) -> str:
    """One row of the table; the ratios are those of the first number of threads."""
    precision = (row["conversion"] or {}).get("precision")
    name = f"{row['tool']} {row['variant']}".strip() + (f" (ships {precision})" if precision else "")
    cost = conversion(row["conversion"])
    if not row.get("latency_ms"):
        why = (row["error"] or "not measured").replace("|", "/")
        return f"| {row['runtime']} | {name} | {why} |" + " – |" * (6 + len(threads)) + f" {' | '.join(cost)} |"
    accuracy = f"{row['accuracy']['value']:.2%}" if metric == "accuracy" else f"{row['accuracy']['value']:.4f}"
    latency = row["latency_ms"]
    first = latency[threads[0]]
    coverage = f"{row['int8_coverage']:.0%}" if row["int8_coverage"] is not None else "–"
    against = f"{speedup(row, threads[0]) / speedup(best, threads[0]):.2f}×" if best else "–"
    drop = f"{100 * row['drop']:.2f}" if metric == "accuracy" else f"{row['drop']:.4f}"
    cells = [row["runtime"], name, accuracy, drop, f"{row['cosine']:.4f}"]
    cells += [f"{latency[count]['p50']:.2f} ms" for count in threads]
    cells += [speed(first["vs_fp32"]), against, coverage, *cost]
    return f"| {' | '.join(cells)} |"


def speed(ratio: dict[str, Any]) -> str:
    """A ratio with its interval."""
    interval = f" ({ratio['ci95'][0]:.2f}–{ratio['ci95'][1]:.2f})" if ratio["ci95"] else ""
    return f"{ratio['value']:.2f}×{interval}"


def conversion(found: dict[str, Any] | None) -> list[str]:
    """Time and memory that the conversion took."""
    if not found:
        return ["–", "–"]
    return [f"{found['seconds']:.0f} s", f"{found['peak_memory_mib'] / 1024:.1f} GiB"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(RESULTS.glob("peers-*.json")))
    parser.add_argument("--short", action="store_true", help="a line per runtime: the fastest peer and mmedge")
    options = parser.parse_args()
    brief(options.files) if options.short else main(options.files)

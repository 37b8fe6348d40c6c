"""mmedge's own rows: what ``mmedge compress`` makes of a recipe that only quantizes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ground import Ground
from peers import PeerFailed, Runtime, last_words

from mmedge.pipeline.line import versions_of

RECIPES = Path(__file__).parent / "recipes"


def recipes() -> list[Path]:
    """Every recipe is a row per runtime."""
    return sorted(RECIPES.glob("*.yaml"))


def compress(recipe: Path, runtime: Runtime, ground: Ground, samples: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Run the recipe from nothing for one target, so that its cost is that of one engine.

    Returns:
        The engine's folder, and the note that peers' converters leave. Its ``seconds`` are those of all steps after
        the baseline: calibration, conversion, export, lowering and build, but also the trials that decide what stays
        floating point and the accuracy on the test split. Its ``peak_memory_mib`` is that of the whole command.

    Raises:
        PeerFailed: the command failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    command = [sys.executable, "-m", "mmedge.cli.main", "compress", "--recipe", str(recipe), "--task", ground.spec]
    command += ["--target", runtime, "--output", str(folder), "--set", f"stages.quantize.calibration.samples={samples}"]
    with log.open("w") as file:
        process = subprocess.Popen([*command, "-q"], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):
        raise PeerFailed(f"mmedge: {last_words(log.read_text().splitlines(), process.returncode)}")
    result = shipped(folder)
    return folder / result["artifact"], {
        "seconds": _seconds(folder / "log.jsonl"),
        "peak_memory_mib": usage.ru_maxrss / 1024,
        "samples": samples,
        "versions": versions_of("torch", "torchao"),
        "precision": result["precision"],
    }


def shipped(folder: Path) -> dict[str, Any]:
    """What the report of a finished run for one target says of its last stage."""
    (result,) = json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"][-1]["results"]
    return dict(result)


def _seconds(log: Path) -> float:
    """What the steps after the baseline took."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    return sum(event["seconds"] for event in events if event["event"] == "step" and event["name"] != "baseline")

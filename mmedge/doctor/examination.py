"""All checks, one after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmedge.doctor import machine
from mmedge.doctor.finding import Finding
from mmedge.doctor.jetson import check_jetpack, check_module, check_power_mode, find_jetson
from mmedge.doctor.nvidia import check_card, check_driver, check_fit, find_gpu
from mmedge.doctor.packages import PACKAGES, Probed, check_python, check_workstation, probe
from mmedge.progress import Progress


def examine(
    root: Path = Path("/"), folder: Path = Path("runs"), progress: Progress | None = None
) -> Mapping[str, Sequence[Finding]]:
    """Every check, by section.

    Args:
        root: where the machine's files begin.
        folder: where runs are written.
        progress: told what is being tried.
    """
    progress = progress or Progress()
    jetson, gpu = find_jetson(root), find_gpu(root)
    probed: dict[str, Probed] = {}
    for package in PACKAGES:
        progress.say(f"trying {package.title}")
        probed[package.module] = probe(package, jetson is not None, gpu.sm is not None)
    tensorrt, rtx = probed["tensorrt"].facts.get("version"), probed["tensorrt_rtx"].facts.get("capabilities")
    sections = {
        "software": [check_python(), *(each.finding for each in probed.values()), check_workstation()],
        "GPU": [check_driver(gpu), *([] if jetson else [check_card()]), *check_fit(gpu, jetson, tensorrt, rtx)],
    }
    if jetson is not None:
        sections["Jetson"] = [check_module(jetson), check_jetpack(jetson, root), check_power_mode(jetson, root)]
    sections["machine"] = [
        machine.check_processor(root),
        machine.check_clocks(root, jetson is not None),
        machine.check_heat(root),
        machine.check_memory(root),
        machine.check_disk(folder),
        machine.check_telemetry(),
    ]
    return sections

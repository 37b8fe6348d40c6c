"""What a Jetson tells of itself: L4T, JetPack, power mode.

Written to recorded contents of these files and to NVIDIA's documentation of nvpmodel; not run on a Jetson.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mmedge.doctor.finding import Finding
from mmedge.doctor.machine import read
from mmedge.targets.devices import Device, devices
from mmedge.targets.tensorrt.jetpack import jetpack_release

_PACKAGES = ("nvidia-jetpack", "nvidia-l4t-core")


@dataclass(frozen=True)
class Jetson:
    """This module.

    Attributes:
        model: as the device tree names it.
        jetpack: ``6.2``, None where the files do not tell.
        device: its entry in the device table, None where there is none.
    """

    model: str
    jetpack: str | None
    device: Device | None


def find_jetson(root: Path = Path("/")) -> Jetson | None:
    """The Jetson that this machine is, or None."""
    model, release = read(root / "proc/device-tree/model"), jetpack_release(root)
    if release is None and "Jetson" not in (model or ""):
        return None
    known = (device for device in devices().values() if device.kind == "jetson" and device.is_called(model or ""))
    return Jetson(model or "a Jetson", release, next(known, None))


def check_module(jetson: Jetson) -> Finding:
    """Which module, by the device table."""
    if jetson.device is None:
        fix = "describe it in a YAML file of your own: entry point group mmedge.devices"
        return Finding("module", "warn", f"{jetson.model}, which the device table does not hold", fix)
    return Finding("module", "ok", f"{jetson.model}: {jetson.device.name} of the device table ({jetson.device.title})")


def check_jetpack(jetson: Jetson, root: Path = Path("/")) -> Finding:
    """JetPack's release and whether all of it is installed, by dpkg's own list."""
    installed = _installed(root)
    shown = ", ".join(f"{name} {version}" for name, version in installed.items())
    if jetson.jetpack is None:
        return Finding("JetPack", "warn", f"/etc/nv_tegra_release is missing or unreadable; {shown or 'no packages'}")
    detail = f"{jetson.jetpack}; {shown}" if shown else jetson.jetpack
    if "nvidia-jetpack" not in installed:
        fix = "sudo apt-get update && sudo apt-get install nvidia-jetpack"
        return Finding("JetPack", "warn", f"{detail}; nvidia-jetpack is missing, so CUDA and TensorRT may be", fix)
    return Finding("JetPack", "ok", detail)


def _installed(root: Path) -> dict[str, str]:
    """Versions from dpkg's status file, of packages that are fully installed."""
    found = {}
    for block in (read(root / "var/lib/dpkg/status") or "").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and line[0] != " ")
        if fields.get("Package") in _PACKAGES and fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields.get("Version", "?")
    return found


def check_power_mode(jetson: Jetson, root: Path = Path("/")) -> Finding:
    """The power mode: it decides clocks, so no figure means anything without it."""
    tool = root / "usr/sbin/nvpmodel"
    if not tool.is_file():
        return Finding("power mode", "absent", f"{tool} is missing", "sudo apt-get install nvidia-l4t-nvpmodel")
    try:
        done = subprocess.run([str(tool), "-q"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        return Finding("power mode", "warn", f"nvpmodel -q fails: {err}", "sudo nvpmodel -q")
    found = re.search(r"NV Power Mode:\s*(\S+)", done.stdout)
    if found is None:
        words = (done.stderr.strip() or done.stdout.strip() or "no answer").splitlines()[-1]
        return Finding("power mode", "warn", f"nvpmodel -q tells none: {words}", "sudo nvpmodel -q")
    others = jetson.device.power_modes if jetson.device else ()
    detail = f"{found[1]} (of {', '.join(others)})" if others else found[1]
    if others and found[1].removeprefix("MODE_") not in {mode.removeprefix("MODE_") for mode in others}:
        detail = f"{found[1]}, a mode of its own"
    return Finding("power mode", "ok", f"{detail}; engines and figures hold for it alone")

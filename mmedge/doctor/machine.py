"""The machine: processor, clocks, heat, memory and disk.

``root`` is where the machine's files begin: ``/``, or a copy of another machine's in a test.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path

from mmedge.doctor.finding import Finding, State
from mmedge.targets.processor import VNNI, processor

GIB = 1024**3
_INT8_FLAGS = (*sorted(VNNI), "i8mm", "asimddp")
OVERFLOWS = "without VNNI or AMX INT8 gains less, and products of 8-bit weights overflow"
GAINS_LESS = "without dot products of 8-bit numbers INT8 gains less"
_SHOWN_FLAGS = ("avx2", "avx512f", *_INT8_FLAGS, "avx512_bf16", "amx_bf16", "bf16")
_LITTLE_MEMORY_GIB, _LITTLE_DISK_GIB = 2, 5
_HOT_C = 85.0  # a zone this warm is close to where the hardware slows down


def read(path: Path) -> str | None:
    """The text of a file of the machine without trailing blanks, None where it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0\n ")
    except OSError:  # a sensor that is switched off answers "try again"
        return None


def check_processor(root: Path = Path("/")) -> Finding:
    """Whether the processor multiplies 8-bit integers faster than floats."""
    name, flags = processor(root)
    if not flags:
        return Finding("processor", "absent", f"{platform.machine()}: /proc/cpuinfo tells no features")
    detail = f"{name}: {', '.join(flag for flag in _SHOWN_FLAGS if flag in flags) or 'none of the wide units'}"
    if flags.intersection(_INT8_FLAGS):
        return Finding("processor", "ok", detail)
    if "sse2" not in flags:  # which every x86-64 has, and only those overflow: see ``processor.overflows``
        fix = "judge INT8 by what it gains here: mmedge profile RUN"
        return Finding("processor", "warn", f"{detail}; {GAINS_LESS}", fix)
    fix = "lower INT8 networks on this machine, or for it: --target NAME:weight_bits=7"
    return Finding("processor", "warn", f"{detail}; {OVERFLOWS}", fix)


def check_clocks(root: Path = Path("/"), jetson: bool = False) -> Finding:
    """Whether the clock of the processor is free to change under a measurement."""
    folder = root / "sys/devices/system/cpu/cpu0/cpufreq"
    governor = read(folder / "scaling_governor")
    low, high = (read(folder / f"scaling_{end}_freq") for end in ("min", "max"))
    if governor is None or not (low and high and low.isdigit() and high.isdigit()):
        return Finding("clocks", "absent", "this system shows no clock control (a virtual machine, perhaps)")
    span = f"{int(low) // 1000} to {int(high) // 1000} MHz, governor {governor}"
    if low == high:
        return Finding("clocks", "ok", f"pinned: {span}")
    if jetson:
        fix = "sudo jetson_clocks   (sudo jetson_clocks --show tells all clocks, and needs root)"
        return Finding("clocks", "warn", f"{span}: free to change while measuring", fix)
    if governor == "performance":
        return Finding("clocks", "ok", span)
    return Finding("clocks", "warn", f"{span}: slow to rise", "sudo cpupower frequency-set -g performance")


def check_heat(root: Path = Path("/")) -> Finding:
    """Temperatures, and whether the hardware is slowing itself down for heat or current."""
    zones = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, value = read(zone / "type"), read(zone / "temp")
        if name and value and value.lstrip("-").isdigit() and int(value) > -100_000:  # -256 °C: switched off
            zones[name] = int(value) / 1000
    slowed = sorted(_throttled(root))
    if not zones and not slowed:
        return Finding("heat", "absent", "no temperatures can be read here")
    detail = ", ".join(f"{name} {value:.0f} °C" for name, value in sorted(zones.items(), key=lambda each: -each[1])[:4])
    if slowed:
        fix = "cool the machine, choose a lower power mode, wait, and measure again"
        return Finding("heat", "warn", f"slowed down: {', '.join(slowed)}; {detail}".removesuffix("; "), fix)
    state: State = "warn" if max(zones.values()) >= _HOT_C else "ok"
    return Finding("heat", state, detail, "let it cool before measuring" if state == "warn" else None)


def _throttled(root: Path) -> set[str]:
    """Alerts that are on, and over-current events since the start.

    Jetson's names: cooling devices ``*-throttle-alert`` and hwmon's ``oc*_event_cnt`` (read in public code).
    """
    found = set()
    for device in (root / "sys/class/thermal").glob("cooling_device*"):
        name, state = read(device / "type") or "", read(device / "cur_state") or "0"
        if name.endswith("throttle-alert") and state != "0":
            found.add(name)
    for file in (root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"):
        count = read(file) or "0"
        if count != "0":
            found.add(f"{file.name.removesuffix('_event_cnt')} {count} over-current events since the start")
    return found


def check_memory(root: Path = Path("/")) -> Finding:
    """Free memory."""
    lines = (line.split() for line in (read(root / "proc/meminfo") or "").splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
    if "MemAvailable" not in kib:
        return Finding("memory", "absent", "/proc/meminfo cannot be read")
    free, total = kib["MemAvailable"] / 1024**2, kib.get("MemTotal", 0) / 1024**2
    detail = f"{free:.1f} of {total:.1f} GiB free"
    if free < _LITTLE_MEMORY_GIB:
        return Finding("memory", "warn", detail, "close what is not needed, or add swap, before building engines")
    return Finding("memory", "ok", detail)


def check_disk(folder: Path) -> Finding:
    """Whether runs can be written at ``folder``, and how much room there is."""
    near = folder.resolve()
    while not near.exists():
        near = near.parent
    free = shutil.disk_usage(near).free / GIB
    detail = f"{near}: {free:.1f} GiB free"
    try:
        with tempfile.NamedTemporaryFile(dir=near):
            pass
    except OSError as err:
        fix = "work elsewhere, or give runs a place: --output DIR"
        return Finding("disk", "warn", f"{near} cannot be written: {err.strerror}", fix)
    if free < _LITTLE_DISK_GIB:
        return Finding("disk", "warn", detail, "make room, or give runs another place: --output DIR")
    return Finding("disk", "ok", detail)


def check_telemetry() -> Finding:
    """ONNX Runtime from 1.30 on carries a telemetry uploader; mmedge switches it off for its own processes."""
    value = os.environ.get("ORT_DISABLE_TELEMETRY")
    if value == "1":
        return Finding("telemetry", "ok", "ONNX Runtime's is off in mmedge; your own programs: ORT_DISABLE_TELEMETRY=1")
    detail = f"ORT_DISABLE_TELEMETRY is {value!r}: ONNX Runtime may phone home"
    return Finding("telemetry", "warn", detail, "export ORT_DISABLE_TELEMETRY=1")

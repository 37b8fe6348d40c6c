"""The NVIDIA driver and GPU, and whether TensorRT, GPU and JetPack fit together by the device table.

Written to the documentation of the CUDA driver, nvidia-smi and NVML; not run beside a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedge.doctor.finding import Finding
from mmedge.doctor.jetson import Jetson
from mmedge.doctor.machine import read
from mmedge.targets.devices import Device, Software, devices
from mmedge.targets.tensorrt.gpu import compute_capability

# Why clocks are low: bits of NVML's nvmlClocksEventReasons that mean that a measurement is not what the card can do.
_SLOWED = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
_ASKED = "name,temperature.gpu,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active"


@dataclass(frozen=True)
class Gpu:
    """What the driver tells.

    Attributes:
        sm: compute capability of the first GPU (``8.9``), None without one.
        driver: version of the kernel module, None without one.
        cuda: the newest CUDA that the driver takes (``12.6``), None without one.
        toolkit: version of the CUDA toolkit under ``/usr/local/cuda``, None without one.
    """

    sm: str | None = None
    driver: str | None = None
    cuda: str | None = None
    toolkit: str | None = None


def find_gpu(root: Path = Path("/")) -> Gpu:
    """Ask the driver."""
    text = read(root / "proc/driver/nvidia/version") or ""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)*)\s", text.split("\n")[0])
    installed = read(root / "usr/local/cuda/version.json") or ""
    toolkit = re.search(r'"cuda"\s*:\s*{[^}]*"version"\s*:\s*"([\d.]+)"', installed)
    return Gpu(compute_capability(), found[1] if found else None, _cuda(), toolkit[1] if toolkit else None)


def _cuda() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def check_driver(gpu: Gpu) -> Finding:
    """The driver is there and sees a GPU."""
    if gpu.sm is not None:
        toolkit = f"; CUDA toolkit {gpu.toolkit}" if gpu.toolkit else ""
        detail = f"SM {gpu.sm}, driver {gpu.driver or '?'}, which takes CUDA up to {gpu.cuda}{toolkit}"
        return Finding("NVIDIA GPU", "ok", detail)
    if gpu.driver is None and gpu.cuda is None:
        detail = "no driver: engines for NVIDIA GPUs can be built with TensorRT-RTX, not run"
        return Finding(
            "NVIDIA GPU", "absent", detail, "on a machine with a GPU: sudo apt-get install nvidia-driver-580"
        )
    seen = f"driver {gpu.driver}" if gpu.driver else "libcuda"
    fix = "nvidia-smi tells why; often: reboot after a driver update, or the container has no --gpus all"
    return Finding("NVIDIA GPU", "fail", f"{seen} is installed, but gives no GPU", fix)


def check_card(smi: str | None = None) -> Finding:
    """Clocks and throttling of a graphics card, by nvidia-smi.

    Args:
        smi: the program; looked up on the path if None.
    """
    tool = smi or shutil.which("nvidia-smi")
    if tool is None:
        return Finding("nvidia-smi", "absent", "not installed")
    try:
        command = [tool, f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as err:
        return Finding("nvidia-smi", "fail", f"fails: {err}", "reinstall the driver")
    fields = [field.strip() for field in done.stdout.split("\n")[0].split(",")]
    if done.returncode or len(fields) != len(_ASKED.split(",")):
        words = (done.stdout.strip() or done.stderr.strip() or "no answer").split("\n")[0]
        return Finding("nvidia-smi", "fail", words, "reboot after a driver update, or reinstall the driver")
    name, heat, clock, most, reasons = fields
    device = find_card(name)
    table = f"{device.name} of the device table" if device else "not in the device table"
    detail = f"{name} ({table}): {clock} of {most} MHz, {heat} °C"
    slowed = [
        why for bit, why in _SLOWED.items() if re.fullmatch(r"0x[0-9a-fA-F]+", reasons) and int(reasons, 16) & bit
    ]
    if slowed:
        fix = "cool it, or lock lower clocks: sudo nvidia-smi -lgc MHZ"
        return Finding("nvidia-smi", "warn", f"{detail}; slowed down by {', '.join(slowed)}", fix)
    return Finding("nvidia-smi", "ok", detail)


def find_card(name: str) -> Device | None:
    """The graphics card of that name in the device table."""
    known = (device for device in devices().values() if device.kind == "gpu" and device.is_called(name))
    return next(known, None)


def check_fit(gpu: Gpu, jetson: Jetson | None, tensorrt: str | None, rtx: Sequence[str] | None) -> list[Finding]:
    """Whether what is installed belongs together.

    Args:
        gpu: what the driver tells.
        jetson: the module, None on a PC.
        tensorrt: TensorRT's version if it works here.
        rtx: the compute capabilities that TensorRT-RTX builds for, if it works here.
    """
    found = []
    if jetson is not None and jetson.device is not None:
        found += _jetson_fit(jetson.device, jetson.jetpack, gpu.sm, tensorrt)
    if rtx is not None and gpu.sm is not None:
        found.append(_rtx_fit(gpu.sm, gpu.cuda, rtx))
    if tensorrt is not None and gpu.sm is None:
        detail = f"TensorRT {tensorrt} builds on the GPU that the engine is for; none here"
        found.append(Finding("TensorRT and GPU", "warn", detail, "copy the run to the device: mmedge build RUN"))
    return found


def _jetson_fit(device: Device, jetpack: str | None, sm: str | None, tensorrt: str | None) -> list[Finding]:
    found = []
    if sm is not None and sm != device.sm:
        fix = "mmedge target show tells the table; report it if the table is wrong"
        found.append(Finding("module and GPU", "warn", f"{device.name} has SM {device.sm}, the driver says {sm}", fix))
    software = next((each for each in device.software if each.release == jetpack), None)
    if software is None:
        known = ", ".join(each.name for each in device.software)
        detail = f"JetPack {jetpack} on {device.name} is not in the device table: {known}"
        found.append(Finding("JetPack and module", "warn", detail, "choose the nearest one: DEVICE:jetpack=RELEASE"))
    elif tensorrt is not None:
        found += [_tensorrt_fit(software, tensorrt), *_dla_fit(device, software, tensorrt)]
    return found


def _tensorrt_fit(software: Software, tensorrt: str) -> Finding:
    wanted = software.tensorrt or ""
    if tensorrt.split(".")[:2] == wanted.split(".")[:2]:
        return Finding("TensorRT and JetPack", "ok", f"{software.name} ships TensorRT {wanted}, found {tensorrt}")
    fix = "a pip wheel may hide it: pip uninstall tensorrt; else: sudo apt-get install --reinstall nvidia-jetpack"
    detail = f"{software.name} ships TensorRT {wanted}, found {tensorrt}: engines of one do not load in the other"
    return Finding("TensorRT and JetPack", "warn", detail, fix)


def _dla_fit(device: Device, software: Software, tensorrt: str) -> list[Finding]:
    if device.dla is None:
        return []
    cores = f"{device.dla.cores} DLA cores"
    if software.dla:
        return [Finding("DLA", "ok", f"{cores}; TensorRT {tensorrt} builds for them: {device.name}:dla_core=0")]
    fix = "build for the GPU, or use a release that builds for the DLA (mmedge target show tells)"
    return [Finding("DLA", "warn", f"{cores}, but TensorRT {tensorrt} of {software.name} does not build for them", fix)]


def _rtx_fit(sm: str, cuda: str | None, built_for: Sequence[str]) -> Finding:
    name = "TensorRT-RTX and GPU"
    if sm not in built_for:
        detail = f"it builds for SM {', '.join(built_for)}, not for SM {sm} here"
        return Finding(name, "warn", detail, "use the target tensorrt for this GPU")
    if cuda is not None and int(cuda.split(".")[0]) < 13:
        fix = "sudo apt-get install nvidia-driver-580, or a later one"
        return Finding(name, "warn", f"its wheel is made for CUDA 13, the driver takes CUDA up to {cuda}", fix)
    return Finding(name, "ok", f"engines for SM {sm} run here")

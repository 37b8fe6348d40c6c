"""The machine that measures, as the report states it. Device side."""

from __future__ import annotations

import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from mmedge import __version__
from mmedge.pipeline.folder import processors
from mmedge.report.model import Environment
from mmedge.targets.processor import processor


@cache
def cpu_name() -> str:
    """The processor's name and what it offers for INT8 and bfloat16."""
    name, flags = processor()
    units = [
        unit for unit in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8") if unit in flags
    ]
    return f"{name} ({', '.join(units)})" if units else name


@cache
def gpu_name() -> str | None:
    """The first NVIDIA GPU, or None."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    names = found.stdout.split("\n") if found.returncode == 0 else []
    return next((name.strip() for name in names if name.strip()), None)


def versions_of(*packages: str) -> dict[str, str]:
    """Versions of those that are installed, mmedge's included."""
    found = {"mmedge": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # a device has no torch
    return found


def environment() -> Environment:
    """What the report says of this machine."""
    gpu = gpu_name()
    return Environment(
        cpu=cpu_name(),
        threads=processors(),
        gpu=gpu,
        os=platform.platform(terse=True),
        versions={"python": platform.python_version(), **versions_of("torch", "torchao", "torch-pruning", "numpy")},
        reasons={} if gpu else {"gpu": "no NVIDIA GPU is visible here"},
    )

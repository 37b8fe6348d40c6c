"""Python and the packages: each is imported and used once, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mmedge.doctor.finding import Finding, State
from mmedge.doctor.probe import MARK, installed
from mmedge.targets.torch_tensorrt import PACKAGES as TORCH_TENSORRT

OLDEST_PYTHON = (3, 10)
TIMEOUT_S = 180.0  # importing torch from a slow card takes a minute
WORKSTATION = (
    *("torchao", "torch-pruning", "onnxscript", "safetensors", "scikit-learn", "jinja2", "matplotlib"),
    "neural-compressor-pt",
)
_NVIDIA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


@dataclass(frozen=True)
class Package:
    """An optional part.

    Attributes:
        title: for people.
        module: what is imported.
        install: the command that installs it; on a Jetson, ``jetson_install`` where given.
        wheels: the names to give pip that bring the module, the usual one first.
        jetson_install: the same for a Jetson.
        needs_gpu: where there is no NVIDIA GPU it cannot even be imported.
    """

    title: str
    module: str
    install: str
    wheels: tuple[str, ...]
    jetson_install: str | None = None
    needs_gpu: bool = False

    @property
    def wheel(self) -> tuple[str, str | None]:
        """The installed one of the wheels and its version; the usual one and None where there is no record of any."""
        for name in self.wheels:
            try:
                return name, version(name)
            except PackageNotFoundError:
                continue
        return self.wheels[0], None


PACKAGES = (
    Package("torch", "torch", 'pip install "mmedge[compress]"', ("torch",)),
    Package("onnx", "onnx", 'pip install "mmedge[compress]"', ("onnx",)),
    Package("ONNX Runtime", "onnxruntime", "pip install onnxruntime", ("onnxruntime", "onnxruntime-gpu")),
    Package("OpenVINO", "openvino", 'pip install "mmedge[openvino]"', ("openvino",)),
    Package(
        "TensorRT",
        "tensorrt",
        "pip install tensorrt",
        ("tensorrt",),
        "sudo apt-get install nvidia-jetpack, and make the environment with python3 -m venv --system-site-packages",
    ),
    Package("TensorRT-RTX", "tensorrt_rtx", 'pip install "mmedge[rtx]"', ("tensorrt-rtx-cu13",)),
    Package("torch-tensorrt", "torch_tensorrt", "pip install torch-tensorrt", TORCH_TENSORRT, needs_gpu=True),
    Package("CUDA Python", "cuda.bindings", "pip install cuda-python", ("cuda-python",)),
)


@dataclass(frozen=True)
class Probed:
    """A finding, and what the module told of itself: empty where it is absent or broken."""

    finding: Finding
    facts: Mapping[str, Any]


def check_python(found: tuple[int, ...] = tuple(sys.version_info[:3]), executable: str = sys.executable) -> Finding:
    """Python is new enough."""
    name = ".".join(map(str, found))
    if found >= OLDEST_PYTHON:
        return Finding("Python", "ok", f"{name}, {executable}")
    oldest = ".".join(map(str, OLDEST_PYTHON))
    fix = "install a newer one; JetPack 5.1 has none and is not built for in this version"
    return Finding("Python", "fail", f"{name}; mmedge needs {oldest} or later", fix)


def check_workstation() -> Finding:
    """The smaller packages of the workstation side, by their metadata alone."""
    found, missing = [], []
    for name in WORKSTATION:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    needed = [name for name in missing if name != "neural-compressor-pt" or sys.version_info >= (3, 11)]
    if not needed:
        return Finding("workstation side", "ok", ", ".join(found))
    state: State = "warn" if found else "absent"
    detail = f"missing: {', '.join(needed)}" if found else "not installed: a device needs none of it"
    return Finding("workstation side", state, detail, 'pip install "mmedge[compress]"')


def probe(package: Package, jetson: bool = False, gpu: bool = False) -> Probed:
    """Import and use one package.

    Args:
        package: what to try.
        jetson: this machine is a Jetson, where some packages come with JetPack.
        gpu: there is an NVIDIA GPU here, so what needs one must work.
    """
    if package.needs_gpu and not gpu and installed(package.module):
        shown = " ".join(filter(None, package.wheel))
        detail = f"{shown}: not tried, for without an NVIDIA GPU it cannot be imported, and none is here"
        return Probed(Finding(package.title, "warn", detail, "use it on a machine with such a GPU"), {})
    facts, words = _facts(package.module)
    if words is not None:
        again = f'pip install --force-reinstall "{package.wheel[0]}"'
        if jetson and package.jetson_install:
            again = "sudo apt-get install --reinstall python3-libnvinfer tensorrt"
        return Probed(Finding(package.title, "fail", words, again), {})
    if facts.get("absent"):
        install = (jetson and package.jetson_install) or package.install
        return Probed(Finding(package.title, "absent", "not installed", install), {})
    return Probed(_JUDGES.get(package.module, _plain)(package, facts, gpu), facts)


def _facts(module: str) -> tuple[dict[str, Any], str | None]:
    """What the module tells, or why it could not."""
    # the child shall see the very packages that this process sees
    see = f"import sys; sys.path[:] = {sys.path!r}"
    code = f"{see}; from mmedge.doctor.probe import main; main({module!r})"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, f"did not answer within {TIMEOUT_S:.0f} s"
    told = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and told:
        return json.loads(told[-1].removeprefix(MARK)), None
    return {}, _last_words(done.returncode, done.stderr)


def _last_words(status: int, said: str) -> str:
    """Why a process ended, in its own words."""
    lines = [line for line in said.splitlines() if line.strip()]
    if status < 0:
        words = next((line for line in reversed(lines) if line.startswith("Fatal Python error")), "")
        return f"crashes on import ({signal.Signals(-status).name}){': ' if words else ''}{words}"
    indented = [index for index, line in enumerate(lines) if line[0].isspace()]
    words = " ".join(lines[indented[-1] + 1 if indented else 0 :])
    return words[:500] or f"ended with status {status} and said nothing"


def _plain(package: Package, facts: Mapping[str, Any], gpu: bool) -> Finding:
    return Finding(package.title, "ok", str(facts["version"]))


def _judge_torch(package: Package, facts: Mapping[str, Any], gpu: bool) -> Finding:
    if facts["cuda_build"] is None:
        return Finding(package.title, "ok", f"{facts['version']}, CPU build")
    detail = f"{facts['version']}, built for CUDA {facts['cuda_build']}"
    if facts["cuda"]:
        return Finding(package.title, "ok", f"{detail}, which works")
    if gpu:
        fix = "the driver is too old for that CUDA, or hidden: see nvidia-smi and CUDA_VISIBLE_DEVICES"
        return Finding(package.title, "fail", f"{detail}, which does not work although there is a GPU", fix)
    return Finding(package.title, "ok", f"{detail}; no GPU here, so it computes on the CPU")


def _judge_onnx(package: Package, facts: Mapping[str, Any], gpu: bool) -> Finding:
    return Finding(package.title, "ok", f"{facts['version']}, opsets up to {facts['opset']}")


def _judge_onnxruntime(package: Package, facts: Mapping[str, Any], gpu: bool) -> Finding:
    detail = f"{facts['version']}, runs on {', '.join(facts['providers']) or 'nothing'}"
    if not facts["refused"]:
        return Finding(package.title, "ok", detail)
    detail += "".join(f"; {name}: {why}" for name, why in facts["refused"].items())
    broken = not facts["providers"] or [name for name in facts["refused"] if gpu or name not in _NVIDIA_PROVIDERS]
    fix = "install the CUDA and TensorRT libraries of that build, or: pip install onnxruntime"
    return Finding(package.title, "fail" if broken else "warn", detail, fix)


def _judge_tensorrt_rtx(package: Package, facts: Mapping[str, Any], gpu: bool) -> Finding:
    return Finding(package.title, "ok", f"{facts['version']}, builds for SM {', '.join(facts['capabilities'])}")


def _judge_openvino(package: Package, facts: Mapping[str, Any], gpu: bool) -> Finding:
    return Finding(package.title, "ok", f"{facts['version']}, runs on {', '.join(facts['devices'])}")


_JUDGES: Mapping[str, Callable[[Package, Mapping[str, Any], bool], Finding]] = {
    "torch": _judge_torch,
    "onnx": _judge_onnx,
    "onnxruntime": _judge_onnxruntime,
    "openvino": _judge_openvino,
    "tensorrt_rtx": _judge_tensorrt_rtx,
}

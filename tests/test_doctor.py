"""``mmedge doctor`` on this machine, beside broken packages, and on files recorded from other machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mmedge.doctor import machine, packages
from mmedge.doctor.finding import Finding
from mmedge.doctor.jetson import Jetson, check_jetpack, check_module, check_power_mode, find_jetson
from mmedge.doctor.nvidia import Gpu, check_card, check_driver, check_fit, find_card, find_gpu
from mmedge.doctor.packages import PACKAGES, check_python, check_workstation, probe
from mmedge.targets.devices import find_device

BY_MODULE = {package.module: package for package in PACKAGES}
COMMAND = (
    "import os, sys; os.environ.setdefault('ORT_DISABLE_TELEMETRY', '1')\n"
    "from mmedge.cli.doctor import doctor; sys.exit(doctor.main(sys.argv[1:], standalone_mode=False))"
)


def run_doctor(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for found in report["findings"].values() for each in found}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# --- the command


def test_the_command_tells_what_works_here(tmp_path: Path) -> None:
    done = run_doctor("--json", "-q", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    found = by_name(report)
    assert (report["state"], report["broken"]) == ("ok", [])
    assert found["torch"]["detail"].startswith(version("torch"))
    assert found["ONNX Runtime"]["detail"] == f"{version('onnxruntime')}, runs on CPUExecutionProvider"
    assert found["OpenVINO"]["detail"].endswith("runs on CPU")
    assert found["TensorRT-RTX"]["detail"].endswith(f"builds for SM {', '.join(RTX)}")
    assert found["disk"]["detail"].startswith(str(tmp_path))
    assert found["telemetry"]["state"] == "ok"
    for each in found.values():
        assert each["state"] != "fail"
        assert each["fix"] or each["state"] in ("ok", "absent"), each


def test_a_package_that_crashes_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    write(tmp_path, {"tensorrt/__init__.py": "import os\nos.abort()\n"})
    done = run_doctor("--runs", str(tmp_path), path=tmp_path)
    assert done.returncode == 4
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert line.split()[1] == "TensorRT"
    assert "crashes on import (SIGABRT): Fatal Python error: Aborted" in line
    assert '→ pip install --force-reinstall "tensorrt"' in done.stdout
    assert "✓  torch " in done.stdout
    assert "broken: TensorRT" in done.stdout
    assert "trying ONNX Runtime" in done.stderr
    assert "Traceback" not in done.stderr


# --- packages


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a module of that name before all others."""

    def make(name: str, code: str) -> None:
        write(tmp_path, {f"{name}/__init__.py": code})
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    return make


BROKEN = {
    "a library is missing": (
        "raise ImportError('libnvinfer.so.10: cannot open shared object file: No such file or directory')",
        "ImportError: libnvinfer.so.10: cannot open shared object file: No such file or directory",
    ),
    "words over two lines": ("raise RuntimeError('CUDA 13 is needed\\nhere is 12')", "CUDA 13 is needed here is 12"),
    "it ends the process": ("import sys; sys.exit(3)", "ended with status 3 and said nothing"),
    "a dependency is missing": ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
    "it is killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "crashes on import (SIGKILL)"),
    "an old file": ("raise = 3", "SyntaxError: invalid syntax"),
}


@pytest.mark.parametrize(("code", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_reported_in_its_own_words(fake: Callable[[str, str], None], code: str, words: str) -> None:
    fake("tensorrt", code)
    found = probe(BY_MODULE["tensorrt"])
    assert found.finding.state == "fail"
    assert words in found.finding.detail
    assert found.finding.fix == 'pip install --force-reinstall "tensorrt"'
    assert found.facts == {}
    assert "apt-get install --reinstall" in (probe(BY_MODULE["tensorrt"], jetson=True).finding.fix or "")


def test_a_package_that_never_answers(fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("tensorrt", "import time; time.sleep(60)")
    monkeypatch.setattr(packages, "TIMEOUT_S", 1.0)
    assert probe(BY_MODULE["tensorrt"]).finding.detail == "did not answer within 1 s"


def test_a_package_that_works_and_talks(fake: Callable[[str, str], None]) -> None:
    fake("tensorrt", "print('welcome'); import sys; print('warning', file=sys.stderr); __version__ = '10.3.0'")
    found = probe(BY_MODULE["tensorrt"])
    assert found.finding == Finding("TensorRT", "ok", "10.3.0")
    assert found.facts["version"] == "10.3.0"


def test_torch_tensorrt_is_not_tried_without_a_gpu(
    fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import fails there by design: it is not broken."""
    fake("torch_tensorrt", "raise RuntimeError('no compute capability')")
    package = BY_MODULE["torch_tensorrt"]
    found = probe(package, gpu=False).finding
    assert (found.state, found.fix) == ("warn", "use it on a machine with such a GPU")
    assert found.detail.startswith("torch-tensorrt: not tried, for without an NVIDIA GPU it cannot be imported")
    broken = probe(package, gpu=True).finding
    assert (broken.state, broken.fix) == ("fail", 'pip install --force-reinstall "torch-tensorrt"')

    def of_rtx(name: str) -> str:
        if name != "torch-tensorrt-rtx":
            raise packages.PackageNotFoundError(name)
        return "2.14.0"

    monkeypatch.setattr(packages, "version", of_rtx)
    assert probe(package, gpu=False).finding.detail.startswith("torch-tensorrt-rtx 2.14.0: not tried")
    assert probe(package, gpu=True).finding.fix == 'pip install --force-reinstall "torch-tensorrt-rtx"'


def test_an_absent_package_names_the_command_that_installs_it() -> None:
    assert probe(BY_MODULE["torch_tensorrt"]).finding.fix == "pip install torch-tensorrt"
    on_jetson = probe(BY_MODULE["tensorrt"], jetson=True).finding
    assert on_jetson.state == "absent"
    assert "sudo apt-get install nvidia-jetpack" in (on_jetson.fix or "")
    assert "--system-site-packages" in (on_jetson.fix or "")


RUNTIME = """
__version__ = "1.99"
def set_default_logger_severity(level): pass
def get_available_providers(): return ["CUDAExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers): pass
    def get_providers(self): return ["CPUExecutionProvider"]
"""


def test_a_provider_that_does_not_load_is_no_provider(fake: Callable[[str, str], None]) -> None:
    """ONNX Runtime falls back to the CPU without an error; without a GPU that is no defect."""
    fake("onnxruntime", RUNTIME)
    without = probe(BY_MODULE["onnxruntime"], gpu=False)
    assert without.finding.state == "warn"
    assert without.facts["providers"] == ["CPUExecutionProvider"]
    assert "CUDAExecutionProvider: is offered, but does not load" in without.finding.detail
    assert probe(BY_MODULE["onnxruntime"], gpu=True).finding.state == "fail"


def test_a_torch_that_does_not_see_the_gpu(fake: Callable[[str, str], None]) -> None:
    fake(
        "torch",
        "class _T:\n    def __matmul__(s, o): return s\n    def sum(s): return s\n    def item(s): return 0\n"
        "def ones(*a): return _T()\n"
        "class version: cuda = '13.0'\n"
        "class cuda:\n    is_available = staticmethod(lambda: False)\n"
        "__version__ = '2.13.0+cu130'",
    )
    assert probe(BY_MODULE["torch"], gpu=True).finding.state == "fail"
    assert probe(BY_MODULE["torch"], gpu=False).finding.state == "ok"


def test_python_and_the_workstation_side() -> None:
    old = check_python((3, 8, 10), "/usr/bin/python3")
    assert old.state == "fail"
    assert "JetPack 5.1" in (old.fix or "")
    assert check_python((3, 10, 0), "python3").state == "ok"
    assert "torchao" in check_workstation().detail


# --- Jetson: contents as devices have them

RELEASES = {
    "6.2": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 "
    "UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "7.0": "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64, DATE: Thu Sep 25 22:47:11 "
    "UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
}
DPKG = """Package: nvidia-l4t-core
Status: install ok installed
Version: 36.4.3-20250107174145
Description: NVIDIA Core Package
 A continuation: line of the description.

Package: nvidia-jetpack
Status: {status}
Version: 6.2+b77
"""
ORIN = {
    "etc/nv_tegra_release": RELEASES["6.2"],
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "var/lib/dpkg/status": DPKG.format(status="install ok installed"),
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "52562\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/thermal/thermal_zone2/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone2/temp": "53968\n",
    "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device0/cur_state": "0\n",
    "sys/class/hwmon/hwmon1/oc1_event_cnt": "0\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "2201600\n",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd aes crc32 atomics asimddp\n",
    "proc/meminfo": "MemTotal:       64349108 kB\nMemFree: 100 kB\nMemAvailable:   45704308 kB\n",
}


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """The files of an AGX Orin with JetPack 6.2."""
    script(tmp_path / "usr/sbin/nvpmodel", "echo 'NV Power Mode: MODE_30W'; echo 2")
    return write(tmp_path, ORIN)


def test_a_healthy_jetson(orin: Path) -> None:
    jetson = find_jetson(orin)
    assert jetson is not None
    assert (jetson.model, jetson.jetpack) == ("NVIDIA Jetson AGX Orin Developer Kit", "6.2")
    assert jetson.device == find_device("jetson-agx-orin")
    assert check_module(jetson).state == "ok"
    detail = "6.2; nvidia-l4t-core 36.4.3-20250107174145, nvidia-jetpack 6.2+b77"
    assert check_jetpack(jetson, orin) == Finding("JetPack", "ok", detail)
    mode = check_power_mode(jetson, orin)
    assert mode.state == "ok"
    assert mode.detail.startswith("MODE_30W (of MODE_15W, MODE_30W, MODE_50W, MAXN)")
    clocks = machine.check_clocks(orin, jetson=True)
    assert clocks.detail == "729 to 2201 MHz, governor schedutil: free to change while measuring"
    assert (clocks.fix or "").startswith("sudo jetson_clocks")
    assert "needs root" in (clocks.fix or "")
    assert machine.check_heat(orin) == Finding("heat", "ok", "tj-thermal 54 °C, cpu-thermal 53 °C")
    assert machine.check_processor(orin).state == "ok"
    assert machine.check_memory(orin).detail == "43.6 of 61.4 GiB free"


def test_this_machine_is_no_jetson(tmp_path: Path) -> None:
    assert find_jetson(tmp_path) is None


def test_a_jetson_of_another_release_and_module(orin: Path) -> None:
    write(
        orin,
        {"etc/nv_tegra_release": RELEASES["7.0"], "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit"},
    )
    jetson = find_jetson(orin)
    assert jetson is not None
    assert jetson.device == find_device("jetson-agx-thor")
    (found,) = check_fit(Gpu("11.0", "38.2", "13.0"), jetson, "10.13.3", None)
    assert found.state == "warn"
    assert "JetPack 7.0 on jetson-agx-thor is not in the device table: JetPack 7.1" in found.detail


def test_a_jetson_that_the_table_does_not_hold(orin: Path) -> None:
    write(orin, {"proc/device-tree/model": "NVIDIA Jetson Nano Developer Kit"})
    jetson = find_jetson(orin)
    assert jetson is not None
    found = check_module(jetson)
    assert found.state == "warn"
    assert "mmedge.devices" in (found.fix or "")


def test_jetpack_that_is_not_installed_in_full(orin: Path) -> None:
    write(orin, {"var/lib/dpkg/status": DPKG.format(status="deinstall ok config-files")})
    found = check_jetpack(Jetson("x", "6.2", None), orin)
    assert found.state == "warn"
    assert found.fix == "sudo apt-get update && sudo apt-get install nvidia-jetpack"


def test_power_mode_that_is_kept_from_us(orin: Path) -> None:
    jetson = find_jetson(orin)
    assert jetson is not None
    script(orin / "usr/sbin/nvpmodel", "echo 'NVPM ERROR: Error opening /var/lib/nvpmodel/status: 13' >&2; exit 1")
    found = check_power_mode(jetson, orin)
    assert (found.state, found.fix) == ("warn", "sudo nvpmodel -q")
    assert "NVPM ERROR: Error opening" in found.detail
    script(orin / "usr/sbin/nvpmodel", "echo 'NV Power Mode: MY_MODE'")
    assert "MY_MODE, a mode of its own" in check_power_mode(jetson, orin).detail
    (orin / "usr/sbin/nvpmodel").unlink()
    assert check_power_mode(jetson, orin).state == "absent"


def test_throttling_and_over_current_are_seen(orin: Path) -> None:
    write(orin, {"sys/class/thermal/cooling_device0/cur_state": "1\n", "sys/class/hwmon/hwmon1/oc3_event_cnt": "7\n"})
    found = machine.check_heat(orin)
    assert found.state == "warn"
    assert "slowed down: cpu-throttle-alert, oc3 7 over-current events since the start" in found.detail
    write(orin, {"sys/class/thermal/cooling_device0/cur_state": "0\n", "sys/class/hwmon/hwmon1/oc3_event_cnt": "0\n"})
    assert machine.check_heat(orin).state == "ok"
    write(orin, {"sys/class/thermal/thermal_zone2/temp": "91000\n"})
    assert machine.check_heat(orin).state == "warn"


# --- what belongs together


RTX = ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]


def fit(tensorrt: str | None, jetpack: str = "6.2", name: str = "jetson-agx-orin", sm: str | None = "8.7") -> Any:
    jetson = Jetson("the model", jetpack, find_device(name))
    return {each.name: each for each in check_fit(Gpu(sm, "540.4.0", "12.6"), jetson, tensorrt, None)}


def test_tensorrt_must_be_that_of_the_jetpack() -> None:
    good = fit("10.3.0.30")
    assert {name: each.state for name, each in good.items()} == {"TensorRT and JetPack": "ok", "DLA": "ok"}
    other = fit("10.16.2.10")["TensorRT and JetPack"]
    assert other.state == "warn"
    assert "pip uninstall tensorrt" in (other.fix or "")


def test_the_dla_needs_a_tensorrt_that_builds_for_it() -> None:
    assert fit("10.16.2.10", "7.2")["DLA"].state == "warn"
    assert fit("11.4.1", "7.2.2")["DLA"].state == "ok"
    assert "DLA" not in fit("10.3.0", name="jetson-orin-nano")


def test_gpu_and_module_must_agree() -> None:
    assert fit("10.3.0", sm="7.2")["module and GPU"].state == "warn"
    assert "TensorRT and GPU" in fit("10.3.0", sm=None)


@pytest.mark.parametrize(
    ("sm", "cuda", "state"), [("8.9", "13.0", "ok"), ("8.9", "12.8", "warn"), ("9.0", "13.0", "warn")]
)
def test_tensorrt_rtx_needs_a_gpu_and_driver_of_its_own(sm: str, cuda: str, state: str) -> None:
    (found,) = check_fit(Gpu(sm, "580.95.05", cuda), None, None, RTX)
    assert found.state == state
    assert found.fix or state == "ok"


# --- driver and card

DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.195.03  Release Build  (dvs-builder@U22-I3-H04-03-1) "
    " Sat Sep 20 00:47:16 UTC 2025\nGCC version:  gcc version 12.3.0\n"
)


def test_driver_and_toolkit_are_read(tmp_path: Path) -> None:
    toolkit = '{"cuda": {"name": "CUDA SDK", "version": "12.6.11"}, "nvcc": {"version": "12.6.68"}}'
    gpu = find_gpu(write(tmp_path, {"proc/driver/nvidia/version": DRIVER, "usr/local/cuda/version.json": toolkit}))
    assert (gpu.driver, gpu.toolkit) == ("570.195.03", "12.6.11")
    assert find_gpu(tmp_path / "empty").driver is None


def test_a_driver_without_a_gpu_is_broken_and_none_is_absent() -> None:
    assert check_driver(Gpu("8.9", "570.1", "12.8", "12.6")).detail == (
        "SM 8.9, driver 570.1, which takes CUDA up to 12.8; CUDA toolkit 12.6"
    )
    assert check_driver(Gpu()).state == "absent"
    broken = check_driver(Gpu(None, "570.1", None))
    assert broken.state == "fail"
    assert "nvidia-smi" in (broken.fix or "")


CARDS = {
    "idle": ("NVIDIA GeForce RTX 4090, 41, 210, 3105, 0x0000000000000001", "ok", "rtx-4090 of the device table"),
    "hot": ("NVIDIA H200, 88, 900, 1980, 0x0000000000000044", "warn", "slowed down by power limit, heat (hardware)"),
    "unknown": ("NVIDIA GeForce RTX 3060 Ti, 41, 210, 2100, [N/A]", "ok", "(not in the device table)"),
    "no contact": (
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "fail",
        "couldn't communicate with the NVIDIA driver",
    ),
}


@pytest.mark.parametrize(("line", "state", "said"), CARDS.values(), ids=CARDS)
def test_nvidia_smi_is_understood(tmp_path: Path, line: str, state: str, said: str) -> None:
    tool = script(tmp_path / "nvidia-smi", f'echo "{line}"')
    found = check_card(str(tool))
    assert found.state == state
    assert said in found.detail
    assert find_card("NVIDIA H200") == find_device("h200")


# --- PC


def test_clocks_of_a_pc(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu0/cpufreq"
    files = {f"{folder}/scaling_min_freq": "800000\n", f"{folder}/scaling_max_freq": "5000000\n"}
    write(tmp_path, {**files, f"{folder}/scaling_governor": "powersave\n"})
    assert machine.check_clocks(tmp_path).fix == "sudo cpupower frequency-set -g performance"
    write(tmp_path, {f"{folder}/scaling_governor": "performance\n"})
    assert machine.check_clocks(tmp_path).state == "ok"
    assert machine.check_clocks(tmp_path / "empty").state == "absent"


def test_a_processor_without_vnni_is_told(tmp_path: Path) -> None:
    text = "processor : 0\nmodel name : Old CPU\nflags : fpu sse2 avx2 fma\n"
    found = machine.check_processor(write(tmp_path, {"proc/cpuinfo": text}))
    assert (found.state, found.detail) == ("warn", f"Old CPU: avx2; {machine.OVERFLOWS}")
    write(tmp_path, {"proc/cpuinfo": text.replace("fma", "avx_vnni amx_int8")})
    assert machine.check_processor(tmp_path).detail == "Old CPU: avx2, amx_int8, avx_vnni"


def test_an_arm_without_dot_products_does_not_overflow(tmp_path: Path) -> None:
    """A Raspberry Pi 4: it adds up in 32 bits, with more instructions."""
    found = machine.check_processor(write(tmp_path, {"proc/cpuinfo": "Features\t: fp asimd evtstrm crc32 cpuid\n"}))
    assert found.state == "warn"
    assert found.detail.endswith(machine.GAINS_LESS)
    assert "weight_bits" not in (found.fix or "")


def test_little_memory_and_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 900000 kB\n"})
    assert machine.check_memory(tmp_path).state == "warn"
    assert machine.check_disk(tmp_path / "not/yet/there").detail.startswith(str(tmp_path))
    read_only = Path("/proc/self/fdinfo")  # not writable, not even for root
    found = machine.check_disk(read_only)
    assert (found.state, found.fix) == ("warn", "work elsewhere, or give runs a place: --output DIR")
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    assert machine.check_telemetry().state == "warn"

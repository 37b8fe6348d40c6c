"""Shell scripts for trtexec, run against a stand-in that tells a version and notes its arguments: none is here."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmedge.errors import UsageError
from mmedge.targets.tensorrt.trtexec import build_script, measure_script

IMAGE = {"name": "image", "dtype": "float32", "shape": ["batch", 3, 32, 32]}
TOKENS = {"name": "tokens", "dtype": "int64", "shape": ["batch", 16]}
FIXED = {"name": "prior", "dtype": "float32", "shape": [1, 8]}
BATCH = {"min": 1, "opt": 2, "max": 8}
Run = Callable[..., list[list[str]]]

STAND_IN = """#!/usr/bin/env -S python3 -IS
import json, pathlib, sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] [b30] # " + " ".join(sys.argv))
if sys.argv[1:] == ["--help"]:
    sys.exit(1)
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for argument in sys.argv[1:]:
    if argument.startswith("--saveEngine="):
        pathlib.Path(argument.split("=", 1)[1]).write_text("engine")
sys.exit({status})
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script as a user would, from another folder; the arguments of each call to trtexec."""

    def go(script: str, version: str = "100300", status: int = 0, expect: int = 0, says: str = "") -> list[list[str]]:
        log, folder = tmp_path / "log", tmp_path / "of the script"
        folder.mkdir(exist_ok=True)
        log.write_text("")
        tool = tmp_path / "bin" / "trtexec"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(STAND_IN.format(number=version, log=str(log), status=status))
        tool.chmod(0o755)
        (folder / "build.sh").write_text(script)
        subprocess.run(["bash", "-n", str(folder / "build.sh")], check=True)
        environment = {**os.environ, "PATH": f"{tool.parent}:{os.environ['PATH']}"}
        command = ["bash", str(folder / "build.sh")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == expect, done.stderr
        assert says in done.stderr
        return [json.loads(line) for line in log.read_text().splitlines()]

    return go


def script(**changes: Any) -> str:
    options: dict[str, Any] = {"tensorrt": "10.3", "workspace_mib": None, "dla_core": None, "timing_cache": None}
    inputs = changes.pop("inputs", [IMAGE, TOKENS])
    names = changes.pop("model", "model.onnx"), changes.pop("plan", "engine.plan")
    return build_script(*names, inputs, BATCH, **{**options, **changes})


def test_build(run: Run, tmp_path: Path) -> None:
    compatible = {"version_compatible": True, "hardware_compatible": True}
    ((*arguments,),) = run(script(workspace_mib=2048, timing_cache="cache.bin", **compatible))
    assert arguments == [
        "--onnx=model.onnx",
        "--saveEngine=engine.plan.partial",
        "--stronglyTyped",
        "--minShapes=image:1x3x32x32,tokens:1x16",
        "--optShapes=image:2x3x32x32,tokens:2x16",
        "--maxShapes=image:8x3x32x32,tokens:8x16",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=engine.plan.layers.json",
        "--skipInference",
        "--memPoolSize=workspace:2048",
        "--timingCacheFile=cache.bin",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
    ]
    folder = tmp_path / "of the script"
    assert (folder / "engine.plan").read_text() == "engine"
    assert not (folder / "engine.plan.partial").exists()


def test_failed_build_leaves_no_engine(run: Run, tmp_path: Path) -> None:
    run(script(), status=3, expect=3)
    assert not (tmp_path / "of the script" / "engine.plan").exists()


def test_names_with_spaces_quotes_and_dollars(run: Run, tmp_path: Path) -> None:
    model, plan = 'it\'s $HOME; rm -rf `x` "y"\n.onnx', "-e \\ n*.plan"
    names = [{**IMAGE, "name": "serving_default:0"}, {**TOKENS, "name": "to kens$(x)"}]
    ((*arguments,),) = run(script(model=model, plan=plan, inputs=names, timing_cache="a b"))
    assert arguments[0] == f"--onnx={model}"
    assert "--maxShapes='serving_default:0':8x3x32x32,to kens$(x):8x16" in arguments
    assert "--timingCacheFile=a b" in arguments
    assert (tmp_path / "of the script" / plan).exists()


def test_shapes(run: Run) -> None:
    """All inputs where one of them may change; none for a network without such an input, which trtexec refuses."""
    ((*arguments,),) = run(script(inputs=[IMAGE, FIXED, {"name": "t", "shape": []}]))
    assert "--minShapes=image:1x3x32x32,prior:1x8,t:scalar" in arguments
    ((*arguments,),) = run(script(inputs=[FIXED]))
    assert not any("Shapes" in argument for argument in arguments)


DLA = [("10.3", "--fp16", "--stronglyTyped"), ("11.4.1", "--stronglyTyped", "--fp16")]


@pytest.mark.parametrize(("version", "typing", "other"), DLA)
def test_dla(version: str, typing: str, other: str, run: Run) -> None:
    number = "".join(part.zfill(2) for part in version.split(".")).ljust(6, "0")
    ((*arguments,),) = run(script(tensorrt=version, dla_core=1), version=number)
    assert {typing, "--useDLACore=1", "--allowGPUFallback"} <= set(arguments)
    assert other not in arguments


VERSIONS = [  # the script's, the tool's, fits
    ("10.3", "100300", True),
    ("10.3.0", "100300", True),
    ("10.3.0.30", "100300", True),
    ("10", "101602", True),
    ("10.16.2.10", "101602", True),
    ("10.3", "103000", False),
    ("10.3", "101602", False),
    ("11", "101602", False),
    ("11.4.1", "110401", True),
    (None, "110401", True),
    (None, "100300", True),
    (None, "8502", False),
]


@pytest.mark.parametrize(("wanted", "found", "fits"), VERSIONS)
def test_version_is_checked(wanted: str | None, found: str, fits: bool, run: Run) -> None:
    for text in (script(tensorrt=wanted), measure_script("engine.plan", [IMAGE], 1, tensorrt=wanted)):
        if fits:
            assert run(text, version=found)
        else:
            says = f"This script is for TensorRT {wanted}, here is" if wanted else "This is TensorRT 8; strongly typed"
            assert run(text, version=found, expect=4, says=says) == []


def test_other_tools_are_refused(run: Run, tmp_path: Path) -> None:
    run(script(), version="?", expect=4, says="does not tell its version")
    missing = {**os.environ, "TRTEXEC": str(tmp_path / "nowhere")}
    command = ["bash", str(tmp_path / "of the script" / "build.sh")]
    done = subprocess.run(command, env=missing, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "There is no trtexec here" in done.stderr
    relative = {**os.environ, "TRTEXEC": "bin/trtexec"}
    (tmp_path / "bin" / "trtexec").write_text(STAND_IN.format(number="100300", log=str(tmp_path / "log"), status=0))
    assert subprocess.run(command, env=relative, cwd=tmp_path, capture_output=True, check=False).returncode == 0


MEASURED = [
    "--loadEngine=engine.plan",
    "--shapes=image:4x3x32x32,tokens:4x16",
    "--warmUp=5000",
    "--duration=60",
    "--iterations=1000",
    "--percentile=50,90,95,99,99.9",
    "--exportTimes=engine.plan.times.json",
]


def measure(**options: bool) -> str:
    return measure_script("engine.plan", [IMAGE, TOKENS], 4, tensorrt=None, **options)


def test_measuring_means_the_same_in_10_and_11(run: Run) -> None:
    """The three settings whose defaults changed: what 11 does by itself, 10 is told, and the reverse."""
    first, second = run(measure(), version="100300")
    assert first == [*MEASURED, "--useCudaGraph", "--noDataTransfers", "--useSpinWait"]
    assert run(measure(), version="110401")[0] == MEASURED
    other = measure(cuda_graph=False, data_transfers=True, spin_wait=False)
    assert run(other, version="100300")[0] == MEASURED
    assert run(other, version="110401")[0] == [
        *MEASURED,
        *("--noCudaGraph", "--includeDataTransfers", "--noSpinWait"),
    ]
    profiled = [
        "--dumpProfile",
        "--exportProfile=engine.plan.profile.json",
        "--exportLayerInfo=engine.plan.layers.json",
    ]
    assert second == [*MEASURED[:2], *profiled, "--useCudaGraph", "--noDataTransfers", "--useSpinWait"]


def test_measuring_on_a_dla_and_with_fixed_shapes(run: Run) -> None:
    text = measure_script("engine.plan", [FIXED], 1, tensorrt="10.3", dla_core=0)
    for arguments in run(text):
        assert arguments[:2] == ["--loadEngine=engine.plan", "--useDLACore=0"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "old": ({"tensorrt": "8.5.2"}, "TensorRT 8.5.2 builds no strongly typed networks"),
    "no version": ({"tensorrt": "newest"}, "'newest' is not a version"),
    "DLA of any version": ({"tensorrt": None, "dla_core": 0}, "depends on the version of TensorRT"),
    "comma": ({"inputs": [{**IMAGE, "name": "a,b"}]}, "cannot take the name of input 'a,b'"),
    "quote": ({"inputs": [{**IMAGE, "name": "a'b"}]}, "cannot take the name of input"),
    "newline": ({"inputs": [{**IMAGE, "name": "a\nb"}]}, "cannot take the name of input"),
    "two dimensions": ({"inputs": [{**IMAGE, "shape": ["batch", "t"]}]}, "more than its first dimension may change"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_trtexec_cannot_do_is_told(case: str) -> None:
    changes, reason = REFUSED[case]
    with pytest.raises(UsageError, match=reason):
        script(**changes)

"""Engines as artifacts of one device: real TensorRT-RTX plans, damaged ones and foreign ones."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_engine import HERE, NOBODY, SMS, manifest_of, sealed_engine, small_plan, tensorrt_engine

from mmedge.errors import ArtifactError, MmedgeError, TargetError
from mmedge.targets.tensorrt import plan, trust
from mmedge.targets.tensorrt.plan import (
    Here,
    PlanHeader,
    Trust,
    admit,
    differences,
    read_admitted,
    read_header,
    seal,
    write_manifest,
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_plan(tmp_path_factory.mktemp("rtx"), SMS)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration directory of its own, so that no test sees the user's key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "mmedge"


@pytest.fixture
def engine(tmp_path: Path, real: Path) -> Path:
    """A sealed engine folder."""
    return sealed_engine(tmp_path / "engine", real)


# --- the header


def test_header_of_real_plans(real: Path, tmp_path: Path) -> None:
    """Every supported GPU's bit, version and length; TensorRT-RTX needs no GPU to build for any of them."""
    found = read_header(real)
    assert found == PlanHeader((1, 7, 1), "tensorrt-rtx", real.stat().st_size, SMS)
    for sms in (("8.0",), ("12.0", "12.1")):
        other = small_plan(tmp_path, sms)
        assert read_header(other) == PlanHeader((1, 7, 1), "tensorrt-rtx", other.stat().st_size, sms)


def test_header_of_tensorrt_by_its_documented_layout(tmp_path: Path) -> None:
    path = tmp_path / "engine.plan"
    start = bytearray(64)
    start[:4], start[24:28] = b"ftrt", bytes((10, 3, 0, 30))
    path.write_bytes(start)
    assert read_header(path) == PlanHeader((10, 3, 0), "tensorrt")
    start[4] = 1  # another serialization version may keep its version elsewhere
    path.write_bytes(start)
    assert read_header(path) == PlanHeader(None, "tensorrt")
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    assert read_header(path) == PlanHeader(None, None)


def test_header_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_header(tmp_path / "engine.plan")
    (tmp_path / "engine.plan").write_bytes(b"vtrt")
    with pytest.raises(ArtifactError, match="cut off after 4 bytes"):
        read_header(tmp_path / "engine.plan")


# --- admission


def test_own_engine_is_admitted(engine: Path) -> None:
    manifest = admit(engine, HERE, NOBODY)
    assert manifest.sms == SMS
    assert manifest.inputs == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert read_admitted(engine, HERE, NOBODY) == (manifest, (engine / plan.PLAN).read_bytes())


def corrupted(folder: Path, rng: random.Random) -> str:
    """Spoil one thing; says what."""
    kind = rng.choice(
        [bit_flip, bit_flip, truncation, appended, zeroed, moved, swapped_field, foreign_version, foreign_sm]
    )
    return kind(folder, rng)


def any_file(folder: Path, rng: random.Random) -> Path:
    return folder / rng.choice([plan.PLAN, plan.PLAN, plan.MANIFEST, trust.SEAL])


def bit_flip(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    content = bytearray(path.read_bytes())
    position = rng.randrange(len(content))
    content[position] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"bit flip in {path.name} at {position}"


def truncation(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])
    return f"truncated {path.name}"


def appended(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"\n", b" ", rng.randbytes(9)]))
    return f"appended to {path.name}"


def zeroed(folder: Path, rng: random.Random) -> str:
    path = any_file(folder, rng)
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content) - 1)
    end = rng.randrange(start + 1, len(content))
    if not any(content[start:end]):
        content[start:end] = b"\xff" * (end - start)
    else:
        content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"zeroed {path.name} {start}:{end}"


def moved(folder: Path, rng: random.Random) -> str:
    """Two halves of the plan change places: same length, same bytes."""
    content = (folder / plan.PLAN).read_bytes()
    cut = rng.randrange(40, len(content) - 40)
    (folder / plan.PLAN).write_bytes(content[:36] + content[cut:] + content[36:cut])
    return f"moved at {cut}"


FIELDS: dict[str, list[Any]] = {
    "runtime": ["tensorrt", "tensorflow", None],
    "runtime_version": ["1.6.0", "10.3.0", "1.7.1.117", "newest", ""],
    "sms": [["8.6"], [], ["8.6", "8.9", "12.0"], ["../8.9"], "8.9", [8.9]],
    "flags": [{}, {"version_compatible": True}, {"hardware_compatible": "ampere+"}, {"timing_cache": "../../cache"}],
    "plan_sha256": ["0" * 64, "0" * 63, "A" * 64],
    "plan_bytes": [1, 0, -1, 10**400, True, "17"],
    "inputs": [[], None, [{"name": "x", "dtype": "float32", "shape": ["batch", -4]}], [{"name": "x"}]],
    "outputs": [
        [{"name": "y", "dtype": "float32", "shape": ["batch", 1 << 62, 1 << 62]}],
        [{"name": "x", "dtype": "float32", "shape": ["batch", 3]}],
        [{"name": "y", "dtype": "object", "shape": ["batch", 3]}],
        [{"name": "y", "dtype": "float32", "shape": ["batch", 3], "path": "/etc/passwd"}],
        [{"name": "", "dtype": "float32", "shape": [""]}],
    ],
    "batch": [{"min": 2, "opt": 1, "max": 4}, {"min": 1, "max": 4}, {"min": 0, "opt": 1, "max": 4}],
    "dla_core": [0, -1],
    "schema_version": [2],
    "unknown": ["key"],
    "built": ["2026-01-02T00:00:00Z"],
    "platform": ["windows-amd64"],
}


def swapped_field(folder: Path, rng: random.Random) -> str:
    fields = json.loads((folder / plan.MANIFEST).read_text())
    name = rng.choice(list(FIELDS))
    fields[name] = rng.choice(FIELDS[name])
    (folder / plan.MANIFEST).write_text(json.dumps(fields, indent=2))
    return f"{name} = {fields[name]!r:.60}"


ABSURD = [
    (name, value) for name, values in FIELDS.items() for value in values if name not in ("flags", "built", "platform")
]


@pytest.mark.parametrize(("name", "value"), [*ABSURD, ("flags", {"timing_cache": "../../cache"})])
def test_absurd_manifest_is_refused_whoever_vouches_for_it(name: str, value: Any, engine: Path) -> None:
    fields = json.loads((engine / plan.MANIFEST).read_text())
    (engine / plan.MANIFEST).write_text(json.dumps({**fields, name: value}))
    with pytest.raises((ArtifactError, TargetError)):
        admit(engine, HERE, Trust(allow_unsigned=True))


def with_plan_byte(folder: Path, position: int, byte: int) -> None:
    """A changed plan whose manifest and seal were made for it, as by another build."""
    content = bytearray((folder / plan.PLAN).read_bytes())
    content[position] = byte
    (folder / plan.PLAN).write_bytes(content)
    write_manifest(folder, manifest_of(folder / plan.PLAN))
    seal(folder)


def foreign_version(folder: Path, rng: random.Random) -> str:
    with_plan_byte(folder, 24 + rng.randrange(3), rng.choice([0, 2, 3, 9, 255]))
    return "foreign version byte, sealed"


def foreign_sm(folder: Path, rng: random.Random) -> str:
    with_plan_byte(folder, 32, rng.choice([0x1C, 0x04, 0x20]))
    return "foreign compute capabilities, sealed"


def refusal(folder: Path) -> MmedgeError | None:
    try:
        admit(folder, HERE, NOBODY)
    except (ArtifactError, TargetError) as err:
        return err
    return None


def test_no_corruption_is_admitted(tmp_path: Path, real: Path) -> None:
    """200 damaged engines, each refused with a reason that says what to do, and nothing is deserialized."""
    pristine = sealed_engine(tmp_path / "pristine", real)
    rng = random.Random(0)
    reasons = set()
    for number in range(200):
        folder = tmp_path / str(number)
        shutil.copytree(pristine, folder)
        what = corrupted(folder, rng)
        err = refusal(folder)
        assert err is not None, f"admitted after: {what}"
        assert all((err.problem, err.fix, err.where)), what
        reasons.add(err.problem[:25])
        shutil.rmtree(folder)
    assert len(reasons) > 8
    admit(pristine, HERE, NOBODY)


def test_every_byte_of_manifest_and_seal_counts(engine: Path) -> None:
    """Also those that change no meaning, such as white space and the case of a hexadecimal digit."""
    for name in (plan.MANIFEST, trust.SEAL):
        content = (engine / name).read_bytes()
        for position, byte in enumerate(content):
            (engine / name).write_bytes(content[:position] + bytes([byte ^ 0x20]) + content[position + 1 :])
            with pytest.raises((ArtifactError, TargetError)):
                admit(engine, HERE, NOBODY)
        (engine / name).write_bytes(content)
    assert admit(engine, HERE, NOBODY)


def test_admission_loads_no_runtime(engine: Path) -> None:
    """In a process of its own, which survives a spoiled plan and has loaded no TensorRT."""
    content = (engine / plan.PLAN).read_bytes()
    (engine / plan.PLAN).write_bytes(content[:100] + bytes(len(content) - 100))
    code = f"""
import sys
from pathlib import Path
from mmedge.targets.tensorrt.plan import Here, Trust, admit
try:
    admit(Path({str(engine)!r}), Here("tensorrt-rtx", "1.7.1.116", "8.9"), Trust(allow_unsigned=True))
except Exception as err:
    print(type(err).__name__, "tensorrt_rtx" in sys.modules, "ctypes" in sys.modules and "nvinfer" in str(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "ArtifactError False False\n"


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another runtime": ({}, {"runtime": "tensorrt"}, "built for tensorrt-rtx, this target is tensorrt"),
    "another version": ({}, {"runtime_version": "1.7.2.1"}, "here is 1.7.2.1: an engine runs on the exact version"),
    "another build number": ({}, {"runtime_version": "1.7.1.117"}, "here is 1.7.1.117"),
    "a version that tells too little": ({}, {"runtime_version": "1.7"}, "here is 1.7:"),
    "another GPU": ({}, {"sm": "12.0"}, "built for SM 8.6, SM 8.9; the GPU here is SM 12.0"),
    "no GPU": ({}, {"sm": ""}, "there is no GPU here"),
    "compatible, older GPU": ({"flags": {"hardware_compatible": "ampere+"}}, {"sm": "7.5"}, "the GPU here is SM 7.5"),
    "DLA on a PC": ({"dla_core": 0}, {}, "built for DLA core 0; this device has none"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_engine_of_another_device_is_refused(case: str, tmp_path: Path, real: Path) -> None:
    built, here, reason = MISFITS[case]
    folder = sealed_engine(tmp_path / "engine", real, **built)
    with pytest.raises(TargetError, match=reason) as caught:
        admit(folder, replace(HERE, **here), Trust(allow_unsigned=True))
    assert caught.value.fix
    assert caught.value.exit_status == 4


ORIN = Here("tensorrt", "10.3.0", "8.7", "6.2")
VERSIONS = [  # built by, version-compatible, loaded by, admitted: facts of the support matrix of TensorRT 11.4.1
    ("10.3.0", False, "10.3.0", True),
    ("10.3.0.30", False, "10.3.0", True),  # Jetson's Python package leaves the build number out
    ("10.3.0.30", False, "10.3.0.26", False),
    ("10.3.0", False, "10.16.2", False),
    ("10.3.0", True, "10.16.2", True),
    ("10.3.0", True, "10.2.0", False),
    ("10.3.0", True, "11.4.1", True),
    ("8.6.1", True, "10.3.0", True),
    ("8.5.2", True, "10.3.0", False),
    ("8.6.1", True, "11.4.1", False),
    ("8.6.1", True, "9.0.0", False),
]


@pytest.mark.parametrize(("built", "compatible", "runs", "admitted"), VERSIONS)
def test_which_versions_fit(built: str, compatible: bool, runs: str, admitted: bool, tmp_path: Path) -> None:
    folder = tensorrt_engine(tmp_path / "engine", built, flags={"version_compatible": True} if compatible else {})
    here = replace(ORIN, runtime_version=runs)
    if admitted:
        assert admit(folder, here, NOBODY).runtime_version == built
    else:
        with pytest.raises(TargetError, match=f"here is {runs}: .*versions?"):
            admit(folder, here, NOBODY)


def test_another_jetpack_is_noted_and_another_platform_refused(tmp_path: Path) -> None:
    folder = tensorrt_engine(tmp_path / "engine", "10.3.0")
    other = replace(ORIN, jetpack="6.1")
    assert differences(admit(folder, other, NOBODY), other) == [
        "built on JetPack 6.2, here is 6.1; TensorRT is the same"
    ]
    assert differences(admit(folder, ORIN, NOBODY), ORIN) == []
    with pytest.raises(TargetError, match="engines are not portable"):
        admit(folder, replace(ORIN, platform="linux-riscv64"), NOBODY)


def test_dla_core_must_exist(tmp_path: Path) -> None:
    folder = tensorrt_engine(tmp_path / "engine", "10.3.0", dla_core=1)
    assert admit(folder, ORIN, NOBODY).dla_core == 1
    assert admit(folder, replace(ORIN, dla_cores=2), NOBODY)
    for cores in (0, 1):  # Orin Nano has none and the same compute capability
        with pytest.raises(TargetError, match="built for DLA core 1; this device has"):
            admit(folder, replace(ORIN, dla_cores=cores), NOBODY)


def test_compatible_hardware_is_admitted(tmp_path: Path, real: Path) -> None:
    folder = sealed_engine(tmp_path / "engine", real, flags={"hardware_compatible": "ampere+"})
    assert admit(folder, replace(HERE, sm="12.0"), NOBODY)


def test_files_are_those_of_the_folder(engine: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.plan"
    for name, link in ((plan.PLAN, outside), (plan.MANIFEST, tmp_path / "outside.json")):
        (engine / name).rename(link)
        (engine / name).symlink_to(link)
        with pytest.raises(ArtifactError, match="link that leads out of its folder"):
            admit(engine, HERE, NOBODY)
        (engine / name).unlink()
        link.rename(engine / name)
    (engine / plan.PLAN).rename(engine / "there.plan")
    (engine / plan.PLAN).symlink_to("there.plan")
    assert admit(engine, HERE, NOBODY)
    (tmp_path / "link").symlink_to(engine)
    assert admit(tmp_path / "link", HERE, NOBODY)
    (engine / plan.PLAN).unlink()
    (engine / plan.PLAN).symlink_to(plan.PLAN)  # a loop
    with pytest.raises(ArtifactError, match="cannot be read"):
        admit(engine, HERE, NOBODY)


def test_what_is_no_engine_is_told(engine: Path, tmp_path: Path) -> None:
    content = (engine / plan.PLAN).read_bytes()
    (engine / plan.PLAN).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"has {len(content) - 1} bytes, the manifest says {len(content)}"):
        admit(engine, HERE, NOBODY)
    with pytest.raises(ArtifactError, match=r"not an engine: no engine\.plan"):
        admit(tmp_path, HERE, NOBODY)
    (engine / plan.MANIFEST).write_bytes(b" " * (plan.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(ArtifactError, match="larger than 4 MiB"):
        admit(engine, HERE, NOBODY)
    (engine / plan.MANIFEST).write_bytes(b"[" * 100_000)
    with pytest.raises(ArtifactError, match="cannot be read"):
        admit(engine, HERE, NOBODY)
    (engine / plan.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"no engine\.json"):
        admit(engine, HERE, NOBODY)
    (engine / plan.PLAN).unlink()
    (engine / plan.PLAN).mkdir()
    with pytest.raises(ArtifactError, match="not a file"):
        admit(engine, HERE, NOBODY)

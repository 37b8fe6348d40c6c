"""TensorRT engines as artifacts of one device: what is checked before one is handed to native code.

An engine folder holds

- ``engine.plan``, the serialized engine,
- ``engine.json``, its manifest (``EngineManifest``),
- ``engine.seal`` where this machine built it, ``engine.sig`` where somebody signed it: see the module ``trust``.

Deserializing runs native code on what the file holds, so NVIDIA says to load none but trusted engines (TensorRT
11.4.1, Best Practices). ``admit`` decides without loading anything; it needs neither TensorRT nor a GPU.
"""

from __future__ import annotations

import hashlib
import io
import math
import platform
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from mmedge.artifact import write_text
from mmedge.errors import ArtifactError, TargetError
from mmedge.targets.tensorrt.trust import Trust, forget_seals, sealed, signed
from mmedge.tensors import DTYPES

__all__ = [
    "EngineManifest", "Here", "PlanHeader", "Trust", "admit", "differences", "read_admitted", "read_header", "seal",
    "sign", "write_manifest",
]  # fmt: skip

Runtime = Literal["tensorrt", "tensorrt-rtx"]

PLAN = "engine.plan"
MANIFEST = "engine.json"
MAX_MANIFEST_BYTES = 4 << 20
MAX_TENSOR_BYTES = 1 << 40  # more than any device has: an absurd shape must not reach an allocator
_REBUILD = "build it again on this device: mmedge build RUN --target NAME"

# --- the header of a plan

_HEADER_BYTES = 36
_TENSORRT, _RTX = b"ftrt", b"vtrt"
_RTX_SMS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # bit 0 upwards; 7.5 follows from the order, the rest was seen


@dataclass(frozen=True)
class PlanHeader:
    """What the first bytes of a plan tell; None where they do not.

    Attributes:
        version: major, minor and patch of the TensorRT that built it.
        runtime: ``tensorrt`` or ``tensorrt-rtx``.
        size: length of the file in bytes, of TensorRT-RTX plans.
        sms: compute capabilities it was built for, of TensorRT-RTX plans.
    """

    version: tuple[int, int, int] | None
    runtime: Runtime | None
    size: int | None = None
    sms: tuple[str, ...] | None = None


def read_header(plan: Path) -> PlanHeader:
    """Read the first 36 bytes of a plan; nothing is loaded.

    TensorRT: the tag ``ftrt``, the serialization version at byte 4 and, where that is 0, the version at bytes 24 to 26
    (``printPlanVersion`` in NVIDIA/TensorRT samples/common/sampleEngines.cpp; Autoware's tensorrt_common reads the
    same bytes). Not seen here.

    TensorRT-RTX: what plans built with 1.7.1.116 have in common, eight of them, float and INT8, for 8.0, 8.6, 8.9,
    12.0, 12.1, 8.0 with 12.1, and 8.6 with 8.9 and 12.0: the tag ``vtrt`` at bytes 0 and 28, zeros at 4 to 7, the
    length of the file at 16 to 23 (little endian), the version at 24 to 26 (and 116 at 27), and at 32 to 35 a set of
    compute capabilities, one bit each: 8.0 is 2, 8.6 is 4, 8.9 is 8, 12.0 is 16, 12.1 is 32.

    Raises:
        ArtifactError: the file is missing or too short to be a plan.
    """
    try:
        with plan.open("rb") as file:
            return _header(file.read(_HEADER_BYTES), str(plan))
    except OSError as err:
        raise ArtifactError(f"cannot be read: {err.strerror}", where=str(plan), fix=_REBUILD) from err


def _header(start: bytes, where: str) -> PlanHeader:
    if len(start) < _HEADER_BYTES:
        raise ArtifactError(f"is cut off after {len(start)} bytes", where=where, fix=_REBUILD)
    tag, serialization, size, targets = start[:4], *struct.unpack_from("<I8xQ8xI", start, 4)
    version = (start[24], start[25], start[26])
    if tag == _TENSORRT:
        return PlanHeader(version if serialization == 0 else None, "tensorrt")
    if tag == _RTX and start[28:32] == _RTX and serialization == 0:
        return PlanHeader(version, "tensorrt-rtx", size, _capabilities(targets))
    return PlanHeader(None, None)


def _capabilities(bits: int) -> tuple[str, ...] | None:
    if bits == 0 or bits >> len(_RTX_SMS):
        return None
    return tuple(sm for bit, sm in enumerate(_RTX_SMS) if bits >> bit & 1)


# --- the manifest


def _this_platform() -> str:
    return f"{platform.system()}-{platform.machine()}".lower()


class _Tensor(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=1024)
    dtype: Literal[DTYPES]  # type: ignore[valid-type]
    shape: list[PositiveInt | str] = Field(max_length=8)

    @field_validator("shape")
    @classmethod
    def _dimensions_have_names(cls, shape: list[int | str]) -> list[int | str]:
        if "" in shape:
            raise ValueError("a dimension that may change needs a name")
        return shape

    def elements(self, batch: int) -> int:
        return math.prod(size if isinstance(size, int) else batch for size in self.shape)


class EngineManifest(BaseModel):
    """What an engine is, for whom, and how it was built.

    Attributes:
        runtime: what loads it.
        runtime_version: that built it, as its Python package says (``10.3.0``, ``1.7.1.116``).
        sms: compute capabilities of the GPUs it was built for (``8.7``).
        jetpack: release it was built on, None elsewhere.
        dla_core: that it was built for, None for the GPU alone.
        flags: what was asked of the builder.
        onnx_sha256: of the ONNX file; joined by ``+`` with that of its weights where these lie in a file of their own.
        plan_sha256: of ``engine.plan``.
        plan_bytes: its length.
        timing_cache_sha256: of the timing cache after building, None without one.
        inputs: name, dtype and shape of each; strings in a shape name what may change.
        outputs: likewise.
        batch: ``min``, ``opt`` and ``max`` of the first dimension.
        log: summary of the build log (kernels, conversions, warnings).
        built: when, UTC.
        platform: operating system and processor that it was built on (``linux-aarch64``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    runtime: Runtime
    runtime_version: str = Field(pattern=r"^\d+\.\d+\.\d+")
    sms: tuple[str, ...]
    jetpack: str | None
    dla_core: NonNegativeInt | None
    flags: dict[str, Any]
    onnx_sha256: str = Field(pattern=r"^[0-9a-f]{64}(\+[0-9a-f]{64})*$")
    plan_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    plan_bytes: PositiveInt
    timing_cache_sha256: str | None
    inputs: list[dict[str, Any]] = Field(min_length=1, max_length=1024)
    outputs: list[dict[str, Any]] = Field(min_length=1, max_length=1024)
    batch: dict[Literal["min", "opt", "max"], PositiveInt]
    log: dict[str, Any]
    built: str
    platform: str = Field(default_factory=_this_platform)

    @field_validator("sms")
    @classmethod
    def _are_capabilities(cls, sms: tuple[str, ...]) -> tuple[str, ...]:
        for sm in sms:
            if not re.fullmatch(r"\d{1,2}\.\d", sm):
                raise ValueError(f"{sm!r} is not a compute capability such as 8.7")
        return sms

    @field_validator("flags")
    @classmethod
    def _names_no_other_folder(cls, flags: dict[str, Any]) -> dict[str, Any]:
        cache = flags.get("timing_cache")
        if cache is not None and (not isinstance(cache, str) or Path(cache).name != cache):
            raise ValueError(f"timing_cache names a file outside the folder: {cache!r}")
        return flags

    @field_validator("batch")
    @classmethod
    def _is_a_range(cls, batch: dict[str, int]) -> dict[str, int]:
        if not (len(batch) == 3 and batch["min"] <= batch["opt"] <= batch["max"]):
            raise ValueError("must hold min <= opt <= max")
        return batch

    @model_validator(mode="after")
    def _tensors_make_sense(self) -> EngineManifest:
        names = [
            _checked_tensor(raw, f"{kind}[{index}]", self.batch["max"])
            for kind in ("inputs", "outputs")
            for index, raw in enumerate(getattr(self, kind))
        ]
        if len(set(names)) < len(names):
            raise ValueError("inputs and outputs: a name stands there twice")
        return self


def _checked_tensor(raw: Mapping[str, Any], where: str, batch: int) -> str:
    try:
        tensor = _Tensor.model_validate(dict(raw), strict=True)
    except ValidationError as err:
        raise ValueError(f"{where}: {_first(err)}") from err
    if tensor.elements(batch) * 8 > MAX_TENSOR_BYTES:
        raise ValueError(f"{where}: shape {tensor.shape} with batch {batch} is larger than any device's memory")
    return tensor.name


def _first(err: ValidationError) -> str:
    first = err.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def write_manifest(folder: Path, manifest: EngineManifest) -> None:
    """Write ``engine.json`` beside ``engine.plan``; a seal that lies there is of another engine and goes.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    forget_seals(folder)
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2))


def seal(folder: Path) -> None:
    """Mark the engine in ``folder`` as built here: see ``mmedge.targets.tensorrt.trust``.

    Raises:
        ArtifactError: manifest or plan cannot be read, or do not belong together.
        TargetError: the key of this machine cannot be made or read.
    """
    sealed(folder, _statement_of(folder))


def sign(folder: Path, private_key_file: Path) -> None:
    """Sign the engine in ``folder`` with an ed25519 key, so that other machines may load it.

    Raises:
        ArtifactError: manifest or plan cannot be read, or do not belong together.
        UsageError: the key cannot be used; says how to make one.
        TargetError: the package cryptography is missing; names the extra.
    """
    signed(folder, _statement_of(folder), private_key_file)


# --- admission


@dataclass(frozen=True)
class Here:
    """This machine, as far as an engine cares.

    Attributes:
        runtime: that would load the engine.
        runtime_version: its version.
        sm: compute capability of the GPU, empty without one.
        jetpack: release, None elsewhere.
        dla_cores: how many DLA cores there are; None where unknown, then the compute capability decides.
        platform: operating system and processor.
    """

    runtime: Runtime
    runtime_version: str
    sm: str
    jetpack: str | None = None
    dla_cores: int | None = None
    platform: str = ""


def admit(folder: Path, here: Here, trust: Trust) -> EngineManifest:
    """Everything that can be known of an engine before native code sees it.

    The manifest must be well formed, the plan whole and the manifest's own, its header must agree, runtime, version,
    platform, GPU and DLA must fit this machine, and this machine or a trusted key must vouch for it.

    Args:
        folder: of the engine.
        here: this machine.
        trust: whom to believe.

    Raises:
        ArtifactError: a file is missing, damaged, absurd or not what the manifest says.
        TargetError: the engine was built for another runtime, version, GPU or device, or nobody vouches for it.
    """
    with _opened(folder / PLAN, folder) as plan:
        return _admitted(folder, plan, here, trust)


def read_admitted(folder: Path, here: Here, trust: Trust) -> tuple[EngineManifest, bytes]:
    """Like ``admit``, and the very bytes that were checked: a file that changes in between cannot slip through.

    Raises:
        ArtifactError: see ``admit``.
        TargetError: see ``admit``.
    """
    with _opened(folder / PLAN, folder) as plan:
        content = plan.read()
    return _admitted(folder, io.BytesIO(content), here, trust), content


def _admitted(folder: Path, plan: BinaryIO, here: Here, trust: Trust) -> EngineManifest:
    manifest, raw = _manifest(folder)
    where = str(folder / PLAN)
    size = plan.seek(0, io.SEEK_END)
    plan.seek(0)
    if size != manifest.plan_bytes:
        raise ArtifactError(f"has {size} bytes, the manifest says {manifest.plan_bytes}", where=where, fix=_REBUILD)
    _check_header(_header(plan.read(_HEADER_BYTES), where), manifest, where)
    for reason, fix in _misfits(manifest, here):
        raise TargetError(reason, where=str(folder), fix=fix)
    plan.seek(0)
    if _digest(plan) != manifest.plan_sha256:
        raise ArtifactError(
            "does not match the digest in its manifest: it was damaged or replaced", where=where, fix=_REBUILD
        )
    trust.check(folder, statement(manifest.plan_sha256, raw))
    return manifest


def statement(plan_sha256: str, manifest: bytes) -> bytes:
    """The bytes that seals and signatures vouch for: the plan's digest and the manifest, byte for byte."""
    return b"mmedge engine 1\n" + plan_sha256.encode() + b"\n" + manifest


def _statement_of(folder: Path) -> bytes:
    manifest, raw = _manifest(folder)
    with _opened(folder / PLAN, folder) as plan:
        if _digest(plan) != manifest.plan_sha256:
            raise ArtifactError("does not match the digest in its manifest", where=str(folder / PLAN), fix=_REBUILD)
    return statement(manifest.plan_sha256, raw)


@contextmanager
def _opened(path: Path, folder: Path) -> Iterator[BinaryIO]:
    """A file of the folder itself: no link that leads out of it, no device, no pipe."""
    try:
        if path.resolve(strict=True).parent != folder.resolve(strict=True):
            raise ArtifactError("is a link that leads out of its folder", where=str(path), fix="copy the file itself")
        if not path.is_file():
            raise ArtifactError("is not a file", where=str(path), fix=_REBUILD)
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as err:
        raise ArtifactError(f"not an engine: no {path.name}", where=str(folder), fix=_REBUILD) from err
    except (OSError, RuntimeError) as err:  # RuntimeError: a loop of links
        raise ArtifactError(f"cannot be read: {err}", where=str(path), fix="look at its permissions") from err


def _manifest(folder: Path) -> tuple[EngineManifest, bytes]:
    path = folder / MANIFEST
    with _opened(path, folder) as file:
        raw = file.read(MAX_MANIFEST_BYTES + 1)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"is larger than {MAX_MANIFEST_BYTES >> 20} MiB: no manifest", where=str(path), fix=_REBUILD
        )
    try:
        return EngineManifest.model_validate_json(raw, strict=True), raw
    except ValidationError as err:
        raise ArtifactError(f"cannot be read: {_first(err)}", where=str(path), fix=_REBUILD) from err


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_header(header: PlanHeader, manifest: EngineManifest, where: str) -> None:
    if header.runtime is None:
        raise ArtifactError("does not begin as a TensorRT plan does", where=where, fix=_REBUILD)
    said = {
        "runtime": (header.runtime, manifest.runtime),
        "version": (header.version, _numbers(manifest.runtime_version)[:3]),
        "length": (header.size, manifest.plan_bytes),
        "compute capabilities": (header.sms and set(header.sms), set(manifest.sms)),
    }
    for what, (found, expected) in said.items():
        if found is not None and found != expected:
            problem = f"its header and its manifest do not agree on the {what}: {_plain(found)}, {_plain(expected)}"
            raise ArtifactError(problem, where=where, fix=_REBUILD)


def _plain(value: Any) -> str:
    if isinstance(value, tuple | set | frozenset):
        return (".").join(map(str, value)) if isinstance(value, tuple) else " ".join(sorted(value))
    return str(value)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _misfits(manifest: EngineManifest, here: Here) -> Iterator[tuple[str, str]]:
    """Reasons, each with its fix, why the engine does not run on this machine."""
    if manifest.runtime != here.runtime:
        yield f"built for {manifest.runtime}, this target is {here.runtime}", "choose the target that built it"
    yield from _version_misfit(manifest, here)
    platform_here = here.platform or _this_platform()
    if manifest.runtime == "tensorrt" and manifest.platform != platform_here:  # RTX engines are portable
        yield f"built on {manifest.platform}, this is {platform_here}: TensorRT engines are not portable", _REBUILD
    yield from _gpu_misfit(manifest, here)
    yield from _dla_misfit(manifest, here)


def _version_misfit(manifest: EngineManifest, here: Here) -> Iterator[tuple[str, str]]:
    built, runs = _numbers(manifest.runtime_version), _numbers(here.runtime_version)
    known = min(len(built), len(runs))  # some packages leave the build number out
    if known >= 3 and built[:known] == runs[:known]:
        return
    reason = f"built by {manifest.runtime} {manifest.runtime_version}, here is {here.runtime_version}"
    if not manifest.flags.get("version_compatible"):
        yield f"{reason}: an engine runs on the exact version that built it", _REBUILD
    elif not _later(built, runs):
        yield (
            f"{reason}: version-compatible engines run on later versions, and from 8 on 10 and 10 on 11 only",
            _REBUILD,
        )


def _later(built: tuple[int, ...], runs: tuple[int, ...]) -> bool:
    """Support matrix of TensorRT 11.4.1: the same major version or the pairs 8 to 10 and 10 to 11; from 8.6 on."""
    if not built or not runs or built < (8, 6):
        return False
    return (built[0], runs[0]) in ((8, 10), (10, 11)) or (built[0] == runs[0] and runs >= built)


def _gpu_misfit(manifest: EngineManifest, here: Here) -> Iterator[tuple[str, str]]:
    if here.sm in manifest.sms:
        return
    if manifest.flags.get("hardware_compatible") == "ampere+" and from_ampere_on(here.sm):
        return
    found = f"the GPU here is SM {here.sm}" if here.sm else "there is no GPU here"
    yield f"built for {_named(manifest.sms)}; {found}", _REBUILD


def from_ampere_on(sm: str) -> bool:
    """Whether a GPU runs engines that were built hardware compatible; ``sm`` is empty where there is none."""
    return _numbers(sm) >= (8, 0)


def _named(sms: tuple[str, ...]) -> str:
    return ", ".join(f"SM {sm}" for sm in sms) or "no named GPU"


def _dla_misfit(manifest: EngineManifest, here: Here) -> Iterator[tuple[str, str]]:
    core = manifest.dla_core
    if core is None:
        return
    cores = here.dla_cores
    if cores is None and here.sm not in ("7.2", "8.7"):  # Xavier and Orin; Thor has none
        cores = 0
    if cores is not None and core >= cores:
        yield f"built for DLA core {core}; this device has {cores or 'none'}", "build it without dla_core"


def differences(manifest: EngineManifest, here: Here) -> list[str]:
    """What differs and yet does not matter enough to refuse: another JetPack with the same TensorRT."""
    if manifest.jetpack == here.jetpack:
        return []
    return [f"built on JetPack {manifest.jetpack or 'none'}, here is {here.jetpack or 'none'}; TensorRT is the same"]

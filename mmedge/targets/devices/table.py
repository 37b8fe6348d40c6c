"""The device table: YAML files read into checked records. Device side: neither torch nor onnx.

A file holds ``devices``, a mapping from name to the fields of ``Device`` (the name itself is the key), and if it wants
``shared``, a free place for YAML anchors. Other packages add files through the entry point group ``mmedge.devices``,
whose values read ``package:file.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmedge.errors import UsageError, unknown

GROUP = "mmedge.devices"
FOLDER = Path(__file__).parent

Precision = Literal["fp32", "fp16", "bf16", "int8"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Record):
    """One number and where it was read.

    Attributes:
        value: in the unit that the field's name states.
        source: the document, page or thread, and how the figure follows from it where it is derived.
        verified: False where nobody read the figure in its source; shown with a mark.
    """

    value: float = Field(ge=0, allow_inf_nan=False)
    source: str = Field(min_length=1)
    verified: bool = True

    @field_validator("source")
    @classmethod
    def _names_a_source(cls, source: str) -> str:
        if source.strip().lower() in ("", "memory", "unknown", "none"):
            raise ValueError(f"{source!r} is not a source; name the document, page or thread")
        return source


class Software(_Record):
    """One generation of software on a device: a JetPack, or the runtime release of a PC.

    Attributes:
        name: for people: ``JetPack 6.2``.
        release: for a target's option: ``6.2``.
        l4t: Linux for Tegra, None on a PC.
        cuda: CUDA's version, None where there is none.
        python: the system's Python, None where the release fixes none.
        os: the operating system, None where the release fixes none.
        tensorrt: TensorRT's (or TensorRT-RTX's) version, None where there is none.
        typing: ``strong`` where only strongly typed networks are built, ``weak`` where both kinds are.
        dla: whether this TensorRT builds for the DLA at all; a device needs DLA cores besides.
        opset: the highest ONNX opset its parser is known to take.
        default: the release taken where none is named; the last one where no release says so.
    """

    name: str
    release: str
    l4t: str | None = None
    cuda: str | None = None
    python: str | None = None
    os: str | None = None
    tensorrt: str | None = None
    typing: Literal["weak", "strong"] | None = None
    dla: bool = False
    opset: int | None = Field(None, ge=7)
    source: str = Field(min_length=1)
    verified: bool = True
    default: bool = False
    notes: tuple[str, ...] = ()


class Dla(_Record):
    """Deep learning accelerators: fixed-function, static shapes, no Q/DQ before TensorRT 11.

    Attributes:
        cores: how many.
        loadables_per_core: engines that fit on one core at the same time.
        precisions: what it computes in.
        peaks: dense tera-operations per second of all cores together, where the source tells.
    """

    cores: int = Field(ge=1)
    loadables_per_core: int = Field(16, ge=1)
    precisions: tuple[Precision, ...]
    source: str = Field(min_length=1)
    peaks: dict[Precision, Figure] = Field(default_factory=dict)


class Device(_Record):
    """A device that engines run on.

    Attributes:
        name: as a target is named: ``jetson-agx-orin``.
        title: for people: ``Jetson AGX Orin 64GB``.
        known_as: what the machine calls it: the beginning of a Jetson's ``/proc/device-tree/model``, the whole of a
            graphics card's name in nvidia-smi.
        kind: ``jetson``, ``gpu`` (a graphics card) or ``cpu``.
        backend: the mmedge target that builds for it.
        sm: CUDA compute capability (``8.7``), None without a GPU.
        sm_source: where that is written.
        memory_gib: of the GPU, or of the module where CPU and GPU share it.
        shared_memory: CPU and GPU share one memory.
        peaks: dense tera-operations per second (one multiply-add is two operations) by precision, sparsity not used.
        bandwidth_gb_s: memory bandwidth, 1e9 bytes per second.
        launch_us: time to start one kernel (of a CPU runtime: one operator), microseconds.
        pays: precisions worth using, fastest first.
        dla: None without one.
        rails: power rails whose sum is the module's total; none where the device has no readable rails.
        rails_source: where that is written.
        power_modes: names that the device's own tool (nvpmodel) gives them, lowest first.
        power_modes_source: where they are written.
        software: releases, oldest first.
        notes: what else must be known.
    """

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    known_as: tuple[str, ...] = ()
    kind: Literal["jetson", "gpu", "cpu"]
    backend: str
    sm: str | None = Field(None, pattern=r"^\d+\.\d$")
    sm_source: str | None = None
    memory_gib: Figure
    shared_memory: bool
    peaks: dict[Precision, Figure] = Field(min_length=1)
    bandwidth_gb_s: Figure
    launch_us: Figure
    pays: tuple[Precision, ...] = Field(min_length=1)
    dla: Dla | None = None
    rails: tuple[str, ...] = ()
    rails_source: str | None = None
    power_modes: tuple[str, ...] = ()
    power_modes_source: str | None = None
    software: tuple[Software, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Device:
        releases = [each.release for each in self.software]
        if len(set(releases)) < len(releases):
            raise ValueError(f"software: a release stands there twice: {', '.join(releases)}")
        if sum(each.default for each in self.software) > 1:
            raise ValueError("software: only one release can be the default")
        for key in ("sm", "rails", "power_modes"):
            if getattr(self, key) and not getattr(self, f"{key}_source"):
                raise ValueError(f"{key}: {key}_source must say where this is written")
        if missing := [each for each in self.pays if each not in self.peaks]:
            raise ValueError(f"pays: peaks has no figure for {', '.join(missing)}")
        return self

    def release(self, wanted: str | None) -> Software:
        """The release of that name, or this device's default.

        Raises:
            UsageError: there is no such release for this device.
        """
        if wanted is None:
            return next((each for each in self.software if each.default), self.software[-1])
        for each in self.software:
            if wanted in (each.release, each.name):
                return each
        problem, fix = unknown("release", wanted, [each.release for each in self.software])
        raise UsageError(problem, where=self.name, fix=fix)

    def is_called(self, name: str) -> bool:
        """Whether a machine that calls itself so is this device."""
        if self.kind == "jetson":
            return any(name.startswith(each) for each in self.known_as)
        return name in self.known_as

    def figures(self) -> Iterator[tuple[str, str, Figure]]:
        """Every figure with a name and its unit, both for people."""
        yield "memory", "GiB", self.memory_gib
        yield "memory bandwidth", "GB/s", self.bandwidth_gb_s
        for precision, figure in self.peaks.items():
            yield f"{precision} peak", _unit(precision), figure
        for precision, figure in (self.dla.peaks if self.dla else {}).items():
            yield f"{precision} peak of the DLA", _unit(precision), figure
        yield "start of a kernel", "µs", self.launch_us


def devices() -> dict[str, Device]:
    """Every device: those shipped, then those of other packages.

    Raises:
        UsageError: a file cannot be read or is not a device table (names the file and the key), or two files claim
            the same name.
    """
    found: dict[str, Device] = {}
    origin: dict[str, Path] = {}
    for path in (*sorted(FOLDER.glob("*.yaml")), *_installed()):
        for name, device in _read(path).items():
            if name in found:
                fix = "rename one of them, or uninstall the package that brings it"
                raise UsageError(f"is already described by {origin[name]}", where=f"{path}: devices.{name}", fix=fix)
            found[name], origin[name] = device, path
    return found


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        UsageError: there is none; with a suggestion.
    """
    known = devices()
    if name in known:
        return known[name]
    problem, fix = unknown("device", name, known)
    raise UsageError(problem, fix=fix)


def _unit(precision: str) -> str:
    return "TOPS" if precision == "int8" else "TFLOPS"


def _installed() -> Iterator[Path]:
    """Files of other packages, found without importing these."""
    values = {point.value: point for point in entry_points(group=GROUP)}
    for _, point in sorted(values.items()):
        package, _, file = (part.strip() for part in point.value.partition(":"))
        folder = _folder(package) if file else None
        if folder is None or not (folder / file).is_file():
            owner = point.dist.name if point.dist else "an installed package"
            problem = f"entry point {point.name!r} of {owner} names {point.value!r}, which is no file"
            raise UsageError(problem, where=GROUP, fix=_mend(point))
        yield folder / file


def _mend(point: EntryPoint) -> str:
    return f'write {point.name} = "package:file.yaml" and ship the file in the package, or uninstall it'


def _folder(package: str) -> Path | None:
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


@cache
def _read(path: Path) -> Mapping[str, Device]:
    """The devices of one file; a file does not change while the program runs."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise UsageError(f"cannot be read as YAML: {err}", where=str(path), fix="mend the file") from err
    where = f"{path}: devices"
    if not isinstance(raw, dict) or not isinstance(raw.get("devices"), dict):
        raise UsageError("must be a mapping from a device's name to its fields", where=where, fix=_LOOK)
    if wrong := set(map(str, raw)) - {"devices", "shared"}:
        problem, fix = unknown("key", min(wrong), ("devices", "shared"))
        raise UsageError(problem, where=str(path), fix=fix)
    return {str(name): _device(str(name), fields, f"{where}.{name}") for name, fields in raw["devices"].items()}


def _device(name: str, fields: Any, where: str) -> Device:
    if not isinstance(fields, dict):
        raise UsageError("must be a mapping of fields", where=where, fix=_LOOK)
    try:
        return Device.model_validate({**fields, "name": name})
    except ValidationError as err:
        raise _explained(err, where) from err


def _explained(err: ValidationError, where: str) -> UsageError:
    """The first complaint at its place in the file; a misspelt key before the one that is missing for it."""
    errors = err.errors(include_url=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]]
    if first["type"] == "extra_forbidden":
        problem, fix = unknown("key", str(first["loc"][-1]), _model(first["loc"]).model_fields)
        return UsageError(problem, where=where + "".join(steps[:-1]), fix=fix)
    problem = first["msg"].removeprefix("Value error, ")
    return UsageError(problem[0].lower() + problem[1:], where=where + "".join(steps), fix=_LOOK)


def _model(place: tuple[int | str, ...]) -> type[_Record]:
    """What the key at ``place`` belongs to."""
    if len(place) == 1:
        return Device
    if place[0] == "software":
        return Software
    return Dla if place[0] == "dla" and len(place) == 2 else Figure


_LOOK = f"the files in {FOLDER} show every field"

"""Tasks, stages and targets by name: the entry points of installed packages, our own included."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, get_type_hints

from mmedge.errors import MmedgeError, UsageError, unknown

if TYPE_CHECKING:
    from mmedge.targets.base import Target

GROUPS = {"task": "mmedge.tasks", "stage": "mmedge.stages", "target": "mmedge.targets"}
_OPTION = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]*)(?:,|$)")


def names(kind: str) -> list[str]:
    """The installed names of one kind, without importing any."""
    return sorted({point.name for point in entry_points(group=GROUPS[kind])})


def load(kind: str, name: str) -> Any:
    """The object behind a name.

    Raises:
        UsageError: there is no such name (with a suggestion), or two packages claim it.
        MmedgeError: the package that offers it fails to import.
    """
    points = {point.value: point for point in entry_points(group=GROUPS[kind], name=name)}
    if not points:
        problem, fix = unknown(kind, name, names(kind))
        raise UsageError(problem, fix=fix)
    if len(points) > 1:
        raise UsageError(f"{kind} {name!r} is offered twice: {', '.join(points)}", fix="uninstall one of the packages")
    return _import(kind, next(iter(points.values())))


def loaders(kind: str) -> dict[str, Callable[[], Any]]:
    """Every name of one kind with the function that loads it."""
    return {name: partial(load, kind, name) for name in names(kind)}


def target_names() -> list[str]:
    """The installed backends and the devices of the table: what a target's name may begin with."""
    from mmedge.targets.devices import devices

    return [*names("target"), *devices()]


def target(spec: str) -> Target:
    """The target that ``spec`` names, ready to use.

    Args:
        spec: a backend or a device of the table, with options if wanted: ``onnxruntime``, ``jetson-agx-orin``,
            ``onnxruntime:provider=cuda``, ``tensorrt-rtx:compute_capabilities=[8.6,8.9]``. The whole text is the
            target's name in reports.

    Raises:
        UsageError: no such backend, device or option, or a value that the option does not take.
    """
    from mmedge.targets.devices import find_device

    name, _, text = spec.partition(":")
    if name not in target_names():
        problem, fix = unknown("target", name, target_names())
        raise UsageError(problem, fix=f"{fix}; mmedge target list tells more")
    options = _options(spec, text)
    if name in names("target"):
        maker, fixed = load("target", name), {}
    else:
        device = find_device(name)
        maker, fixed = load("target", device.backend), {"device": device}
        if "device" not in inspect.signature(maker).parameters:
            problem = f"{name} is in the table for forecasts; engines for it are those of {device.backend}"
            raise UsageError(problem, fix=f"name the backend: --target {device.backend}")
    found: Target = maker(**_fitting(maker, options, spec), **fixed)
    found.name = spec
    return found


def target_options(name: str) -> dict[str, Any]:
    """The options that a target takes, with their defaults.

    Args:
        name: a backend or a device.

    Raises:
        UsageError: see ``load``.
    """
    from mmedge.targets.devices import find_device

    maker = load("target", name if name in names("target") else find_device(name).backend)
    return {key: each.default for key, each in inspect.signature(maker).parameters.items() if key != "device"}


def _options(spec: str, text: str) -> dict[str, Any]:
    import yaml

    found = {match[1]: yaml.safe_load(match[2]) for match in _OPTION.finditer(text)}
    if ",".join(f"{match[1]}={match[2]}" for match in _OPTION.finditer(text)) != text:
        fix = "write NAME:option=value,option=value with [a,b] for several values"
        raise UsageError("its options cannot be read", where=f"target {spec!r}", fix=fix)
    return found


def _fitting(maker: type[Target], options: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """``options`` as the constructor declares them."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    hints = get_type_hints(maker.__init__)
    known = [name for name in inspect.signature(maker).parameters if name in hints and name != "device"]
    numbers_as_text = ConfigDict(coerce_numbers_to_str=True)  # jetpack=6.2
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            problem, fix = unknown("option", name, known)
            raise UsageError(problem, where=f"target {spec!r}", fix=fix)
        try:
            found[name] = TypeAdapter(hints[name], config=numbers_as_text).validate_python(value)
        except ValidationError as err:
            problem = f"option {name} does not take {value!r}: {err.errors(include_url=False)[0]['msg']}"
            fix = "mmedge target show NAME lists the options"
            raise UsageError(problem, where=f"target {spec!r}", fix=fix) from err
    return found


def _import(kind: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except MmedgeError:
        raise
    except ImportError as err:
        owner = point.dist.name if point.dist else "an installed package"
        if owner == "mmedge":
            extra = "compress"
            raise UsageError(f"{kind} {point.name!r} needs {err.name}", fix=f'pip install "mmedge[{extra}]"') from err
        raise UsageError(f"{kind} {point.name!r} of {owner} cannot be imported: {err}") from err

"""How ``mmedge target`` prints the device table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click

from mmedge.cli.page import grid, heading, page
from mmedge.targets.devices import Device, Figure, Software

DOUBT = "?"  # beside what nobody read in its source
_KINDS = ("jetson", "gpu", "cpu")


def print_targets(backends: Mapping[str, str], devices: Mapping[str, Device], as_json: bool) -> None:
    """Backends with their state here, and devices with what builds for them."""
    ordered = sorted(devices.values(), key=lambda device: _KINDS.index(device.kind))
    if as_json:
        found = {device.name: _in_short(device) for device in ordered}
        click.echo(json.dumps({"backends": dict(backends), "devices": found}, indent=2))
        return
    with page() as console:
        console.print(grid(("backend", "here"), backends.items()))
        console.print()
        rows = ([name or "–" for name in _in_short(each).values()] for each in ordered)
        console.print(grid(("device", "", "SM", "software", "backend"), rows))
        console.print("\nmmedge target show NAME tells the rest; a target is NAME or NAME:option=value", markup=False)


def _in_short(device: Device) -> dict[str, str | None]:
    return {
        "name": device.name,
        "title": device.title,
        "sm": device.sm,
        "software": device.release(None).name,
        "backend": device.backend,
    }


def print_device(device: Device, options: Mapping[str, Any], as_json: bool) -> None:
    """All that the table knows of a device, each figure with its source; the options that a target on it takes."""
    if as_json:
        facts = {**device.model_dump(mode="json"), "default_release": device.release(None).release, "options": options}
        click.echo(json.dumps(facts, indent=2))
        return
    with page() as console:
        console.print(f"{device.name}: {device.title}", style="bold", markup=False)
        console.print(f"backend {device.backend}; worth using, fastest first: {', '.join(device.pays)}", markup=False)
        console.print("options: " + ", ".join(f"{name}={value}" for name, value in options.items()), markup=False)
        heading(console, f"figures, dense ({DOUBT} nobody here read it in its source)")
        console.print(grid(("", "", "", "source"), (_figure(*each) for each in device.figures())))
        heading(console, "hardware")
        console.print(grid(("", "", "source"), _hardware(device)))
        heading(console, "software")
        default = device.release(None)
        heads = ("release", "", "L4T", "CUDA", "TensorRT", "typing", "DLA", "opset", "Python", "system")
        console.print(grid(heads, (_release(each, each == default, device) for each in device.software)))
        console.print()
        console.print(grid(("release", "source and notes"), _notes(device.software)))
        if device.notes:
            heading(console, "notes")
            console.print(grid(("", ""), (("-", note) for note in device.notes)))


def _figure(name: str, unit: str, figure: Figure) -> Sequence[str]:
    return name, f"{figure.value:g} {unit}", "" if figure.verified else DOUBT, figure.source


def _hardware(device: Device) -> Iterable[Sequence[str]]:
    yield "SM", device.sm or "none", device.sm_source or ""
    if device.dla:
        kinds = ", ".join(device.dla.precisions)
        many = f"{device.dla.cores} cores, {kinds}, {device.dla.loadables_per_core} engines per core"
        yield "DLA", many, device.dla.source
    else:
        yield "DLA", "none", ""
    yield "memory", "shared by CPU and GPU" if device.shared_memory else "the GPU's own", ""
    yield "total power", " + ".join(device.rails) or "no rails", device.rails_source or ""
    if device.power_modes:
        yield "power modes", ", ".join(device.power_modes), device.power_modes_source or ""


def _release(software: Software, default: bool, device: Device) -> Sequence[str]:
    dla = "builds" if software.dla and device.dla else "no"
    fields = (software.l4t, software.cuda, software.tensorrt, software.typing, dla, software.opset, software.python)
    shown = ["–" if each is None else str(each) for each in (*fields, software.os)]
    return [software.release, "default" if default else "", *shown]


def _notes(software: Iterable[Software]) -> Iterable[Sequence[str]]:
    for each in software:
        yield each.release, each.source if each.verified else f"{DOUBT} {each.source}"
        yield from (("", f"- {note}") for note in each.notes)

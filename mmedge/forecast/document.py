"""``forecast-DEVICE.json``, version 1: what a forecast says, apart from everything that was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmedge.artifact import write_text
from mmedge.forecast.roofline import Precision

SCHEMA: Final = 1
Range = tuple[float, float]


class Part(BaseModel):
    """A piece of the document: a fixed set of names."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)


class FigureUsed(Part):
    """A figure of the device table that the forecast rests on."""

    name: str
    value: float
    unit: str
    source: str
    verified: bool


class DeviceUsed(Part):
    """The device, with the figures used."""

    name: str
    title: str
    figures: list[FigureUsed]
    notes: list[str]


class Kernel(Part):
    """One kernel of the fast end.

    Attributes:
        name: its main operator, as in the graph.
        operators: ONNX types, the main operator first.
        precision: of its products, or of its values where it has none.
        macs: multiply-adds.
        size_bytes: read from memory and written to it.
        expected_ms: fast and slow end; in the slow end several kernels may take its place.
    """

    name: str
    operators: list[str]
    precision: Literal["fp32", "fp16", "int8"]
    macs: int
    size_bytes: int
    expected_ms: Range


class NotCovered(Part):
    """An operator whose cost is not known: its share of multiply-adds, time and memory is in no figure."""

    layer: str
    operator: str
    reason: str


class Memory(Part):
    """Bytes of weights, and of the largest set of activations alive at the same time; ``total_bytes`` is their sum."""

    weights_bytes: int
    activations_bytes: int
    total_bytes: int
    fits: bool = Field(description="into the memory of the device, if nothing else were in it")


class Figures(Part):
    """What is forecast of one network in one precision.

    Attributes:
        macs: multiply-adds of one query.
        int8_macs: those of them in INT8.
        rest: the precision of what is not INT8.
        lower_bound_ms: no implementation is faster.
        bound_by: what the lower bound comes from.
        expected_ms: fast and slow end of what to expect; of the operators that are covered.
        bound_rests_on: names of the device's figures that ``lower_bound_ms`` comes from.
        rests_on: names of the device's figures that ``expected_ms`` comes from.
        kernels: how many are started, in the fast and in the slow end.
        layers: every kernel of the fast end.
    """

    macs: int
    int8_macs: int
    rest: Literal["fp32", "fp16"]
    lower_bound_ms: float
    bound_by: Literal["compute", "memory"]
    bound_rests_on: list[str]
    expected_ms: Range
    rests_on: list[str]
    kernels: tuple[int, int]
    memory: Memory
    layers: list[Kernel]


class Row(Part):
    """One stage in one precision: either ``figures``, or why there are none.

    Attributes:
        stage: of the run.
        digest: of that stage's network, as in ``report.json``.
        graph: the folder of the graph that was read, relative to the run folder.
        not_covered: operators whose share is missing from the figures.
    """

    stage: str
    digest: str
    graph: str
    precision: Precision
    figures: Figures | None
    not_forecast: str | None
    not_covered: list[NotCovered] = Field(default_factory=list)


class Forecast(Part):
    """All of ``forecast-DEVICE.json``.

    Attributes:
        kind: tells it from a report.
        measured: nothing in here was.
        batch: samples per query.
        assumptions: what the figures rest on, in sentences.
    """

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    kind: Literal["forecast"] = "forecast"
    measured: Literal[False] = False
    task: str
    device: DeviceUsed
    batch: int
    created: str
    rows: list[Row]
    assumptions: list[str]

    @property
    def unverified(self) -> list[FigureUsed]:
        """Figures of the device that nobody read in their source."""
        return [figure for figure in self.device.figures if not figure.verified]

    def save(self, folder: Path) -> Path:
        """Write ``forecast-DEVICE.json`` into a run folder, whole or not at all.

        Raises:
            ArtifactError: the disk is full or the place cannot be written.
        """
        path = folder / f"forecast-{self.device.name}.json"
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
        write_text(path, text + "\n")
        return path

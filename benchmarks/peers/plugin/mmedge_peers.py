"""Targets for the comparison: OpenVINO on whatever a converter wrote, ONNX or intermediate representation.

mmedge finds them by their entry points, as those of any other package, once this folder is on the import path.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from mmedge.errors import TargetError
from mmedge.targets.base import Build, Runner, Target
from mmedge.targets.openvino import OpenVino, opened

FILES = ("model.xml", "model.onnx")


class OpenVinoFp32(Target):
    """OpenVINO's CPU plugin as mmedge's own target runs it; what is not INT8 runs in float32."""

    name = "peers-openvino"
    precision: ClassVar[str] = "f32"

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return OpenVino().check()

    def build(self, model: Path, folder: Path) -> Build:
        """Nothing is built: converters write the folder that ``runner`` reads."""
        raise TargetError("this target only runs what converters wrote", where=str(model))

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``."""
        model = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
        with opened(model, threads, self.precision, self.name) as run:
            yield run


class OpenVinoBf16(OpenVinoFp32):
    """The same in bfloat16: what OpenVINO chooses itself for a float model on processors that have it."""

    name = "peers-openvino-bf16"
    precision: ClassVar[str] = "bf16"

"""Targets for the comparison: OpenVINO on whatever a converter wrote, ONNX or intermediate representation.

mmedge finds them by their entry points, as those of any other package, once this folder is on the import path.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from mmedge.errors import TargetError
from mmedge.targets.base import Build, Runner, Target
from mmedge.targets.checked import checked, reported
from mmedge.tensors import Array

FILES = ("model.xml", "model.onnx")


class OpenVinoFp32(Target):
    """OpenVINO's CPU plugin with the options of mmedge's own target; what is not INT8 runs in float32."""

    name = "peers-openvino"
    precision: ClassVar[str] = "f32"

    def check(self) -> dict[str, str]:
        """See ``Target.check``."""
        return {"openvino": str(_openvino().__version__)}

    def build(self, model: Path, folder: Path) -> Build:
        """Nothing is built: converters write the folder that ``runner`` reads."""
        raise TargetError("this target only runs what converters wrote", where=str(model))

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``."""
        model = next((folder / name for name in FILES if (folder / name).exists()), folder / FILES[0])
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": self.precision,
            "ENABLE_CPU_PINNING": False,
        }
        with reported("OpenVINO: compiling the model", str(model)):
            compiled = _openvino().Core().compile_model(str(model), "CPU", options)
        request = compiled.create_infer_request()
        dtypes = {port.get_any_name(): str(port.get_element_type().to_dtype()) for port in compiled.inputs}
        outputs = {port.get_any_name(): port for port in compiled.outputs}

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            results = request.infer(dict(inputs), share_inputs=True, share_outputs=False)
            return {name: results[port] for name, port in outputs.items()}

        yield checked(run, dtypes, self.name)


class OpenVinoBf16(OpenVinoFp32):
    """The same in bfloat16: what OpenVINO chooses itself for a float model on processors that have it."""

    name = "peers-openvino-bf16"
    precision: ClassVar[str] = "bf16"


def _openvino() -> Any:
    # Without its telemetry package OpenVINO takes its own stub, which reports nothing to a web service.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino

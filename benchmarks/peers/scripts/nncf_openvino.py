"""NNCF on an OpenVINO model."""

from __future__ import annotations

import sys
from functools import partial

from peer import Conversion, main


def quantize(job: Conversion, model_type: str | None) -> None:
    """The settings that NNCF chooses itself, for any model or for transformers."""
    sys.modules.setdefault("openvino_telemetry", None)  # OpenVINO then takes its own stub, which reports to nobody
    import nncf
    import openvino

    model = openvino.Core().read_model(job.model)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(list(job.singles())),
        subset_size=len(job),
        model_type=nncf.ModelType(model_type) if model_type else None,
    )
    openvino.save_model(quantized, job.output / "model.xml", compress_to_fp16=False)


if __name__ == "__main__":
    variants = {"default": None, "transformer": "transformer"}
    main({name: partial(quantize, model_type=kind) for name, kind in variants.items()}, "nncf", "openvino")

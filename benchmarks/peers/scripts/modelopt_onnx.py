"""NVIDIA Model Optimizer's ONNX quantization. Its placement is for TensorRT; here the same file runs on a CPU."""

from __future__ import annotations

from functools import partial

from modelopt.onnx.quantization import quantize
from peer import Conversion, main


def convert(job: Conversion, method: str) -> None:
    """INT8 with float32 for the rest: its default, float16, is not what these runtimes run fast."""
    quantize(
        str(job.model),
        quantize_mode="int8",
        calibration_data=dict(job.samples),
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(job.output / "model.onnx"),
    )


if __name__ == "__main__":
    variants = {"entropy": "entropy", "max": "max"}
    main(
        {name: partial(convert, method=method) for name, method in variants.items()},
        "nvidia-modelopt", "onnxruntime-gpu", "onnx",
    )  # fmt: skip

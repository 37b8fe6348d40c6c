"""Olive's ``OnnxStaticQuantization`` pass with its default settings, and with unsigned activations."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from olive.data.config import DataComponentConfig, DataConfig
from olive.data.registry import Registry
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.onnx.quantization import OnnxStaticQuantization
from peer import Conversion, main


def quantize(job: Conversion, settings: dict[str, Any]) -> None:
    """Run the pass by itself, as a workflow of one pass would."""

    @Registry.register_dataset("mmedge_calibration")
    def dataset(**_: Any) -> list[Any]:
        return [(single, 0) for single in job.singles()]

    data = DataConfig(
        name="calibration",
        type="DummyDataContainer",
        load_dataset_config=DataComponentConfig(type="mmedge_calibration"),
        pre_process_data_config=DataComponentConfig(type="skip_pre_process"),
        post_process_data_config=DataComponentConfig(type="skip_post_process"),
        dataloader_config=DataComponentConfig(type="no_auto_batch_dataloader"),
    )
    accelerator = AcceleratorSpec("cpu", "CPUExecutionProvider")
    step = create_pass_from_dict(OnnxStaticQuantization, {"data_config": data, **settings}, True, accelerator)
    with tempfile.TemporaryDirectory() as folder:
        done = step.run(ONNXModelHandler(str(job.model)), str(Path(folder) / "out.onnx"))
        onnx.save(onnx.load(done.model_path), job.output / "model.onnx")  # one file, external data taken in


if __name__ == "__main__":
    # uint8 for both is what the pass's own search offers besides int8 for both.
    variants = {
        "default": {},
        "per-channel": {"per_channel": True},
        "uint8-per-channel": {"per_channel": True, "precision": "uint8", "activation_type": "uint8"},
    }
    main(
        {name: partial(quantize, settings=settings) for name, settings in variants.items()},
        "olive-ai", "onnxruntime", "onnx",
    )  # fmt: skip

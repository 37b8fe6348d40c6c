"""Intel Neural Compressor's static quantization by PT2E, its recipe for x86 processors, then exported to ONNX."""

from __future__ import annotations

import torch
from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare
from peer import Conversion, main


def quantize(job: Conversion) -> None:
    """Prepare, calibrate, convert; the result is a torch graph, which PyTorch's own exporter turns into ONNX."""
    program = torch.export.load(job.archive)
    graph = program.module()
    # What neural_compressor.torch.export.export() notes on a graph that it exported itself.
    graph._exported, graph.dynamic_shapes = True, None
    prepared = prepare(graph, StaticQuantConfig(act_dtype="uint8", w_dtype="int8"))
    with torch.no_grad():
        for single in job.singles():
            prepared(**{name: torch.from_numpy(array) for name, array in single.items()})
    converted = convert(prepared)
    pair = {name: torch.from_numpy(array[:2]) for name, array in job.samples.items()}
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(converted, (), kwargs=pair, dynamic_shapes={name: {0: batch} for name in pair})
    names = {"input_names": list(pair), "output_names": job.outputs}
    model = torch.onnx.export(exported, dynamo=True, opset_version=20, verbose=False, **names)
    assert model is not None
    model.save(job.output / "model.onnx")


if __name__ == "__main__":
    main({"pt2e": quantize}, "neural-compressor-pt", "torch", "torchao")

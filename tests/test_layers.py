"""Layer information of finished engines, and the build log: the same kernels, and what became of the network.

The samples are written after the format of real files: TensorRT 8 and 10 as in NVIDIA/TensorRT,
tools/experimental/trt-engine-explorer (``examples/**/*.graph.json``, ``trex/parser.py``, ``trex/activations.py``),
TensorRT 11 as in NVIDIA's "Migrating IEngineInspector Usage from TensorRT 10.x to 11.x". The log is a real one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from small_onnx import LAYERS, Maker

from mmedge.errors import TargetError
from mmedge.targets.tensorrt.layers import fusion, read_layers
from mmedge.targets.tensorrt.log import Kernel, onnx_layers, read_kernels

INT8_32 = "Thirty-two wide channel vectorized row major Int8 format"
FP32 = "Row major linear FP32"

# conv1 in INT8 behind its quantizer, conv2 left in float16 with reformats on both sides, a matrix product in INT8 by
# the graph compiler, and what is no kernel.
TENSORRT_10 = r"""{"Layers": [{
  "Name": "image/q",
  "LayerType": "Reformat",
  "Inputs": [
  {
    "Name": "image",
    "Location": "Device",
    "Dimensions": [1,16,8,8],
    "Format/Datatype": "Row major linear FP32"
  }],
  "Outputs": [
  {
    "Name": "image/q_output",
    "Location": "Device",
    "Dimensions": [1,16,8,8],
    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"
  }],
  "ParameterType": "Reformat",
  "Origin": "QDQ",
  "TacticValue": "0x0000000000000000",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: image/q]"
},{
  "Name": "conv1.weight + conv1/dq + conv1",
  "LayerType": "CaskConvolution",
  "Inputs": [
  {
    "Name": "image/q_output",
    "Location": "Device",
    "Dimensions": [1,16,8,8],
    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"
  }],
  "Outputs": [
  {
    "Name": "c1",
    "Location": "Device",
    "Dimensions": [1,16,8,8],
    "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"
  }],
  "ParameterType": "Convolution",
  "Weights": {"Type": "Int8", "Count": 2304},
  "Bias": {"Type": "Float", "Count": 16},
  "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_t1r1s1",
  "TacticValue": "0x764ba04bb839d539",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: conv1/dq]SEP[ONNX Layer: conv1]SEP[ONNX Layer: relu1]"
},{
  "Name": "Reformatting CopyNode for Input Tensor 0 to conv2",
  "LayerType": "Reformat",
  "Inputs": [{ "Name": "c1", "Dimensions": [1,16,8,8], "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format" }],
  "Outputs": [{ "Name": "Reformatted Input Tensor 0 to conv2", "Dimensions": [1,16,8,8], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0" }],
  "Origin": "REFORMAT",
  "Metadata": ""
},{
  "Name": "conv2",
  "LayerType": "CaskGemmConvolution",
  "Inputs": [{ "Name": "Reformatted Input Tensor 0 to conv2", "Dimensions": [1,16,8,8], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0" }],
  "Outputs": [{ "Name": "c2", "Dimensions": [1,16,8,8], "Format/Datatype": "Channel major FP16 format where channel % 8 == 0" }],
  "Weights": {"Type": "Half", "Count": 256},
  "Metadata": "[ONNX Layer: conv2]"
},{
  "Name": "Reformatting CopyNode for Output Tensor 0 to conv2",
  "LayerType": "NoOp",
  "Inputs": [{ "Name": "c2", "Dimensions": [1,16,8,8], "Format/Datatype": "Channel major FP16 format" }],
  "Outputs": [{ "Name": "c2r", "Dimensions": [1,16,8,8], "Format/Datatype": "Channel major FP16 format" }],
  "Metadata": ""
},{
  "Name": "__myl_Fc_myl2_0",
  "LayerType": "fusion",
  "Inputs": [{ "Name": "c2r", "Dimensions": [1,16], "Format/Datatype": "Int8" }],
  "Outputs": [{ "Name": "logits", "Dimensions": [1,10], "Format/Datatype": "Float" }],
  "TacticName": "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64x64",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: head]"
},{
  "Name": "__myl_signal",
  "LayerType": "signal",
  "Inputs": [],
  "Outputs": [],
  "StreamId": 0,
  "Metadata": ""
}],
"Bindings": ["image"
,"logits"
]}
"""  # noqa: E501


def separated(by: str) -> str:
    return TENSORRT_10.replace("SEP", by)


@pytest.mark.parametrize("by", ["", "\x1e", "\x1f"])
def test_tensorrt_10(by: str) -> None:
    """The separators of names are bare control characters, which JSON does not allow."""
    kernels = read_layers(separated(by))
    assert [kernel.type for kernel in kernels] == [
        *("Reformat", "CaskConvolution", "Reformat", "CaskGemmConvolution", "fusion")
    ]
    conv = kernels[1]
    assert conv.inputs == conv.outputs == ("Int8",)
    assert conv.constants == ("Int8", "Float")
    assert conv.layers == ("conv1/dq", "conv1", "relu1")
    assert (conv.reads, conv.writes) == (("image/q_output",), ("c1",))


def test_what_became_of_the_network() -> None:
    found = fusion(read_layers(separated("\x1e")), ["conv1", "conv2", "head", "lost"])
    assert found.coverage.int8 == ("conv1", "head")
    assert found.coverage.other == {
        "conv2": "runs as CaskGemmConvolution on Half",
        "lost": "not in the build log",
    }
    assert found.reformats == (("conv1/dq", "conv2"),)
    facts = json.loads(json.dumps(found.facts()))
    assert facts == {
        "kernels": 5,
        "conversions": {"quantize": 1, "dequantize": 1, "inserted": 1},
        "reformats": [["conv1/dq", "conv2"]],
    }


def test_tensorrt_11_says_the_same() -> None:
    """Separate format and type; inputs and outputs as records."""
    old = json.loads(separated("").replace('"Format/Datatype": "', '"Format/Datatype": "'))
    for layer in old["Layers"]:
        for tensor in (*layer["Inputs"], *layer["Outputs"]):
            told = tensor.pop("Format/Datatype")
            kind = next(word for word in ("Int8", "FP16", "FP32", "Float") if word in told)
            tensor["Datatype"] = {"FP16": "Half", "FP32": "Float"}.get(kind, kind)
            tensor |= {"Format": "(NHWC) Channel major format", "Strides": [1], "StrideOrder": [0]}
    del old["Bindings"]
    old["I/O Tensors"] = [{"Name": "image", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 16, 8, 8]}]
    assert read_layers(old) == read_layers(json.dumps(old)) == read_layers(separated(""))


def test_names_that_nobody_escaped() -> None:
    odd = r'blocks["a\b"]\p'
    text = separated("\x1e").replace('"conv2"', f'"{odd}"').replace("Layer: conv2]", f"Layer: {odd}]")
    with pytest.raises(ValueError, match=r"delimiter|escape"):
        json.loads(text, strict=False)
    kernels = read_layers(text)
    assert kernels[3].name == kernels[3].layers[0] == odd
    assert fusion(kernels, [odd]).coverage.other == {odd: "runs as CaskGemmConvolution on Half"}


def test_names_with_brackets() -> None:
    metadata = "[ONNX Layer: layers[0]]\x1e[ONNX Layer: layers[0][1]][ONNX Layer: plain]"
    assert onnx_layers(metadata) == ("layers[0]", "layers[0][1]", "plain")
    assert onnx_layers("") == onnx_layers("something else") == ()


def test_tensorrt_before_8_6_has_only_joined_names() -> None:
    layer = json.loads(separated(""))["Layers"][1]
    del layer["Metadata"]
    (kernel,) = read_layers({"Layers": [layer]})
    assert kernel.layers == ("conv1.weight", "conv1/dq", "conv1")
    assert fusion([kernel], ["conv1"]).coverage.int8 == ("conv1",)


def test_dynamic_shapes_hide_the_types() -> None:
    text = separated("").replace(INT8_32, "N/A due to dynamic shapes").replace(FP32, "N/A due to dynamic shapes")
    found = fusion(read_layers(text), ["conv1"])
    assert found.coverage.int8 == ()
    assert found.coverage.other["conv1"].startswith(
        "runs as CaskConvolution on unknown: TensorRT tells types of dynamic"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"Layers": 3}', '{"Layers": ["conv1"\n,"conv2"]}', "[TRT] error"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(TargetError, match="layer information") as caught:
        read_layers(text)
    assert "profilingVerbosity=detailed" in str(caught.value)


# --- DLA


def dla_engine() -> list[Kernel]:
    """Two loadables with a pooling on the GPU between; the DLA's own layer type was not seen, names were."""
    tensor = {"Dimensions": [1, 16, 8, 8], "Format/Datatype": INT8_32}
    layers: list[dict[str, Any]] = [
        {
            "Name": "{ForeignNode[conv1...relu3]}",
            "LayerType": "DLA",
            "Inputs": [{"Name": "x"}],
            "Outputs": [{"Name": "a"}],
        },
        {"Name": "pool", "LayerType": "Pooling", "Inputs": [{"Name": "a"}], "Outputs": [{"Name": "b"}]},
        {"Name": "{ForeignNode[head]}", "LayerType": "DLA", "Inputs": [{"Name": "b"}], "Outputs": [{"Name": "y"}]},
    ]
    for layer in layers:
        layer["Inputs"][0] |= tensor
        layer["Outputs"][0] |= tensor
    return read_layers({"Layers": layers})


def test_dla_placement() -> None:
    order = ["conv1", "relu1", "conv2", "conv3", "relu3", "pool", "head"]
    found = fusion(dla_engine(), ["conv1", "conv3", "head"], order)
    assert found.coverage.other == dict.fromkeys(["conv1", "conv3", "head"], "runs on the DLA on Int8")
    assert found.on_gpu == ("pool",)
    assert found.facts()["dla"] == {"loadables": 2, "on_gpu": ["pool"]}
    without = fusion(dla_engine(), ["conv1", "conv3", "head"])
    assert without.coverage.other["conv3"].startswith("in no kernel of the GPU, so on the DLA")


def test_too_many_loadables_are_told() -> None:
    first, pool, _ = dla_engine()
    facts = fusion([first, pool] * 17, []).facts()
    assert facts["dla"]["problem"] == "a DLA core holds 16 loadables at the same time"
    assert "dla" not in fusion([pool], []).facts()


def test_foreign_nodes_of_the_graph_compiler_are_no_dla() -> None:
    layer = {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Inputs": [], "Outputs": [{"Name": "y"}]}
    (kernel,) = read_layers({"Layers": [layer]})
    assert not kernel.dla
    assert kernel.layers == ("a", "b")


# --- the real log of TensorRT-RTX


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    trt = pytest.importorskip("tensorrt_rtx")
    from mmedge.progress import Progress
    from mmedge.targets.tensorrt.building import BuildOptions, build_plan

    model = tmp_path_factory.mktemp("log") / "model.onnx"
    onnx.save(Maker(quantized=True).model(), model)
    built = build_plan(trt, model, BuildOptions({"min": 1, "opt": 2, "max": 4}, ("8.9",)), Progress())
    return [text for _, text in built.messages]


def as_json(line: str) -> dict[str, Any]:
    """One line of the log as TensorRT 11 would write it in JSON."""
    keys = ("Name", "LayerType", "Inputs", "Constants", "Outputs", "TacticName", "StreamId", "Metadata")
    parts = re.split(rf"(?:^|, )(?=(?:{'|'.join(keys)}): )(?![^\[]*\}})", line)
    found: dict[str, Any] = {}
    for part in filter(None, parts):
        key, _, text = part.partition(": ")
        found[key] = text if key not in ("Inputs", "Constants", "Outputs") else []
        for block in re.findall(r"\{ (.*?) \}", text) if found[key] == [] else ():
            name, kind = re.match(r"Name: (.*), Dimensions: .*, Datatype: (\w+), ", block + ", ").groups()  # type: ignore[union-attr]
            found[key].append({"Name": name, "Datatype": kind, "Format": block.partition("Format: ")[2]})
    return found


def test_log_and_layer_information_agree(log: list[str]) -> None:
    kernels = read_kernels(log)
    lines = [line for text in log if "Layers:" in text for line in text.splitlines() if line.startswith("Name: ")]
    assert read_layers(json.dumps({"Layers": [as_json(line) for line in lines]})) == kernels
    assert len(kernels) == sum("Outputs: [ {" in line for line in lines) >= 7


def test_real_engine(log: list[str]) -> None:
    kernels = read_kernels(log)
    found = fusion(kernels, [*LAYERS, "elsewhere"])
    assert found.coverage.int8 == LAYERS
    assert found.coverage.other == {"elsewhere": "not in the build log"}
    assert found.kernels == len(kernels)
    assert found.loadables == 0
    (gemm,) = [kernel for kernel in kernels if "head" in kernel.layers and kernel.type == "gemm"]
    assert gemm.library
    assert gemm.int8
    writer = next(kernel for kernel in kernels if gemm.reads[0] in kernel.writes)
    assert "tanh" in writer.layers
    reads = {name for kernel in kernels for name in kernel.reads}
    assert {"image", "audio"} <= reads
    assert "logits" in {name for kernel in kernels for name in kernel.writes}


def test_reformats_of_a_real_engine_stand_between_layers(tmp_path: Path, log: list[str]) -> None:
    """A kernel of the real log stripped of its ONNX layers is one that TensorRT put in between."""
    text = "\n".join(log).replace("[ONNX Layer: image/q]\n", "\n")
    assert fusion(read_kernels([text]), LAYERS).reformats == (("image", "image.conv"),)
    assert fusion(read_kernels(log), LAYERS).reformats == ()

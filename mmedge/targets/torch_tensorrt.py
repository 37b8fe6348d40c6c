"""Torch-TensorRT: TensorRT engines inside a PyTorch program, for those who stay in PyTorch.

What TensorRT cannot convert runs in PyTorch. Written to the documentation and the sources of Torch-TensorRT 2.13 and
2.14; **not yet run on a GPU**. On a machine without one the package does not even import (it asks for the GPU's compute
capability), so ``check`` looks for a GPU first. In a trial there, with those questions answered by hand, the lowering
and the converters of Torch-TensorRT-RTX 2.14 took float and rewritten Q/DQ programs whole, batch symbolic, and
TensorRT for RTX 1.7 built plans of them in which every INT8 layer was an INT8 kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmedge.errors import TargetError, needs_extra
from mmedge.targets.base import Build, Lowering, Runner, Target
from mmedge.targets.checked import checked, in_batches, reported
from mmedge.targets.lowered import described, write_description
from mmedge.targets.tensorrt.jetpack import jetpack_release
from mmedge.targets.torch import refuse_pickle
from mmedge.tensors import Array

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram
    from torch.fx import GraphModule

Node = Any  # torch.fx.Node says of its arguments only that they may be anything

COMPILED = "compiled.pt2"
GPU = "cuda:0"
PACKAGES = ("torch-tensorrt", "torch-tensorrt-rtx")  # both bring the module torch_tensorrt
VERSIONS = ("2.13", "2.14")
BATCH = {"min": 1, "opt": 1, "max": 8}  # where nothing else is described
_Q, _DQ, _DQ_CHANNELS = (
    f"quantized_decomposed.{name}.default"
    for name in ("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel")
)
# Operators without their overload: with weights; that pass INT8 on; that run in INT8 where what they read is.
_WEIGHTED = ("aten.conv", "aten.linear")
_MOVING = {
    f"aten.{name}"
    for name in (
        *(
            "view",
            "reshape",
            "flatten",
            "permute",
            "transpose",
            "t",
            "squeeze",
            "unsqueeze",
            "expand",
            "slice",
            "select",
        ),
        *("cat", "contiguous", "clone"),
    )
}
_SOFTMAX = ("aten.softmax", "aten._softmax")
_POOLING = {f"aten.{name}" for name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")}


class TorchTensorRt(Target):
    """Compiles a ``torch.export`` archive with Torch-TensorRT, on the GPU that runs it.

    Q/DQ pairs become ``tensorrt::quantize_op``, an operator of NVIDIA Model Optimizer: neither 2.13 nor 2.14 converts
    PyTorch's own (``quantized_decomposed``). Per-channel weights must be quantized along axis 0, so transposed
    convolutions stay in floating point. Torch-TensorRT-RTX takes no quantized activations at all (its documentation).

    A compiled archive holds engines, which are native code, and objects that PyTorch unpickles: load none whose digest
    or signature does not vouch for it.

    Args:
        half: compute in float16 what is not INT8, by Torch-TensorRT's own casts (``enable_autocast``).
    """

    name = "torch-tensorrt"
    lowering = Lowering(format="pt2")
    built_on_device = True

    def __init__(self, half: bool = False) -> None:
        self.half = half

    @property
    def float_name(self) -> Literal["fp32", "bf16", "fp16"]:
        """See ``Target.float_name``."""
        return "fp16" if self.half else "fp32"

    def forms(self) -> list[Target]:
        """float32 and float16."""
        other = TorchTensorRt(half=True)
        other.name = self.name
        return [self, other]

    def options(self) -> dict[str, Any]:
        """See ``Target.options``."""
        return {"half": self.half}

    def check(self) -> dict[str, str]:
        """See ``Target.check``: packages and versions that fit each other, and a GPU."""
        release = jetpack_release()
        if release is not None and release.startswith(("5.", "6.")):
            raise TargetError(
                f"Torch-TensorRT {VERSIONS[0]} and later is not released for JetPack {release}",
                where=self.name,
                fix="use the target tensorrt, or the device's name (jetson-agx-orin)",
            )
        torch = _torch()
        package, found = _installed()
        if _series(found) not in VERSIONS or _series(found) != _series(torch.__version__):
            raise TargetError(
                f"{package} {found} with PyTorch {torch.__version__}: both must be {' or both '.join(VERSIONS)}",
                where=self.name,
                fix=f'pip install "{package}=={_series(torch.__version__)}.*", or another PyTorch',
            )
        if not torch.cuda.is_available():
            problem = (
                f"PyTorch {torch.__version__} sees no NVIDIA GPU; Torch-TensorRT builds on the one that it runs on"
            )
            fix = "a build of PyTorch with CUDA, a driver and a GPU; then mmedge build RUN --target torch-tensorrt"
            raise TargetError(problem, where=self.name, fix=fix)
        major, minor = torch.cuda.get_device_capability()
        versions = {package: found, "torch": str(torch.__version__), "sm": f"{major}.{minor}"}
        _torch_tensorrt()
        return {**versions, "tensorrt": str(importlib.import_module("tensorrt").__version__)}  # or RTX under that name

    def build(self, model: Path, folder: Path) -> Build:
        """Rewrite the pairs, compile, and save the compiled program with the names of its inputs and outputs."""
        versions = self.check()
        about = described(model) or {}
        ready = self._ready(model, about)
        with reported("Torch-TensorRT: compiling the program", str(model)):
            torch_tensorrt = _torch_tensorrt()
            compiled = torch_tensorrt.dynamo.compile(ready.program, **ready.inputs(torch_tensorrt), **self._settings())
            torch_tensorrt.save(
                compiled,
                str(folder / COMPILED),
                output_format="exported_program",
                kwarg_inputs=ready.examples,
                dynamic_shapes=ready.dynamic_shapes,
            )
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in ready.examples.items()}
        write_description(folder / COMPILED, {"dtypes": dtypes, "outputs": about.get("outputs"), "batch": ready.batch})
        facts = {
            "versions": versions,
            "engine_bytes": (folder / COMPILED).stat().st_size,
            "quantized_tensors": ready.carried.tensors,
            "left_in_float": dict(ready.carried.left),
            "left_to_pytorch": _outside_engines(compiled),
            "coverage": "Torch-TensorRT does not tell which kernels run in INT8: the target tensorrt does",
        }
        return Build(None, facts)

    def serialize(self, model: Path) -> bytes:
        """The whole archive as one TensorRT plan, for programs without PyTorch; nothing may be left to PyTorch.

        Raises:
            TargetError: an operator has no converter, or float16 was asked for.
        """
        if self.half:
            fix = "use the target tensorrt, whose graph holds the types"
            raise TargetError("a plan of its own has no automatic casts to float16", where=self.name, fix=fix)
        self.check()
        ready = self._ready(model, described(model) or {})
        torch_tensorrt = _torch_tensorrt()
        with reported("Torch-TensorRT: building the plan", str(model)):
            convert = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine
            return bytes(convert(ready.program, require_full_compilation=True, **ready.inputs(torch_tensorrt)))

    @contextmanager
    def runner(self, folder: Path, threads: int) -> Iterator[Runner]:
        """See ``Target.runner``; ``threads`` means nothing on a GPU. A query copies its arrays there and back."""
        self.check()
        torch = _torch()
        about = described(folder / COMPILED) or {}
        with reported("loading the compiled program", str(folder / COMPILED)):
            module = _torch_tensorrt().load(str(folder / COMPILED)).module()

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            with torch.inference_mode():
                found = module(**{name: torch.from_numpy(array).to(GPU) for name, array in inputs.items()})
            listed = list(found) if isinstance(found, tuple | list) else [found]
            names = about["outputs"] or [f"output_{index}" for index in range(len(listed))]
            return {name: tensor.cpu().numpy() for name, tensor in zip(names, listed, strict=True)}

        yield checked(in_batches(run, about["batch"]["max"]), about["dtypes"], self.name)

    def _settings(self) -> dict[str, Any]:
        return {"enable_autocast": True, "autocast_low_precision_type": _torch().float16} if self.half else {}

    def _ready(self, model: Path, about: Mapping[str, Any]) -> Ready:
        from torch.export.passes import move_to_device_pass

        module, examples = opened(model)
        carried = Carried()
        if any(str(node.target).startswith("quantized_decomposed.") for node in module.graph.nodes):
            self._need_quantize_op()
            carried = carry_over(module)
        batch = about.get("batch", BATCH)
        examples = resized(examples, batch)
        program, shapes = exported(module, examples, batch)
        with reported("moving the program to the GPU", str(model)):
            moved = move_to_device_pass(program, GPU)
        on_gpu = {name: tensor.to(GPU) for name, tensor in examples.items()}
        return Ready(moved, on_gpu, shapes, batch, carried)

    def _need_quantize_op(self) -> None:
        """Register ``tensorrt::quantize_op``; before Torch-TensorRT is imported, which then knows how to convert it."""
        if _installed()[0] == "torch-tensorrt-rtx":
            problem = "Torch-TensorRT-RTX takes no quantized activations"
            raise TargetError(problem, where=self.name, fix="pip install torch-tensorrt, or build the float network")
        try:
            importlib.import_module("modelopt.torch.quantization")
        except ImportError as err:
            problem = f"INT8 needs NVIDIA Model Optimizer, which brings Torch-TensorRT's quantizing operator ({err})"
            raise TargetError(problem, where=self.name, fix=needs_extra("nvidia-modelopt", "torch-tensorrt")) from err
        # Torch-TensorRT runs the operator on the weights while it looks for constants.
        with reported("compiling Model Optimizer's kernels", self.name, "install ninja and CUDA's compiler, nvcc"):
            importlib.import_module("modelopt.torch.quantization.extensions").get_cuda_ext(raise_if_failed=True)


@dataclass(frozen=True)
class Carried:
    """What became of the Q/DQ pairs of a program.

    Attributes:
        tensors: how many tensors, weights included, are quantized.
        left: layers that stay in floating point, each with the reason.
    """

    tensors: int = 0
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A program that Torch-TensorRT can compile.

    Attributes:
        program: on the GPU, its batch symbolic where it may change.
        examples: inputs by name, on the GPU.
        dynamic_shapes: as ``torch.export`` takes them: one ``Dim`` for the batch of all inputs.
        batch: ``min``, ``opt`` and ``max``.
        carried: what became of its Q/DQ pairs.
    """

    program: ExportedProgram
    examples: dict[str, Tensor]
    dynamic_shapes: dict[str, dict[int, Any]] | None
    batch: Mapping[str, int]
    carried: Carried

    def inputs(self, torch_tensorrt: Any) -> dict[str, Any]:
        """The arguments of Torch-TensorRT's compilers that describe the inputs."""
        ends = ("min", "opt", "max")
        specs = {}
        for name, tensor in self.examples.items():
            rest = tuple(tensor.shape[1:])
            if self.dynamic_shapes is None:
                specs[name] = torch_tensorrt.Input(shape=tuple(tensor.shape), dtype=tensor.dtype, name=name)
            else:
                shapes = {f"{end}_shape": (self.batch[end], *rest) for end in ends}
                specs[name] = torch_tensorrt.Input(**shapes, dtype=tensor.dtype, name=name)
        return {"arg_inputs": (), "kwarg_inputs": specs}


# ------------------------------------------------------------------ the program, with torch alone


def opened(model: Path) -> tuple[GraphModule, dict[str, Tensor]]:
    """The graph of an archive and its example inputs by name.

    Raises:
        TargetError: it cannot be loaded, or takes its inputs by position.
    """
    torch = _torch()
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators of Q/DQ archives
    refuse_pickle(model)
    with reported("loading the archive", str(model)):
        program = torch.export.load(model)
    args, kwargs = program.example_inputs
    if args:
        raise TargetError("the archive takes its inputs by position", where=str(model), fix="export with named inputs")
    return program.module(), dict(kwargs)


def resized(examples: Mapping[str, Tensor], batch: Mapping[str, int]) -> dict[str, Tensor]:
    """Example inputs with as many samples as an engine is tuned for, repeated as often as it takes.

    A program of a fixed batch takes what it was exported with. One of a variable batch is not exported with 1.
    """
    count = batch["opt"] if batch["min"] == batch["max"] else max(batch["opt"], 2)
    return {name: tensor[_torch().arange(count) % len(tensor)] for name, tensor in examples.items()}


def exported(
    module: GraphModule, examples: Mapping[str, Tensor], batch: Mapping[str, int]
) -> tuple[ExportedProgram, dict[str, dict[int, Any]] | None]:
    """A changed graph as a program again, with one ``Dim`` for the batch of all inputs.

    Torch-TensorRT would make one for each input, and several inputs of a multimodal model would not be known to agree.

    Returns:
        The program, and its dynamic shapes; None where the batch is fixed.
    """
    torch = _torch()
    shapes: dict[str, dict[int, Any]] | None = None
    if batch["min"] < batch["max"]:
        shared = torch.export.Dim("batch", min=batch["min"], max=batch["max"])
        shapes = {name: {0: shared} for name in examples}
    with reported("exporting the program again", "torch-tensorrt"), torch.no_grad():
        return torch.export.export(module, (), dict(examples), dynamic_shapes=shapes), shapes


def carry_over(module: GraphModule) -> Carried:
    """Replace the Q/DQ pairs of a graph by ``tensorrt::quantize_op``, in place.

    Placed as for TensorRT itself: a pair that no INT8 operator reads is taken away, and so is the one between a
    convolution and a residual sum.

    Raises:
        TargetError: a pair is not symmetric int8, which is all that TensorRT has.
    """
    torch = _torch()
    rewriting = _Rewriting(module, torch.ops.tensorrt.quantize_op.default)
    for node in list(module.graph.nodes):
        if str(node.target) in (_DQ, _DQ_CHANNELS) and node.args[0].op == "get_attr":
            rewriting.weight(node)
    for node in list(module.graph.nodes):
        if _operator(node) == "aten.add":
            rewriting.sum(node)
    for node in reversed(list(module.graph.nodes)):  # what reads a pair is decided before it
        if str(node.target) == _Q:
            rewriting.activation(node)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return Carried(rewriting.count, rewriting.left)


class _Rewriting:
    """Replaces one pair after the other.

    Attributes:
        count: tensors quantized so far.
        left: layers left in floating point so far, with reasons.
    """

    def __init__(self, module: GraphModule, quantize_op: Any) -> None:
        self.module, self.graph, self.quantize_op = module, module.graph, quantize_op
        self.count = 0
        self.left: dict[str, str] = {}

    def weight(self, dequantize: Node) -> None:
        """An int8 constant behind its DQ becomes a float constant behind a ``quantize_op``."""
        stored, scale, zero_point = (self._value(each) for each in dequantize.args[:3])
        self._require_symmetric(dequantize, stored.dtype, zero_point)
        axis = int(dequantize.args[3]) if str(dequantize.target) == _DQ_CHANNELS else 0
        along = [-1 if each == axis else 1 for each in range(stored.ndim)] if scale.numel() > 1 else []
        scale = scale.reshape(along)
        with self.graph.inserting_before(dequantize):
            new = constant = self._constant(stored.float() * scale, f"{dequantize.name}_weight")
            if axis == 0 or scale.numel() == 1:
                new = self._quantized(constant, scale, dequantize.name)
            else:
                for user in dequantize.users:
                    reason = f"its scales lie along axis {axis} of the weight, Torch-TensorRT takes axis 0"
                    self.left[user.name] = reason
        dequantize.replace_all_uses_with(new)
        self.graph.erase_node(dequantize)

    def sum(self, add: Node) -> None:
        """Take the pair between a convolution and a residual sum away; the other branch keeps its own."""
        branches = [argument for argument in add.args[:2] if _is(argument, _DQ)]
        if len(branches) < 2:
            return
        for branch in branches:
            convolution = branch.args[0].args[0]
            if _operator(convolution).startswith("aten.conv") and len(convolution.users) == 1:
                add.replace_input_with(branch, convolution)
                return

    def activation(self, quantize: Node) -> None:
        """A pair becomes one ``quantize_op``, or nothing where no INT8 operator reads it."""
        source, scale, zero_point = quantize.args[:3]
        readers = list(quantize.users)
        weighs = _operator(source) in _SOFTMAX  # uint8, for attention in INT8, which TensorRT is not given
        if not weighs:
            self._require_symmetric(quantize, quantize.args[5], self._value(zero_point))
        if not all(_is(reader, _DQ) for reader in readers):
            problem = f"{quantize.name} is read by other operators than its dequantizer"
            raise TargetError(problem, where="torch-tensorrt", fix="quantize with the stage `quantize`")
        new = source
        if not weighs and any(self._feeds_int8(reader) for reader in readers):
            with self.graph.inserting_before(quantize):
                new = self._quantized(source, self._value(scale), quantize.name)
        for reader in readers:
            reader.replace_all_uses_with(new)
            self.graph.erase_node(reader)
        self.graph.erase_node(quantize)

    def _feeds_int8(self, dequantize: Node) -> bool:
        """Whether an operator that can run in INT8 reads the tensor, directly or moved but not changed."""
        readers = [(dequantize, reader) for reader in dequantize.users]
        while readers:
            read, node = readers.pop()
            operator = _operator(node)
            if node.target is self.quantize_op and _operator(read) == "aten.cat":
                return True  # the parts share the scale of the whole
            if operator in _MOVING:
                readers += [(node, reader) for reader in node.users]
            elif operator in _POOLING or self._is_int8_layer(node) or (operator == "aten.add" and _adds_up(node, read)):
                return True
        return False

    def _is_int8_layer(self, node: Node) -> bool:
        return _operator(node).startswith(_WEIGHTED) and getattr(node.args[1], "target", None) is self.quantize_op

    def _quantized(self, source: Node, scale: Tensor, name: str) -> Node:
        """``source`` rounded to 8 bits; 127 steps make the range that the operator takes (``amax``)."""
        self.count += 1
        amax = self._constant(scale.float() * 127, f"{name}_amax")
        # Bits, exponent bits (none: integers), unsigned, narrow range: TensorRT clips to -128 either way.
        return self.graph.call_function(self.quantize_op, (source, amax, 8, 0, False, False))

    def _constant(self, tensor: Tensor, name: str) -> Node:
        self.module.register_buffer(name, tensor.detach().contiguous())
        return self.graph.get_attr(name)

    def _value(self, argument: Any) -> Tensor:
        if not hasattr(argument, "op"):
            tensor: Tensor = _torch().tensor(argument)
            return tensor
        owner, _, name = str(argument.target).rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(owner), name)
        return found

    def _require_symmetric(self, node: Node, dtype: Any, zero_point: Tensor) -> None:
        if dtype != _torch().int8 or bool(zero_point.any()):
            kind, zero = str(dtype).removeprefix("torch."), zero_point.flatten()[0].item()
            raise TargetError(
                f"{node.name} quantizes to {kind} with a zero point of {zero}",
                where="torch-tensorrt",
                fix="TensorRT quantizes to int8 symmetrically: use the stage `quantize` with its default placement",
            )


def _is(argument: Any, target: str) -> bool:
    return str(getattr(argument, "target", "")) == target


def _operator(node: Any) -> str:
    """``aten.add`` for ``aten.add.Tensor``."""
    return ".".join(str(getattr(node, "target", "")).split(".")[:2])


def _adds_up(add: Node, skip: Node) -> bool:
    """Whether a sum is of a skip connection and a convolution, which one kernel computes in INT8."""
    others = [argument for argument in add.args[:2] if argument is not skip]
    return any(_operator(other).startswith("aten.conv") for other in others)


# ------------------------------------------------------------------ packages


def _torch() -> Any:
    try:
        import torch
    except ImportError as err:
        raise TargetError("PyTorch is missing", fix=needs_extra("torch", "torch-tensorrt")) from err
    return torch


def _installed() -> tuple[str, str]:
    """Which of ``PACKAGES`` is installed, and its version."""
    for package in PACKAGES:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    raise TargetError("Torch-TensorRT is missing", fix=needs_extra("torch-tensorrt", "torch-tensorrt"))


def _series(text: str) -> str:
    """``2.13`` for ``2.13.0+cu130``."""
    return ".".join(text.split("+")[0].split(".")[:2])


def _torch_tensorrt() -> Any:
    fix = "its TensorRT and PyTorch must be the ones that it was built for: install it in an environment of its own"
    with reported("importing torch_tensorrt", "torch-tensorrt", fix):
        return importlib.import_module("torch_tensorrt")


def _outside_engines(compiled: GraphModule) -> list[str]:
    """Operators that run in PyTorch, between engines."""
    names = {_operator(node) for node in compiled.graph.nodes if node.op == "call_function"}
    return sorted(name for name in names if "." in name)

"""Where quantizers go: the Q/DQ placement that TensorRT asks for, from which every other target's form is lowered.

The rules are those of TensorRT's explicit quantization: symmetric int8; activations per tensor, weights per output
channel; no bias; all inputs of weighted layers; both branches of a residual sum of convolutions; the inputs of a
concatenation with one shared scale; max pooling with the scale of its input, average pooling with one of its own.
Norms, softmax and activations that are not ReLU stay floating point. Queries, keys and values of attention are observed
too, for targets that run its products in INT8: attention is found by what it is, no flag tells that a model has it.
Beyond 512 tokens its products stay floating point (after NVIDIA's Model Optimizer), and so do those with learned
queries, layers that read what is the same for all samples, and any other product of two activations.

The outputs of convolutions are observed too: ONNX Runtime runs a convolution in INT8 only where its output is
quantized, while TensorRT wants none there, so ``mmedge.lower`` takes them away for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from mmedge.stages.quantization.operators import (
    ADD,
    ATTENTION,
    AVERAGING,
    CHANNEL_AXIS,
    CONCAT,
    CONVOLUTIONS,
    LINEAR,
    MOST_TOKENS,
    POOLING,
    RELU,
    RESHAPING,
    TRANSPOSED,
    attended,
    is_weighted,
    most_tokens,
    softmax_of,
    varying,
    why_float,
)
from mmedge.stages.quantization.prepared import Range
from mmedge.stages.trace import layer_name, module_name, quiet

with quiet():  # see ``prepared``
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

FIXED = (
    "(only the products of its attention) its queries, keys or values do not depend on the inputs, "
    "and with such ones OpenVINO 2026.4 answers wrong from the second query on"
)
SAME = "what it reads is the same for all samples, and such values in INT8 OpenVINO 2026.4 overwrites as it runs"
ACTIVATION = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_tensor_symmetric,
    observer_or_fake_quant_ctr=Range,
)


# What a softmax gives. Of many tokens that are weighed alike all weights are small, so it has no fixed scale.
WEIGHTS = QuantizationSpec(
    dtype=torch.uint8,
    quant_min=0,
    quant_max=255,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=Range.with_args(unsigned=True),
)


@dataclass(frozen=True)
class Skipped:
    """A weighted layer that stays floating point, and why."""

    layer: str
    reason: str


class Int8Placement(Quantizer):  # type: ignore[misc]
    """Annotates an exported graph for PT2E.

    Args:
        keep_float: patterns (``fnmatch``) of layer names that stay floating point.

    Attributes:
        names: all that such a pattern can name: layers, the modules that hold their weights, modules that attend.
    """

    def __init__(self, keep_float: Iterable[str] = ()) -> None:
        super().__init__()
        self.keep_float = tuple(keep_float)
        self.quantized: list[str] = []
        self.attention: list[str] = []
        self.skipped: list[Skipped] = []
        self.names: set[str] = set()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark every edge that carries an INT8 tensor."""
        self.quantized.clear()
        self.attention.clear()
        self.skipped.clear()
        nodes = list(model.graph.nodes)
        inputs = varying(nodes)
        weighted = list(filter(is_weighted, nodes))
        varied = {layer_name(node) for node in weighted if node.args[0] in inputs}  # in one of its uses at least
        for node in weighted:
            self._annotate_weighted(node, layer_name(node) in varied)
        self.skipped += [Skipped(layer_name(node), reason) for node in nodes if (reason := why_float(node))]
        for node in nodes:
            if node.target in ADD:
                _annotate_residual(node)
        for node in nodes:  # in order: what a pooling gives may be what a concatenation takes
            if node.target in POOLING | AVERAGING:
                _annotate_pooling(node)
            elif node.target in CONCAT:
                _annotate_concat(node)
        self.names = {name(node) for node in weighted for name in (layer_name, module_name)}
        self.names |= {each.layer for each in self.skipped} | {module_name(node) for node in nodes if attended(node)}
        fixed = {module_name(node) for node in nodes if not inputs.issuperset(attended(node))}
        partly = {module_name(node) for node in nodes if not self._linear_layers(node) <= set(self.quantized)}
        for node in nodes:
            if (operands := attended(node)) and (module_name(node) not in partly or module_name(node) in fixed):
                self._annotate_attention(node, operands, module_name(node) in fixed)
        return model

    def validate(self, model: GraphModule) -> None:
        """Nothing to check: ``annotate`` only marks what the rules allow."""

    def _annotate_weighted(self, node: Node, varies: bool) -> None:
        name = layer_name(node)
        if reason := self._reason_to_skip(node, name) or ("" if varies else SAME):
            self.skipped.append(Skipped(name, reason))
            return
        data, weight = node.args[0], node.args[1]
        annotation = QuantizationAnnotation(
            input_qspec_map={data: ACTIVATION, weight: weight_spec(CHANNEL_AXIS[node.target])}, _annotated=True
        )
        node.meta[Q_ANNOTATION_KEY] = annotation
        self.quantized.append(name)
        if node.target in CONVOLUTIONS:
            _quantize_output(end_of_fusion(node))

    def _annotate_attention(self, node: Node, operands: tuple[Node, ...], fixed: bool) -> None:
        """Queries, keys, values and their weights in INT8.

        Where a linear layer alone gives one of them, its result is rounded, in the layer's own kernel. Elsewhere (one
        layer for all three, rotary embeddings) the pair stands next to the product.

        Args:
            node: a product of attention.
            operands: what it reads of these.
            fixed: some of its module's do not depend on the inputs.
        """
        name, tokens = module_name(node), most_tokens(node)
        if any(fnmatchcase(name, pattern) for pattern in self.keep_float):
            return
        if not isinstance(tokens, int) or tokens > MOST_TOKENS or node.target is ATTENTION:
            return
        layers = {operand: source for operand in operands if (source := origin(operand)).target is LINEAR}
        if fixed:
            self.skipped.append(Skipped(name, FIXED))
            return
        for operand in operands:
            if operand not in layers:
                _quantize_input(_reader(node, operand), operand, ACTIVATION)
        if weights := softmax_of(node):
            _quantize_input(node, weights, WEIGHTS)
        for layer in layers.values():
            _quantize_output(layer)
        if name not in self.attention:
            self.attention.append(name)

    def _linear_layers(self, node: Node) -> set[str]:
        """Names of the linear layers that give what a product of attention reads."""
        return {layer_name(source) for each in attended(node) if (source := origin(each)).target is LINEAR}

    def _reason_to_skip(self, node: Node, name: str) -> str | None:
        for pattern in self.keep_float:
            if fnmatchcase(name, pattern) or fnmatchcase(module_name(node), pattern):
                return f"kept in floating point by the recipe ({pattern})"
        weight = node.args[1]
        if not isinstance(weight, Node) or weight.op != "get_attr":
            return "its weight is not a constant"
        if node.target in TRANSPOSED and len(node.args) > 6 and node.args[6] != 1:
            return "grouped transposed convolution has no per-channel axis"
        return None


def weight_spec(axis: int) -> QuantizationSpec:
    """Symmetric int8 with one scale per slice along ``axis``; -128 is left out so that the range is symmetric."""
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=axis,
        observer_or_fake_quant_ctr=Range.with_args(channel_axis=axis),
    )


def _quantize_output(node: Node, spec: QuantizationSpec | SharedQuantizationSpec = ACTIVATION) -> None:
    """Ask for ``node``'s value in INT8, beside whatever is asked of its inputs."""
    annotation = node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
    annotation.output_qspec = spec


def _quantize_input(node: Node, source: Node, spec: QuantizationSpec) -> None:
    """Ask for what ``node`` reads of ``source`` in INT8, beside whatever else is asked of it."""
    annotation = node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
    annotation.input_qspec_map[source] = spec


def _reader(product: Node, operand: Node) -> Node:
    """What reads an operand of attention: the product, or what scales it for the product."""
    return product if operand in product.all_input_nodes else next(iter(operand.users))


def _annotate_residual(node: Node) -> None:
    """Quantize both branches and the sum where convolutions meet a skip connection.

    Residual streams of transformers stay floating point: nothing around them runs in INT8.
    """
    branches = [argument for argument in node.args[:2] if isinstance(argument, Node)]
    if len(branches) < 2 or not any(branch.target in CONVOLUTIONS for branch in branches):
        return
    if not all(is_quantized(branch) for branch in branches):
        return
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map=dict.fromkeys(branches, ACTIVATION), _annotated=True
    )
    _quantize_output(end_of_fusion(node))


def _annotate_pooling(node: Node) -> None:
    """Pooling runs in INT8 where what it reads is, and what reads it will be.

    Max pooling only picks values, so its result has the scale of its input; an average needs one of its own.
    """
    source = node.args[0]
    if not isinstance(source, Node) or not is_quantized(source) or not read_by_int8(node):
        return
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map={source: ACTIVATION}, _annotated=True)
    _quantize_output(node, SharedQuantizationSpec((source, node)) if node.target in POOLING else ACTIVATION)


def _annotate_concat(node: Node) -> None:
    """One scale for all parts of a concatenation that only INT8 layers read: then nothing is rounded twice."""
    parts = node.args[0]
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Node) for part in parts):
        return
    first, *others = dict.fromkeys(parts)
    if not read_by_int8(node) or any(_own_scale(part) for part in (first, *others)):
        return
    shared = SharedQuantizationSpec((first, node))
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
        input_qspec_map={first: ACTIVATION, **dict.fromkeys(others, shared)}, output_qspec=shared, _annotated=True
    )


def _own_scale(part: Node) -> bool:
    """Whether a part of a concatenation must keep a scale of its own: other INT8 layers read it as well."""
    return len(part.users) > 1


def origin(node: Node) -> Node:
    """What gives the values of ``node``, which were only moved since and which nothing else reads."""
    while node.target in RESHAPING and isinstance(source := node.args[0], Node) and len(source.users) == 1:
        node = source
    return node


def end_of_fusion(node: Node) -> Node:
    """The last of the nodes that run as one kernel with ``node``: its ReLU, if nothing reads between.

    A batch norm that is still there, behind the ReLU or a sum, is an operator of its own: ``fold_norms`` left it.
    """
    while len(node.users) == 1 and (user := next(iter(node.users))).target in RELU:
        node = user
    return node


def is_quantized(node: Node) -> bool:
    """Whether an annotation already asks for ``node``'s value in INT8, as an output or as an input of another node."""
    own = node.meta.get(Q_ANNOTATION_KEY)
    if own is not None and own.output_qspec is not None:
        return True
    readers = (user.meta.get(Q_ANNOTATION_KEY) for user in node.users)
    return any(reader is not None and node in reader.input_qspec_map for reader in readers)


def read_by_int8(node: Node) -> bool:
    """Whether every reader of ``node``, behind reshapes, takes it in INT8."""
    readers = list(_readers(node))
    return bool(readers) and all(
        (found := reader.meta.get(Q_ANNOTATION_KEY)) is not None and source in found.input_qspec_map
        for reader, source in readers
    )


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    for user in node.users:
        if user.target in RESHAPING:
            yield from _readers(user)
        else:
            yield user, node

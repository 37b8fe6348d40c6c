"""A decoder that remembers: one step of it, and what it makes of its other inputs, out of the graph that reads all.

Both keep the operators, weights and scales of the whole graph, so nothing is traced or calibrated again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mmedge.errors import StageError
from mmedge.lower.cut import cut
from mmedge.lower.passes import add_constant, constant, remove_unused
from mmedge.lower.places import BATCH, LEAVE_OUT, Walk, sizes_of
from mmedge.lower.shape import save
from mmedge.targets.base import Runner
from mmedge.targets.decoding import Cache, Decoding
from mmedge.targets.onnxruntime import OnnxRuntime
from mmedge.task import Component, Piece
from mmedge.tensors import Array

SAMPLES, STEPS = 2, 16  # compared with the whole decoder when a step is made
FLOAT, ROUNDED = 1e-3, 0.1  # how far its outputs may be off, relative to the largest; where INT8 rounds, a step of it


def piece_of(path: Path, piece: Piece) -> tuple[ir.Model, Cache | None]:
    """One graph of a component, cut from a whole network's.

    Args:
        path: of the network's graph.
        piece: which.

    Returns:
        The graph, and of a ``step`` how it is fed.

    Raises:
        StageError: the component cannot be cut, or its tokens cannot be read one by one; see ``check``.
    """
    model = ir.load(path)
    cut(model, piece.component)
    if piece.role == "memory":
        memory_of(model, piece.component)
    if piece.role != "step":
        return model, None
    cache = step_of(model, piece.component)
    roles = {each.role: each for each in piece.component.pieces}
    memory = piece_of(path, roles["memory"])[0] if "memory" in roles else None
    check(piece_of(path, roles["whole"])[0], memory, model, cache, piece.component.name)
    return model, cache


def memory_of(model: ir.Model, component: Component) -> None:
    """Reduce a decoder's graph to what does not depend on its tokens, in place.

    Args:
        model: cut to the component.
        component: has a ``cache`` and other inputs.

    Raises:
        StageError: something in it does not count samples along its first dimension.
    """
    _prepare(model, component)
    graph = model.graph
    outputs = []
    for number, value in enumerate(_frontier(model, component)):
        made = value if value.producer() is not None else _copied(model, value)
        made.name = _memory(component, number)
        outputs.append(made)
    graph.outputs[:] = outputs
    graph.inputs[:] = [value for value in graph.inputs if value.name != component.cache]
    remove_unused(model)
    _tidy(model)


def step_of(model: ir.Model, component: Component) -> Cache:
    """Rewrite a decoder's graph so that it reads one token and what it remembers of those before, in place.

    The graph then reads the token ``(batch, 1)``, its place ``(batch,)``, what ``memory_of`` makes, and all keys and
    values of before, of sizes ``(batch, …, places, …)``. It gives the component's outputs for that place, and its keys
    and values.

    Args:
        model: cut to the component.
        component: has a ``cache``.

    Returns:
        How it is fed.

    Raises:
        StageError: a node cannot go along; says which, and why.
    """
    _prepare(model, component)
    graph = model.graph
    tokens = next(value for value in graph.inputs if value.name == component.cache)
    known = [_entered(value, _memory(component, number)) for number, value in enumerate(_frontier(model, component))]
    walk = Walk(model, tokens, constant, component.name)
    walk.shapes |= {value: sizes for value in known if (sizes := sizes_of(value)) is not None}
    walk.run()
    outputs = _outputs(walk, component)
    for value, past in zip(walk.new, walk.past, strict=True):
        new = value if not value.is_graph_output() else _copied(model, value)
        new.name = past.new
        graph.outputs.append(_shaped(new, [1 if axis == past.axis else size for axis, size in _sizes(walk, value)]))
    graph.inputs[:] = [_shaped(tokens, [BATCH, 1]), walk.inputs[0], *known, *walk.inputs[1:]]
    remove_unused(model)
    _tidy(model)
    dtype = tokens.dtype.numpy() if tokens.dtype is not None else np.dtype(np.int64)
    return Cache(component.cache, str(dtype), str(walk.position.name), walk.length, tuple(walk.past), outputs)


def _outputs(walk: Walk, component: Component) -> dict[str, int]:
    """The axis of places of each of the component's outputs, which become those of one place."""
    found = {}
    for value in walk.model.graph.outputs:
        at, sizes = walk.along.get(value), walk.shapes.get(value)
        if at is None or sizes is None or sizes[0] != BATCH or at.within != 1 or at.keys is not None:
            raise StageError(
                f"{value.name} does not go along the tokens, sample by sample",
                where=f"component {component.name}: cache",
                fix=LEAVE_OUT,
            )
        found[str(value.name)] = at.axis
        _shaped(value, [1 if axis == at.axis else size for axis, size in enumerate(sizes)])
    return found


def _sizes(walk: Walk, value: ir.Value) -> Iterable[tuple[int, int]]:
    return enumerate(walk.shapes[value])


def _prepare(model: ir.Model, component: Component) -> None:
    """Make constants of what only the number of samples decides, and learn the shapes of everything else."""
    from onnx_ir.passes.common import ShapeInferencePass

    _fold_sizes(model, component)
    for value in model.graph.inputs:
        value.shape = ir.Shape([BATCH if isinstance(size, ir.SymbolicDim) else size for size in value.shape or ()])
    for value in model.graph.outputs:
        value.shape = None
    ShapeInferencePass()(model)


# --- what is known from the number of samples alone


def _fold_sizes(model: ir.Model, component: Component) -> None:
    """Put constants in the place of what is computed from shapes: it does not differ from sample to sample."""
    edges = _sized(model)
    if not edges:
        return
    few, more = _evaluated(model, edges, 2), _evaluated(model, edges, 3)
    kept: dict[tuple[object, ...], ir.Value] = {}  # each layer has its own copy of the same mask
    for value in edges:
        for node, index in list(value.uses()):
            array = _one_for_all(few[str(value.name)], more[str(value.name)], node.op_type)
            if array is None:
                raise StageError(
                    f"{node.name} reads {value.name}, which differs from sample to sample by their number alone",
                    where=f"component {component.name}: cache",
                    fix=LEAVE_OUT,
                )
            key = (array.dtype.str, array.shape, array.tobytes())
            if key not in kept:
                kept[key] = add_constant(model, f"{value.name}.{node.op_type}", array)
            node.replace_input_with(index, kept[key])
    remove_unused(model)


def _sized(model: ir.Model) -> list[ir.Value]:
    """What is computed from shapes and constants, as far as anything else reads it.

    Weights are not, which lie there transposed or rounded for good reason; large masks are, which no exporter folds.
    """
    fixed = set(model.graph.initializers.values())
    sized: set[ir.Value] = set()
    for node in model.graph:
        read = {value for value in node.inputs if value is not None}
        if read <= fixed and node.op_type in ("DequantizeLinear", "Transpose"):
            fixed.update(node.outputs)
        elif node.op_type == "Shape" or read <= fixed | sized:
            sized.update(node.outputs)
    return [
        value
        for node in model.graph
        for value in node.outputs
        if value in sized and any(use.node.outputs[0] not in sized for use in value.uses())
    ]


def _evaluated(model: ir.Model, values: list[ir.Value], samples: int) -> dict[str, Array]:
    graph = model.graph
    before = list(graph.outputs)
    graph.outputs[:] = values
    try:
        with _running(model) as run:
            return run({str(value.name): _blank(value, samples) for value in graph.inputs})
    finally:
        graph.outputs[:] = before


def _one_for_all(few: Array, more: Array, reader: str) -> Array | None:
    """What holds for any number of samples, from what holds for two and for three."""
    if few.shape == more.shape:
        if few.ndim == 1 and reader in ("Reshape", "Expand"):
            return np.where(few == more, few, -1 if reader == "Reshape" else 1)
        return few if np.array_equal(few, more) else None
    axes = [axis for axis, sizes in enumerate(zip(few.shape, more.shape, strict=True)) if sizes == (2, 3)]
    first = few.take([0], axis=axes[0]) if len(axes) == 1 else few
    return first if len(axes) == 1 and (few == first).all() and (more == first).all() else None


# --- what depends on other inputs than the tokens


def _frontier(model: ir.Model, component: Component) -> list[ir.Value]:
    """What the tokens meet that depends on other inputs alone, in the order of the graph."""
    others = [value for value in model.graph.inputs if value.name != component.cache]
    tokens = next(value for value in model.graph.inputs if value.name == component.cache)
    moving, still = {tokens}, set(others)
    for node in model.graph:
        read = {value for value in node.inputs if value is not None}
        if read & moving:
            moving.update(node.outputs)
        elif read & still:
            still.update(node.outputs)
    made = [*others, *(value for node in model.graph for value in node.outputs if value in still)]
    found = [value for value in made if any(use.node.outputs[0] in moving for use in value.uses())]
    for value in found:
        if (sizes_of(value) or (0,))[0] != BATCH:
            raise StageError(
                f"{value.name} does not depend on the tokens, and its first dimension is not the batch",
                where=f"component {component.name}: cache",
                fix=LEAVE_OUT,
            )
    return found


def _memory(component: Component, number: int) -> str:
    return f"{component.name}_memory_{number}"


def _entered(value: ir.Value, name: str) -> ir.Value:
    """An input in the place of ``value``."""
    fed = ir.Value(name=name, shape=value.shape, type=value.type)
    value.replace_all_uses_with(fed)
    return fed


def _copied(model: ir.Model, value: ir.Value) -> ir.Value:
    node = ir.node("Identity", [value], name=f"{value.name}/Identity")
    model.graph.append(node)
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    return node.outputs[0]


def _shaped(value: ir.Value, sizes: Iterable[int]) -> ir.Value:
    value.shape = ir.Shape(list(sizes))
    return value


def _tidy(model: ir.Model) -> None:
    """Name the batch, and forget shapes inside the graph: targets infer their own."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(["batch" if size == BATCH else size for size in value.shape or ()])


# --- does it do the same?


def check(whole: ir.Model, memory: ir.Model | None, step: ir.Model, cache: Cache, name: str) -> None:
    """Compare the first steps with the whole decoder on random inputs.

    Args:
        whole: cut to the component.
        memory: of ``memory_of``, None where the decoder reads tokens alone.
        step: of ``step_of``.
        cache: of ``step_of``.
        name: the component's, for errors.

    Raises:
        StageError: a place depends on tokens after it, or steps give other values.
    """
    rng = np.random.default_rng(0)
    entries = _entries(whole, cache.token)
    feeds = {str(value.name): _random(value, SAMPLES, rng, entries) for value in whole.graph.inputs}
    with _running(whole) as run:
        expected = run(feeds)
        _check_causal(run, feeds, expected, cache, entries, name)
    others = {name: array for name, array in feeds.items() if name != cache.token}
    known = {}
    if memory is not None:
        with _running(memory) as run:
            known = run(others)
    with _running(step) as run:
        decoding = Decoding(run, cache, known, SAMPLES)
        made = [decoding.next(feeds[cache.token][:, place]) for place in range(min(STEPS, cache.length))]
    allowed = ROUNDED if any(node.op_type == "QuantizeLinear" for node in step.graph) else FLOAT
    for output, axis in cache.outputs.items():
        steps = np.stack([each[output] for each in made], axis=axis)
        wanted = expected[output].take(range(len(made)), axis=axis)
        off = float(np.abs(steps - wanted).max() / (np.abs(wanted).max() or 1))
        if not off <= allowed:
            problem = f"{output} of {len(made)} steps is off by {off:.2g} of its largest value from that of all at once"
            raise StageError(problem, where=f"component {name}: cache", fix=LEAVE_OUT)


def _check_causal(
    run: Runner, feeds: Mapping[str, Array], expected: Mapping[str, Array], cache: Cache, entries: int, name: str
) -> None:
    """Other tokens from some place on must leave the places before it as they are."""
    tokens = feeds[cache.token]
    for place in sorted({1, cache.length // 3, cache.length // 2, cache.length - 1} - {0}):
        other = tokens.copy()
        other[:, place:] = (tokens[:, place:] + 1) % entries
        found = run({**feeds, cache.token: other})
        for output, axis in cache.outputs.items():
            before, after = (array.take(range(place), axis=axis) for array in (expected[output], found[output]))
            if not np.allclose(before, after, rtol=0, atol=1e-4 * (np.abs(before).max() or 1)):
                problem = f"{output} before place {place} depends on the tokens from there on: the decoder looks ahead"
                raise StageError(problem, where=f"component {name}: cache", fix=LEAVE_OUT)


@contextmanager
def _running(model: ir.Model) -> Iterator[Runner]:
    """The graph on this machine's processor."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "model.onnx"))
        with OnnxRuntime().runner(Path(folder), threads=1) as run:
            yield run


def _sizes_for(value: ir.Value, samples: int) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else samples for size in value.shape or ())


def _blank(value: ir.Value, samples: int) -> Array:
    return np.zeros(_sizes_for(value, samples), value.dtype.numpy() if value.dtype is not None else np.float32)


def _random(value: ir.Value, samples: int, rng: np.random.Generator, entries: int) -> Array:
    blank = _blank(value, samples)
    if np.issubdtype(blank.dtype, np.floating):
        return rng.standard_normal(blank.shape).astype(blank.dtype)
    return rng.integers(0, entries, blank.shape).astype(blank.dtype)


def _entries(model: ir.Model, tokens: str) -> int:
    """How many tokens there are: the rows of the table that they are looked up in."""
    for node in model.graph:
        index = node.inputs[1] if node.op_type == "Gather" else None
        while index is not None and (maker := index.producer()) is not None and maker.op_type in ("Reshape", "Cast"):
            index = maker.inputs[0]
        table = constant(node.inputs[0]) if index is not None and index.name == tokens else None
        if table is not None:
            return len(table)
    return 2  # no table: whatever tokens are, these are among them

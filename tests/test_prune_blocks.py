"""Structured pruning of the blocks that networks are built of: each is narrowed, still right, and exports."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from blocks import BLOCKS
from families import assert_exports, context_of, prune, task_of
from torch import Tensor, nn

import mmedge.stages.prune as prune_stage
from mmedge.errors import StageError
from mmedge.stages.base import Network
from mmedge.stages.prune import Prune
from mmedge.stages.pruning import attention, coupling, graph, layers, narrowing, standins


@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("encoder", "fusion")])  # in test_prune.py
def test_block_is_narrowed_everywhere(name: str) -> None:
    torch.manual_seed(0)
    task = task_of(*BLOCKS[name]())
    module, edits = prune(task, macs=0.5, round_to=8)
    assert edits["rolled_back"] == {}
    assert set(edits["left_alone"]) == {"head"}
    assert 0.3 < edits["after"]["macs"] / edits["before"]["macs"] <= 0.5
    if name in ENGINES:
        assert_exports(task, module)


# benchmarks/prune_families.py does it for all of them
ENGINES = ("decoder", "timm", "grouped", "co_attention", "recurrent", "convolutions", "rotary", "unet", "flattened")


def widths(name: str) -> set[str]:
    """The groups that can be narrowed."""
    torch.manual_seed(0)
    task = task_of(*BLOCKS[name]())
    stage = Prune(Prune.Config(round_to=8, importance="magnitude"))
    choices = stage.choices(Network(task.model), context_of(task))
    return {member for choice in choices for member in choice.group.members}


# What a block needs: a row of a table, and a group that is not narrowed without it.
ROWS = [
    ("decoder", attention, "ADAPTERS", "_multihead", "decoder.layers.0.multihead_attn"),
    ("gated", attention, "ADAPTERS", "_all_in_one", "blocks.0.attention"),
    ("grouped", attention, "ADAPTERS", "_separate", "blocks.0.attention"),
    ("co_attention", attention, "ADAPTERS", "_separate", ""),
    ("recurrent", standins, "STAND_INS", "Recurrent", "gru"),
    ("recurrent", standins, "STAND_INS", "RecurrentCell", "cell"),
    ("cross_widths", standins, "STAND_INS", "_cross", "image"),
    ("temporal", layers, "LAYERS", "_conv", "blocks.1.one"),
    ("gated_fusion", layers, "LAYERS", "_linear", "mixed"),
    ("decoder", layers, "LAYERS", "_embedding", "patch"),
    ("convolutions", layers, "LAYERS", "_layer_norm", "stem"),
    ("convolutions", layers, "LAYERS", "_group_norm", "grouped"),
    ("convolutions", layers, "LAYERS", "_batch_norm", "up_again"),
]


@pytest.mark.parametrize(("name", "where", "table", "row", "group"), ROWS)
def test_row_of_a_table_is_needed(
    name: str, where: Any, table: str, row: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert group in widths(name)
    rows = getattr(where, table)
    kept = tuple(entry for entry in rows if (entry[1] if isinstance(entry, tuple) else entry).__name__ != row)
    assert len(kept) == len(rows) - 1
    monkeypatch.setattr(where, table, kept)
    assert group not in widths(name)


def _no_products(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(standins, "PRODUCTS", {})


def _no_halves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        standins.SpelledOut, "__torch_function__", lambda self, f, t, args=(), kw=None: f(*args, **(kw or {}))
    )


def _no_exact_edges(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph.Edges, "_read", lambda self, node: None)


def _no_flattening(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph.Edges, "_area", lambda self, node: 1)


def _no_unused_results(patch: pytest.MonkeyPatch) -> None:
    class All(set[Any]):
        def __contains__(self, item: object) -> bool:
            return True

    patch.setattr(coupling, "_reached", lambda results: All())


def _no_baking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prune_stage, "bake", lambda module, paths=None: [])


def _no_counts_around(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(narrowing, "_counted_around", lambda group, module: iter(()))


def _no_entries_per_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "_one_per_head", lambda frame, shape: [])


def _one_reading(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(narrowing, "_reading", lambda group, number: group)
    real = attention._groups
    patch.setattr(attention, "_groups", lambda *args: islice(real(*args), 1))
    all_in_one = attention._attention
    patch.setattr(
        attention, "_attention", lambda frame, shape, readings, ends: all_in_one(frame, shape, readings[:1], ends)
    )


@pytest.mark.parametrize(
    ("name", "without", "group"),
    [
        ("open_clip", _no_products, "conv1"),
        ("gated_fusion", _no_halves, "halves"),
        ("gated_fusion", _no_exact_edges, "image"),
        ("flattened", _no_flattening, "camera.2"),
        ("convolutions", _no_unused_results, "grouped"),
        ("temporal", _no_baking, "blocks.1.one"),
        ("recurrent", _no_counts_around, "gru"),
        ("keys_and_values", _no_entries_per_head, "blocks.0.attention"),
        ("head_by_head", _one_reading, "blocks.0.attention"),
    ],
)
def test_part_is_needed(
    name: str, without: Callable[[pytest.MonkeyPatch], None], group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert group in widths(name)
    without(monkeypatch)
    assert group not in widths(name)


@pytest.mark.parametrize("name", ["decoder", "timm", "gated", "head_by_head", "grouped", "co_attention"])
def test_heads_can_get_narrower_and_keep_their_number(name: str) -> None:
    torch.manual_seed(0)
    task = task_of(*BLOCKS[name]())
    counts = [module.num_heads for module in task.model.modules() if hasattr(module, "num_heads")]
    module, edits = prune(task, width=0.5, round_to=8, heads="narrower", importance="magnitude")
    assert edits["rolled_back"] == {}
    assert [module.num_heads for module in module.modules() if hasattr(module, "num_heads")] == counts
    assert 0.2 < edits["after"]["macs"] / edits["before"]["macs"] < 0.35


def test_layers_and_directions_choose_their_own_channels() -> None:
    found = coupling.groups_of(Reader(), {"x": torch.randn(2, 5, 8)}, ("logits",))
    (group,) = found.groups
    assert (group.name, group.width, len(group.parts), group.channels) == ("gru", 32, 4, 128)


def test_sizes_of_what_is_concatenated_come_from_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_sizes", lambda cat: None)
    with pytest.raises(StageError, match="torch-pruning cannot follow the model"):
        widths("rotary")


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(8, 32, num_layers=2, bidirectional=True, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0].mean(1))

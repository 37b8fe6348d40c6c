"""What nodes of a traced graph are views of, and what they write to."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node


def aliased(node: Node, writes: bool = False) -> list[Node]:
    """The operands that what ``node`` gives is a view of, or those that it writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    found = [(argument.alias_info, value) for argument, value in pairs if argument.alias_info is not None]
    return [value for alias, value in found if alias.is_write == writes and isinstance(value, Node)]


def writes_to_others(node: Node) -> bool:
    """Whether ``node`` changes a tensor that others read too, itself or through a view of it (``x[:, 0] = y``)."""
    written = aliased(node, writes=True)
    return any(len(source.users) > 1 or source.op != "call_function" or aliased(source) for source in written)


def writers(node: Node) -> Iterator[Node]:
    """The nodes that change what ``node`` gives, through views of it as well."""
    for user in node.users:
        if node in aliased(user, writes=True):
            yield user
            yield from writers(user)
        elif node in aliased(user):
            yield from writers(user)

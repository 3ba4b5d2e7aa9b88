"""Keeps YAML of a few lines from growing to more than fits in memory."""

from __future__ import annotations

import yaml

_AT_MOST = 100_000


def check_size(text: str) -> None:
    """Raises YAMLError where the values of a YAML text, with all that its aliases repeat, are too many or endless.

    Lines like ``b: &b [*a, *a]`` double with each alias, and whoever copies or prints the values never ends.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise yaml.YAMLError("a value must not contain itself")
        open_nodes.add(id(node))
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        total = 1 + sum(size(part) for part in inner)
        open_nodes.remove(id(node))
        sizes[id(node)] = total
        if total > _AT_MOST:
            raise yaml.YAMLError(f"must have at most {_AT_MOST} values, those that aliases repeat included")
        return total

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        size(root)

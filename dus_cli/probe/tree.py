"""Layer maps as a prefix tree, so that what several maps begin with is computed once. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

# A layer of the base, and the factor that multiplies what it adds to the residual stream.
Step = tuple[int, float]


@dataclass(eq=False)
class Node:
    """A prefix of one or more maps, named by its last step. `ends` are the numbers of the maps that
    end here.
    """

    layer: int
    parent: Node | None
    factor: float = 1.0
    children: dict[Step, Node] = field(default_factory=dict)
    ends: list[int] = field(default_factory=list)


def as_they_are(layers: Iterable[int]) -> tuple[Step, ...]:
    """Layers of the base as steps that scale nothing.

    >>> as_they_are([0, 1])
    ((0, 1.0), (1, 1.0))
    """
    return tuple((layer, 1.0) for layer in layers)


def grow(maps: Sequence[Sequence[Step]]) -> Node:
    """Grow the tree of these maps; the root stands for the embeddings."""
    root = Node(-1, None)
    for number, steps in enumerate(maps):
        node = root
        for step in steps:
            if step not in node.children:
                layer, factor = step
                node.children[step] = Node(layer, node, factor)
            node = node.children[step]
        node.ends.append(number)
    return root


def count_nodes(root: Node) -> int:
    """The number of layer passes that the tree takes.

    >>> count_nodes(grow([as_they_are(layers) for layers in ([0, 1, 2, 3], [0, 1, 2, 1, 2, 3])]))
    7
    """
    count, waiting = 0, list(root.children.values())
    while waiting:
        node = waiting.pop()
        count += 1
        waiting += node.children.values()
    return count


def sweeps(root: Node, num_layers: int) -> Iterator[tuple[int, list[Node]]]:
    """Layers in the order in which they are called, each with the nodes that it is called for:
    those with one factor together, so that a layer is scaled once for all of them.

    A sweep goes once over the base's layers and takes every node along whose beginning is known by
    then; a map of two copies is done in two sweeps. So a layer that is read from disk is read once
    for all maps.

    >>> root = grow([as_they_are([0, 1, 2]), as_they_are([0, 1, 1, 2])])
    >>> [(layer, len(nodes)) for layer, nodes in sweeps(root, 3)]
    [(0, 1), (1, 1), (2, 1), (1, 1), (2, 1)]
    """
    ready: list[list[Node]] = [[] for _ in range(num_layers)]
    for child in root.children.values():
        ready[child.layer].append(child)
    while any(ready):
        for layer in range(num_layers):
            nodes, ready[layer] = sorted(ready[layer], key=lambda node: -node.factor), []
            if nodes:
                yield layer, nodes
                for node in nodes:
                    for child in node.children.values():
                        ready[child.layer].append(child)


def most_states(root: Node, num_layers: int) -> int:
    """The largest number of hidden states of every token that exist at a time.

    >>> maps = [0, 1, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]
    >>> most_states(grow([as_they_are(layers) for layers in maps]), 5)
    2
    """
    waiting = {root: len(root.children)}
    most = 1
    for _, nodes in sweeps(root, num_layers):
        for node in nodes:
            parent = node.parent
            assert parent is not None
            waiting[parent] -= 1
            # The last child takes its parent's place, a batch of rows at a time.
            if not waiting[parent]:
                del waiting[parent]
            if node.children:
                waiting[node] = len(node.children)
            most = max(most, len(waiting))
    return most

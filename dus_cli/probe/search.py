"""Which maps a search over starts measures: stretches of layers that stand twice, in blocks. Pure.

Doubling one layer alone says what it costs, and those costs nearly add up; so layers that bear it
well are doubled first. Where several layers in a row are doubled, the second copies stand right
behind the first of each (blocks of one layer), or behind all of them (one block), or between the
two: which of these a start takes best is measured. A map of B blocks has B seams.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from dus_cli.maps.layers import LayerMap
from dus_cli.planning.plan import MapRequest

# Layers in a block, at most; beside these one block is measured.
_WIDTHS = (1, 2, 4, 8)

# Layers that stand twice, in blocks, in the order of the base.
Doubled = tuple[range, ...]

# Maps of one width of blocks, each deeper than the one before it.
Family = tuple[Doubled, ...]


def borne(costs: Sequence[float | None], most: float) -> list[int]:
    """The layers that are worth doubling: each of them alone costs at most `most`.

    >>> borne([2.7, 0.01, None, 0.02], most=0.5)
    [1, 3]
    """
    return [layer for layer, cost in enumerate(costs) if cost is not None and cost <= most]


def families(costs: Sequence[float | None], most: float) -> list[Family]:
    """The maps that a search considers, in families by the width of their blocks.

    In a family of one width, the blocks that cost least per layer are doubled first. The family of
    single blocks has for each length the block that costs least.

    Args:
        costs: nats per token that doubling each layer alone adds; None where it was refused.
        most: of these, for a layer that is doubled at all.

    >>> families([9.0, 0.1, 0.3, 0.2, 9.0], most=1.0)[0]
    ((range(1, 2),), (range(1, 2), range(3, 4)), (range(1, 2), range(2, 3), range(3, 4)))
    """
    layers = borne(costs, most)
    cost_of = {layer: costs[layer] or 0.0 for layer in layers}
    whole = _runs(layers)
    longest = max(map(len, whole), default=0)
    found = [
        _by_cost(_cut(whole, width), cost_of) for width in _WIDTHS if width < longest or width == 1
    ]
    windows = [
        range(run.start + at, run.start + at + length)
        for length in range(1, longest + 1)
        for run in whole
        for at in range(len(run) - length + 1)
    ]
    best: dict[int, range] = {}
    for window in windows:
        other = best.get(len(window))
        if other is None or _cost(window, cost_of) < _cost(other, cost_of):
            best[len(window)] = window
    found.append(tuple((best[length],) for length in sorted(best)))
    return [family for family in found if family]


def _runs(layers: Iterable[int]) -> list[range]:
    """Join consecutive layers into ranges."""
    found: list[range] = []
    for layer in layers:
        if found and found[-1].stop == layer:
            found[-1] = range(found[-1].start, layer + 1)
        else:
            found.append(range(layer, layer + 1))
    return found


def _cut(runs: Iterable[range], width: int) -> list[range]:
    """Cut runs into as few blocks of at most `width` layers as possible, of nearly equal length.

    >>> _cut([range(2, 7)], 2)
    [range(2, 4), range(4, 5), range(5, 7)]
    """
    found = []
    for run in runs:
        count = -(-len(run) // width)
        ends = [run.start + round(len(run) * part / count) for part in range(count + 1)]
        found += [range(start, end) for start, end in pairwise(ends)]
    return found


def _cost(block: range, cost_of: Mapping[int, float]) -> float:
    return sum(cost_of[layer] for layer in block)


def _by_cost(blocks: Iterable[range], cost_of: Mapping[int, float]) -> Family:
    ranked = sorted(blocks, key=lambda block: _cost(block, cost_of) / len(block))
    return tuple(
        tuple(sorted(ranked[:count], key=lambda block: block.start))
        for count in range(1, len(ranked) + 1)
    )


def request_of(doubled: Doubled, num_layers: int) -> MapRequest:
    """The request to `dus upscale` that makes this map.

    >>> request_of((range(1, 2), range(2, 3), range(4, 5)), 6).double
    '1:3,4'
    >>> request_of((range(1, 3),), 6).layers
    '0:3,1:6'
    """
    if all(len(block) == 1 for block in doubled):
        runs = _runs(block.start for block in doubled)
        return MapRequest(
            double=",".join(
                str(run.start) if len(run) == 1 else f"{run.start}:{run.stop}" for run in runs
            )
        )
    sources: list[int] = []
    begin = 0
    for block in doubled:
        sources += [*range(begin, block.stop), *block]
        begin = block.stop
    layer_map = LayerMap((*sources, *range(begin, num_layers)), num_layers)
    return MapRequest(layers=str(layer_map))


def first_round(family: Family) -> list[int]:
    """The numbers of a family's maps to measure first: the middle one and the last.

    >>> first_round(((range(1),), (range(2),), (range(3),)))
    [1, 2]
    """
    return sorted({(len(family) - 1) // 2, len(family) - 1})


def next_round(losses: Mapping[int, float], limit: float, count: int) -> list[int]:
    """The numbers of a family's maps to measure next, evenly spread between the deepest known to be
    within the limit and the next one known to be above it; none if these two are neighbours, or if
    the deepest of all is within.

    >>> next_round({4: 2.4, 9: 3.0}, limit=2.5, count=2)
    [6, 8]
    """
    good = max((number for number, loss in losses.items() if loss <= limit), default=-1)
    bad = min((number for number in losses if number > good), default=None)
    if bad is None:
        return []
    between = range(good + 1, bad)
    count = min(count, len(between))
    return (
        sorted({between[(2 * k + 1) * len(between) // (2 * count)] for k in range(count)})
        if count
        else []
    )


def reach(
    family: Family, losses: Mapping[int, float], base_loss: float, limit: float
) -> tuple[float, float]:
    """Estimate how many layers a family can double within the limit, by linear interpolation
    between the measured maps; and its last loss, negated, so that of two families that reach as far
    the larger pair is the better.

    >>> reach(((range(1, 2),), (range(1, 4),)), {0: 2.5, 1: 3.0}, base_loss=2.0, limit=2.75)
    (2.0, -3.0)
    """
    doubled, loss = 0.0, base_loss
    for number in sorted(losses):
        count, next_loss = sum(map(len, family[number])), losses[number]
        if next_loss > limit:
            doubled += (count - doubled) * (limit - loss) / (next_loss - loss)
            break
        doubled, loss = float(count), next_loss
    return doubled, -losses[max(losses)]

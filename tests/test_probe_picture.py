"""The picture of a probe, whatever was found: everything in it can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from pictures import check_labels

from dus_cli.maps.layers import stack, typed_map
from dus_cli.probe.budget import Memory
from dus_cli.probe.distances import Distances
from dus_cli.probe.found import Measured, Probe, ProbePlan, ProbeText
from dus_cli.probe.maps import Cost, MapCandidate
from dus_cli.probe.picture import probe_svg


def found(
    trims: Sequence[int] = range(16),
    loss: Callable[[int], float] = lambda trim: 2.9 + 6 * math.exp(-trim / 4),
    num_layers: int = 32,
    *,
    others: Sequence[tuple[str, float]] = (),
    name: str = "org/some-model",
    within: int | None = None,
    knee: int | None = None,
) -> Probe:
    """A probe of a model of some layers, with a loss for each trim and for other maps."""

    def measured(layer_map: Any, options: str, nats: float) -> Measured:
        size = len(layer_map)
        cost = Cost(size, 260_000_000 + 218_000_000 * size, 10**9 * size, 1e9)
        return Measured(MapCandidate(layer_map, options, cost), nats, ((0.3, 0.2),))

    maps = [measured(stack(num_layers, trim), f"--trim {trim}", loss(trim)) for trim in trims]
    maps += [
        measured(typed_map(text, num_layers), f"--layers {text}", nats) for text, nats in others
    ]
    table = [
        [abs(a - b) / (num_layers + 4) for b in range(num_layers + 1)]
        for a in range(num_layers + 1)
    ]
    plan = ProbePlan(
        model=name,
        name=name,
        commit=None,
        num_layers=num_layers,
        base_cost=Cost(num_layers, 260_000_000 + 218_000_000 * num_layers, 1, 1.0),
        candidates=tuple(each.candidate for each in maps),
        seq_length=512,
        precision="fp32",
        device="cpu",
        streams=False,
        memory=Memory(1, 1, 1, 1, 1),
        bound=0.2,
        layer_passes=1,
        seconds=1.0,
    )
    return Probe(
        plan=plan,
        text=ProbeText(("text.jsonl",), 1, 1, 1, {}),
        base_loss=2.9,
        maps=tuple(maps),
        distances=Distances(table, table, 100),
        within=within,
        knee=knee,
        layer_passes=1,
        num_groups=1,
        seconds=1.0,
        peak_bytes=None,
    )


@pytest.mark.parametrize("within", [None, 0, 1, 5, 7, 8, 12, 15])
@pytest.mark.parametrize("knee", [None, 0, 2, 7, 9, 14, 15])
def test_no_label_is_cut_or_lies_on_another_wherever_the_recommended_maps_are(
    within: int | None, knee: int | None
) -> None:
    text = check_labels(probe_svg(found(within=within, knee=knee)))
    assert "base 2.900" in text
    assert sum("layers, " in label for label in text) == len({within, knee} - {None})


ODD: dict[str, Probe] = {
    "one map": found([8], within=0, knee=0),
    "hardly any difference": found(loss=lambda trim: 2.905 + 0.001 * trim, within=0, knee=1),
    "far above the base": found(loss=lambda trim: 11 - trim / 20, within=15, knee=3),
    "126 layers and a loss of 1,000": found(
        range(63), lambda trim: 3 + 1e3 * math.exp(-trim / 3), 126, within=62, knee=20
    ),
    "other maps": found(
        within=16, knee=11, others=[("0:20,9:32", 3.2), ("0:21,10:32", 3.4), ("0:30,2:32", 2.95)]
    ),
    "a long name": found(
        name="an-organisation-with-a-name/" + "and-a-model-with-a-longer-one-" * 3, within=12
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_probes_have_a_picture_that_can_be_read(name: str) -> None:
    for dark in (False, True):
        text = check_labels(probe_svg(ODD[name], dark=dark))
        assert "".join(text).replace(" ", "").startswith(ODD[name].plan.name)

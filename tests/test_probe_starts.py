"""What `dus probe --start` says of a map is what the checkpoint that `dus upscale --start` writes
does; and a search finds which layers bear to be doubled, and the line that writes what it
recommends.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import tiny
from tiny import forked_dus

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from pictures import check_labels  # noqa: E402  (probed imports both)
from probed import measured, own_loss, write_model  # noqa: E402

from dus_cli import upscale  # noqa: E402
from dus_cli.maps.layers import LayerMap  # noqa: E402
from dus_cli.maps.starts import StartRule  # noqa: E402
from dus_cli.planning.plan import MapRequest  # noqa: E402
from dus_cli.probe import search  # noqa: E402
from dus_cli.probe.distances import Distances  # noqa: E402
from dus_cli.probe.found import Doublings, Probe  # noqa: E402
from dus_cli.probe.maps import MapCandidate, options_of  # noqa: E402
from dus_cli.probe.options import ProbeOptions  # noqa: E402
from dus_cli.probe.report import upscale_command  # noqa: E402
from dus_cli.probe.rounds import Rounds  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models

# Of each way in which what is scaled stands in memory otherwise than in the file: as it is; turned
# round; a norm behind a block, of 1 + w; experts, merged while they are loaded; experts beside
# dense layers; mixers; biases; a parallel block.
TYPES = "llama gpt2 gemma2 qwen3_moe mixtral deepseek_v3 granitemoehybrid gpt_neox falcon".split()


def starts(*names: str) -> tuple[StartRule, ...]:
    return tuple(map(StartRule.parse, names))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "text.jsonl", 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama")


def written_loss(found: Probe, number: int, corpus: Path, out: Path) -> float:
    """Of the model that the line for this map writes."""
    run = forked_dus(*shlex.split(upscale_command(found, number))[1:-1], out, "-q")
    assert run.returncode == 0, run.stderr
    return own_loss(out, corpus)


@pytest.mark.parametrize("model_type", TYPES)
def test_the_loss_is_that_of_the_checkpoint_that_upscale_writes(
    model_type: str, corpus: Path, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base", model_type)
    options: dict[str, Any] = {"trims": (2, 3), "starts": starts("fade", "scale:3")}
    found = measured(base, corpus, **options)
    faded, loud = found.maps
    for number, each in enumerate(found.maps):
        expected = written_loss(found, number, corpus, tmp_path / f"out-{number}")
        assert each.loss == pytest.approx(expected, abs=1e-4)
    assert faded.loss is not None
    assert loud.loss is not None
    assert abs(faded.loss - loud.loss) > 1e-3  # the comparison can fail
    streamed = measured(base, corpus, stream_layers=True, **options)
    assert [each.loss for each in streamed.maps] == [faded.loss, loud.loss]


def test_factors_are_rounded_as_the_written_models_are(corpus: Path, tmp_path: Path) -> None:
    """In the dtype of the file, though it is computed in fp32."""
    base = write_model(tmp_path / "base", "llama")
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(
        base
    )
    found = measured(base, corpus, trims=(1, 2), starts=starts("fade:cosine"))
    expected = written_loss(found, 0, corpus, tmp_path / "out")
    assert found.maps[0].loss == pytest.approx(expected, abs=2e-6)
    upscale(tmp_path / "base", tmp_path / "longer", trim=1, start="fade:cosine", dtype="float32")
    assert own_loss(tmp_path / "longer", corpus) != pytest.approx(expected, abs=2e-6)


def test_every_map_is_measured_with_every_start(model: Path, corpus: Path) -> None:
    found = measured(
        model,
        corpus,
        trims=(2, 3),
        double=("1:3,5",),
        layers=("0:4,2:7,0",),
        starts=starts("copy", "identity", "half", "fade"),
    )
    said = [each.candidate.options for each in found.maps]
    maps = ["--trim 2", "--layers 0:4,2:7,0", "--double 1:3,5"]
    assert said == [
        f"{options}{start}"
        for start in ("", " --start identity", " --start half", " --start fade:cosine")
        for options in maps
    ]
    (plain,) = measured(model, corpus, trims=(2, 3)).maps
    assert found.maps[0].loss == plain.loss
    assert [each.loss for each in found.maps[3:6]] == [found.base_loss] * 3
    # a doubled layer fades as it stands in half
    assert found.maps[11].loss == found.maps[8].loss
    refused = found.maps[10].candidate.refused
    assert refused is not None
    assert "--start fade needs copies that each begin" in refused


def test_the_report_has_starts_where_they_were_asked_for(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    layout = (Path(__file__).parent.parent / "docs/layout.md").read_text()
    options = ("--data", corpus, "--tokens", "100", "--seq-length", "24", "--precision", "fp32")
    search_too = ("--start", "half,fade", "--search", "--best", "2", "--within", "100%")
    report = forked_dus("probe", model, *options, *search_too, "--json").report
    assert report["starts"] == ["half", "fade:cosine"]
    assert report["base_passes"] == round(report["layer_passes"] / 7, 2)
    assert [one["start"] for one in report["doublings"]] == ["half", "fade:cosine"]
    one = report["doublings"][0]
    alone = measured(model, corpus, double=("3",), starts=starts("half"))
    assert one["layers"][3]["loss"] == pytest.approx(alone.maps[0].loss, abs=1e-6)
    assert one["layers"][3]["above_base"] == pytest.approx(
        one["layers"][3]["loss"] - report["base"]["loss"], abs=1e-6
    )
    for record in (report, one, one["layers"][0], report["maps"][0]):
        for field in record:
            assert f"`{field}`" in layout, field
    number = report["recommended"]["within"]["map"]
    best = report["maps"][number]
    assert best["num_layers"] == max(each["num_layers"] for each in report["maps"])
    assert f"--start {best['start']}" in report["recommended"]["within"]["command"]
    assert len(best["factors"]) == best["num_layers"]
    line = shlex.split(report["recommended"]["within"]["command"])
    assert forked_dus(*line[1:-1], tmp_path / "out", "-q").returncode == 0
    assert best["loss"] == pytest.approx(own_loss(tmp_path / "out", corpus), abs=1e-4)
    plain = forked_dus("probe", model, *options, "--trims", "2", "--json").report
    assert not {"starts", "doublings", "base_passes"} & plain.keys()
    assert not {"start", "factors"} & plain["maps"][0].keys()
    run = forked_dus("probe", model, *options, *search_too, "--plot", tmp_path / "p.svg")
    assert run.stdout.splitlines()[0].split()[:3] == ["map", "start", "layers"]
    text = check_labels((tmp_path / "p.svg").read_text())
    assert {"half", "fade:cosine", "Each layer doubled alone: loss above the base's"} <= set(text)
    paths = ET.parse(tmp_path / "p.svg").iter("{http://www.w3.org/2000/svg}path")  # noqa: S314
    assert sum(path.get("d", "").count("V") == 14 for path in paths) == 2  # seven bars a start


def test_a_search_leaves_out_the_layers_that_cost_most() -> None:
    """Of a base whose losses are sums of what doubling each layer costs."""
    costs = dict.fromkeys(range(30), 0.005) | {0: 2.7, 1: 0.06, 17: 0.05, 28: 0.08, 29: 0.9}
    num_measured = 0

    def check(request: MapRequest) -> MapCandidate:
        layer_map = request.resolve(30)
        return MapCandidate(layer_map, options_of(layer_map, request), None, start=request.start)

    def losses(about: Sequence[MapCandidate]) -> list[float]:
        nonlocal num_measured
        num_measured += len(about)
        maps = [each.layer_map for each in about]
        return [2.4, *(2.4 + extra(map_of) for map_of in maps)]

    def extra(layer_map: LayerMap) -> float:
        """Layers that stand twice, and a little for each that comes back from afar."""
        twice = [layer for layer, outputs in enumerate(layer_map.outputs) if len(outputs) > 1]
        far = sum(seam.distance for seam in layer_map.seams)
        return sum(costs[layer] for layer in twice) + 0.01 * far

    options = ProbeOptions(data=("text.jsonl",), search=True, within=0.1, best=4)
    rounds = Rounds(options, 30, check, losses)
    (doublings,) = rounds.doublings(starts("half"))
    assert doublings.not_borne == (0, 29)
    found = rounds.maps(doublings, Distances([], [], 0))
    within = [each for each in found if each.loss is not None and each.loss <= 1.1 * 2.4]
    best = max(within, key=lambda each: len(each.candidate.layer_map))
    assert best.candidate.options == "--double 1:28 --start half"
    assert num_measured < 30 + 25


def test_blocks_are_of_neighbours_and_the_cheapest_come_first() -> None:
    costs = [5.0, 0.1, 0.4, 0.2, 0.3, None, 0.05, 0.6]
    found = search.families(costs, most=1.0)
    assert [len(family) for family in found] == [6, 3, 4]
    assert search.request_of(found[0][2], 8).double == "1,3,6"
    assert search.request_of(found[0][-1], 8).double == "1:5,6:8"
    pairs, one_block = found[1], found[2]
    assert pairs[:2] == ((range(1, 3),), (range(1, 3), range(3, 5)))
    assert search.request_of(pairs[-1], 8).layers == "0:3,1:5,3:8,6:8"
    assert one_block[-1] == (range(1, 5),)
    assert search.request_of(one_block[-1], 8).layers == "0:5,1:8"
    assert one_block[0] == (range(6, 7),)
    assert search.families([9.0, None], most=1.0) == []


def test_rounds_close_in_on_the_deepest_map_within_the_limit() -> None:
    losses = {number: 2.0 + number / 10 for number in range(20)}
    known = {number: losses[number] for number in (9, 19)}
    rounds = 0
    while numbers := search.next_round(known, 2.65, 3):
        known |= {number: losses[number] for number in numbers}
        rounds += 1
    assert max(number for number, loss in known.items() if loss <= 2.65) == 6
    assert len(known) < 10
    assert search.next_round({19: 2.0}, 2.65, 3) == []  # the deepest of all is within
    assert search.next_round({0: 3.0, 4: 3.0}, 2.65, 3) == []  # and none is


def test_what_a_layer_costs_decides_whether_it_is_borne() -> None:
    one = Doublings(StartRule.parse("half"), (3.0, 2.1, None, float("inf"), 2.0), 2.0, 0.5)
    assert one.not_borne == (0, 2, 3)
    assert one.costs[1] == pytest.approx(0.1)
    assert one.costs[2:4] == (None, None)


def test_what_cannot_be_is_one_line(model: Path, corpus: Path) -> None:
    for options, said, code in (
        (("--start", "loud"), "is not a start", 2),
        (("--start", "half,"), "is not a start", 2),
        (("--start", "identity", "--search"), "nothing to find with --start identity", 2),
        (("--double", "3:9", "--start", "half"), "beyond the base", 1),
        (("--layers", "0:7", "--start", "half"), "this map has no layer of the base twice", 1),
    ):
        run = forked_dus("probe", model, "--data", corpus, *options)
        run.assert_one_line_error(said, code=code)

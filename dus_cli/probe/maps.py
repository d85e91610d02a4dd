"""Which maps are measured, each checked as `dus upscale` checks it. Only headers are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dus_cli.errors import CheckpointError, ConfigError, LayerMapError
from dus_cli.maps.engines import Engine
from dus_cli.maps.layers import LayerMap, largest_trim, stack
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import flops_per_token, shape_of
from dus_cli.maps.starts import COPY, IDENTITY, StartRule
from dus_cli.planning.judging import Judged
from dus_cli.planning.plan import MapRequest, UpscalePlan, make_plan
from dus_cli.probe.options import ProbeOptions
from dus_cli.probe.tree import Step
from dus_cli.source.checkpoint import Checkpoint


@dataclass(frozen=True)
class Cost:
    """The size of a model, and the FLOPs of its forward pass for one token of a row."""

    num_layers: int
    num_parameters: int
    num_bytes: int
    flops_per_token: float


@dataclass(frozen=True)
class MapCandidate:
    """A map, the options that make it, and its cost; or the reason why `dus upscale` refuses it.

    `engines` has a verdict for each inference engine. `factors` has one number for each output
    layer, which multiplies what the layer adds to the residual stream; `scaled` says which tensors
    carry it (`planning.post_norms`).
    """

    layer_map: LayerMap
    options: str
    cost: Cost | None
    refused: str | None = None
    engines: tuple[Judged, ...] = ()
    start: StartRule = COPY
    factors: tuple[float, ...] = ()
    scaled: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The map's name in a table, without its start."""
        if self.layer_map.trim is not None:
            return f"trim {self.layer_map.trim}"
        words = self.options.split()
        return f"double {words[1]}" if words[0] == "--double" else str(self.layer_map)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The base's layers in the order of the output, each with its factor; layers that add
        nothing are left out.
        """
        factors = self.factors or (1.0,) * len(self.layer_map)
        return tuple(
            (base, factor)
            for base, factor in zip(self.layer_map.sources, factors, strict=True)
            if factor
        )

    @property
    def wrong(self) -> tuple[Engine, ...]:
        """The inference engines that would not compute the output as config.json says."""
        return tuple(judged.engine for judged in self.engines if judged.verdict.is_wrong)

    def is_right_for(self, engines: Sequence[str]) -> bool:
        """Whether every one of these engines computes it as config.json says."""
        return not any(engine.name in engines for engine in self.wrong)


def wanted_requests(options: ProbeOptions, num_layers: int) -> list[MapRequest]:
    """The maps that the options name; those of a search come later.

    Raises:
        LayerMapError: no trim of the range makes this model deeper.
    """
    requests = [MapRequest(layers=text, assume=options.assume) for text in options.layers]
    requests += [MapRequest(double=text, assume=options.assume) for text in options.double]
    if options.trims is not None or not (requests or (options.search and options.starts)):
        requests = [*_trims(options, num_layers), *requests]
    return [
        started(request, start)
        for start in dict.fromkeys(options.starts or (COPY,))
        for request in requests
    ]


def started(request: MapRequest, start: StartRule) -> MapRequest:
    """Give a map this start."""
    if start.name == IDENTITY:
        return replace(request, identity=True)
    return replace(request, start=start)


def _trims(options: ProbeOptions, num_layers: int) -> list[MapRequest]:
    most = largest_trim(num_layers)
    first, end = options.trims or (0, None)
    span = range(first, min(most + 1, most + 1 if end is None else end))
    if not span:
        raise LayerMapError(
            f"--trims {first}: would leave {num_layers} layers no deeper; use 0:{most + 1}"
        )
    return [MapRequest(trim, copies=options.copies, assume=options.assume) for trim in span]


def check(of_base: UpscalePlan, request: MapRequest, seq_length: int) -> MapCandidate:
    """Check a map as `dus upscale` does.

    Raises:
        LayerMapError: it is no map of this base at all.
    """
    layer_map = request.resolve(of_base.layer_map.num_base_layers)
    options = options_of(layer_map, request)
    start = _start_of(request)
    refusals = () if start == COPY else (CheckpointError, LayerMapError)
    try:
        plan = make_plan(of_base.base, of_base.checkpoint, request)
    except (ConfigError, *refusals) as error:
        return MapCandidate(layer_map, options, None, str(error), start=start)
    treatment = plan.treatment
    silent = treatment.new_layers if treatment.zeros else frozenset()
    return MapCandidate(
        layer_map,
        options,
        cost_of(plan, seq_length),
        engines=plan.engines,
        start=start,
        factors=tuple(float(layer not in silent) for layer in range(len(layer_map)))
        if silent
        else treatment.factors,
        scaled=treatment.scaled,
    )


def options_of(layer_map: LayerMap, request: MapRequest) -> str:
    """The options of `dus upscale` that make this map."""
    copies = f" --copies {request.copies}" if request.copies != 2 else ""
    assume = "".join(f" --assume {field}={value}" for field, value in request.assume)
    said = f"--layers {layer_map}" if layer_map.trim is None else f"--trim {layer_map.trim}"
    if request.double is not None:
        said = f"--double {request.double}"
    start = _start_of(request)
    begins = "" if start == COPY else f" --start {start}"
    return f"{said}{copies}{begins}{assume}"


def _start_of(request: MapRequest) -> StartRule:
    return StartRule(IDENTITY) if request.identity else request.start


def cost_of(plan: UpscalePlan, seq_length: int) -> Cost:
    """The cost of the plan's model."""
    decoder = decoder_config(plan.config)
    shape = shape_of(decoder.fields, plan.num_parameters, len(plan.layer_map))
    # A forward pass is a third of a training step's FLOPs.
    return Cost(
        len(plan.layer_map),
        plan.num_parameters,
        plan.num_data_bytes,
        flops_per_token(shape, seq_length) / 3,
    )


def nearest(distances: Sequence[Sequence[float]], best: int) -> list[LayerMap]:
    """Choose which of all maps [0,a)+[b,n) to measure, by the distances between depths, (n + 1, n +
    1).

    For each depth, take the map whose layers meet at the smallest distance. Of these, return the
    `best` whose distance is smallest relative to the depthwise scaling of the same depth (or of one
    layer less, if there is none). Depthwise scalings themselves are left out.
    """
    n = len(distances) - 1
    closest: dict[int, tuple[float, int, int]] = {}
    for a in range(1, n + 1):
        for b in range(a):
            if a + b != n:
                closest[a - b] = min(
                    closest.get(a - b, (float("inf"), 0, 0)), (distances[a][b], a, b)
                )
    ranked = []
    for extra, (distance, a, b) in closest.items():
        trim = (n - extra + 1) // 2
        other = stack(n, trim) if trim * 2 < n else None
        usual = distances[n - trim][trim] if other is not None else distance
        ranked.append((distance / usual if usual else 1.0, a, b))
    return [LayerMap((*range(a), *range(b, n)), n) for _, a, b in sorted(ranked)[:best]]


def width_of(checkpoint: Checkpoint) -> int:
    """The size of a hidden state; if config.json does not say it under a known name, that of a
    large model.
    """
    return shape_of(decoder_config(checkpoint.config).fields, 0, 0).hidden_size or 8192

"""Run an output on tokens and compare it with its base, layer by layer. This works for every
architecture, without the tables of `maps`.

transformers loads both models, one after the other, with the weights of one layer at a time. The
output runs first. Then the base runs, and each of its layers is also called on the input of each of
its copies in the output: it must return what the copy returned. If every layer does so to the bit,
the output's logits are those of the base's layers called in the map's order. If one does not, the
layers are called in that order, to measure how far the logits differ.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dus_cli.data.sample import read_sample
from dus_cli.data.tokeniser import UNKNOWN_VOCABULARY, open_tokeniser, tokenizer_identity
from dus_cli.errors import DataError, ReplayError, VerificationError
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import context_length, vocab_size
from dus_cli.maps.stacks import LayerStack, find_stack
from dus_cli.models import weights
from dus_cli.models.replay import Ready, Replay, Step
from dus_cli.progress import Progress
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint
from dus_cli.verification.origin import OutputOrigin
from dus_cli.verification.report import Forward

# The text that is run without --data; it is repeated if it is too short.
TEXT = """\
In the spring the river rose above the lower road, and for nine days the only way into town was the
railway bridge. People carried flour, letters and lamp oil across it in handcarts, 40 loads a day by
the station master's count, and nobody was charged. On the tenth day the water fell as quickly as it
had come. "We should build the next road higher," the engineer said, "or the next house." They did
neither, as the minutes of the council show: 7 were for it, 8 against, and 2 had gone home early.
"""

# The least number of tokens, if the model has positions for them; and the widest attention window
# that is always exceeded. Only more tokens than a window shows whether a layer has it.
_TOKENS = 128
_WIDEST = 1024

# The least number of different tokens: attention over equal values shows no difference.
_DIFFERENT = 16

_WINDOW = re.compile(r"(window|chunk)(_size)?$")

# The difference that is allowed for fp32 rounding in another kernel, relative to the largest number
# compared.
_ROUNDING = 1e-6

# The relative spacing of the numbers of a dtype: a number that was multiplied is off by half of it.
_EPSILON = {"BF16": 2**-8, "F16": 2**-11, "F32": 2**-23}


class _Layer(NamedTuple):
    """A layer of the output that ran: its number, its base layer, and the factor on that."""

    output: int
    source: int
    factor: float


@dataclass
class _OutputRun:
    """The run of the output.

    Attributes:
        layers: the layers that ran, in order.
        states: the hidden states before each of them, and after the last; each has the shape
            (1, tokens, width).
        start: the hidden states before the first layer, as the model makes them.
        logits: of the last positions.
    """

    layers: list[_Layer]
    states: list[Tensor]
    start: Tensor
    logits: Tensor


def run_forward(
    folder: Path, origin: OutputOrigin, data: Sequence[str], progress: Progress
) -> Forward:
    """Run an output, and compare its layers with its base's.

    Args:
        folder: the output.
        origin: its base, and how it was made.
        data: files of text, as `--data` takes them; empty for the built-in text.
        progress: receives the number of layers done.

    Raises:
        VerificationError: the model's layers cannot be called one by one.
        LoadError, ProbeError: transformers cannot load or run one of the models.
        DataError: the data cannot be read.
    """
    output = open_checkpoint(folder)
    stack, _ = find_stack(
        (tensor.name for _, tensor in output.tensors()),
        decoder_config(output.config),
        recorded=origin.treatment.layer_prefix,
    )
    ids = _token_ids(origin.base, data)
    progress.start(
        "running layers", len(origin.layer_map) + origin.layer_map.num_base_layers, "layers"
    )
    try:
        with torch.no_grad():
            mine = _run_output(output, stack, origin, ids, progress)
            return _BaseRun(mine, origin, _least_dtype(output)).run(ids, progress)
    except ReplayError as error:
        raise VerificationError(
            f"--forward cannot compare {error}; leave it out: the bytes and config.json are "
            "compared without it"
        ) from error


def _run_output(
    output: Checkpoint, stack: LayerStack, origin: OutputOrigin, ids: Tensor, progress: Progress
) -> _OutputRun:
    layers, states = list[_Layer](), list[Tensor]()

    def keep(step: Step) -> None:
        source = origin.layer_map.sources[step.number]
        layers.append(_Layer(step.number, source, origin.factor(step.number)))
        states.append(step.before)
        progress.advance(1)

    model, ready = _loaded(output, stack)
    replay = Replay(model, stack.num_layers, ids, ready, on_layer=keep, called="the model")
    run = _OutputRun(layers, [*states, replay.after], replay.start, replay.logits)
    del model, ready, replay
    gc.collect()  # modules refer to themselves, and two embeddings need not fit
    return run


def _loaded(
    checkpoint: Checkpoint, stack: LayerStack, stored: torch.dtype | None = None
) -> tuple[Any, Ready]:
    """A model in fp32, with the weights of one layer at a time if possible."""
    device = torch.device("cpu")
    try:
        return weights.stream(checkpoint, stack, torch.float32, device, stored)
    except ReplayError:
        return weights.load(checkpoint, torch.float32, device, stored)


def _least_dtype(output: Checkpoint) -> float:
    """The relative spacing of the numbers of the output's least exact dtype."""
    return max((_EPSILON.get(tensor.dtype, 0.0) for _, tensor in output.tensors()), default=0.0)


class _BaseRun:
    """Runs the base, and compares its layers with a run of the output."""

    def __init__(self, mine: _OutputRun, origin: OutputOrigin, epsilon: float) -> None:
        self._mine, self._origin, self._epsilon = mine, origin, epsilon
        self._copies: dict[int, list[int]] = {}
        for place, layer in enumerate(mine.layers):
            self._copies.setdefault(layer.source, []).append(place)
        self._compared: dict[int, tuple[float, float, bool]] = {}

    def run(self, ids: Tensor, progress: Progress) -> Forward:
        dtype = self._origin.treatment.dtype
        stored = None if dtype is None else getattr(torch, dtype.value)
        model, ready = _loaded(self._origin.base, self._origin.stack(), stored)

        def compare_copies(step: Step) -> None:
            for place in self._copies.get(step.number, ()):
                self._compare(place, step)
            progress.advance(1)

        base = Replay(
            model, self._origin.layer_map.num_base_layers, ids, ready, on_layer=compare_copies
        )
        tail = base.finish_last(ids, self._mine.states[-1])
        ends = {
            "the part before the first layer": (base.start, self._mine.start),
            "the part after the last layer": (tail, self._mine.logits),
        }
        apart = [
            self._mine.layers[place] for place in sorted(self._compared) if self._compared[place][2]
        ]
        is_exact = all(torch.equal(*pair) for pair in ends.values()) and not any(
            size for size, _, _ in self._compared.values()
        )
        first = None if not apart else apart[0]
        place = None if first is None else self._mine.layers.index(first)
        return Forward(
            tokens=ids.shape[1],
            layers=len(self._mine.layers),
            is_exact=is_exact,
            num_apart=len(apart),
            first=None if first is None else (first.output, first.source),
            difference=0.0 if place is None else self._compared[place][0],
            added=0.0 if place is None else self._compared[place][1],
            ends=tuple(name for name, pair in ends.items() if _apart(*pair)[2]),
            logits=0.0 if is_exact else self._logits_apart(base, ready, ids),
            wider=_wider(self._origin.base, ids.shape[1]),
        )

    def _compare(self, place: int, step: Step) -> None:
        """Compare a layer of the output with the base layer that has its weights now."""
        layer, before = self._mine.layers[place], self._mine.states[place]
        if layer.factor == 1 and torch.equal(before, step.before):
            expected = step.after
        else:
            expected = step.run(before, layer.factor)
        added = float((expected - before).abs().max())
        epsilon = self._epsilon if layer.factor not in (0, 1) else 0.0
        size, _, is_apart = _apart(expected, self._mine.states[place + 1], 4 * epsilon * added)
        self._compared[place] = size, added, is_apart

    def _logits_apart(self, base: Replay, ready: Ready, ids: Tensor) -> float:
        """The largest difference between the output's logits and those of the base's layers called
        in the map's order.
        """
        base.take([ids])
        hidden = base.start
        for layer in self._mine.layers:
            with ready(layer.source):
                hidden = base.layer(layer.source, 0, hidden, layer.factor)
        return _apart(base.finish_last(ids, hidden), self._mine.logits)[0]


def _apart(expected: Tensor, actual: Tensor, allowed: float = 0.0) -> tuple[float, float, bool]:
    """Compare two tensors: the largest difference, the largest expected number, and whether they
    differ by more than rounding.
    """
    if expected.shape != actual.shape:
        return float("inf"), 0.0, True
    size, largest = float((expected - actual).abs().max()), float(expected.abs().max())
    return size, largest, not size <= allowed + _ROUNDING * largest


# --- the tokens ---------------------------------------------------------------------------------


def _token_ids(base: Checkpoint, data: Sequence[str]) -> Tensor:
    """One row of token ids, of shape (1, tokens): of the data, or of the built-in text; without a
    tokenizer, made up.
    """
    fields = decoder_config(base.config).fields
    words, length = vocab_size(base.config, fields), _num_tokens(fields)
    if data:
        tokeniser = open_tokeniser(base.folder, words)
        (ids,) = tokeniser.encode(["\n".join(read_sample(data, tokeniser, length).texts)])
        return torch.tensor([[*tokeniser.before, *ids][:length]])
    ids = _built_in_ids(base, words)
    if len(set(ids)) < _DIFFERENT:
        ids = [(number * 7919 + 1) % (words or _DIFFERENT) for number in range(length)]
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]])


def _built_in_ids(base: Checkpoint, words: int | None) -> list[int]:
    """Token ids of the built-in text; [] if there is no tokenizer that fits the vocabulary."""
    try:
        # raises without tokenizer files, from which transformers would make up a tokenizer
        tokenizer_identity(base.folder)
        tokeniser = open_tokeniser(base.folder, words)
    except DataError:
        return []
    (ids,) = tokeniser.encode([TEXT])
    return [*tokeniser.before, *ids] if max(ids, default=0) < (words or UNKNOWN_VOCABULARY) else []


def _num_tokens(fields: dict[str, Any]) -> int:
    """The number of tokens: more than each attention window up to _WIDEST, within the model's
    positions.
    """
    narrow = max((width for width in _windows(fields) if width <= _WIDEST), default=0)
    return min(max(_TOKENS, narrow + narrow // 16 + 8), context_length(fields) or _WIDEST)


def _wider(base: Checkpoint, num_tokens: int) -> int | None:
    """An attention window that is not narrower than these tokens, if layers differ in kind."""
    fields = decoder_config(base.config).fields
    kinds = fields.get("layer_types")
    differ = isinstance(kinds, list) and any(kind != kinds[0] for kind in kinds)
    return next((width for width in _windows(fields) if differ and width >= num_tokens), None)


def _windows(fields: dict[str, Any]) -> Iterator[int]:
    """The widths of attention that a decoder's config names, in tokens."""
    for name, value in fields.items():
        if _WINDOW.search(name) and type(value) is int and value > 0:
            yield value

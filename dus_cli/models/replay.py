"""A model's layers called one by one, each with the arguments that the model itself passes to it.

The arguments besides the hidden states (masks, rotary angles, the layer's kind) are recorded from
the model's own forward once per batch; then any layer can be called on any hidden states. What
comes before and after the layers is computed by the model's forward, with stand-ins for the layers.

That is correct only if nothing happens to the hidden states between two layers, and nothing else
passes from layer to layer. Both are checked at run time.
"""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dus_cli.errors import ProbeError, ReplayError, reason_of, shown, shown_list
from dus_cli.models.decoder import layers_of
from dus_cli.models.residual import scaled_residual

# The last positions of a row, on which two computations of the same loss are compared.
COMPARED = 64

# A context in which the layer of this number has its weights.
Ready = Callable[[int], AbstractContextManager[object]]

# A context in which the layer of this number, which has its weights, adds a factor times as much.
Scaled = Callable[[int, float], AbstractContextManager[object]]

# The base in an error about it.
_BASE = "the base itself, with no map,"

# Types of arguments that are compared by ==.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """The arguments of a layer except its hidden states, which are the first argument or
    `hidden_states`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_positional: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        named = {key: value for key, value in kwargs.items() if args or key != "hidden_states"}
        return cls(_snapshot(args[1:]), _snapshot(named), bool(args))

    def on(self, forward: Callable[..., Any], hidden: Tensor) -> Any:
        """Call the layer. It gets copies of dicts, because it may write into them."""
        kwargs = _snapshot(self.kwargs)
        if self.is_positional:
            return forward(hidden, *_snapshot(self.args), **kwargs)
        return forward(hidden_states=hidden, **kwargs)


@dataclass(frozen=True)
class Step:
    """One layer as it ran on the example; passed to `on_layer` while the layer has its weights.

    Attributes:
        number: of the layer.
        before: its input hidden states, (rows, length, width).
        after: its output hidden states.
        run: calls it on other hidden states, with a factor on what it adds to them.
    """

    number: int
    before: Tensor
    after: Tensor
    run: Callable[[Tensor, float], Tensor]


@dataclass
class _Interned:
    """Keeps one of all equal tensors among the arguments of batches and layers."""

    known: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            alike = self.known.setdefault((value.shape, value.dtype, value.device), [])
            same = next(
                (other for other in alike if other is value or torch.equal(other, value)), None
            )
            if same is None:
                alike.append(value)
            return value if same is None else same
        if isinstance(value, dict):
            return {key: self(entry) for key, entry in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self(entry) for entry in value)
        return value


class Replay:
    """A causal language model of transformers whose layers are called by number.

    Args:
        model: in evaluation mode.
        num_layers: of the decoder.
        example: token ids, (rows, length); every batch has this shape.
        ready: a context in which the layer of a number has its weights.
        on_layer: called with each layer's Step while the model runs on the example.
        called: the model's name in an error about it.

    Attributes:
        start: the example's hidden states before the first layer.
        after: the example's hidden states after the last layer.
        logits: the model's logits at the example's last positions.
        starts: for each batch passed to `take`, the hidden states before the first layer.

    Raises:
        ReplayError: the layers cannot be called one by one with the same result.
        ProbeError: transformers cannot run the model, or it computes NaN.
    """

    def __init__(
        self,
        model: Any,
        num_layers: int,
        example: Tensor,
        ready: Ready,
        *,
        on_layer: Callable[[Step], object] = lambda _: None,
        called: str = _BASE,
    ) -> None:
        self.model, self._called = model, called
        self.layers = layers_of(model, num_layers)
        self._forwards = [layer.forward for layer in self.layers]
        parameters = inspect.signature(model.forward).parameters
        takes_cache = "use_cache" in parameters or any(
            p.kind is p.VAR_KEYWORD for p in parameters.values()
        )
        self._settings: dict[str, Any] = {"use_cache": False} if takes_cache else {}
        self._returns: list[Any] = [None] * num_layers
        self._works_in_place: set[int] = set()
        self._batches: list[Tensor] = []
        self._calls: list[list[Call | None]] = []
        self.starts: list[Tensor | None] = []
        calls, self.after, self.logits = self._watch(example, ready, on_layer)
        self.start, without = self._stand_in(example)
        self._check_independent(example, ready, calls, without)

    def take(self, batches: Sequence[Tensor]) -> None:
        """Record, for other batches, the hidden states before the first layer and the arguments of
        each layer.
        """
        intern = _Interned()
        self._batches, self.starts, self._calls = list(batches), [], []
        for batch in batches:
            start, calls = self._stand_in(batch)
            self.starts.append(start)
            self._calls.append(
                [c and replace(c, args=intern(c.args), kwargs=intern(c.kwargs)) for c in calls]
            )

    @property
    def model_type(self) -> str:
        return shown(self.model.config.get_text_config().model_type)

    def layer(self, number: int, batch: int, hidden: Tensor, factor: float = 1.0) -> Tensor:
        """The hidden states after layer `number`, called as in the model on hidden states of that
        batch, with `factor` on what it adds to them.
        """
        call = self._calls[batch][number]
        return hidden if call is None else self.run(number, call, hidden, factor)

    def run(self, number: int, call: Call, hidden: Tensor, factor: float = 1.0) -> Tensor:
        """The hidden states after layer `number`, called with these arguments."""
        if number in self._works_in_place:
            hidden = hidden.clone()
        with scaled_residual(hidden, factor):
            return _hidden_of(call.on(self._forwards[number], hidden))

    def finish(self, ids: Tensor, hidden: Tensor) -> Any:
        """The model's own output for these ids, with these hidden states after the last layer."""

        def stand_in(number: int) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: self._output(number, hidden)

        with self._replaced([stand_in(number) for number in self._numbers]):
            return self._run(ids)

    def finish_last(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits at the last positions, with these hidden states after the last layer."""
        with last_positions(self.model):
            logits: Tensor = self.finish(ids, hidden).logits
        return logits

    @property
    def _numbers(self) -> range:
        return range(len(self.layers))

    def _output(self, number: int, hidden: Tensor) -> Any:
        """A layer's return value with these hidden states in it, and zeros for everything else."""
        returned = self._returns[number]
        if returned is None:
            return hidden
        return type(returned)((hidden, *_zeros(list(returned[1:]))))

    def _run(self, ids: Tensor) -> Any:
        try:
            return self.model(input_ids=ids, **self._settings)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
            raise ProbeError(
                f"transformers cannot run model_type {self.model_type} on text alone: "
                f"{reason_of(error)}"
            ) from error

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        try:
            for layer, forward in zip(self.layers, forwards, strict=True):
                layer.forward = forward
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _watch(
        self, ids: Tensor, ready: Ready, on_layer: Callable[[Step], object]
    ) -> tuple[list[Call | None], Tensor, Tensor]:
        """Run the model on one batch: the call of each layer, the hidden states after the last
        layer, and the logits.
        """
        calls: list[Call | None] = [None] * len(self.layers)
        after: list[Tensor] = []

        def watched(number: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.get("hidden_states")
                if not isinstance(hidden, Tensor):
                    raise self._refusal(f"layer {number} does not take hidden states as a tensor")
                if after and not torch.equal(after[-1], hidden):
                    raise self._refusal(f"the hidden states change before layer {number}")
                if any(calls[number:]):
                    raise self._refusal(f"layer {number} is not called once and in order")
                mine, before = Call.of(args, kwargs), hidden.clone()
                calls[number] = mine
                with ready(number):
                    output = self._forwards[number](*args, **kwargs)
                    states = _hidden_of(output)
                    self._check_finite(number, before, states)
                    if not isinstance(states, Tensor) or type(output) not in (Tensor, tuple, list):
                        raise self._refusal(f"layer {number} does not return hidden states")
                    if not torch.equal(before, hidden):
                        self._works_in_place.add(number)
                    on_layer(Step(number, before, states, partial(self.run, number, mine)))
                self._returns[number] = None if isinstance(output, Tensor) else output
                after[:] = [states]
                return output

            return call

        with (
            self._replaced([watched(number) for number in self._numbers]),
            last_positions(self.model),
        ):
            logits: Tensor = self._run(ids).logits
        if not after:
            raise self._refusal("its layers are not called")
        return calls, after[0], logits

    def _stand_in(self, ids: Tensor) -> tuple[Tensor, list[Call | None]]:
        """Run the model with stand-ins for its layers: the hidden states before the first layer,
        and the call of each.
        """
        calls: list[Call | None] = [None] * len(self.layers)
        start: list[Tensor] = []

        def stand_in(number: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                start.append(hidden)
                calls[number] = Call.of(args, kwargs)
                return self._output(number, hidden)

            return call

        with (
            self._replaced([stand_in(number) for number in self._numbers]),
            last_positions(self.model),
        ):
            self._run(ids)
        return start[0], calls

    def _check_independent(
        self,
        ids: Tensor,
        ready: Ready,
        real: Sequence[Call | None],
        without: Sequence[Call | None],
    ) -> None:
        """Check that layers use nothing of other layers but hidden states: a layer called with the
        arguments `without` real layers must return the same as with the `real` ones.
        """
        other_calls: dict[int, Call] = {}
        for number, (mine, other) in enumerate(zip(real, without, strict=True)):
            if (mine is None) != (other is None):
                raise self._refusal(f"whether layer {number} is called depends on other layers")
            if (
                mine is not None
                and other is not None
                and not _same([mine.args, mine.kwargs], [other.args, other.kwargs])
            ):
                other_calls[number] = other

        def check(step: Step) -> None:
            if step.number in other_calls and not self._ignores(step, other_calls[step.number]):
                raise self._refusal(
                    f"layer {step.number} gets more from other layers than hidden states"
                )

        if other_calls:
            self._watch(ids, ready, check)

    def _ignores(self, step: Step, other: Call) -> bool:
        """Whether a layer returns the same if it is called with other arguments."""
        try:
            after = self.run(step.number, other, step.before)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
            return False  # it needs an argument that came from another layer
        return torch.equal(after, step.after)

    def _check_finite(self, number: int, before: Tensor, after: Any) -> None:
        """Check that hidden states are finite, because NaN would fail every comparison.

        Raises:
            ProbeError: they are not, before or after this layer.
        """
        if not torch.isfinite(before).all():
            raise damaged(f"before layer {number}", self.model, called=self._called)
        if isinstance(after, Tensor) and not torch.isfinite(after).all():
            raise damaged(
                f"after layer {number}",
                self.layers[number],
                f"layer {number}: ",
                called=self._called,
            )

    def _refusal(self, what: str) -> ReplayError:
        return ReplayError(f"model_type {self.model_type}: {what}")


def damaged(where: str, module: nn.Module, prefix: str = "", *, called: str = _BASE) -> ProbeError:
    """The error for a model, by default the base, that computes NaN; it names the weights of the
    module that are NaN or infinite.
    """
    names = [
        f"{prefix}{name}"
        for name, parameter in module.named_parameters()
        if not parameter.is_meta
        and parameter.is_floating_point()
        and not torch.isfinite(parameter).all()
    ]
    what = f"{called} computes NaN or infinite numbers {where}"
    if names:
        return ProbeError(
            f"{what}: weights in {shown_list(names)} are damaged; fetch or save it again"
        )
    return ProbeError(
        f"{what}, though its weights there are finite: they are beyond this precision; try "
        "--precision fp32"
    )


@contextmanager
def last_positions(model: Any) -> Iterator[None]:
    """A context in which the model gives logits for its last `COMPARED` positions only, because
    those of all positions would take gigabytes.
    """
    output = model.get_output_embeddings()
    if output is None:
        yield
        return
    project = output.forward
    output.forward = lambda hidden: project(hidden[:, -COMPARED:])
    try:
        yield
    finally:
        del output.forward


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _snapshot(value: Any) -> Any:
    """The same arguments with copied dicts, because a layer may write into them."""
    if type(value) is dict:
        return {key: _snapshot(entry) for key, entry in value.items()}
    if isinstance(value, UserDict):  # the keys and values that Gemma's layers share
        return type(value)({key: _snapshot(entry) for key, entry in value.items()})
    return tuple(map(_snapshot, value)) if type(value) is tuple else value


def _zeros(value: Any) -> Any:
    """The same structure with zeros in all tensors, so that a layer that uses them computes
    something else and is noticed.
    """
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: _zeros(entry) for key, entry in value.items()}
    return type(value)(_zeros(entry) for entry in value) if type(value) in (tuple, list) else value


def _same(left: Any, right: Any) -> bool:
    """Whether two arguments are equal. Objects of unknown types are never equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            _same(value, right[key]) for key, value in left.items()
        )
    if isinstance(left, (tuple, list)) and type(left) is type(right):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, _PLAIN) and type(left) is type(right) and bool(left == right)

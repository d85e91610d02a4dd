"""A model's layers called one by one, each as the model calls it in its own place.

The model's own forward says what a layer is handed besides the hidden states: masks, rotary angles,
its kind. That is written down once for each batch of rows; then any layer can be called on any
hidden states. What comes before the layers and behind them is left to the model's forward as well,
with stand-ins for the layers.

Two things must hold for that to mean anything, and are held at run time: between two layers nothing
happens to the hidden states, and nothing else passes from layer to layer.
"""

from __future__ import annotations

import inspect
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

# Positions of a row on which ways to the same loss are compared.
COMPARED = 64

# A context in which the numbered layer has its weights.
Ready = Callable[[int], AbstractContextManager[object]]

# A context in which the numbered layer, which has its weights, adds so much times what it adds.
Scaled = Callable[[int, float], AbstractContextManager[object]]

# The model that everything is measured against, in an error about it.
_BASE = "the base itself, with no map,"

# What may stand in a call and says nothing of tensors.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """How a layer is called, its hidden states aside: they are the first argument, or
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
        """What the layer returns. It gets copies of dicts, for it may put something into them."""
        kwargs = _snapshot(self.kwargs)
        if self.is_positional:
            return forward(hidden, *_snapshot(self.args), **kwargs)
        return forward(hidden_states=hidden, **kwargs)


@dataclass(frozen=True)
class Step:
    """One layer of the model as it ran on the example, told while it has its weights.

    Attributes:
        number: of the layer.
        before: the hidden states that it was given, (rows, length, width).
        behind: those that it returned.
        run: what it returns for others, called in the same way and adding a factor times what it
            would add.
    """

    number: int
    before: Tensor
    behind: Tensor
    run: Callable[[Tensor, float], Tensor]


@dataclass
class _Interned:
    """Tensors, each kept once however many batches and layers are handed an equal one."""

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
        example: token ids (rows, length); every batch has this shape.
        ready: a context in which the numbered layer has its weights.
        on_layer: told of each layer of the model as it is, on the example.
        called: what the model is called in an error about itself.

    Attributes:
        start: of the example, the hidden states before the first layer.
        behind: of the example, the hidden states behind the last layer.
        logits: of the example, as the model gives them for the last positions.
        starts: of each batch that was taken, the hidden states before the first layer.

    Raises:
        ReplayError: the model cannot be taken apart like this. Nothing wrong is ever computed
            instead.
        ProbeError: transformers cannot run it, or it computes NaN.
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
        calls, self.behind, self.logits = self._watch(example, ready, on_layer)
        self.start, without = self._stand_in(example)
        self._hold_apart(example, ready, calls, without)

    def take(self, batches: Sequence[Tensor]) -> None:
        """Go over to other rows: where each batch starts, and how layers are called on it."""
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
        """The hidden states behind layer `number`, called as it is in the model, on hidden
        states of that batch.

        It adds `factor` times what it would add to them.
        """
        call = self._calls[batch][number]
        return hidden if call is None else self.run(number, call, hidden, factor)

    def run(self, number: int, call: Call, hidden: Tensor, factor: float = 1.0) -> Tensor:
        """The hidden states behind layer `number`, called like this."""
        if number in self._works_in_place:
            hidden = hidden.clone()
        with scaled_residual(hidden, factor):
            return _hidden_of(call.on(self._forwards[number], hidden))

    def finish(self, ids: Tensor, hidden: Tensor) -> Any:
        """The model's own output for these ids, with these hidden states behind the last layer."""

        def standing(number: int) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: self._output(number, hidden)

        with self._replaced([standing(number) for number in self._numbers]):
            return self._run(ids)

    def finish_last(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits of the last positions, as `logits`, with these hidden states behind the last
        layer.
        """
        with last_positions(self.model):
            found: Tensor = self.finish(ids, hidden).logits
        return found

    @property
    def _numbers(self) -> range:
        return range(len(self.layers))

    def _output(self, number: int, hidden: Tensor) -> Any:
        """What a layer returns, with these hidden states in it. All else that it would return is
        zeros.
        """
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
        """The model as it is, on one batch: how each layer was called, what is behind the last
        one, logits.
        """
        calls: list[Call | None] = [None] * len(self.layers)
        behind: list[Tensor] = []

        def watched(number: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.get("hidden_states")
                if not isinstance(hidden, Tensor):
                    raise self._refusal(f"layer {number} is not handed hidden states alone")
                if behind and not torch.equal(behind[-1], hidden):
                    raise self._refusal(
                        f"something happens to the hidden states before layer {number}"
                    )
                if any(calls[number:]):
                    raise self._refusal(f"layer {number} is not called once and in its turn")
                mine, before = Call.of(args, kwargs), hidden.clone()
                calls[number] = mine
                with ready(number):
                    output = self._forwards[number](*args, **kwargs)
                    states = _hidden_of(output)
                    self._hold_finite(number, before, states)
                    if not isinstance(states, Tensor) or type(output) not in (Tensor, tuple, list):
                        raise self._refusal(
                            f"layer {number} returns something else than hidden states"
                        )
                    if not torch.equal(before, hidden):
                        self._works_in_place.add(number)
                    on_layer(Step(number, before, states, partial(self.run, number, mine)))
                self._returns[number] = None if isinstance(output, Tensor) else output
                behind[:] = [states]
                return output

            return call

        with (
            self._replaced([watched(number) for number in self._numbers]),
            last_positions(self.model),
        ):
            logits: Tensor = self._run(ids).logits
        if not behind:
            raise self._refusal("its layers are not called")
        return calls, behind[0], logits

    def _stand_in(self, ids: Tensor) -> tuple[Tensor, list[Call | None]]:
        """The model without its layers: what stands before the first, and how each would be
        called.
        """
        calls: list[Call | None] = [None] * len(self.layers)
        start: list[Tensor] = []

        def standing(number: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                start.append(hidden)
                calls[number] = Call.of(args, kwargs)
                return self._output(number, hidden)

            return call

        with (
            self._replaced([standing(number) for number in self._numbers]),
            last_positions(self.model),
        ):
            self._run(ids)
        return start[0], calls

    def _hold_apart(
        self,
        ids: Tensor,
        ready: Ready,
        real: Sequence[Call | None],
        without: Sequence[Call | None],
    ) -> None:
        """Check that layers get nothing from other layers but hidden states, or make nothing of
        it: a layer called as `without` the others returns the same.
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

        def hold(step: Step) -> None:
            if step.number in other_calls and not self._ignores(step, other_calls[step.number]):
                raise self._refusal(
                    f"layer {step.number} is handed more from other layers than hidden states"
                )

        if other_calls:
            self._watch(ids, ready, hold)

    def _ignores(self, step: Step, other: Call) -> bool:
        """Whether a layer returns the same when it is called like this."""
        try:
            behind = self.run(step.number, other, step.before)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
            return False  # what it was not handed, it needs
        return torch.equal(behind, step.behind)

    def _hold_finite(self, number: int, before: Tensor, behind: Any) -> None:
        """Check that numbers of the base stay numbers: what is NaN equals nothing, not even itself.

        Raises:
            ProbeError: they do not, before this layer or in it.
        """
        if not torch.isfinite(before).all():
            raise damaged(f"before layer {number}", self.model, called=self._called)
        if isinstance(behind, Tensor) and not torch.isfinite(behind).all():
            raise damaged(
                f"behind layer {number}",
                self.layers[number],
                f"layer {number}: ",
                called=self._called,
            )

    def _refusal(self, what: str) -> ReplayError:
        return ReplayError(f"model_type {self.model_type}: {what}")


def damaged(where: str, module: nn.Module, prefix: str = "", *, called: str = _BASE) -> ProbeError:
    """An error about a model itself, by default the base, whatever the map: which of this module's
    weights is NaN or infinite.
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
    """The model gives logits for its last few positions only: those of all would be gigabytes."""
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
    found: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def _snapshot(value: Any) -> Any:
    """The same arguments with their own dicts, which a layer may write into."""
    if type(value) is dict:
        return {key: _snapshot(entry) for key, entry in value.items()}
    return tuple(map(_snapshot, value)) if type(value) is tuple else value


def _zeros(value: Any) -> Any:
    """The same shape of things, all tensors zero: what a map's layers may not hand on must not
    go unnoticed.
    """
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: _zeros(entry) for key, entry in value.items()}
    return type(value)(_zeros(entry) for entry in value) if type(value) in (tuple, list) else value


def _same(left: Any, right: Any) -> bool:
    """Whether two arguments say the same. Objects of which nothing is known do not."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(
            _same(value, right[key]) for key, value in left.items()
        )
    if isinstance(left, (tuple, list)) and type(left) is type(right):
        return len(left) == len(right) and all(map(_same, left, right))
    return isinstance(left, _PLAIN) and type(left) is type(right) and bool(left == right)

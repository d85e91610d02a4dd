"""The model under training: run for its hidden states, without full logits, or with some of its
layers only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from dus_cli.errors import HealError, ReplayError, shown
from dus_cli.models.losses import Head, check_head, head_of
from dus_cli.models.stopping import Brake

# Relative tolerance between hidden states that differ only in the order of bf16 sums.
_ROUNDING = 0.01


class Decoder:
    """A causal language model of transformers that returns hidden states instead of logits.

    The output embedding's forward is replaced by one that keeps its input, so that all hooks of
    FSDP still run in their order. The loss multiplies by the embedding chunk by chunk.

    Args:
        model: the model.
        num_layers: the number of its decoder layers.
        packs_rows: whether a batch's rows are passed to the model as a single row.
    """

    def __init__(self, model: Any, num_layers: int, *, packs_rows: bool = False) -> None:
        self.model = model
        self.output: nn.Module = model.get_output_embeddings()
        self.inner: Any = model.get_decoder()
        self.head: Head = head_of(self.inner.config)
        self._packs_rows = packs_rows
        self._name = stack_name(self.inner, num_layers)
        self._hidden: Tensor | None = None
        # Read before the first forward: after it FSDP may give the gathered parameters instead.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._project = self.output.forward

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self.inner, self._name)
        return layers

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The last hidden states, (rows, length, width), for ids and positions (rows, length).

        A document begins wherever positions restart; transformers masks attention accordingly.
        Without positions each row is one document.
        """
        rows, length = input_ids.shape
        positions = {} if position_ids is None else {"position_ids": position_ids}
        if self._packs_rows and position_ids is not None:
            input_ids, positions = (
                input_ids.reshape(1, -1),
                {"position_ids": position_ids.reshape(1, -1)},
            )
        self.output.forward = self._keep
        try:
            self.model(input_ids=input_ids, **positions, use_cache=False)
        finally:
            self.output.forward = self._project
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return hidden.reshape(rows, length, -1)

    def _keep(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        # the rest of the model's forward expects logits; FSDP's hooks do not work on a view
        return hidden[..., :1].clone()

    def brake_at_layers(self, brake: Brake, num_tokens: int) -> None:
        """Let a signal end a forward or backward pass after any layer.

        Every worker counts the FLOPs of `num_tokens` tokens, the most that a micro-batch has,
        whatever rows it has, so that all workers check for signals at the same layer.
        """
        layer_flops = [
            2.0 * num_tokens * sum(p.numel() for p in layer.parameters()) for layer in self.layers
        ]

        def after(flops: float, output: Any) -> None:
            brake.passed(flops)
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: brake.passed(2 * flops))  # type: ignore[no-untyped-call]

        for layer, flops in zip(self.layers, layer_flops, strict=True):
            layer.register_forward_hook(
                lambda _layer, _input, output, flops=flops: after(flops, output)
            )

    def check_loss(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Check that our loss equals the model's own, on a few tokens.

        This must be the first forward and a complete one: FSDP sets up its groups in it.

        Raises:
            HealError: the losses differ.
        """
        from dus_cli.models.losses import loss_sums

        labels = input_ids.roll(-1, dims=1)
        with torch.no_grad():
            logits = self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits
            theirs = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
            _, total, _ = loss_sums(
                self.hidden(input_ids, position_ids), self.output, labels, self.head
            )
        _join_tied(self.model)
        self.reshard()
        check_head(float(total) / labels.numel(), float(theirs), self.model.config.model_type)

    def check_documents(self, input_ids: Tensor) -> None:
        """Check that a document in a packed row has the same hidden states as alone.

        Raises:
            HealError: the architecture attends to other documents or ignores positions.
        """
        half = input_ids.shape[1] // 2
        own = torch.arange(input_ids.shape[1] - half, device=input_ids.device)
        positions = torch.cat([own[:half], own])[None]
        changed = torch.cat(
            [(input_ids[:, :half] + 1) % self.model.config.vocab_size, input_ids[:, half:]], 1
        )
        with torch.no_grad():
            first, other = (
                self.hidden(ids, positions)[:, half:].float() for ids in (input_ids, changed)
            )
            alone = self.hidden(input_ids[:, half:], own[None]).float()
        self.reshard()
        size = first.norm()
        if not (
            (first - other).norm() <= _ROUNDING * size
            and (first - alone).norm() <= 10 * _ROUNDING * size
        ):
            raise HealError(
                f"model_type {self.model.config.model_type!r} does not keep the documents of a row "
                "apart in transformers; give --no-document-mask"
            )

    def reshard(self) -> None:
        """Free gathered weights. FSDP keeps some after a forward, and these would go stale if the
        parameters change.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def only(self, layers: Sequence[int]) -> Iterator[None]:
        """Run with these layers only; per-layer fields of the config follow. With the layers of the
        base, the model at step 0 has the base's loss.
        """
        all_layers, config = self.layers, self.inner.config
        lists = _by_layer(config, len(all_layers))
        try:
            self._select(layers)
            yield
        finally:
            setattr(self.inner, self._name, all_layers)
            config.num_hidden_layers = len(all_layers)
            for key, value in lists.items():
                setattr(config, key, value)

    def _select(self, layers: Sequence[int]) -> None:
        all_layers, config = self.layers, self.inner.config
        setattr(self.inner, self._name, nn.ModuleList([all_layers[i] for i in layers]))
        for key, value in _by_layer(config, len(all_layers)).items():
            setattr(config, key, [value[i] for i in layers])
        config.num_hidden_layers = len(layers)

    def keep_only(self, layers: Sequence[int]) -> None:
        """Drop all other layers for good and free them."""
        self._select(layers)
        self.parameters = dict(self.model.named_parameters())

    def train_only(self, layers: Sequence[int] | None, frozen: Collection[str] = ()) -> None:
        """Train the parameters of these layers only (None: all parameters), except those whose
        names are in `frozen`.
        """
        self.reshard()  # FSDP reads requires_grad when it gathers
        learning = (
            None if layers is None else {id(p) for i in layers for p in self.layers[i].parameters()}
        )
        for name, parameter in self.parameters.items():
            learns = learning is None or id(parameter) in learning
            parameter.requires_grad_(learns and name not in frozen)


def _by_layer(config: Any, num_layers: int) -> dict[str, Sequence[Any]]:
    """The config's fields that have an entry for each layer."""
    fields = vars(config).items()
    return {
        key: value
        for key, value in fields
        if isinstance(value, (list, tuple)) and len(value) == num_layers
    }


def stack_name(inner: nn.Module, num_layers: int) -> str:
    """The name under which a decoder holds its layers: layers, h, blocks or another.

    Raises:
        HealError: the decoder itself holds no list of as many layers.
    """
    found = _stack(inner, num_layers)
    if found is None or found[0] is not inner:
        raise HealError(
            f"{shown(type(inner).__name__)} has no list of {num_layers} layers, so dus heal cannot "
            "train this architecture"
        )
    return found[1]


def layers_of(model: Any, num_layers: int) -> list[nn.Module]:
    """The decoder's layers, wherever the model holds them.

    Raises:
        ReplayError: it has no list of as many layers.
    """
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    for whole in (inner, model):
        found = _stack(whole, num_layers)
        if found is not None:
            return list(getattr(*found))
    raise ReplayError(f"{shown(type(model).__name__)} has no list of {num_layers} layers")


def _stack(whole: nn.Module, num_layers: int) -> tuple[nn.Module, str] | None:
    """The first list of as many modules that have parameters: what holds it, and its name."""
    for module in whole.modules():
        for name, child in module.named_children():
            if (
                isinstance(child, nn.ModuleList)
                and len(child) == num_layers
                and list(child.parameters())
            ):
                return module, name
    return None


def _join_tied(model: nn.Module) -> None:
    """Give a tied weight a single storage, after the first forward.

    transformers ties after `fully_shard`, so FSDP manages the weight twice. If the number of rows
    is not a multiple of the number of workers, FSDP pads each of the two into a copy of its own in
    the first forward, and the optimizer would update only one of them.
    """
    managed: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:  # noqa: SLF001  (FSDP2 has no public name)
                for fsdp_param in group.fsdp_params:
                    managed.setdefault(id(fsdp_param.sharded_param), []).append(fsdp_param)
    for twins in managed.values():
        if len(twins) == 1:
            continue
        storage = _storage(twins[0].sharded_param.to_local())
        data = next(
            fsdp_param._sharded_param_data  # noqa: SLF001
            for fsdp_param in twins
            if _storage(fsdp_param._sharded_param_data) == storage  # noqa: SLF001
        )
        for fsdp_param in twins:
            fsdp_param._sharded_param_data = data  # noqa: SLF001


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

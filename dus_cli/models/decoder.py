"""The model under training: loaded in shards by transformers, run without full logits, run in
part as its base.
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

# Of a norm: what two orders of the same sums may differ by in bf16.
_ROUNDING = 0.01


class Decoder:
    """A causal language model of transformers, asked for hidden states instead of logits.

    The output embedding's forward is replaced by one that hands its input on, so that every hook of
    FSDP still runs in its order; the loss then multiplies by the embedding chunk by chunk.
    """

    def __init__(self, model: Any, num_layers: int, *, packs_rows: bool = False) -> None:
        self.model = model
        self.output: nn.Module = model.get_output_embeddings()
        self.inner: Any = model.get_decoder()
        self.head: Head = head_of(self.inner.config)
        self._packs_rows = packs_rows
        self._name = stack_name(self.inner, num_layers)
        self._hidden: Tensor | None = None
        # By name before the first forward: afterwards FSDP may show the gathered parameters
        # instead.
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._project = self.output.forward

    @property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self.inner, self._name)
        return layers

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """The last hidden states, (rows, length, width), of token ids and positions (rows, length).

        Attention is masked per document where positions start again (transformers reads it from
        them). Without positions each row is one document, from its first token on.
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
        return hidden[
            ..., :1
        ].clone()  # what follows is for logits; a view would upset FSDP's hooks

    def brake_at_layers(self, brake: Brake, num_tokens: int) -> None:
        """Let a signal end a pass at a layer, forwards and backwards. A micro-batch has
        `num_tokens` tokens at most.

        Every worker counts the same FLOPs, whatever rows it has: they are only to come to the same
        place.
        """
        whole = [
            2.0 * num_tokens * sum(p.numel() for p in layer.parameters()) for layer in self.layers
        ]

        def after(flops: float, output: Any) -> None:
            brake.passed(flops)
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _: brake.passed(2 * flops))  # type: ignore[no-untyped-call]

        for layer, flops in zip(self.layers, whole, strict=True):
            layer.register_forward_hook(
                lambda _layer, _input, output, flops=flops: after(flops, output)
            )

    def check_loss(self, input_ids: Tensor, position_ids: Tensor) -> None:
        """Hold our way to the loss against the model's own, on a few tokens.

        It is the first forward of all, in full: FSDP gathers its groups then.

        Raises:
            HealError: they differ.
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
        """Check that a document in a packed row is as it is alone.

        Raises:
            HealError: the architecture sees other documents, or other positions.
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
        """Let go of gathered weights. FSDP keeps some from a forward, and would not see what
        changes after it.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def only(self, layers: Sequence[int]) -> Iterator[None]:
        """Run with these layers alone, each keeping its kind. At step 0 the base's layers give
        the base's loss.
        """
        whole, config = self.layers, self.inner.config
        lists = _by_layer(config, len(whole))
        try:
            self._cut(layers)
            yield
        finally:
            setattr(self.inner, self._name, whole)
            config.num_hidden_layers = len(whole)
            for key, value in lists.items():
                setattr(config, key, value)

    def _cut(self, layers: Sequence[int]) -> None:
        whole, config = self.layers, self.inner.config
        setattr(self.inner, self._name, nn.ModuleList([whole[i] for i in layers]))
        for key, value in _by_layer(config, len(whole)).items():
            setattr(config, key, [value[i] for i in layers])
        config.num_hidden_layers = len(layers)

    def keep_only(self, layers: Sequence[int]) -> None:
        """Become the model of these layers, for good: the rest is freed."""
        self._cut(layers)
        self.parameters = dict(self.model.named_parameters())

    def train_only(self, layers: Sequence[int] | None, frozen: Collection[str] = ()) -> None:
        """Let these layers learn, and nothing else; None is everything. Parameters whose names are
        `frozen` do not.
        """
        self.reshard()  # FSDP asks what learns when it gathers
        learning = (
            None if layers is None else {id(p) for i in layers for p in self.layers[i].parameters()}
        )
        for name, parameter in self.parameters.items():
            learns = learning is None or id(parameter) in learning
            parameter.requires_grad_(learns and name not in frozen)


def _by_layer(config: Any, num_layers: int) -> dict[str, Sequence[Any]]:
    """A config's fields with an entry for each layer."""
    fields = vars(config).items()
    return {
        key: value
        for key, value in fields
        if isinstance(value, (list, tuple)) and len(value) == num_layers
    }


def stack_name(inner: nn.Module, num_layers: int) -> str:
    for name, child in inner.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return name
    raise HealError(
        f"{shown(type(inner).__name__)} has no list of {num_layers} layers; dus heal does not "
        "know it"
    )


def _join_tied(model: nn.Module) -> None:
    """Give a tied weight one storage, after the first forward.

    transformers ties after `fully_shard`, so FSDP manages the weight twice. Where its rows do not
    divide by the workers FSDP pads each of the two into a copy of its own then, and the optimizer
    would update one only.
    """
    managed: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:  # noqa: SLF001  (FSDP2 has no public name)
                for held in group.fsdp_params:
                    managed.setdefault(id(held.sharded_param), []).append(held)
    for twins in managed.values():
        if len(twins) == 1:
            continue
        storage = _storage(twins[0].sharded_param.to_local())
        data = next(
            held._sharded_param_data  # noqa: SLF001
            for held in twins
            if _storage(held._sharded_param_data) == storage  # noqa: SLF001
        )
        for held in twins:
            held._sharded_param_data = data  # noqa: SLF001


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def layers_of(model: Any, num_layers: int) -> list[Any]:
    """The decoder's layers: the first list of as many modules that have parameters."""
    inner = model.get_decoder() if hasattr(model, "get_decoder") else model
    for whole in (inner, model):
        for module in whole.modules():
            for child in module.children():
                if (
                    isinstance(child, nn.ModuleList)
                    and len(child) == num_layers
                    and list(child.parameters())
                ):
                    return list(child)
    raise ReplayError(f"{shown(type(model).__name__)} has no list of {num_layers} layers")

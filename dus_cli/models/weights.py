"""A model in memory, or one whose layers are read from disk one at a time; and layers scaled in
memory as `dus upscale --start` scales them on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from dus_cli.errors import CheckpointError, ProbeError, ReplayError, shown, shown_list
from dus_cli.maps.layers import split_name
from dus_cli.maps.stacks import LayerStack
from dus_cli.models.decoder import layers_of
from dus_cli.models.loading import (
    STORED_DTYPES,
    load_config,
    load_model,
    missing_weights,
    transformers_errors,
)
from dus_cli.models.replay import Ready, Scaled
from dus_cli.planning.projections import pattern
from dus_cli.planning.scaling import Scale
from dus_cli.planning.treatment import Making, made_pieces
from dus_cli.source.checkpoint import Checkpoint, Shard
from dus_cli.source.headers import TensorInfo
from dus_cli.source.reading import open_regular, reading

if TYPE_CHECKING:
    from io import FileIO


def load(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> tuple[Any, Ready]:
    """The whole model in memory, in evaluation mode, and a context for its layers that does
    nothing. Arguments as in `stream`.

    Raises:
        LoadError: transformers cannot load it, or would initialise weights that the files lack.
    """
    model = load_model(checkpoint.folder, checkpoint.folder, dtype).to(device).eval()
    if stored is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(stored).to(parameter.dtype)
    return model, lambda _: nullcontext()


def stream(
    checkpoint: Checkpoint,
    stack: LayerStack,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> tuple[Any, Ready]:
    """The model without its layers' weights, and a context in which a layer has its weights.

    Args:
        checkpoint: the files.
        stack: the model's layers.
        dtype: of the weights in memory.
        device: of the weights in memory.
        stored: a dtype that the weights are cast to first, as if they were stored in it.

    Raises:
        LoadError: as in `load`.
        ReplayError: the weights are pickled or quantised.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint.is_pickled:
        raise ReplayError("layers are read from safetensors only, and these weights are pickled")
    if "quantization_config" in checkpoint.config:
        raise ReplayError("layers with quantised weights cannot be read one at a time")
    with transformers_errors(checkpoint.folder):
        config = load_config(checkpoint.folder)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    streamed = _Streamed(checkpoint, stack, model.eval(), (dtype, stored), device)
    return model, streamed.layer


def scaling(
    checkpoint: Checkpoint,
    stack: LayerStack,
    model: Any,
    tensors: Sequence[Mapping[str, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> Scaled:
    """A context in which a layer adds a factor times what it adds.

    The layer's tensors are read from the files again, multiplied and rounded in their stored dtype,
    and loaded by transformers: the same numbers as if `dus upscale` had written them.

    Args:
        checkpoint: the base.
        stack: its layers.
        model: the model, in memory or layer by layer.
        tensors: for each layer, what is scaled, from `planning.post_norms.scaled_tensors`; read
            when a layer is scaled.
        dtype: of the model's weights.
        device: of the model's weights.
    """
    stored: list[list[tuple[str, Shard, TensorInfo]]] = [[] for _ in range(stack.num_layers)]
    for shard, tensor in checkpoint.tensors():
        split = split_name(tensor.name)
        if split is not None and split.prefix == stack.prefix and split.index < stack.num_layers:
            stored[split.index].append((pattern(split.suffix), shard, tensor))
    layers = layers_of(model, stack.num_layers)
    places = _Places(checkpoint, model, dtype, device)

    @contextmanager
    def scaled(number: int, factor: float) -> Iterator[None]:
        offsets = tensors[number]
        changed_tensors = {
            tensor.name: _Stored(shard, tensor, Scale(tensor.dtype, factor, offsets[kind]))
            for kind, shard, tensor in stored[number]
            if kind in offsets
        }
        with _parameters_restored(layers[number]) as num_changed:
            places.put(changed_tensors)
            if changed_tensors and not num_changed():
                raise ProbeError(
                    f"transformers keeps {shown_list(sorted(changed_tensors))} outside of layer "
                    f"{number}, so dus probe cannot scale it; write the models with dus upscale "
                    "--start and measure those"
                )
            yield

    return scaled


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, read when it is indexed, as transformers does."""

    shard: Shard
    tensor: TensorInfo
    scale: Scale | None = None
    cast: torch.dtype | None = None

    def __getitem__(self, _whole: object) -> Tensor:
        dtype = STORED_DTYPES.get(self.tensor.dtype)
        if dtype is None:
            raise ReplayError(
                f"{shown(self.tensor.name)} is {self.tensor.dtype}, not a floating-point type"
            )
        if self.scale is not None:
            return self._scaled(self.scale, dtype)
        content = bytearray(self.tensor.num_bytes)
        with reading(self.shard.name), open_regular(self.shard.path, 0) as file:
            file.seek(self.tensor.start)
            view = memoryview(content)
            while view:
                count = cast("FileIO", file).readinto(view)
                if not count:
                    raise CheckpointError(
                        f"{shown(self.shard.name)} was truncated while it was read; fetch it again"
                    )
                view = view[count:]
        if not content:
            return torch.empty(0)
        weights = torch.frombuffer(content, dtype=dtype).reshape(self.tensor.shape)
        return weights if self.cast is None else weights.to(self.cast)

    def _scaled(self, scale: Scale, dtype: torch.dtype) -> Tensor:
        content = bytearray()
        with reading(self.shard.name), open_regular(self.shard.path) as file:
            for piece in made_pieces(
                file.fileno(), self.tensor, Making.scaled, self.tensor.dtype, scale
            ):
                content += piece
        return torch.frombuffer(content, dtype=dtype).reshape(self.tensor.shape)


class _Places:
    """Puts stored tensors into a model by transformers' own loading, which renames and merges them
    for the architecture.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._checkpoint, self._model, self._dtype, self._device = checkpoint, model, dtype, device
        self._mapping = get_model_conversion_mapping(model)

    def put(self, stored: Mapping[str, _Stored]) -> set[str]:
        """Put tensors into the model; return the names of parameters that still lack one."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        plan = self._model._get_dtype_plan(self._dtype)  # noqa: SLF001  (what stays in fp32; it has no public name)
        settings = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=plan,
            device_map={"": self._device},
            weight_mapping=self._mapping,
        )
        with transformers_errors(self._checkpoint.folder):
            info, _ = convert_and_load_state_dict_in_model(self._model, dict(stored), settings)
        wrong = [*(name for name, *_ in info.mismatched_keys), *info.conversion_errors]
        if wrong:
            raise ReplayError(
                f"transformers cannot load {shown_list(sorted(wrong))} one layer at a time"
            )
        missing: set[str] = info.missing_keys
        return missing


@contextmanager
def _parameters_restored(layer: nn.Module) -> Iterator[Callable[[], int]]:
    """Restore the layer's present parameters at the end. Gives a function that counts how many of
    them have been replaced.
    """
    own = [
        (module, name, p)
        for module in layer.modules()
        for name, p in module.named_parameters(recurse=False)
    ]
    try:
        yield lambda: sum(getattr(module, name) is not p for module, name, p in own)
    finally:
        for module, name, parameter in own:
            module.register_parameter(name, parameter)


class _Streamed:
    """A model whose layers get their weights from the files, one at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stack: LayerStack,
        model: Any,
        dtypes: tuple[torch.dtype, torch.dtype | None],
        device: torch.device,
    ) -> None:
        dtype, stored = dtypes
        self._checkpoint, self._model, self._device = checkpoint, model, device
        self._places = _Places(checkpoint, model, dtype, device)
        self._layers: Sequence[nn.Module] = layers_of(model, stack.num_layers)
        self._stored: list[dict[str, _Stored]] = [{} for _ in self._layers]
        rest: dict[str, _Stored] = {}
        for shard, tensor in checkpoint.tensors():
            split = split_name(tensor.name)
            is_layer = split is not None and split.prefix == stack.prefix
            if split is None or not is_layer:
                rest[tensor.name] = _Stored(shard, tensor, cast=stored)
            elif split.index < stack.num_layers:
                self._stored[split.index][tensor.name] = _Stored(shard, tensor, cast=stored)
        self._load_rest(rest)

    def _load_rest(self, rest: dict[str, _Stored]) -> None:
        missing = self._places.put(rest)
        self._model.tie_weights(missing_keys=missing, recompute_mapping=False)
        of_layers = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        lacking = [
            n for n, p in self._model.named_parameters() if p.is_meta and id(p) not in of_layers
        ]
        if lacking:
            raise missing_weights(self._checkpoint.folder, lacking)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """A context in which layer `number` has its weights."""
        layer = self._layers[number]
        with _parameters_restored(layer):
            self._places.put(self._stored[number])
            lacking = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
            if lacking:
                raise missing_weights(
                    self._checkpoint.folder, [f"layer {number}: {name}" for name in lacking]
                )
            yield


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A context in which new modules have parameters without memory. Buffers keep theirs: they are
    computed, not loaded.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]

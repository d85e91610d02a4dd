"""A model in memory, or one whose layers' weights are read from disk when their turn comes and
let go after it; and a layer whose output is scaled for a while, as `dus upscale --start` writes it.
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
from dus_cli.models.loading import STORED_DTYPES, load_config, load_model, no_weights, refusals_told
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
    """The whole model as transformers loads it, in evaluation mode. Arguments as of `stream`.

    Raises:
        LoadError: transformers cannot load it, or would make up weights that the files lack.
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
    """The model with all but its layers' weights, and a way to give a layer its own for a while.

    Args:
        checkpoint: where its weights lie.
        stack: its layers.
        dtype: of the weights in memory.
        device: where they are.
        stored: a dtype that they are cast to first, as if the files had them so.

    Raises:
        LoadError: as `load`.
        ReplayError: the weights are pickled or quantised.
    """
    from transformers import AutoModelForCausalLM

    if checkpoint.is_pickled:
        raise ReplayError("layers are read from safetensors alone, and these weights are pickled")
    if "quantization_config" in checkpoint.config:
        raise ReplayError("layers with quantised weights are not read")
    with refusals_told(checkpoint.folder):
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
    """A way to have a layer add so many times what it adds, for a while.

    Its tensors are read from the files again, each number multiplied and rounded in the dtype that
    it is stored in, and put into the model by transformers' own loading: what `dus upscale` writes,
    loaded as that will be.

    Args:
        checkpoint: of the base.
        stack: its layers.
        model: of transformers, all of it in memory or layer by layer.
        tensors: what is scaled in each layer, as `planning.post_norms.scaled_tensors` has it;
            looked up when the layer's turn comes.
        dtype: of the model's weights.
        device: where they are.
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
        made = {
            tensor.name: _Stored(shard, tensor, Scale(tensor.dtype, factor, offsets[kind]))
            for kind, shard, tensor in stored[number]
            if kind in offsets
        }
        with _own_again(layers[number]) as changed:
            places.put(made)
            if made and not changed():
                raise ProbeError(
                    f"transformers keeps {shown_list(sorted(made))} somewhere else than in layer "
                    f"{number}: dus probe cannot scale it; write the models with dus upscale "
                    "--start and measure those"
                )
            yield

    return scaled


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, read when it is asked for its content."""

    shard: Shard
    tensor: TensorInfo
    scale: Scale | None = None
    cast: torch.dtype | None = None

    def __getitem__(self, _whole: object) -> Tensor:
        dtype = STORED_DTYPES.get(self.tensor.dtype)
        if dtype is None:
            raise ReplayError(f"{shown(self.tensor.name)} is {self.tensor.dtype}: not a float")
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
                        f"{shown(self.shard.name)} was cut short while it was read; fetch it again"
                    )
                view = view[count:]
        if not content:
            return torch.empty(0)
        found = torch.frombuffer(content, dtype=dtype).reshape(self.tensor.shape)
        return found if self.cast is None else found.to(self.cast)

    def _scaled(self, scale: Scale, dtype: torch.dtype) -> Tensor:
        content = bytearray()
        with reading(self.shard.name), open_regular(self.shard.path) as file:
            for piece in made_pieces(
                file.fileno(), self.tensor, Making.scaled, self.tensor.dtype, scale
            ):
                content += piece
        return torch.frombuffer(content, dtype=dtype).reshape(self.tensor.shape)


class _Places:
    """Stored tensors put into a model by transformers' own loading, which renames and merges them
    as the architecture wants it.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._checkpoint, self._model, self._dtype, self._device = checkpoint, model, dtype, device
        self._mapping = get_model_conversion_mapping(model)

    def put(self, stored: Mapping[str, _Stored]) -> set[str]:
        """Put tensors in their places; the names that have none yet."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        plan = self._model._get_dtype_plan(self._dtype)  # noqa: SLF001  (what stays in fp32; it has no public name)
        settings = LoadStateDictConfig(
            dtype=self._dtype,
            dtype_plan=plan,
            device_map={"": self._device},
            weight_mapping=self._mapping,
        )
        with refusals_told(self._checkpoint.folder):
            found, _ = convert_and_load_state_dict_in_model(self._model, dict(stored), settings)
        wrong = [*(name for name, *_ in found.mismatched_keys), *found.conversion_errors]
        if wrong:
            raise ReplayError(f"transformers cannot place {shown_list(sorted(wrong))} by itself")
        missing: set[str] = found.missing_keys
        return missing


@contextmanager
def _own_again(layer: nn.Module) -> Iterator[Callable[[], int]]:
    """Behind this the layer has the parameters that it has now; within it, how many are others."""
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
    """Tensors by layer."""

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
            raise no_weights(self._checkpoint.folder, lacking)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    @contextmanager
    def layer(self, number: int) -> Iterator[None]:
        """Layer `number` has its weights."""
        layer = self._layers[number]
        with _own_again(layer):
            self._places.put(self._stored[number])
            lacking = [name for name, parameter in layer.named_parameters() if parameter.is_meta]
            if lacking:
                raise no_weights(
                    self._checkpoint.folder, [f"layer {number}: {name}" for name in lacking]
                )
            yield


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made here have parameters without memory. Buffers are made as ever: they are
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

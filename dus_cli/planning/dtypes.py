"""`--dtype`: cast floating-point tensors while they are copied, with torch's rounding.

torch rounds (to nearest, ties to even). It is imported when the first number must be cast, because
it comes with the `heal` extra: a checkpoint that already has the dtype does not need it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.source.headers import DTYPE_BITS, TensorInfo
from dus_cli.source.weights import EXPLICIT_KEY

if TYPE_CHECKING:
    import torch


# Other names of torch's dtypes.
_OTHER_NAMES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "float": "float32",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "single": "float32",
}


def torch_name(text: str) -> str:
    """The name that torch prints for a dtype, for any of its names; other text in lower case.

    >>> torch_name("bf16"), torch_name("torch.half"), torch_name("F32"), torch_name("auto")
    ('bfloat16', 'float16', 'float32', 'auto')
    """
    name = text.strip().lower().removeprefix("torch.")
    return _OTHER_NAMES.get(name, name)


class DtypeChoice(str, Enum):
    """An enum of dtypes whose members are found by any of their names."""

    @classmethod
    def _missing_(cls, value: object) -> DtypeChoice | None:
        name = torch_name(str(value))
        return next((choice for choice in cls if torch_name(choice.value) == name), None)

    @classmethod
    def parse(cls, text: str) -> DtypeChoice:
        """The member with this name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls(text)
        except ValueError:
            raise ValueError(
                f"{shown(text)!r} is not one of {', '.join(choice.value for choice in cls)}"
            ) from None


class Dtype(DtypeChoice):
    """The dtypes that tensors can be cast to, by torch's names.

    >>> Dtype("fp16")
    <Dtype.float16: 'float16'>
    """

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"

    @property
    def stored(self) -> str:
        """Its name in safetensors."""
        return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[self.value]


# The dtypes that are cast, by safetensors' names, with torch's. Tensors of other dtypes stay.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Dtypes of quantised weights: their numbers mean nothing without their scales.
_SCALED = ("F4", "F6_", "F8_")
_INTEGERS = frozenset(["I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"])
# Endings of names of integer tensors with packed weights (GPTQ, AWQ, bitsandbytes,
# compressed-tensors, MXFP4).
_PACKED = (".weight", ".qweight", ".qzeros", ".weight_packed", ".weight.absmax", "_blocks", ".SCB")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")

_LARGEST = {"BF16": "3.39e38", "F16": "65504", "F32": "3.40e38"}


@dataclass(frozen=True)
class Cast:
    """A cast from one dtype to another; both by safetensors' names."""

    source: str
    target: str

    @property
    def source_size(self) -> int:
        """Bytes of a source number."""
        return DTYPE_BITS[self.source] // 8

    @property
    def target_size(self) -> int:
        """Bytes of a target number."""
        return DTYPE_BITS[self.target] // 8

    def __call__(self, numbers: memoryview, into: memoryview) -> int:
        """Cast `numbers` into the buffer `into`; return how many finite ones became infinite.

        Every NaN becomes torch.nan: otherwise its bits would depend on the CPU, and in torch even
        on the number's position in the tensor.
        """
        import torch

        torch.set_num_threads(1)  # `dus` casts in several threads of its own
        source = torch.frombuffer(numbers, dtype=_torch_dtype(self.source))
        target = torch.frombuffer(into, dtype=_torch_dtype(self.target))
        target.copy_(source)
        lowest, highest = target.aminmax()
        if lowest.isfinite() and highest.isfinite():
            return 0
        target.masked_fill_(target.isnan(), torch.nan)
        return int(target.isinf().sum()) - int(source.isinf().sum())


def _torch_dtype(stored: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, FLOATS[stored])
    return dtype


def overflow(name: str, cast: Cast) -> CheckpointError:
    """The error for a tensor with finite numbers that are out of the dtype's range."""
    return CheckpointError(
        f"tensor {shown(name)} holds finite {cast.source} numbers beyond {FLOATS[cast.target]}'s "
        f"range (±{_LARGEST[cast.target]}), which would become infinite; choose "
        f"{'--dtype bfloat16 or float32' if cast.target == 'F16' else 'another --dtype'}, or leave "
        "it out"
    )


def check_castable(checkpoint: Checkpoint, dtype: Dtype) -> tuple[str, ...]:
    """Check that the checkpoint can be cast; return warnings.

    Raises:
        CheckpointError: it is quantised.
    """
    for fields in _nested(checkpoint.config):
        for key in _QUANTIZATION_KEYS:
            if fields.get(key):
                raise CheckpointError(
                    f"--dtype: the model is quantised (config.json has {key}), and its tensors "
                    "cannot be cast one by one; use the unquantised model, or leave out --dtype"
                )
    num_tensors: Counter[str] = Counter()
    for _, tensor in checkpoint.tensors():
        if tensor.dtype.startswith(_SCALED) or (
            tensor.dtype in _INTEGERS and tensor.name.endswith(_PACKED)
        ):
            raise CheckpointError(
                f"--dtype: {shown(tensor.name)} is quantised ({tensor.dtype}), and cast numbers "
                "would no longer fit their scale; use the unquantised model, or leave out --dtype"
            )
        if tensor.dtype in FLOATS:
            num_tensors[tensor.dtype] += 1
    if len(num_tensors) < 2:
        return ()
    counts = ", ".join(f"{count} {FLOATS[stored]}" for stored, count in num_tensors.most_common())
    return (
        (
            f"the base's tensors are of several dtypes ({counts}); --dtype casts all of them to "
            f"{dtype.value}"
        ),
    )


def cast_dtype(tensor: TensorInfo, dtype: Dtype | None) -> str:
    """The dtype of a tensor in the output, by safetensors' name."""
    return dtype.stored if dtype is not None and tensor.dtype in FLOATS else tensor.dtype


def output_config(config: dict[str, Any], dtype: Dtype | None) -> dict[str, Any]:
    """The config of the output, whose weights have the usual file names: without a field that
    names another file, and with the new dtype.
    """
    named = {key: value for key, value in config.items() if key != EXPLICIT_KEY}
    return config_with_dtype(named, dtype)


def config_with_dtype(config: dict[str, Any], dtype: Dtype | None) -> dict[str, Any]:
    """The config with the new dtype in every field that has one, in nested configs too, and at the
    top level in any case.

    transformers before 4.56 wrote `torch_dtype`.
    """
    if dtype is None:
        return config
    changed = _with_dtype(config, dtype)
    has_dtype = changed.get("dtype") or changed.get("torch_dtype")
    return changed if has_dtype else changed | {"dtype": dtype.value}


def _with_dtype(fields: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    return {
        key: dtype.value
        if key in {"dtype", "torch_dtype"} and isinstance(value, str)
        else _with_dtype(value, dtype)
        if isinstance(value, dict)
        else value
        for key, value in fields.items()
    }


def _nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and every mapping in it."""
    return [
        config,
        *(
            inner
            for value in config.values()
            if isinstance(value, dict)
            for inner in _nested(value)
        ),
    ]

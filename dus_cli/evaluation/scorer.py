"""The losses of a transformers model on windows of text, in nats."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from dus_cli.data.streams import IGNORED
from dus_cli.errors import EvaluationError, HealError, reason_of, shown
from dus_cli.evaluation.windows import Window
from dus_cli.models.decoder import Decoder
from dus_cli.models.loading import load_model
from dus_cli.models.losses import Head, cross_entropies, token_losses
from dus_cli.models.precision import torch_dtype

# The most nats by which losses from hidden states may differ from those from the model's logits.
_TOLERANCE = 0.01

# Words in the RuntimeError of torch's CPU allocator.
_NO_MEMORY = ("allocate memory", "not enough memory")


def quiet_libraries() -> None:
    """Silence the libraries' progress bars and warnings; what matters in them is an error here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|transformers")


def device_of(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA if available, else the CPU.

    Raises:
        EvaluationError: this machine has no such device.
    """
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EvaluationError(
            f"--device {shown(name)}: {reason_of(error)}; give auto, cpu or cuda:0"
        ) from error
    return device


def load(folder: Path, name: str, precision: str, device: torch.device) -> Any:
    """Load a causal language model with all its weights for inference, without running the
    checkpoint's code.

    Raises:
        LoadError: transformers cannot load it, or would initialise weights that the files lack.
    """
    model = load_model(folder, name, torch_dtype(precision))
    model.requires_grad_(False)
    return model.to(device).eval()


def scorer_of(model: Any, num_layers: int, before: Sequence[int]) -> Scorer:
    """What scores a loaded model: from hidden states if its structure is known and this gives the
    losses of its own logits, else from the logits.

    Args:
        model: the model.
        num_layers: the number of its decoder layers.
        before: the ids put before each window.
    """
    by_logits = Scorer(model, None, before)
    try:
        decoder = Decoder(model, num_layers)
    except (HealError, AttributeError, NotImplementedError):
        return by_logits
    scorer = Scorer(model, decoder, before)
    difference = float((scorer.few_losses() - by_logits.few_losses()).abs().max())
    return scorer if difference <= _TOLERANCE or math.isnan(difference) else by_logits


class Scorer:
    """Losses of a loaded model, without the logits of a whole batch if its structure is known.

    If it is not (no output embedding, or logits changed in an unknown way), the losses come from
    the model's logits.

    Args:
        model: the model.
        decoder: the same model, asked for hidden states; None takes losses from its logits.
        before: the ids put before each window.
    """

    def __init__(self, model: Any, decoder: Decoder | None, before: Sequence[int]) -> None:
        self.device: torch.device = model.device
        self._model, self._decoder, self._before = model, decoder, tuple(before)

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def losses(self, batch: Sequence[Window]) -> list[float]:
        """For each window the sum of losses over its scored tokens, in nats.

        Rows are padded at their end, to which no token of a causal model attends.
        """
        longest = max(len(window.ids) for window in batch) + len(self._before) - 1
        labels = torch.full((len(batch), longest), IGNORED)  # (windows, longest)
        inputs = torch.zeros_like(labels)
        for row, window in enumerate(batch):
            ids = torch.tensor([*self._before, *window.ids])
            length = len(ids) - 1
            inputs[row, :length] = ids[:-1]
            labels[row, length - window.num_scored : length] = ids[len(ids) - window.num_scored :]
        inputs, labels = inputs.to(self.device), labels.to(self.device)
        # cast on the CPU, because MPS has no float64
        each = self._token_losses(inputs, labels).cpu().double()
        rows = (labels != IGNORED).nonzero()[:, 0].cpu()
        sums: list[float] = (
            torch.zeros(len(batch), dtype=torch.float64).index_add_(0, rows, each).tolist()
        )
        return sums

    @contextmanager
    def only(self, layers: Sequence[int]) -> Iterator[None]:
        """Score with these layers only: the base inside an up-scaled model."""
        if self._decoder is None:
            raise EvaluationError(
                f"dus cannot run the base inside a model of model_type "
                f"{self._model.config.model_type!r}; give the base itself as a MODEL"
            )
        with self._decoder.only(layers):
            yield

    @torch.no_grad()
    def _token_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The losses, (tokens,), at the labelled positions of inputs and labels (rows, length)."""
        counted = labels != IGNORED
        if self._decoder is not None:
            hidden = self._decoder.hidden(inputs)[counted]  # (tokens, width)
            return token_losses(hidden, self._decoder.output, labels[counted], self._decoder.head)
        logits = self._model(input_ids=inputs, use_cache=False).logits[counted]
        return cross_entropies(logits, labels[counted], Head())

    def few_losses(self) -> Tensor:
        """The losses of a few tokens, by which two ways to the loss are compared."""
        ids = torch.arange(1, 33, device=self.device)[None] % self.vocab_size
        return self._token_losses(ids[:, :-1], ids[:, 1:])


@contextmanager
def out_of_memory(name: str) -> Iterator[None]:
    """Translate the allocators' errors into one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # the CPU's allocator raises a bare RuntimeError
        known = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, known) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise EvaluationError(
            f"out of memory while {shown(name)} was evaluated; lower --batch-tokens or "
            "--seq-length, or use --device cpu"
        ) from error

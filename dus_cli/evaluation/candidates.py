"""The models to compare: all are found and fetched, with their tokenizers, before any is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dus_cli.common.reference import ModelRef
from dus_cli.data.tokeniser import Tokeniser, open_tokeniser
from dus_cli.errors import ConfigError, EvaluationError, ModelNotFoundError, shown
from dus_cli.hub.opening import open_base
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import context_length, vocab_size
from dus_cli.progress import Progress
from dus_cli.release.within import base_within
from dus_cli.source.incomplete import is_unfinished_healing


@dataclass(frozen=True)
class EvaluationCandidate:
    """A model in a local folder, with its tokenizer.

    `name` is unique among the models. `max_length` is the context length in tokens; None if
    config.json gives none.
    """

    ref: ModelRef
    name: str
    folder: Path
    commit: str | None
    num_layers: int
    max_length: int | None
    tokeniser: Tokeniser


def check_there(refs: Sequence[ModelRef]) -> None:
    """Check what can be checked of the models at once, without fetching or loading any.

    Raises:
        DusError: a model is given twice, is missing, or is an unfinished healing.
    """
    texts = [ref.text for ref in refs]
    for ref in refs:
        if texts.count(ref.text) > 1:
            raise EvaluationError(f"{shown(ref)} is given twice; name each model once")
        if ref.path is None:
            continue
        if not ref.path.is_dir():
            what = "is not a directory" if ref.path.exists() else "does not exist"
            raise ModelNotFoundError(
                f"{shown(ref)} {what}; give a model's directory or a Hub id such as org/name"
            )
        if is_unfinished_healing(ref.path):
            raise EvaluationError(
                f"{shown(ref)} is a healing that has not finished; finish it with the same dus "
                "heal command, then evaluate"
            )


def find_candidates(
    refs: Sequence[ModelRef],
    progress: Progress | None = None,
    *,
    special_tokens: bool = True,
    quiet: bool,
) -> list[EvaluationCandidate]:
    """Each model with its weights, from its directory or through the Hub's cache.

    Raises:
        DusError: a model cannot be fetched, is damaged, or has no tokenizer.
    """
    names = [ref.name for ref in refs]
    return [
        _candidate(
            ref,
            ref.name if names.count(ref.name) == 1 else ref.text,
            progress,
            special_tokens=special_tokens,
            quiet=quiet,
        )
        for ref in refs
    ]


def _candidate(
    ref: ModelRef, name: str, progress: Progress | None, *, special_tokens: bool, quiet: bool
) -> EvaluationCandidate:
    checkpoint = open_base(ref, quiet=quiet, progress=progress)
    try:
        decoder = decoder_config(checkpoint.config)
        fields, num_layers = decoder.fields, decoder.num_layers
    except ConfigError:  # transformers may support it nevertheless
        fields, num_layers = checkpoint.config, 0
    return EvaluationCandidate(
        ref,
        name,
        checkpoint.folder,
        commit=checkpoint.folder.name if ref.repo_id is not None else None,
        num_layers=num_layers,
        max_length=context_length(fields),
        tokeniser=open_tokeniser(
            checkpoint.folder, vocab_size(checkpoint.config, fields), special_tokens=special_tokens
        ),
    )


def base_layers(candidate: EvaluationCandidate) -> tuple[int, ...]:
    """The layers of an up-scaled model that are its base's, by its dus.json.

    Raises:
        DusError: the model is not an up-scaled one, or has been trained since.
    """
    base = base_within(candidate.folder)
    if base is None:
        raise EvaluationError(
            f"--with-base: {shown(candidate.name)} does not hold its base (only a model written "
            "by dus upscale, not healed since, does); give the base as the first MODEL"
        )
    return base.layers

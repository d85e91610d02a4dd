"""`--from dus.json`: read how a release was made, make it again, and compare it with its sums."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dus_cli import __version__
from dus_cli.common.reference import ModelRef, user_path
from dus_cli.errors import CheckpointError, VerificationError, shown, shown_list
from dus_cli.maps.layers import source_layers
from dus_cli.maps.recipes import RECIPES
from dus_cli.pictures.layer_map import PICTURES
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import Base, MapRequest, UpscalePlan, dump_json
from dus_cli.release import card, lineage
from dus_cli.release.checksums import NAME as SUMS
from dus_cli.release.checksums import are_in, different_files, expected_sums
from dus_cli.source.files import inside
from dus_cli.source.reading import read_small_file

_MAX_BYTES = 16_000_000

# The fields of a base's record that depend on its bytes, each with what a different base has.
_BASE_FIELDS = {
    "config_sha256": "another config.json",
    "index_sha256": "another index of its weights",
    "format": "weights in another format",
    "shards": "shards of other names or sizes",
}

# Files that depend on the version of dus: those of another version may differ.
_VERSION_FILES = (card.NAME, *PICTURES, lineage.NAME)


@dataclass(frozen=True)
class Remaking:
    """A release that is to be made again.

    Attributes:
        path: its dus.json.
        record: the content of dus.json.
        ref: where the base is now.
        request: the layer map and start, as recorded.
        max_shard_bytes: size of the largest shard, as recorded.
        dtype: the cast, as recorded.
        sums: the sums in the SHA256SUMS beside it; None without them, or if the model was healed
            since.
        warnings: why the result may differ.
    """

    path: Path
    record: dict[str, Any]
    ref: ModelRef
    request: MapRequest
    max_shard_bytes: int
    dtype: Dtype | None
    sums: dict[str, str] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def parts(self) -> tuple[ModelRef, MapRequest, int, Dtype | None]:
        """The arguments of an `UpscaleRequest`: base, map, largest shard, cast."""
        return self.ref, self.request, self.max_shard_bytes, self.dtype

    def base(self) -> Base:
        """The base as recorded, wherever it is now, so that the new record is the same."""
        base = self.record["base"]
        repo_id, name = base.get("repo_id"), str(base.get("name"))
        if repo_id is None:
            return Base(ModelRef(base["path"], path=Path(base["path"])), recorded_name=name)
        revision = base.get("revision")
        text = repo_id if revision is None else f"{repo_id}@{revision}"
        return Base(
            ModelRef(text, repo_id=repo_id, revision=revision), base["commit"], recorded_name=name
        )

    def check(self, plan: UpscalePlan) -> None:
        """Check that a plan's lineage is the recorded one: the base's digests, then the other
        fields.

        Raises:
            VerificationError: the base is another one, or this dus plans something else.
        """
        planned = json.loads(dump_json(lineage.lineage(plan)))
        then, now = self.record["base"], planned["base"]
        other = [
            difference
            for key, difference in _BASE_FIELDS.items()
            if key in then and then[key] != now[key]
        ]
        recorded = then.get("shards")
        if (
            other
            and isinstance(recorded, dict)
            and recorded
            and recorded.keys() <= set(plan.checkpoint.unread)
        ):
            read = plan.checkpoint.weight_files[0]
            raise VerificationError(
                f"{shown(self.path)} was made from {shown_list(sorted(recorded))}, but dus, like "
                f"transformers, now reads {read} beside them; move {read} away to make the same "
                "again"
            )
        if other:
            raise VerificationError(
                f"{shown(self.ref)} is not the base that {shown(self.path)} records: it has "
                f"{' and '.join(other)}; give the right one as MODEL"
            )
        # An older dus recorded fewer fields; the common ones must agree. `files` is left to the
        # sums, and another version of dus may judge engines differently.
        fields = self.record.keys() & planned.keys() - {"base", "dus_version", "files", "engines"}
        if differing := sorted(key for key in fields if self.record[key] != planned[key]):
            raise VerificationError(
                f"dus {__version__} would not make what {shown(self.path)} records: "
                f"{shown_list(differing)} "
                f"differ; it was made by dus {shown(self.record.get('dus_version'))}, or edited"
            )

    def check_sums(self, sums: dict[str, str]) -> None:
        """Compare the sums of the new files with those of the release, if there are any.

        Raises:
            VerificationError: a file differs, is missing or is new.
        """
        if self.sums is None:
            return
        differing = different_files(sums, self.sums)
        if self.record.get("dus_version") != __version__:
            differing = [name for name in differing if name not in _VERSION_FILES]
        if differing:
            raise VerificationError(
                f"not reproduced: {shown_list(differing)} differ from the {SUMS} beside "
                f"{shown(self.path)}; nothing "
                "was published. Check whether small files in the base's folder have changed"
            )


def read_remaking(path: Path, model: str | None = None, *, token: str | None = None) -> Remaking:
    """Read how a release was made.

    Args:
        path: its dus.json, or the directory that holds it.
        model: where the base is now; None if it is where dus.json says.
        token: Hub access token.

    Raises:
        CheckpointError: the file is not the dus.json of an upscale, is damaged, or is of a newer
            dus.
        UsageError, ModelNotFoundError: as `ModelRef.parse`.
    """
    path = path / lineage.NAME if path.is_dir() else path
    record = lineage.parse_lineage(read_small_file(path, shown(path), _MAX_BYTES), shown(path))
    if "layer_map" not in record:
        raise CheckpointError(
            f"{shown(path)} records no upscale; give the dus.json that dus upscale wrote"
        )
    base = record.get("base")
    if not isinstance(base, dict):
        raise _damaged(path, "base")
    _check_base(path, base)
    ref = _recorded_ref(path, base, token) if model is None else ModelRef.parse(model, token=token)
    size = record.get("max_shard_size")
    if type(size) is not int or size < 1:
        raise _damaged(path, "max_shard_size")
    dtype = record.get("dtype")
    if dtype is not None and dtype not in [choice.value for choice in Dtype]:
        raise _damaged(path, "dtype")
    warnings = []
    if record.get("dus_version") != __version__:
        warnings.append(
            f"{shown(path)} is of dus {shown(record.get('dus_version'))} and this is dus "
            f"{__version__}: the card, its pictures and dus.json may differ"
        )
    recorded_sums, problems = expected_sums(path.parent)
    if problems:
        raise CheckpointError(
            f"beside {shown(path)}: {problems[0]}; restore it, or remove it to compare nothing"
        )
    if not recorded_sums and are_in(path.parent):
        raise CheckpointError(
            f"{SUMS} beside {shown(path)} is empty; restore it, or remove it to compare nothing"
        )
    sums = recorded_sums or None
    if record.get("healing"):
        warnings.append(
            f"the model of {shown(path)} was healed since: this makes it as it was before healing"
        )
        sums = None
    elif total := _sum_without_results(path.parent, recorded_sums.get(card.NAME)):
        warnings.append(
            f"the {card.NAME} beside {shown(path)} has evaluation results: this makes it without "
            "them"
        )
        sums = recorded_sums | {card.NAME: total}
    return Remaking(
        path,
        record,
        ref,
        request=_request(path, record),
        max_shard_bytes=size,
        dtype=dtype and Dtype(dtype),
        sums=sums,
        warnings=warnings,
    )


def _sum_without_results(folder: Path, total: str | None) -> str | None:
    """The SHA-256 that the card had before `dus eval` wrote results into it; None if it has no
    results.
    """
    if total is None:
        return None
    try:
        raw = read_small_file(inside(folder, card.NAME), card.NAME, _MAX_BYTES)
        text = raw.decode()
    except (CheckpointError, UnicodeDecodeError):
        return None  # the card is compared as it is
    if hashlib.sha256(raw).hexdigest() != total:
        return None
    from dus_cli.release.front_matter import without_results

    before = without_results(text)
    return None if before == text else hashlib.sha256(before.encode()).hexdigest()


def _check_base(path: Path, base: dict[str, Any]) -> None:
    """Check that the fields that say where the base is have the forms that dus writes."""
    repo_id, revision, commit = base.get("repo_id"), base.get("revision"), base.get("commit")
    if repo_id is None:
        if not isinstance(base.get("path"), str) or not base["path"] or "\0" in base["path"]:
            raise _damaged(path, "base.path")
        return
    if not isinstance(repo_id, str) or ModelRef.parse(repo_id or ".").repo_id != repo_id:
        raise _damaged(path, "base.repo_id")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit, re.ASCII):
        raise _damaged(path, "base.commit")
    if revision is not None and not isinstance(revision, str):
        raise _damaged(path, "base.revision")


def _recorded_ref(path: Path, base: dict[str, Any], token: str | None) -> ModelRef:
    """Where the base was: a repo at its commit, or a path as it was typed."""
    if base.get("repo_id") is not None:
        return ModelRef.parse(base["repo_id"], revision=base["commit"], token=token)
    ref = ModelRef(base["path"], path=user_path(base["path"]))
    if not user_path(base["path"]).is_dir():
        raise CheckpointError(
            f"{shown(path)} records its base at {shown(ref)}, where there is no directory; give "
            "its place now: dus upscale MODEL --from …"
        )
    return ref


def _request(path: Path, record: dict[str, Any]) -> MapRequest:
    """The request for the recorded map: by recipe, --double, --trim or --layers."""
    recipe, trim, layers = record.get("recipe"), record.get("trim"), record.get("layers")
    assume = tuple(lineage.recorded_assumptions(record).items())
    identity, start = bool(record.get("identity")), lineage.recorded_start(record)
    if recipe is not None:
        if not isinstance(recipe, str) or recipe not in RECIPES:
            raise _damaged(path, "recipe")
        return MapRequest(recipe=recipe, identity=identity, assume=assume, start=start)
    double = record.get("double")
    if double is not None:
        if not isinstance(double, str):
            raise _damaged(path, "double")
        return MapRequest(double=double, identity=identity, assume=assume, start=start)
    if trim is None:
        if not isinstance(layers, str):
            raise _damaged(path, "layers")
        return MapRequest(layers=layers, identity=identity, assume=assume, start=start)
    return MapRequest(
        trim, copies=_copies(path, record), identity=identity, assume=assume, start=start
    )


def _copies(path: Path, record: dict[str, Any]) -> int:
    """K of --copies, by the output's length: K · n − 2 · (K − 1) · m layers
    (`maps.layers.source_layers`).
    """
    trim, depths, sources = record["trim"], record.get("num_layers"), record["layer_map"]
    n = depths.get("base") if isinstance(depths, dict) else None
    if type(trim) is int and type(n) is int and isinstance(sources, list) and 0 <= trim < n / 2:
        copies = (len(sources) - 2 * trim) // (n - 2 * trim)
        if copies >= 2 and tuple(sources) == source_layers(n, trim, copies):
            return copies
    raise _damaged(path, "trim")


def _damaged(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{shown(path)}: {name} is not what dus writes; it was damaged or edited"
    )

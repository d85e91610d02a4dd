"""The options of `dus upscale`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.common.units import parse_size, size_text
from dus_cli.errors import shown
from dus_cli.hub.options import HUB, Branch, Private, Revision, Token
from dus_cli.maps.options import Assume, check_double, check_map, check_start, engines_option
from dus_cli.maps.recipes import RECIPES
from dus_cli.maps.starts import STARTS
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import DEFAULT_SHARD_BYTES
from dus_cli.verification.planned import VerifyMode
from dus_cli.writing.transfer import DEFAULT_JOBS, CopyMode

# The groups in which --help lists the options; the Hub's is in `hub.options`.
_MAP, _WRITING = "Layer map", "Writing"

# The fields whose values a lineage records.
RECORDED = (
    "revision",
    "trim",
    "layers",
    "double",
    "copies",
    "assume",
    "recipe",
    "identity",
    "start",
    "dtype",
    "max_shard_size",
)


def check_recipe(text: str) -> str:
    """Check the name of a published map, and return it.

    Raises:
        ValueError: there is no such map.
    """
    if text not in RECIPES:
        raise ValueError(f"there is no recipe {shown(text)!r}; use one of {', '.join(RECIPES)}")
    return text


@dataclass(frozen=True, kw_only=True)
class UpscaleOptions:
    """The layer map and its start, what is cast, and how the output is written and pushed.

    Attributes:
        lineage: the dus.json of a release that is to be made again. The model is then the base's
            place now, and no field in `RECORDED` may be given.
        revision: branch, tag or commit of a Hub id.
        token: Hub access token; HF_TOKEN or the stored login by default.
        trim: layers trimmed from each copy; a quarter of the base's by default.
        layers: any other map, as half-open ranges of base layers, such as "0:24,8:32".
        double: the base with the layers of these ranges twice in a row, such as "2:29".
        copies: copies to stack.
        recipe: a published map by name. `recipe`, `layers` and `double` exclude each other, `trim`
            and `copies`.
        assume: "keep" or "map" for fields of config.json that dus does not know.
        identity: new layers start as identities, so that the model computes what its base does.
        start: the factor on what layers add to the residual stream: "copy" (1, the default),
            "identity", "half", "fade", "fade:linear" or "scale:C" (`dus_cli.maps.starts`).
        engines: names of inference engines, such as "llama.cpp", that must compute the output as
            config.json says; "all" for every one that dus knows. Without `trim`, the nearest to a
            quarter with which they do is taken.
        dtype: what floating-point tensors are cast to (needs the heal extra).
        max_shard_size: size of the largest shard, in bytes.
        copy_mode: whether bytes are cloned (reflinks) or copied.
        stream: weights go from the Hub straight into the output, without a copy in the cache. What
            a killed run has fetched stays beside the output, and the same call continues.
        jobs: parallel copies, 1 to 64; with `stream`, parallel requests.
        push_to: a repo on the Hub to push the verified output to; created if it does not exist.
        private: create that repo as a private one.
        branch: branch of that repo; created if it does not exist, main by default.
        verify: what is checked before publishing.
        checksums: also write SHA256SUMS.
        overwrite: replace an existing output, once the new one is whole.
    """

    lineage: Annotated[
        Path | None,
        Option(
            "Make a release again from its dus.json, and compare with the SHA256SUMS beside it. "
            "Give MODEL if the base has moved.",
            name="from",
            metavar="DUS.JSON",
        ),
    ] = None
    revision: Revision = None
    token: Token = None
    trim: Annotated[
        int | None,
        Option(
            "Layers trimmed from each copy. Default: a quarter, or the nearest to it with which "
            "every inference engine computes what config.json says.",
            short="-t",
            metavar="M",
            panel=_MAP,
        ),
    ] = None
    layers: Annotated[
        str | None,
        Option(
            "Any other map, as half-open ranges of base layers: 0:24,8:32. Excludes --trim and "
            "--copies.",
            metavar="MAP",
            panel=_MAP,
            parse=check_map,
            once="give all ranges in one, with commas",
        ),
    ] = None
    double: Annotated[
        str | None,
        Option(
            "The base with each of its layers A to B - 1 twice in a row; several ranges: "
            "2:8,20:29. Excludes --trim, --layers and --copies.",
            metavar="A:B",
            panel=_MAP,
            parse=check_double,
            once="give all ranges in one, with commas",
        ),
    ] = None
    copies: Annotated[int, Option("Copies to stack.", metavar="K", panel=_MAP)] = 2
    assume: Assume = ()
    recipe: Annotated[
        str | None,
        Option(
            f"A published map: {', '.join(RECIPES)}. Excludes --trim, --layers, --double and "
            "--copies.",
            metavar="NAME",
            panel=_MAP,
            parse=check_recipe,
            choices=tuple(RECIPES),
        ),
    ] = None
    identity: Annotated[
        bool,
        Option(
            "New layers start as identities (output projections zero): the model computes what "
            "MODEL does. The same as --start identity.",
            panel=_MAP,
        ),
    ] = False
    start: Annotated[
        str | None,
        Option(
            "Factor on what layers add at first: copy (1), identity (0 for new layers), half "
            "(equal parts for the copies of a layer), fade (overlapping copies cross-fade; "
            "fade:cosine, the default, or fade:linear), scale:C (C for new layers). Default: copy.",
            metavar="START",
            panel=_MAP,
            parse=check_start,
            choices=tuple(STARTS),
        ),
    ] = None
    engines: Annotated[
        tuple[str, ...],
        engines_option(
            "Refuse a map that an inference engine would not compute as config.json says; without "
            "--trim, take the nearest to a quarter that it does.",
            _MAP,
        ),
    ] = ()
    dtype: Annotated[
        Dtype | None,
        Option(
            "Cast floating-point tensors to bf16, fp16 or fp32, rounding as torch does (heal "
            "extra).",
            metavar="DTYPE",
            panel=_WRITING,
            parse=Dtype.parse,
        ),
    ] = None
    max_shard_size: Annotated[
        int,
        Option(
            "Largest shard, in decimal KB, MB, GB or TB.",
            metavar="SIZE",
            panel=_WRITING,
            parse=parse_size,
            show=size_text,
        ),
    ] = DEFAULT_SHARD_BYTES
    copy_mode: Annotated[
        CopyMode,
        Option(
            "How to write the weights: clone (reflinks), copy, or auto, which clones if the file "
            "system can.",
            panel=_WRITING,
        ),
    ] = CopyMode.auto
    stream: Annotated[
        bool,
        Option(
            "Stream the weights from the Hub straight into OUT, without a copy in the cache. "
            "After a kill, the same command continues.",
            panel=HUB,
        ),
    ] = False
    jobs: Annotated[
        int,
        Option(
            "Number of parallel copies, or of parallel requests with --stream.",
            metavar="J",
            panel=_WRITING,
        ),
    ] = DEFAULT_JOBS
    push_to: Annotated[
        str | None,
        Option("Push OUT to the Hub once it is verified: org/name.", metavar="REPO", panel=HUB),
    ] = None
    private: Private = False
    branch: Branch = None
    verify: Annotated[
        VerifyMode,
        Option(
            "What to check before publishing: structure, full (every byte; with --stream, copies "
            "against each other and whole files against the Hub's sha256), forward (structure, "
            "and each layer run beside the base's), or none.",
            panel=_WRITING,
        ),
    ] = VerifyMode.structure
    checksums: Annotated[bool, Option("Also write SHA256SUMS.", panel=_WRITING)] = False
    overwrite: Annotated[
        bool, Option("Replace an existing OUT, once the new one is whole.", panel=_WRITING)
    ] = False

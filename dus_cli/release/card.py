"""README.md of the output: the model card."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from dus_cli.common.reference import ModelRef
from dus_cli.common.units import counted
from dus_cli.errors import shown
from dus_cli.maps.layers import LayerMap
from dus_cli.maps.recipes import RECIPES
from dus_cli.pictures.layer_map import PICTURES, describe_map, layer_map_svg
from dus_cli.planning.plan import Start, UpscalePlan
from dus_cli.release.drawing import describe_scales, draw_map
from dus_cli.release.lineage import base_chain

NAME = "README.md"

# The notes about the model's state in the card; `dus heal` replaces them.
NOT_HEALED = """\
> **This model is not healed.** Its layers are copies of the base's, stacked by depthwise scaling; at the
> seam layers meet that never met before, so it is worse than its base until it has had continued
> pretraining: `dus heal OUT --data corpus.jsonl`."""

NOT_TRAINED = """\
> **The new layers of this model are not trained.** Their output projections are zeros, so they are
> identities and it computes what its base does; continued pretraining makes use of them:
> `dus heal OUT --data corpus.jsonl --train new`."""

SCALED_COPIES = """\
> **This model is not healed.** Its layers are copies of the base's, and what some of them add to the residual stream is
> scaled, which brings it nearer to its base. It is worse than its base until it has had continued pretraining:
> `dus heal OUT --data corpus.jsonl`."""

SAME_AS_BASE = """\
> **This model computes what its base does.** It has the base's layers, all and in order, and no others: there is
> nothing to heal."""

LAYERS_LEFT_OUT = """\
> **This model is not healed.** It has some of its base's layers, in order, and leaves out the others, so it is worse
> than its base until it has had continued pretraining: `dus heal OUT --data corpus.jsonl`."""

STATES = {
    Start.seams: NOT_HEALED,
    Start.scaled: SCALED_COPIES,
    Start.identity: NOT_TRAINED,
    Start.base: SAME_AS_BASE,
    Start.part: LAYERS_LEFT_OUT,
}

# The section on healing is between these marks; `dus heal` removes it.
HEAL_START, HEAL_END = "<!-- dus: heal it -->", "<!-- /dus: heal it -->"

# The Hub knows adapter, finetune, quantized and merge (huggingface.co/docs/hub/model-cards,
# "Specifying a base model"). A model stacked from a base's own layers, none of them trained, is
# what mergekit calls a passthrough merge, and the Hub's cards of such models
# (mlabonne/Meta-Llama-3-120B-Instruct) say merge. Continued pretraining makes it a finetune.
SCALED, HEALED = "base_model_relation: merge", "base_model_relation: finetune"

_CITATION = """\
```bibtex
@article{kim2023solar,
  title   = {SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling},
  author  = {Kim, Dahyun and Park, Chanjun and others},
  journal = {arXiv preprint arXiv:2312.15166},
  year    = {2023}
}
```"""


def command_line(plan: UpscalePlan) -> str:
    """The command that makes this model again. It names OUT instead of the directory, so that the
    card does not depend on it.
    """
    ref = plan.base.ref
    model = (
        ref.text
        if ref.repo_id is None
        else ref.repo_id + (f"@{plan.base.commit}" if plan.base.commit else "")
    )
    return f"dus upscale {shlex.quote(model)} {plan.options} -o OUT"


def pictures(plan: UpscalePlan) -> dict[str, str]:
    """The layer map's pictures that the card shows, by file name."""
    identities = plan.layer_map.new_layers if plan.treatment.zeros else ()
    return {
        name: layer_map_svg(plan.layer_map, dark=dark, identities=identities)
        for name, dark in PICTURES.items()
    }


def model_card(plan: UpscalePlan) -> str:
    """The model card: Markdown with the Hub's metadata at its beginning. Like dus.json, it has no
    times and no output path.
    """
    layer_map, base_parameters, chain = (
        plan.layer_map,
        plan.checkpoint.num_parameters,
        base_chain(plan.checkpoint),
    )
    warnings = "".join(f"\n> **Note:** {warning}\n" for warning in plan.warnings)
    how = "depth up-scaled" if layer_map.is_deeper else "rearranged"
    light, dark = PICTURES
    return f"""---
{_metadata(plan, chain)}
---

# {shown(plan.base.ref.repo_id or plan.base.name)}, {how} to {len(layer_map)} layers

{STATES[plan.start]}
{warnings}
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{dark}">
  <img alt="{describe_map(layer_map)}" src="{light}">
</picture>

| | base | this model |
|---|---|---|
| layers | {layer_map.num_base_layers} | {len(layer_map)} |
| parameters | {base_parameters:,} | {plan.num_parameters:,} |

Layer map: `{layer_map}` (half-open ranges of base layers).{_recipe(plan)}{_scaled(plan)}{_dtype(plan)}

{_seams(layer_map)}

<details><summary>The map as text</summary>

```
{draw_map(layer_map, width=76)}
```

</details>

## Load it

It is an ordinary checkpoint; OUT is its directory, or its id on the Hub.

```python
{_loading(plan)}
```

{_healing(plan)}## Lineage

{_lineage(plan, len(chain))}

```
{command_line(plan)}
```

`dus.json` holds the lineage; `dus upscale --from dus.json -o OUT` makes the same bytes again.

## Citation

{_CITATION}
"""


def _healing(plan: UpscalePlan) -> str:
    """The section on healing, with an empty line after it; "" if there is nothing to heal."""
    if plan.start is Start.base:
        return ""
    train = " --train new" if plan.start is Start.identity else ""
    return f"""{HEAL_START}
## Heal it

```
pip install 'dus-cli[heal]'
dus heal OUT --data corpus.jsonl{train} --dry-run    # tokens, memory and FLOPs first
dus heal OUT --data corpus.jsonl{train}
```

OUT must be a directory here.
{HEAL_END}

"""


# --- metadata -----------------------------------------------------------------------------------


def _metadata(plan: UpscalePlan, chain: list[Any]) -> str:
    """The Hub's fields as YAML. Texts that are not plainly safe are quoted as JSON, so that none
    can end its field.
    """
    base, config = plan.base_card, plan.checkpoint.config
    fields: dict[str, Any] = {}
    if (base_model := _base_model(plan, chain)) is not None:
        fields["base_model"] = base_model
    fields["library_name"] = "transformers"
    fields["pipeline_tag"] = base.task or _task(config)
    if base.license:
        fields["license"] = base.license[0] if len(base.license) == 1 else list(base.license)
    if "other" in base.license:  # the Hub reads name and link only for the licence "other"
        fields["license_name"], fields["license_link"] = base.license_name, _license_link(plan)
    fields["language"] = list(base.languages)
    fields["tags"] = ["depth-up-scaling", *(tag for tag in base.tags if tag != "depth-up-scaling")]
    lines = [line for name, value in fields.items() if value for line in _yaml(name, value)]
    if base_model is not None:
        lines.insert(1, SCALED)
    return "\n".join(lines)


def _yaml(name: str, value: str | list[str]) -> list[str]:
    if isinstance(value, str):
        return [f"{name}: {_scalar(value)}"]
    return [f"{name}:", *(f"- {_scalar(item)}" for item in value)]


def _scalar(text: str) -> str:
    """A text as YAML: plain if every version of YAML reads it as text, else quoted.

    >>> _scalar("apache-2.0"), _scalar("no"), _scalar("1e3")
    ('apache-2.0', '"no"', '"1e3"')
    """
    is_plain = re.fullmatch(r"[a-z][a-z0-9_-]*(?:\.[0-9]+)?", text) and text not in _YAML_WORDS
    return text if is_plain else json.dumps(text)


_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


def _base_model(plan: UpscalePlan, chain: list[Any]) -> str | None:
    """The Hub id of the base; for a base that dus made from a model on the Hub, that model's id;
    else None.
    """
    if plan.base.ref.repo_id is not None:
        return plan.base.ref.repo_id
    for record in reversed(chain):
        base = record.get("base") if isinstance(record, dict) else None
        repo_id = base.get("repo_id") if isinstance(base, dict) else None
        if isinstance(repo_id, str):  # from a file: used only if it has the form of an id
            return repo_id if ModelRef.parse(repo_id or ".").repo_id == repo_id else None
    return None


def _task(config: dict[str, Any]) -> str:
    """The Hub's task of the model, by the other models that the config wraps."""
    if "vision_config" in config:
        return "image-text-to-text"
    return "audio-text-to-text" if "audio_config" in config else "text-generation"


def _license_link(plan: UpscalePlan) -> str | None:
    """The licence's link: an address or a file of the output as it is; for another file, its
    address in the base's repo.
    """
    link, ref = plan.base_card.license_link, plan.base.ref
    if link is None or link.startswith(("https://", "http://")) or link in dict(plan.files):
        return link
    return (
        f"https://huggingface.co/{ref.repo_id}/blob/{plan.base.commit or 'main'}/{link}"
        if ref.repo_id
        else None
    )


# --- the body -----------------------------------------------------------------------------------


def _recipe(plan: UpscalePlan) -> str:
    name = plan.request.recipe
    return "" if name is None else f" It is the recipe `{name}`: {RECIPES[name].source}."


def _scaled(plan: UpscalePlan) -> str:
    treatment = plan.treatment
    if not treatment.scaled:
        return ""
    return (
        f" Its start is `{plan.request.start}`: "
        f"{describe_scales(treatment.factors, treatment.scaled)}."
    )


def _dtype(plan: UpscalePlan) -> str:
    dtype = plan.treatment.dtype
    return (
        ""
        if dtype is None
        else f" Its floating-point tensors are {dtype.value}; others of the base's were cast."
    )


def _seams(layer_map: LayerMap) -> str:
    lines = [
        f"- output layers {seam.output_layers[0]} and {seam.output_layers[1]}: base layer "
        f"{seam.base_layers[0]} feeds base layer {seam.base_layers[1]}, distance {seam.distance}"
        for seam in layer_map.seams
    ]
    if len(lines) > 40:  # dus.json has them all
        lines = [*lines[:40], f"- {len(lines) - 40} seams more"]
    return "\n".join(lines) or "No seam: every layer follows its neighbour in the base."


# transformers' class for each task that `_task` finds.
_LOADERS = {
    "text-generation": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "audio-text-to-text": "AutoModelForMultimodalLM",
}


def _loading(plan: UpscalePlan) -> str:
    """Python code that loads the model and its tokenizer or processor."""
    config, task = plan.checkpoint.config, _task(plan.checkpoint.config)
    model = _LOADERS[task]
    tool = "AutoTokenizer" if task == "text-generation" else "AutoProcessor"
    # The base's code is used, and its `.py` files are in the output.
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    return f"""from transformers import {model}, {tool}

model = {model}.from_pretrained("OUT", dtype="auto"{trust})
{tool.removeprefix("Auto").lower()} = {tool}.from_pretrained("OUT"{trust})"""


def _lineage(plan: UpscalePlan, count: int) -> str:
    ref = plan.base.ref
    if ref.repo_id is not None:
        at = f" at commit `{plan.base.commit}`" if plan.base.commit else ""
        base = f"[{ref.repo_id}](https://huggingface.co/{ref.repo_id}){at}"
    else:
        base = f"`{shown(plan.base.name)}`, a directory"
    origin = (
        f", itself made by dus in {counted(count, 'step')} (`chain` in `dus.json`)" if count else ""
    )
    pickled = "\n\nThe base's weights were pickled; these are safetensors, the same numbers."
    return (
        f"Base: {base}{origin}.{pickled if plan.checkpoint.is_pickled else ''}\n\n"
        "Made by [dus](https://pypi.org/project/dus-cli/) with"
    )

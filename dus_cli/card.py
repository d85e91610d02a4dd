"""README.md of the output: the model card."""

from __future__ import annotations

import json
import shlex

from dus_cli.drawing import draw_map
from dus_cli.planning import UpscalePlan
from dus_cli.recipes import RECIPES

# What `dus heal` replaces in the card: one of these two.
NOT_HEALED = """\
> **This model is not healed.** Its layers are copies of the base's, stacked by depthwise scaling; at the
> seam layers meet that never met before, so it is worse than its base until it has had continued
> pretraining: `dus heal OUT --data corpus.jsonl`."""

NOT_TRAINED = """\
> **The new layers of this model are not trained.** Their output projections are zeros, so they are
> identities and it computes what its base does; continued pretraining makes use of them:
> `dus heal OUT --data corpus.jsonl --train new`."""

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
    """The command that makes this model again. OUT stands for the directory, so that any two runs agree."""
    ref = plan.base.ref
    model = ref.text if ref.repo_id is None else ref.repo_id + (f"@{plan.base.commit}" if plan.base.commit else "")
    return f"dus upscale {shlex.quote(model)} {plan.options} -o OUT"


def _recipe(plan: UpscalePlan) -> str:
    name = plan.request.recipe
    return "" if name is None else f" It is the recipe `{name}`: {RECIPES[name].source}."


def _dtype(plan: UpscalePlan) -> str:
    dtype = plan.treatment.dtype
    return "" if dtype is None else f" Its floating-point tensors are {dtype.value}; others of the base's were cast."


def model_card(plan: UpscalePlan) -> str:
    """Markdown with the Hub's metadata in front. Like dus.json it has no times and no output path."""
    ref, layer_map = plan.base.ref, plan.layer_map
    metadata = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- depth-up-scaling"]
    if ref.repo_id is not None:
        metadata.insert(0, f"base_model: {json.dumps(ref.repo_id)}")
    name = ref.repo_id or ref.name
    seams = "\n".join(
        f"- output layers {seam.output_layers[0]} and {seam.output_layers[1]}: base layer {seam.base_layers[0]} "
        f"feeds base layer {seam.base_layers[1]}, distance {seam.distance}"
        for seam in layer_map.seams
    )
    format_note = "The base's weights were pickled; these are safetensors, the same numbers.\n\n"
    warnings = "".join(f"\n> **Note:** {warning}\n" for warning in plan.warnings)
    base_parameters = plan.checkpoint.num_parameters
    return f"""---
{chr(10).join(metadata)}
---

# {name}, depth up-scaled to {len(layer_map)} layers

{NOT_TRAINED if plan.treatment.zeros else NOT_HEALED}
{warnings}
| | base | this model |
|---|---|---|
| layers | {layer_map.num_base_layers} | {len(layer_map)} |
| parameters | {base_parameters:,} | {plan.num_parameters:,} |

```
{draw_map(layer_map, width=76)}
```

Layer map: `{layer_map}` (half-open ranges of base layers).{_recipe(plan)}{_dtype(plan)}

{seams or "No seam: every layer follows its neighbour in the base."}

{format_note if plan.checkpoint.is_pickled else ""}Made by [dus](https://pypi.org/project/dus-cli/) with

```
{command_line(plan)}
```

It is an ordinary checkpoint: `AutoModelForCausalLM.from_pretrained("OUT")`. `dus.json` holds its lineage.

## Citation

{_CITATION}
"""

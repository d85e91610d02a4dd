r"""Starts that `dus upscale` does not have, beside those that it has: what a new layer holds inside,
how loudly it speaks, and a linear patch at the seam.

    python tests/benchmarks/other_starts.py BASE --work DIR --data train.jsonl --eval-data heldout.jsonl \
        [--starts copy,patch,...] [--double 7:23] [--trim 7] [--heal] [--seeds 0]
        [--tokens 12288] [--below 3]

Each start is a folder of DIR, made from what `dus upscale` writes by replacing tensors, measured by
transformers in fp32 over the first 5,120 held-out tokens. With --heal those below --below are then
healed by `dus heal` as it is (heal_recovery.py, whose results.jsonl stands in DIR). What is in DIR
is not made again. Needs scipy.

A start of the --double map is INSIDE-VOICE. Inside a new layer, which stands between base layers a
and b = a + 1:

- `copy`: a.
- `mean`: the mean of the two.
- `ot`: the mean, once b's neurons and heads are in a's order: optimal transport between uniform
  weights is an assignment (OpT-DeUS, arXiv:2508.08011; neurons by their rows of gate and up and
  their column of down, heads within their groups).
- `svd`: of each matrix the two side by side = U S [Va Vb], each row of V turned half the way from
  Va to Vb at the geometric mean of their lengths (LESA, arXiv:2502.13794, without its trained
  network; a straight line between Va and Vb would be the mean itself).

Its voice: `full`, `half` (as `--start half`: a and what follows it at half each), or `zero` (an
identity). Starts of the --trim map are those of `dus upscale` by their names, and

- `patch`, `patch-neurons`: the copies, with the output projection of the MLP before the seam so
  changed that the stream comes nearest, by least squares over --fit-tokens, to what the layer
  behind the seam is used to. `patch` changes what the MLP says by a matrix T as wide as the stream
  (ReplaceMe, arXiv:2505.02819; LinearPatch, 2505.24680), `patch-neurons` its output projection as a
  whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss_after_scaling import mean_loss, read_tokens
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Layer = dict[str, Tensor]  # a layer's tensors by their names within it, fp32

OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
STARTS_OF_VOICES = {"full": "copy", "half": "half", "zero": "identity"}
ROWS = 10  # of 512 held-out tokens


def mean(a: Layer, b: Layer) -> Layer:
    return {name: (a[name] + b[name]) / 2 for name in a}


def transported(a: Layer, b: Layer, heads_per_group: int, head: int) -> Layer:
    """The mean of a and of b with its neurons and heads in the order that is nearest to a's."""
    b = dict(b)
    order = _assigned(_neurons(a), _neurons(b))
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        b[name] = b[name][order]
    b["mlp.down_proj.weight"] = b["mlp.down_proj.weight"][:, order]
    groups, heads = _heads(a, b, heads_per_group, head)
    for name, wanted in (("q", heads), ("k", groups), ("v", groups)):
        full = f"self_attn.{name}_proj.weight"
        b[full] = b[full].reshape(-1, head, b[full].shape[1])[wanted].reshape(b[full].shape)
    o_proj = b["self_attn.o_proj.weight"]
    by_head = o_proj.reshape(o_proj.shape[0], -1, head)
    b["self_attn.o_proj.weight"] = by_head[:, heads].reshape(o_proj.shape)
    return mean(a, b)


def _neurons(layer: Layer) -> Tensor:
    """A row for each neuron of the MLP: its gate, its up and its down, of length 1 each."""
    rows = ("gate_proj", "up_proj", "down_proj")
    matrices = [layer[f"mlp.{name}.weight"] for name in rows]
    matrices[2] = matrices[2].T
    return torch.cat([torch.nn.functional.normalize(m, dim=1) for m in matrices], 1)


def _assigned(a: Tensor, b: Tensor) -> Tensor:
    """For each row of a its own row of b, so that their products come to most."""
    return torch.as_tensor(linear_sum_assignment((a @ b.T).numpy(), maximize=True)[1])


def _heads(a: Layer, b: Layer, per_group: int, head: int) -> tuple[Tensor, Tensor]:
    """For each key/value group and each query head of a, b's; heads stay with their group."""

    def likeness(of: str, axis: int) -> Tensor:
        """Of every head of a with every head of b. Shape (heads, heads)."""
        rows = []
        for layer in (a, b):
            matrix = layer[f"self_attn.{of}_proj.weight"]
            matrix = matrix if axis == 0 else matrix.T
            rows.append(torch.nn.functional.normalize(matrix.reshape(len(matrix) // head, -1)))
        return rows[0] @ rows[1].T

    of_queries = likeness("q", 0) + likeness("o", 1)
    of_groups = likeness("k", 0) + likeness("v", 0)
    num_groups = len(of_groups)
    inside = {}
    for one, other in product(range(num_groups), repeat=2):
        block = of_queries[
            one * per_group : (one + 1) * per_group, other * per_group : (other + 1) * per_group
        ]
        rows, columns = linear_sum_assignment(block.numpy(), maximize=True)
        inside[one, other] = torch.as_tensor(columns)
        of_groups[one, other] += float(block[rows, columns].sum())
    groups = linear_sum_assignment(of_groups.numpy(), maximize=True)[1]
    heads = [int(other) * per_group + inside[one, int(other)] for one, other in enumerate(groups)]
    return torch.as_tensor(groups), torch.cat(heads)


def turned(a: Layer, b: Layer) -> Layer:
    """Each matrix half the way from a's to b's in the coefficients of a common SVD."""
    found = mean(a, b)
    for name, matrix in a.items():
        if matrix.dim() < 2:
            continue
        # U and S of the two side by side; (U S) V = W, so V needs no SVD of its own
        squares, left = torch.linalg.eigh((matrix @ matrix.T + b[name] @ b[name].T).double())
        scale = squares.clamp(min=1e-12).sqrt()
        one, other = ((left.T @ w.double()) / scale[:, None] for w in (matrix, b[name]))
        lengths = [v.norm(dim=1, keepdim=True).clamp(min=1e-12) for v in (one, other)]
        halfway = one / lengths[0] + other / lengths[1]
        halfway *= (lengths[0] * lengths[1]).sqrt() / halfway.norm(dim=1, keepdim=True)
        found[name] = (left @ (scale[:, None] * halfway)).float()
    return found


class Study:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work: Path = options.work
        self.base = Path(options.base)
        config = AutoConfig.from_pretrained(self.base)
        per_group = config.num_attention_heads // config.num_key_value_heads
        head = config.hidden_size // config.num_attention_heads
        self.insides: dict[str, Callable[[Layer, Layer], Layer]] = {
            "copy": lambda a, _: a,
            "mean": mean,
            "ot": lambda a, b: transported(a, b, per_group, head),
            "svd": turned,
        }

    def model(self, name: str) -> Path:
        """The folder of a start, made where it is not there."""
        folder = self.work / name.replace(":", "-")
        if folder.exists():
            return folder
        made = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(made, ignore_errors=True)
        inside, _, voice = name.partition("-")
        if inside in self.insides and voice in STARTS_OF_VOICES:
            self.upscale(made, "--double", self.options.double, STARTS_OF_VOICES[voice])
            self.fill(made, self.insides[inside])
        elif inside == "patch":
            self.upscale(made, "--trim", str(self.options.trim), "copy")
            self.patch(made, of_neurons=voice == "neurons")
        else:
            self.upscale(made, "--trim", str(self.options.trim), name)
        made.rename(folder)
        return folder

    def upscale(self, out: Path, option: str, value: str, start: str) -> None:
        command = [sys.executable, "-m", "dus_cli", "upscale", str(self.base), option, value]
        subprocess.run([*command, "--start", start, "-o", str(out), "--quiet"], check=True)

    def fill(self, folder: Path, fused: Callable[[Layer, Layer], Layer]) -> None:
        """Put into each new layer what comes of its neighbours, as loud as the layer is."""
        lineage = json.loads((folder / "dus.json").read_text())
        base = load_file(self.base / "model.safetensors")
        scaled = lineage.get("scaled") or {}
        factors = scaled.get("factors", [1.0] * len(lineage["layer_map"]))
        silent = lineage["identity"] is not None
        new = {}
        for output in lineage["new_layers"]:
            source = lineage["layer_map"][output]
            pair = (_layer(base, source), _layer(base, source + 1))
            for name, tensor in fused(*pair).items():
                factor = 1.0 if name not in OUTPUTS else 0.0 if silent else factors[output]
                new[f"model.layers.{output}.{name}"] = tensor * factor
        _replace(folder, new)

    def patch(self, folder: Path, *, of_neurons: bool) -> None:
        """Fold into the last output projection before the seam what brings the stream back."""
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        trim, num_layers = self.options.trim, model.config.num_hidden_layers
        before = model.model.layers[num_layers - trim - 1]
        spoken = before.mlp.down_proj
        caught: dict[str, list[Tensor]] = {"neurons": [], "stream": [], "wanted": []}
        spoken.register_forward_pre_hook(
            lambda _, given: caught["neurons"].append(given[0].flatten(0, 1).double())
        )
        for key, layer in (("stream", before), ("wanted", model.model.layers[trim - 1])):
            layer.register_forward_hook(
                lambda _, __, out, key=key: caught[key].append(
                    (out if torch.is_tensor(out) else out[0]).flatten(0, 1).double()
                )
            )
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        with torch.no_grad():
            rows = self.options.fit_tokens // 512
            for row in read_tokens(Path(self.options.data), tokenizer, rows):
                model.model(input_ids=row[None])
        neurons, stream, wanted = (torch.cat(parts) for parts in caught.values())
        weight = spoken.weight.detach().double()
        said = neurons @ weight.T
        given, missing = (neurons if of_neurons else said), wanted - (stream - said)
        square = given.T @ given
        square += 1e-4 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        found = torch.linalg.solve(square, given.T @ missing)  # given @ found is nearest to missing
        patched = found.T if of_neurons else found.T @ weight
        left = float((given @ found - missing).square().mean() / (stream - wanted).square().mean())
        print(f"{left:.3f} of the seam's squared distance is left", file=sys.stderr)
        name = f"model.layers.{num_layers - trim - 1}.mlp.down_proj.weight"
        _replace(folder, {name: patched.float()})

    def loss(self, name: str) -> float:
        """Right after scaling, once."""
        path = self.work / "losses.json"
        losses: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
        if name not in losses:
            folder = self.base if name == "base" else self.model(name)
            tokenizer = AutoTokenizer.from_pretrained(self.base)
            tokens = read_tokens(Path(self.options.eval_data), tokenizer, ROWS)
            losses[name] = mean_loss(str(folder), tokens)
            path.write_text(json.dumps(losses))
        return losses[name]

    def heal(self, name: str, seed: str) -> None:
        options = self.options
        command = [sys.executable, str(Path(__file__).with_name("heal_recovery.py"))]
        command += [str(self.model(name)), "--data", options.data, "--eval-data", options.eval_data]
        command += ["--seeds", seed, "--only", "default", "--tokens", str(options.tokens)]
        command += [
            "--eval-tokens",
            str(ROWS * 512),
            "--every",
            str(options.tokens),
            "--label",
            f"{name}: ",
        ]
        subprocess.run([*command, "--results", str(self.results)], check=True)

    @property
    def results(self) -> Path:
        return self.work / "results.jsonl"

    def table(self, names: list[str]) -> None:
        found: list[dict[str, Any]] = []
        if self.results.exists():
            found = [json.loads(line) for line in self.results.read_text().splitlines()]
        print("\n| start | right after scaling | healed, each seed | mean |\n|---|---|---|---|")
        for name in names:
            ends = [
                run["curve"][-1][1]
                for run in sorted(found, key=lambda run: run["seed"])
                if run["name"] == f"{name}: default"
            ]
            seeds = ", ".join(f"{loss:.3f}" for loss in ends)
            average = f"{np.mean(ends):.3f}" if ends else ""
            print(f"| {name} | {self.loss(name):.3f} | {seeds} | {average} |", flush=True)


def _layer(tensors: dict[str, Tensor], number: int) -> Layer:
    begin = f"model.layers.{number}."
    return {
        name.removeprefix(begin): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(begin)
    }


def _replace(folder: Path, new: dict[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert new.keys() <= tensors.keys()
    tensors |= {name: tensor.to(tensors[name].dtype).contiguous() for name, tensor in new.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    insides = [
        f"{inside}-{voice}"
        for inside in ("copy", "mean", "ot", "svd")
        for voice in STARTS_OF_VOICES
    ]
    default = [
        "base",
        "copy",
        "fade:linear",
        "fade:cosine",
        "identity",
        "patch",
        "patch-neurons",
        *insides,
    ]
    parser.add_argument("--starts", default=",".join(default))
    parser.add_argument("--double", default="7:23")
    parser.add_argument("--trim", type=int, default=7)
    parser.add_argument("--fit-tokens", type=int, default=8192)
    parser.add_argument("--heal", action="store_true")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--below", type=float, default=3.0, help="what starts above is not healed")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    study, names = Study(options), options.starts.split(",")
    for name in names:
        print(f"{name}: {study.loss(name):.4f}", flush=True)
    if options.heal:
        for seed in options.seeds.split(","):
            for name in names:
                if name != "base" and study.loss(name) < options.below:
                    study.heal(name, seed)
    study.table(names)


if __name__ == "__main__":
    main()

"""The model card: metadata that the Hub takes, whatever the base's card says, and the layer map
as a picture.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from forked import dus
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from dus_cli.common.reference import ModelRef
from dus_cli.heal.proof.card import healed_card
from dus_cli.maps.layers import LayerMap, stack, typed_map
from dus_cli.maps.recipes import recipe_map
from dus_cli.pictures.layer_map import PICTURES, layer_map_svg
from dus_cli.planning.plan import MapRequest
from dus_cli.source.base_card import BaseCard, parse_base_card, read_base_card
from dus_cli.source.belonging import carried_files
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.upscaling.verb import upscale

LLAMA = """---
license: other
license_name: llama3
license_link: LICENSE
language:
- en
- no
pipeline_tag: text-generation
tags: [chat, gguf, facebook, "arxiv:2307.09288", "base_model:x/y"]
model-index:
- name: x
  results: []
base_model: someone/else
---

# Llama
"""


def fields(card: ModelCard) -> dict[str, Any]:
    """The metadata as huggingface_hub's own dataclass takes it."""
    assert isinstance(card.data, ModelCardData)
    found: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
    return found


def card_of(base: Path, output: Path, *, trim: int = 2, with_checksums: bool = False) -> ModelCard:
    """The card of an upscale, loaded by huggingface_hub, which refuses what is no card."""
    upscale(
        UpscaleRequest(ModelRef(str(base), path=base), MapRequest(trim)),
        output,
        UpscaleOptions(checksums=with_checksums),
    )
    assert metadata_load(output / "README.md")
    return ModelCard((output / "README.md").read_text(encoding="utf-8"))


def test_what_still_holds_of_the_bases_card_is_taken(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text(LLAMA)
    (base / "LICENSE").write_text("the licence")
    card = card_of(base, tmp_path / "out")
    assert fields(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "tags": ["depth-up-scaling", "chat", "facebook", "arxiv:2307.09288"],
    }
    assert (tmp_path / "out/LICENSE").read_text() == "the licence"


def test_a_base_without_a_card_leaves_licence_and_base_model_out(
    base: Path, tmp_path: Path
) -> None:
    assert fields(card_of(base, tmp_path / "out")) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["depth-up-scaling"],
    }


@pytest.mark.parametrize(
    ("tower", "task", "loader"),
    [
        ("vision_config", "image-text-to-text", "AutoModelForImageTextToText"),
        ("audio_config", "audio-text-to-text", "AutoModelForMultimodalLM"),
    ],
)
def test_a_wrapper_has_the_task_of_its_tower_and_is_loaded_as_one(
    tower: str, task: str, loader: str, tmp_path: Path
) -> None:
    tensors = [(f"language_model.{name}", dtype, shape) for name, dtype, shape in llama_tensors(4)]
    config = {"model_type": "llava", "text_config": llama_config(4), tower: {"hidden_size": 8}}
    card = card_of(write_checkpoint(tmp_path / "base", tensors, config), tmp_path / "out", trim=1)
    assert fields(card)["pipeline_tag"] == task
    assert loader in card.text


HOSTILE: dict[str, str] = {
    "breaks out": '---\nlicense: "mit\\n---\\n# mine"\nlicense_name: "a\\nbase_model: evil/x"\n---\n',
    "markup": "---\nlicense: <script>alert(1)</script>\ntags: ['<img src=x>', '](http://evil)']\n---\n",
    "python objects": "---\nlicense: !!python/object/apply:os.system ['touch pwned']\n---\n",
    "a bomb of aliases": "---\ntags: [&a [x,x,x], "
    + ", ".join(f"&{chr(98 + k)} [*{chr(97 + k)},*{chr(97 + k)},*{chr(97 + k)}]" for k in range(20))
    + "]\n---\n",
    "an alias of nothing": "---\nlicense: *nowhere\n---\n",
    "nested beyond reason": "---\nlicense: " + "[" * 9000 + "\n---\n",
    "no end": "---\nlicense: mit\n" + "x: y\n" * 10,
    "no YAML": "---\nlicense: {mit\n---\n",
    "a mapping": "---\nlicense: {a: b}\nlanguage: {a: b}\ntags: {a: b}\n---\n",
    "a field of a megabyte": "---\ntags: [" + "x, " * 350_000 + "]\n---\n",
    "ten megabytes of text": "---\nlicense: [[mit]]\n---\n" + "x" * 10_000_000,
    "ten megabytes of metadata": "---\nlicense: [[mit]]\n" + "x: y\n" * 2_000_000 + "---\n",
    "not text": "\udcff\udcfe---\nlicense: mit\n---\n",
    "empty": "",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_card_costs_nothing_and_adds_nothing(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (base / "README.md").write_text(HOSTILE[name], encoding="utf-8", errors="surrogateescape")
    found = read_base_card(base)
    assert (found.license, found.license_name, found.license_link, found.languages, found.tags) == (
        (),
        None,
        None,
        (),
        (),
    )
    assert not (tmp_path / "pwned").exists()


def test_a_damaged_card_is_said_and_ours_stays_valid(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text(HOSTILE["no YAML"])
    assert any(
        "license" in warning
        for warning in dus("upscale", base, "-o", "x", "--dry-run", "--json").report["warnings"]
    )
    card = card_of(base, tmp_path / "out")
    assert "license" not in fields(card)
    assert "is no metadata that can be read" in card.text


def test_a_card_that_is_a_link_to_elsewhere_is_not_followed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("---\nlicense: mit\n---\n")
    (base / "README.md").symlink_to(tmp_path / "secret")
    found = read_base_card(base)
    assert found.license == ()
    assert "leaves the model's folder" in (found.problem or "")


def test_only_the_wanted_lines_are_read_as_yaml() -> None:
    text = "---\nmodel-index: [*bomb, {\nlicense: apache-2.0\nextra: |\n  license: mit\n---\n"
    assert parse_base_card(text) == BaseCard(license=("apache-2.0",))


def test_the_base_model_of_a_chain_is_the_one_on_the_hub(base: Path, tmp_path: Path) -> None:
    """Where the base is a directory that dus made from a model on the Hub."""
    card_of(base, tmp_path / "once")
    path = tmp_path / "once/dus.json"
    record = json.loads(path.read_text())
    record["base"] = {"repo_id": "org/llama", "commit": "1" * 40}
    path.write_text(json.dumps(record))
    card = card_of(tmp_path / "once", tmp_path / "twice")
    assert (fields(card)["base_model"], fields(card)["base_model_relation"]) == (
        "org/llama",
        "merge",
    )
    assert "made by dus in 1 step " in card.text
    record["base"] = {"repo_id": "org/llama\nlicense: mit"}
    path.write_text(json.dumps(record))
    assert "base_model" not in fields(card_of(tmp_path / "once", tmp_path / "third"))


def report(*, reached: bool | None) -> dict[str, Any]:
    losses = {
        "base_loss": None if reached is None else 2.0,
        "scaled_loss": 3.0,
        "loss": 1.9,
        "tokens_to_base": 10,
    }
    spent = {"fraction_of_pretraining": 0.1, "tokens": 10, "steps": 1, "flops": 1.0, "epochs": 0.5}
    data = {"data": ["corpus.jsonl"], "train_tokens": 20, "train_documents": 2}
    heldout = {"heldout_tokens": 5, "heldout_documents": 1, "available_heldout_tokens": 50}
    return losses | spent | data | heldout | {"reached_base": reached}


def test_a_healed_card_is_a_finetune_with_both_pictures_and_no_advice_to_heal(
    base: Path, tmp_path: Path
) -> None:
    card_of(base, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    text = text.replace(
        "library_name", 'base_model: "org/llama"\nbase_model_relation: merge\nlibrary_name', 1
    )
    healed = healed_card(text, report(reached=True), "out")
    assert fields(ModelCard(healed))["base_model_relation"] == "finetune"
    assert set(re.findall(r'src="([^"]+)"', healed)) == {"layer-map-light.svg", "healing-light.svg"}
    assert "## Heal it" not in healed
    assert "not healed" not in healed
    assert "## Lineage" in healed
    assert "over 5 tokens of 1 document of the 50 tokens held out" in healed
    assert "## Heal it" in healed_card(text, report(reached=False), "out")


def test_the_pictures_belong_to_the_output_and_not_to_its_base(base: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    card_of(base, once, with_checksums=True)
    card_of(once, twice, trim=1)
    assert not {name for name, _ in carried_files(once).files} & set(PICTURES)
    for name in PICTURES:
        assert f'"{name}"' in (once / "README.md").read_text()
        assert f"  {name}\n" in (once / "SHA256SUMS").read_text()
        assert "12 layers" in (once / name).read_text()
        assert "22 layers" in (twice / name).read_text()
    (once / "layer-map-dark.svg").unlink()
    # no longer what the command writes
    dus("upscale", base, "-o", once, "-q").assert_one_line_error("not empty")
    verified = dus("verify", once).stdout
    assert "problem: layer-map-dark.svg is in SHA256SUMS" in verified
    assert "warning: README.md shows layer-map-dark.svg, which does not exist" in verified


# --- the picture --------------------------------------------------------------------------------

MAPS: dict[str, Callable[[], LayerMap]] = {
    "solar": lambda: stack(32, 8),
    "three copies": lambda: stack(30, 7, 3),
    "llama-pro": lambda: recipe_map("llama-pro", 32),
    "llama-3-120b": lambda: recipe_map("llama-3-120b", 80),
    "eighty": lambda: stack(80, 20),
    "one layer": lambda: typed_map("0,0", 1),
    "no seam": lambda: typed_map("0:4", 8),
    "twelve copies": lambda: stack(80, 30, 12),
    "a hundred thousand layers": lambda: typed_map(",".join(["5,3"] * 50_000), 8),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_picture_of_any_map_is_small_and_within_its_frame(name: str) -> None:
    layer_map = MAPS[name]()
    svg = layer_map_svg(layer_map, dark=False, identities=layer_map.new_layers)
    assert len(svg) < 60_000
    root = ET.fromstring(svg)  # noqa: S314  (our own text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.findall(".//{*}rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width
        assert float(rect.attrib["y"]) + float(rect.attrib["height"]) <= height
    texts = [text.text for text in root.findall(".//{*}text")]
    assert f"{layer_map.num_base_layers} layers" in texts
    assert f"{len(layer_map)} layers" in texts


def test_the_picture_marks_every_seam_at_its_place() -> None:
    root = ET.fromstring(layer_map_svg(stack(30, 7, 3), dark=True))  # noqa: S314
    marks = [float(path.attrib["d"][1:].split(" ")[0]) for path in root.findall(".//{*}path")]
    assert marks == pytest.approx([96 + 480 * 23 / 62, 96 + 480 * 39 / 62], abs=1)
    assert [t.text for t in root.findall(".//{*}text")].count("22→7") == 2


def test_new_layers_that_start_as_identities_are_outlined() -> None:
    layer_map = recipe_map("llama-pro", 32)
    root = ET.fromstring(layer_map_svg(layer_map, dark=False, identities=layer_map.new_layers))  # noqa: S314
    assert len([rect for rect in root.findall(".//{*}rect") if rect.attrib["fill"] == "none"]) == 8


@pytest.mark.parametrize(
    ("layers", "start", "said", "is_to_heal"),
    [
        ("0:8", "base", "all and in order", False),
        ("2:7", "part", "leaves out", True),
        ("0", "part", "leaves out", True),
        ("0:2,4:8", "seams", "the seam", True),
        ("0:8,7", "seams", "the seam", True),
        ("0:5,3:6,3:8", "seams", "the seams", True),
    ],
)
def test_a_seam_is_blamed_where_there_is_one(
    base: Path, tmp_path: Path, layers: str, start: str, said: str, is_to_heal: bool
) -> None:
    out = tmp_path / "out"
    report = dus("upscale", base, "--layers", layers, "-o", out, "--json").report
    text = dus("upscale", base, "--layers", layers, "-o", tmp_path / "again").stdout
    card = (out / "README.md").read_text()
    assert (report["start"], bool(report["seams"])) == (start, start == "seams")
    state = " ".join(text.partition("Wrote ")[2].split())
    assert said.replace("leaves", "leave") in state.replace("leaves", "leave")
    for shown in (state, card):
        assert ("worse than its base" in " ".join(shown.replace("> ", "").split())) == is_to_heal
        assert ("dus heal" in shown) == is_to_heal
    assert ("the seam" in state) == (start == "seams")
    assert ("at the\n> seam" in card) == (start == "seams")


@pytest.mark.skipif(
    not os.environ.get("SMOLLM2"), reason="SMOLLM2 names no checkpoint; `make test` makes one"
)
def test_the_card_of_a_real_model_is_valid(tmp_path: Path) -> None:
    card = card_of(Path(os.environ["SMOLLM2"]), tmp_path / "out", trim=7)
    assert fields(card)["tags"][0] == "depth-up-scaling"
    assert "46 layers" in (tmp_path / "out/layer-map-light.svg").read_text()

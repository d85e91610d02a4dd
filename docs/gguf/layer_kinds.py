"""A GGUF with the kinds of its layers, which llama.cpp's library reads and its converter does not
write for gemma2, gemma3, cohere2 and gpt_oss: see docs/engines.md.

Usage: layer_kinds.py OUT model.gguf right.gguf, where OUT is the folder that was converted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

folder, converted, right = map(Path, sys.argv[1:])
config = json.loads((folder / "config.json").read_text())
kinds = config.get("text_config", config).get("layer_types")
if kinds is None:
    sys.exit(f"{folder}/config.json lists no layer_types: every engine makes up the same")
slides = [kind == "sliding_attention" for kind in kinds]

reader = gguf.GGUFReader(converted)
arch = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
key = gguf.Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=arch)
array = MetadataDetails(gguf.GGUFValueType.ARRAY, slides, sub_type=gguf.GGUFValueType.BOOL)
copy_with_new_metadata(reader, gguf.GGUFWriter(right, arch), {key: array}, [])

#!/usr/bin/env bash
# A commit hash of digits around one "e", written by PyYAML into a model card, is a number to readers of YAML 1.2.
#
# Versions:  huggingface_hub 2.4.0, PyYAML 6.0.4, ruamel.yaml 0.19.1, js-yaml 5.5.0, 2026-11-30
# Guess:     a YAML writer puts quotes around every text that a YAML reader would take for a number; it does so for
#            1234567. What ModelCardData writes is read as what was given.
# Behaviour: PyYAML speaks YAML 1.1, whose numbers with an exponent have a point and a sign. So 12e4567 stays bare, and
#            YAML 1.2 makes a number of it: ruamel.yaml infinity; js-yaml, common in web pages, only where the number is
#            finite, as of 1234e56. By count two in a hundred hashes of seven digits are of this kind.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet huggingface_hub==2.4.0 PyYAML==6.0.4 ruamel.yaml==0.19.1
npm install --silent --no-fund --no-audit js-yaml@5.5.0 >/dev/null
env/bin/python - <<'PY' 2>/dev/null | tee seen
import subprocess
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData
from ruamel.yaml import YAML

READ = 'const y = require("js-yaml"); console.log(y.load(require("fs").readFileSync("card.yaml", "utf8")).revision)'
for revision in ("1234567", "abcdef0", "12e4567", "1234e56"):
    written = ModelCardData(revision=revision).to_yaml().strip()
    Path("card.yaml").write_text(written)
    print(written, end="; ")
    print("PyYAML:", repr(yaml.safe_load(written)["revision"]), end="; ")
    print("ruamel.yaml:", repr(YAML(typ="safe", pure=True).load(written)["revision"]), end="; ")
    print("js-yaml:", subprocess.run(["node", "-e", READ], capture_output=True, text=True).stdout.strip())
PY
diff seen - <<'EXPECTED'
revision: '1234567'; PyYAML: '1234567'; ruamel.yaml: '1234567'; js-yaml: 1234567
revision: abcdef0; PyYAML: 'abcdef0'; ruamel.yaml: 'abcdef0'; js-yaml: abcdef0
revision: 12e4567; PyYAML: '12e4567'; ruamel.yaml: inf; js-yaml: 12e4567
revision: 1234e56; PyYAML: '1234e56'; ruamel.yaml: 1.234e+59; js-yaml: 1.234e+59
EXPECTED
echo "as described"

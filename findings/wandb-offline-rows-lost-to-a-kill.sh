#!/usr/bin/env bash
# wandb's offline file has none of the rows that were logged seconds before kill -9, although its writer is another process.
#
# Versions:  wandb 0.31.0, 2026-11-30 (Linux)
# Guess:     a row reaches the .wandb file at the latest a few seconds after wandb.log: the service that writes it is a
#            process of its own, which outlives the killed one and closes the file in order.
# Behaviour: five seconds after the tenth wandb.log, and again five seconds after the kill, the file is its header of
#            seven bytes. Rows are written when a buffer is full or the run is finished, and the service that has them
#            does not write them when its client is gone. What survives is what the program wrote itself.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet wandb==0.31.0
cat > train.py <<'PY'
import os
import signal
import sys
import time

import wandb

run = wandb.init(project="p", mode="offline", settings=wandb.Settings(silent=True, x_disable_stats=True, console="off"))
for step in range(10):
    run.log({"loss": 1 / (step + 1)}, step=step)
time.sleep(5)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
run.finish()
PY
for how in finished killed; do
    (mkdir "$how" && cd "$how" && WANDB_DIR=. ../env/bin/python ../train.py "$how" > out 2>&1) || true
    sleep 5
    size=$(stat -c %s "$how"/wandb/offline-run-*/run-*.wandb)
    if [ "$size" -gt 7 ]; then echo "$how: its rows"; else echo "$how: $size bytes"; fi
done 2> err | tee seen
diff seen - <<'EXPECTED'
finished: its rows
killed: 7 bytes
EXPECTED
echo "as described"

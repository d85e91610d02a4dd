#!/usr/bin/env bash
# lm-evaluation-harness runs every request and returns None, if the environment has a LOCAL_RANK other than 0.
#
# Versions:  lm_eval 0.4.13, datasets 5.2.0, 2026-11-30
# Guess:     whether a process reports is decided by the model's own rank (`lm.rank`). A process that loads a model by
#            itself is rank 0 of a world of 1, so simple_evaluate returns its results, also where the process is a
#            worker of something else, such as a training loop under torchrun that measures between two steps.
# Behaviour: LOCAL_RANK of the environment must be 0, too. With LOCAL_RANK=1, of a world of one process, all requests
#            are computed, and simple_evaluate returns None without a word. RANK and WORLD_SIZE do not matter.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet lm_eval==0.4.13 datasets==5.2.0
mkdir tasks
printf '{"text": "a"}\n{"text": "b"}\n' > rows.jsonl
cat > tasks/letters.yaml <<EOF
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: $work/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
metric_list: [{metric: acc}]
EOF
cat > evaluate.py <<'PY'
import lm_eval
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager


class Counting(DummyLM):
    computed = 0

    def loglikelihood(self, requests, **options):
        self.computed += len(requests)
        return super().loglikelihood(requests, **options)


lm = Counting()
manager = TaskManager(include_path="tasks", include_defaults=False)
results = lm_eval.simple_evaluate(model=lm, tasks=["letters"], task_manager=manager, bootstrap_iters=0)
print(f"rank {lm.rank} of {lm.world_size}, {lm.computed} requests:", results and list(results["results"]))
PY
export HF_HOME=$work/hf HF_HUB_OFFLINE=1 TQDM_DISABLE=1
for variables in LOCAL_RANK=0 LOCAL_RANK=1 "RANK=1 WORLD_SIZE=2"; do
    echo "$variables: $(env -u LOCAL_RANK $variables env/bin/python evaluate.py 2> err)"
done | tee seen
diff seen - <<'EXPECTED'
LOCAL_RANK=0: rank 0 of 1, 4 requests: ['letters']
LOCAL_RANK=1: rank 0 of 1, 4 requests: None
RANK=1 WORLD_SIZE=2: rank 0 of 1, 4 requests: ['letters']
EXPECTED
echo "as described"

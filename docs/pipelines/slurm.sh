#!/usr/bin/env bash
#SBATCH --job-name=dus-heal
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@900
#
# On the login node:  bash slurm.sh   fetches and scales up, where there is a network, and submits itself.
# In the job:         one dus heal a node; each starts torchrun for its GPUs, and they meet at the first node.
#
# 15 minutes before the time is over Slurm sends SIGTERM to the tasks (not to this script): a checkpoint is saved, dus
# exits with 143, and the job puts itself back into the queue. MODEL, OUT, DATA and HEALED lie on a shared file system.
set -euo pipefail

: "${MODEL:=mistralai/Mistral-7B-v0.1}" "${TRIM:=8}" "${OUT:=out}" "${DATA:=corpus.jsonl}" "${HEALED:=$OUT-healed}"
: "${HEAL:=--until base}"
export OUT DATA HEALED HEAL

if [[ -z ${SLURM_JOB_ID:-} ]]; then
  dus upscale "$MODEL" --trim "$TRIM" -o "$OUT" --checksums
  exec sbatch "$0"
fi

export HF_HUB_OFFLINE=1 # the model is a directory by now, and nodes often have no network
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export ENDPOINT="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))" # the first node's

code=0
# shellcheck disable=SC2016  # the variables of each task, not of this script; $HEAL is words
srun --kill-on-bad-exit=0 bash -c 'exec dus heal "$OUT" --data "$DATA" -o "$HEALED" $HEAL --progress plain \
  --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rdzv-endpoint "$ENDPOINT"' || code=$?

case $code in
  0) echo "healed: $HEALED" ;;
  129 | 130 | 143) scontrol requeue "$SLURM_JOB_ID" ;; # a checkpoint is saved: the same job goes on from there
  *) echo "dus heal ended with $code; starting it again would end the same way" >&2 ;;
esac
exit "$code"

"""Batch jobs that run `dus heal`: what `--print-job` prints for Slurm, Kubernetes, SkyPilot and
Hugging Face Jobs. Pure text: nothing is checked, sent or written.

Each job may be killed at any time and started again: the same command goes on from the newest
checkpoint. Exit codes 129, 130 and 143 say that one was saved.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from enum import Enum
from typing import Any

from dus_cli import __version__
from dus_cli.common.options import option_fields
from dus_cli.errors import UsageError, shown
from dus_cli.heal.options import HealOptions, LaunchOptions

# Where the volume or the bucket with the model, the text and the output is.
_MOUNT = "/work"

_PORT = 29500

_INSTALL = f'pip install "dus-cli[heal]=={__version__}"'


class JobKind(str, Enum):
    """What runs the job."""

    slurm = "slurm"
    k8s = "k8s"
    sky = "sky"
    hf_jobs = "hf-jobs"


def job_text(kind: JobKind, options: HealOptions) -> str:
    """The job that runs a healing: a script, a manifest or a command line.

    Args:
        kind: what will run it.
        options: of the healing. `launch.nnodes` nodes with `launch.nproc_per_node` GPUs each.

    Raises:
        UsageError: the number of GPUs is not said, or the job could not see a file.
    """
    if options.launch.nproc_per_node is None:
        raise UsageError("--print-job must know the GPUs of a node; give --nproc-per-node")
    if "-" in options.data.files:
        raise UsageError("--print-job: a job has no standard input; give --data a file")
    if kind is not JobKind.slurm:
        _check_relative(options)
    return _WRITERS[kind](options)


def _check_relative(options: HealOptions) -> None:
    paths = [str(options.model), str(options.output), *options.data.files]
    paths += [text.split("=", 1)[-1] for text in options.data.eval_files]
    for path in paths:
        if path.startswith(("/", "~")):
            raise UsageError(
                f"--print-job: {shown(path)} is not a path that the job sees; give it relative to "
                f"the job's volume, which is {_MOUNT} there"
            )


def heal_command(options: HealOptions) -> list[str]:
    """`dus heal` with every option that is not its default, without those of the launch that a
    job fills in.
    """
    words = ["dus", "heal", str(options.model), "-o", str(options.output)]
    launch = LaunchOptions(
        nproc_per_node=options.launch.nproc_per_node, max_restarts=options.launch.max_restarts
    )
    groups = (options.data, options.budget, options.recipe, options.fit, launch, options.saving)
    for group in groups:
        for option in option_fields(type(group)):
            value = getattr(group, option.field)
            if value == option.default:
                continue
            typed = option.typed(value)
            if isinstance(typed, bool):
                words.append(f"--{option.name}" if typed else f"--no-{option.name}")
                continue
            for item in typed if isinstance(typed, list) else [typed]:
                words += [f"--{option.name}", str(item)]
    return words


def _lines(words: list[str], indent: str) -> str:
    """A command line in the shell's words, an option on each line."""
    lines, line = [], shlex.quote(words[0])
    for word in words[1:]:
        if word.startswith("-"):
            lines.append(line)
            line = shlex.quote(word)
        else:
            line += f" {shlex.quote(word)}"
    return f" \\\n{indent}".join([*lines, line])


# --- Slurm ----------------------------------------------------------------------------------------


def _slurm(options: HealOptions) -> str:
    launch = options.launch
    head = f"""\
#!/usr/bin/env bash
#SBATCH --job-name=dus-heal
#SBATCH --nodes={launch.nnodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={launch.nproc_per_node}
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@900
#
# Submit it with sbatch from the folder that its paths are relative to; all nodes must see it.
# 15 minutes before the time is over the tasks get SIGTERM and save a checkpoint, and the job puts
# itself back into the queue.
set -euo pipefail

code=0
"""
    heal = _lines(heal_command(options), "  ")
    if launch.nnodes > 1:
        head += f"""\
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export ENDPOINT="${{nodes%%$'\\n'*}}:$((20000 + SLURM_JOB_ID % 10000))" # the first node's
# shellcheck disable=SC2016  # each task has its own SLURM_NODEID
srun --kill-on-bad-exit=0 bash -c 'exec "$@" --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \\
  --rdzv-endpoint "$ENDPOINT"' heal \\
  {heal} || code=$?
"""
    else:
        head += f"srun --kill-on-bad-exit=0 {heal} || code=$?\n"
    return (
        head
        + """
case $code in
  # a checkpoint is saved: the same job goes on from there
  129 | 130 | 143) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
"""
    )


# --- Kubernetes -----------------------------------------------------------------------------------

_K8S_HEAD = f"""\
# kubectl apply -f FILE. Two names are yours to fill in: the image, which needs {_INSTALL},
# and the claim of a volume that holds the paths of the command and that every pod can write to.
"""


def _k8s(options: HealOptions) -> str:
    import yaml

    launch = options.launch
    is_spread = launch.nnodes > 1
    # Kubernetes takes $(NAME) for a variable of the container
    command = [word.replace("$(", "$$(") for word in heal_command(options)]
    if is_spread:
        command += ["--nnodes", str(launch.nnodes), "--node-rank", "$(JOB_COMPLETION_INDEX)"]
        command += ["--rdzv-endpoint", f"dus-heal-0.dus-heal:{_PORT}"]
    token = {"name": "hugging-face", "key": "token", "optional": True}
    heal = {
        "name": "heal",
        "image": f"registry.example.com/dus:{__version__}",
        "command": command,
        "workingDir": _MOUNT,
        "env": [
            {"name": "HF_HOME", "value": f"{_MOUNT}/hf"},
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}},
        ],
        "volumeMounts": [{"name": "work", "mountPath": _MOUNT}],
        "resources": {"limits": {"nvidia.com/gpu": launch.nproc_per_node}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 600,
        "containers": [heal],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": "dus"}}],
    }
    spec: dict[str, Any] = {
        "backoffLimit": 4,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
            ]
        },
        "template": {"metadata": {"labels": {"app": "dus-heal"}}, "spec": pod},
    }
    if is_spread:
        pod["subdomain"] = "dus-heal"
        spec |= {
            "completionMode": "Indexed",
            "completions": launch.nnodes,
            "parallelism": launch.nnodes,
        }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "dus-heal"},
        "spec": spec,
    }
    # without an address of its own the service names each pod, also before it is ready
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "dus-heal"},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"app": "dus-heal"},
            "ports": [{"name": "rendezvous", "port": _PORT}],
        },
    }
    manifests = [service, job] if is_spread else [job]
    text: str = yaml.safe_dump_all(manifests, sort_keys=False, width=1000)
    return _K8S_HEAD + text


# --- SkyPilot -------------------------------------------------------------------------------------

_SKY_HEAD = """\
# sky jobs launch FILE. The GPU's type and the volume's name are yours to choose. The volume holds
# the paths of the command; it must be a file system that all nodes share, not a mounted bucket.
"""


def _sky(options: HealOptions) -> str:
    launch = options.launch
    heal = _lines(heal_command(options), "    ")
    if launch.nnodes > 1:
        heal += f""" \\
    --nnodes "$SKYPILOT_NUM_NODES" \\
    --node-rank "$SKYPILOT_NODE_RANK" \\
    --rdzv-endpoint "$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{_PORT}\""""
    return f"""\
{_SKY_HEAD}\
name: dus-heal
num_nodes: {launch.nnodes}
resources:
  accelerators: H100:{launch.nproc_per_node}
  job_recovery:
    max_restarts_on_errors: 4
    recover_on_exit_codes: [129, 130, 143]
volumes:
  {_MOUNT}: dus
envs:
  HF_HOME: {_MOUNT}/hf
setup: |
  {_INSTALL}
run: |
  cd {_MOUNT}
  {heal}
"""


# --- Hugging Face Jobs ----------------------------------------------------------------------------

# The flavors with so many of their largest GPU; `hf jobs hardware` has all.
_FLAVORS = {1: "h200", 2: "h200x2", 4: "h200x4", 8: "h200x8"}

# The bucket is copied, not mounted: its mount appends to files only, and locks none.
_HF_JOBS = """\
# Runs in a job of Hugging Face. $BUCKET, as ORG/NAME, holds the paths of the command. The output
# is copied back into it, also after a failure; the same job goes on from what is there.
hf jobs run --name dus-heal --flavor {flavor} --timeout 24h --attempts 3 --secrets HF_TOKEN \\
  --env BUCKET="${{BUCKET:?the bucket with the model and the text, as ORG/NAME}}" \\
  python:3.12 bash -c {script}
"""


def _hf_jobs(options: HealOptions) -> str:
    launch = options.launch
    if launch.nnodes > 1:
        raise UsageError("--print-job hf-jobs is for one node; leave out --nnodes")
    if launch.nproc_per_node not in _FLAVORS:
        counts = ", ".join(map(str, _FLAVORS))
        raise UsageError(
            f"--print-job hf-jobs: there is no machine with {launch.nproc_per_node} GPUs; give "
            f"--nproc-per-node one of {counts}"
        )
    output = shlex.quote(str(options.output))
    script = (
        f"{_INSTALL} && hf buckets sync hf://buckets/$BUCKET {_MOUNT} && cd {_MOUNT} || exit\n"
        f"{_lines(heal_command(options), '  ')}\n"
        f"code=$?; hf buckets sync {output} hf://buckets/$BUCKET/{output} && exit $code"
    )
    return _HF_JOBS.format(flavor=_FLAVORS[launch.nproc_per_node], script=shlex.quote(script))


_WRITERS: dict[JobKind, Callable[[HealOptions], str]] = {
    JobKind.slurm: _slurm,
    JobKind.k8s: _k8s,
    JobKind.sky: _sky,
    JobKind.hf_jobs: _hf_jobs,
}

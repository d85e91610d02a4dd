"""The examples of docs/pipelines, run as they stand there, and their bad cases."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from conftest import dus
from hub_server import StandInHub, StandInRepo, commit_of

PIPELINES = Path(__file__).parent.parent / "docs/pipelines"

# Two steps of two short rows: what a run of any length does, in a few seconds.
HEAL = (
    "--steps 2 --seq-length 32 --batch-tokens 64 --eval-tokens 256 --eval-every 2 --holdout 10% "
    "--precision fp32 --nproc-per-node 1"
)


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dus` on the PATH."""
    folder = tmp_path_factory.mktemp("bin")
    script(folder / "dus", f'exec {sys.executable} -m dus_cli "$@"')
    return folder


@pytest.fixture(scope="module")
def forking_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A `dus` for the PATH that is forked with everything imported, and so are its workers."""
    folder = tmp_path_factory.mktemp("forking")
    server, command = tiny.start_server(folder)
    script(folder / "dus", f'exec {shlex.join(command)} "$@"')
    yield folder
    server.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can be trained, and text."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_base(folder / "base")
    tiny.write_corpus(folder / "corpus.jsonl")
    return folder


@pytest.fixture
def environment(bin_folder: Path) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HF_"))
    }
    paths = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(PIPELINES.parent.parent),
    }
    return kept | paths | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def forking(environment: dict[str, str], forking_folder: Path) -> dict[str, str]:
    """An environment in which `dus` takes a second less, and its workers many."""
    return environment | {"PATH": f"{forking_folder}:{environment['PATH']}"}


def run(
    command: list[str | Path], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Without a standard input: whoever asks gets no answer."""
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def stub(folder: Path, environment: dict[str, str], **programs: str) -> dict[str, str]:
    """An environment in which these programs are others; `$CALLS` is a file for what they were
    asked.
    """
    folder.mkdir(exist_ok=True)
    for name, text in programs.items():
        script(folder / name, text)
    return environment | {"PATH": f"{folder}:{environment['PATH']}", "CALLS": str(folder / "calls")}


# --- make -----------------------------------------------------------------------------------------


def test_make_goes_on_after_a_kill_and_has_nothing_to_do_when_all_is_done(
    home: Path, tmp_path: Path, forking: dict[str, str]
) -> None:
    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        variables = (f"MODEL={home}/base", "TRIM=1", f"DATA={home}/corpus.jsonl", f"HEAL={HEAL}")
        return run(
            ["make", "-f", PIPELINES / "Makefile", *variables, *arguments], tmp_path, forking
        )

    planned = make("plan")
    assert planned.returncode == 0, planned.stderr
    assert "Dry run: nothing was written to out" in planned.stdout
    assert list(tmp_path.iterdir()) == []
    # Killed in the middle of writing, which a folder left beside OUT shows.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model.safetensors").write_bytes(b"half")
    done = make()
    assert done.returncode == 0, done.stderr
    assert "out: sound (6 layers" in done.stdout
    assert json.loads((tmp_path / "out-healed/report.json").read_text())["steps"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-healed"]
    again = make()
    assert again.returncode == 0, again.stderr
    assert "out is already what this command writes: nothing was done" in again.stdout
    assert "is finished already, with these options; nothing was done" in again.stdout
    other = make("TRIM=0", "upscale")
    assert other.returncode == 2
    assert re.search(r"error: .*out exists and is not empty", other.stderr)
    assert "Error 1" in other.stderr


def test_make_after_sigterm_in_the_middle_of_writing(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    tensors = llama_tensors(8, hidden=1024, intermediate=2048, kv=256)
    write_checkpoint(tmp_path / "base", tensors, llama_config(8), fill=fill_randomly)
    command = ["make", "-f", str(PIPELINES / "Makefile"), "MODEL=./base", "TRIM=1", "upscale"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / ".out.partial").exists():
        time.sleep(0.001)
        assert process.poll() is None
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    stderr = process.communicate()[1]
    assert process.returncode == 2
    assert "error: ended by SIGTERM" in stderr
    assert "Error 143" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert run(list(command), tmp_path, environment).returncode == 0
    assert dus("verify", tmp_path / "out", "--base", tmp_path / "base", "-q").returncode == 0


# --- GitHub Actions -------------------------------------------------------------------------------


@pytest.fixture
def hub(home: Path) -> Iterator[StandInHub]:
    repo = StandInRepo({commit_of("tiny"): home / "base"}, {"main": commit_of("tiny")})
    with StandInHub({"org/tiny": repo}) as server:
        yield server


def actions(name: str, contexts: dict[str, str]) -> Any:
    """A workflow, its expressions replaced."""
    text = (PIPELINES / name).read_text(encoding="utf-8")
    return yaml.safe_load(re.sub(r"\$\{\{ (.*?) \}\}", lambda match: contexts[match[1]], text))


def step(which: Any, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As the runner does it, by docs.github.com's workflow syntax: bash --noprofile --norc -eo
    pipefail {0}.
    """
    (cwd / "step.sh").write_text(which["run"])
    command: list[str | Path] = [
        "bash",
        "--noprofile",
        "--norc",
        "-eo",
        "pipefail",
        cwd / "step.sh",
    ]
    done = run(command, cwd, environment | which.get("env", {}))
    (cwd / "step.sh").unlink()
    return done


def workflow(tmp_path: Path, model: str = "org/tiny", trim: str = "1") -> Any:
    contexts = {"inputs.model": model, "inputs.trim": trim, "github.workspace": str(tmp_path)}
    contexts |= {"secrets.HF_TOKEN": "", "!cancelled()": "always"}
    (job,) = actions("github-actions.yml", contexts)["jobs"].values()
    # as a runner has them
    job["env"] = {name: str(value or "") for name, value in job["env"].items()}
    return job


def test_the_actions_job_goes_through_and_needs_no_network_the_second_time(
    hub: StandInHub, tmp_path: Path, environment: dict[str, str]
) -> None:
    job = workflow(tmp_path)
    steps = {which["name"]: which for which in job["steps"] if "run" in which}
    assert list(steps) == ["Install", "Plan", "Upscale", "Verify", "Nothing is left to do"]
    assert steps.pop("Install")["run"] == "pip install dus-cli"
    environment |= job["env"] | {"HF_ENDPOINT": hub.endpoint}
    for name, which in steps.items():
        if name == "Nothing is left to do":
            assert which["env"] == {"HF_HUB_OFFLINE": "1"}
            hub.log.clear()
        done = step(which, tmp_path, environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), name
    assert hub.log == []
    assert json.loads((tmp_path / "plan.json").read_text())["status"] == "planned"
    assert json.loads((tmp_path / "report.json").read_text())["commit"] == commit_of("tiny")
    assert json.loads((tmp_path / "verify.json").read_text())["sound"]
    *_, last = (json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines())
    assert last == {"event": "exit", "exit_code": 0, "error": None}


def test_the_actions_job_fails_with_dus_own_code_and_shows_why(
    hub: StandInHub, tmp_path: Path, environment: dict[str, str]
) -> None:
    job = workflow(tmp_path, model="org/none")
    plan, upscale = (which for which in job["steps"] if which.get("name") in {"Plan", "Upscale"})
    environment |= job["env"] | {"HF_ENDPOINT": hub.endpoint}
    done = step(plan, tmp_path, environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: org/none is not on the Hub, or is private")
    done = step(upscale, tmp_path, environment | {"TRIM": "x"})
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2


# --- Slurm ----------------------------------------------------------------------------------------

# As many tasks as there are nodes, with what Slurm tells each; the highest code of them, as srun
# has it.
SRUN = """
[[ $1 == --kill-on-bad-exit=0 ]] && shift
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!); done
code=0; for task in "${tasks[@]}"; do wait "$task" || { mine=$?; ((mine > code)) && code=$mine; }; done; exit $code
"""
SCONTROL = """
echo "scontrol $*" >>"$CALLS"
[[ $1 == show ]] && printf '127.0.0.1\\n127.0.0.2\\n' || true
"""
SBATCH = """
echo "sbatch $*" >>"$CALLS"
SLURM_JOB_ID=$JOB SLURM_NNODES=2 SLURM_JOB_NODELIST='node[1-2]' exec bash "$@"
"""


def slurm(tmp_path: Path, environment: dict[str, str], home: Path, **more: str) -> dict[str, str]:
    job = str(tiny.free_port() % 10_000)  # 20000 + job % 10000 is the port
    stubs = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH} | more
    settings = {
        "MODEL": str(home / "base"),
        "TRIM": "1",
        "DATA": str(home / "corpus.jsonl"),
        "HEAL": HEAL,
        "JOB": job,
    }
    return stub(tmp_path / "slurm", environment, **stubs) | settings


def test_the_slurm_script_scales_up_submits_itself_and_heals_on_two_nodes(
    home: Path, tmp_path: Path, forking: dict[str, str]
) -> None:
    environment = slurm(tmp_path, forking, home)
    done = run(["bash", PIPELINES / "slurm.sh"], tmp_path, environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.endswith("healed: out-healed\n")
    calls = (tmp_path / "slurm/calls").read_text().splitlines()
    assert calls == [f"sbatch {PIPELINES / 'slurm.sh'}", "scontrol show hostnames node[1-2]"]
    report = json.loads((tmp_path / "out-healed/report.json").read_text())
    assert (report["steps"], report["num_workers"]) == (2, 2)


@pytest.mark.parametrize(
    ("code", "is_requeued"), [(143, True), (130, True), (1, False), (2, False)]
)
def test_the_slurm_job_is_requeued_after_a_signal_and_not_after_a_failure(
    tmp_path: Path, environment: dict[str, str], code: int, is_requeued: bool
) -> None:
    environment = slurm(tmp_path, environment, tmp_path, dus=f"exit {code}")
    inside = environment | {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    done = run(["bash", PIPELINES / "slurm.sh"], tmp_path, inside)
    assert done.returncode == code
    assert ("scontrol requeue 7" in (tmp_path / "slurm/calls").read_text()) is is_requeued
    assert ("would end the same way" in done.stderr) is not is_requeued


def test_on_the_login_node_a_failure_submits_nothing(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    environment = slurm(tmp_path, environment, tmp_path)
    done = run(["bash", PIPELINES / "slurm.sh"], tmp_path, environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "slurm/calls").exists()


# --- jobs that dus prints -------------------------------------------------------------------------


def printed_job(kind: str, *options: str | Path, nodes: int = 1) -> str:
    done = tiny.forked_dus(
        *("heal", *options, "--nproc-per-node", "1", "--nnodes", str(nodes), "--print-job", kind)
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_printed_slurm_job_heals_on_two_nodes(
    home: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    assert dus("upscale", home / "base", "--trim", "1", "-o", tmp_path / "out").returncode == 0
    text, recipe = home / "corpus.jsonl", HEAL.split()[:-2]
    job = printed_job("slurm", "out", "--data", text, *recipe, nodes=2)
    (tmp_path / "job.sh").write_text(job)
    environment = slurm(tmp_path, environment, home)
    done = run(["sbatch", "job.sh"], tmp_path, environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert (tmp_path / "slurm/calls").read_text().splitlines() == [
        "sbatch job.sh",
        "scontrol show hostnames node[1-2]",
    ]
    report = json.loads((tmp_path / "out-healed/report.json").read_text())
    assert (report["steps"], report["num_workers"]) == (2, 2)


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (1, False), (143, True)])
@pytest.mark.parametrize("nodes", [1, 2])
def test_the_printed_slurm_job_is_requeued_after_a_signal(
    tmp_path: Path, environment: dict[str, str], nodes: int, code: int, is_requeued: bool
) -> None:
    (tmp_path / "job.sh").write_text(
        printed_job("slurm", "out", "--data", "a b.jsonl", nodes=nodes)
    )
    told = 'printf "%s|" "$@" >>"$CALLS"; echo >>"$CALLS"'
    environment = slurm(tmp_path, environment, tmp_path, dus=f"{told}; exit {code}")
    done = run(["sbatch", "job.sh"], tmp_path, environment | {"SLURM_NNODES": str(nodes)})
    assert done.returncode == code, done.stderr
    calls = (tmp_path / "slurm/calls").read_text()
    assert calls.count("heal|out|-o|out-healed|--data|a b.jsonl|--nproc-per-node|1|") == 2
    assert calls.count("--node-rank|1|--rdzv-endpoint|127.0.0.1:") == nodes - 1
    assert ("scontrol requeue" in calls) is is_requeued


def test_the_printed_kubernetes_job_has_a_pod_for_each_node_that_finds_the_first() -> None:
    (alone,) = yaml.safe_load_all(printed_job("k8s", "out", "--data", "$(a).jsonl"))
    (container,) = alone["spec"]["template"]["spec"]["containers"]
    assert container["command"] == (
        ["dus", "heal", "out", "-o", "out-healed", "--data", "$$(a).jsonl", "--nproc-per-node", "1"]
    )
    service, job = yaml.safe_load_all(printed_job("k8s", "out", "--data", "a.jsonl", nodes=4))
    spec, pod = job["spec"], job["spec"]["template"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    # <job>-<index>.<subdomain>, by the headless service of that name
    name, subdomain = job["metadata"]["name"], pod["spec"]["subdomain"]
    assert (service["metadata"]["name"], service["spec"]["clusterIP"]) == (subdomain, "None")
    (container,) = pod["spec"]["containers"]
    port = service["spec"]["ports"][0]["port"]
    assert container["command"][-6:] == [
        *("--nnodes", "4", "--node-rank", "$(JOB_COMPLETION_INDEX)"),
        *("--rdzv-endpoint", f"{name}-0.{subdomain}:{port}"),
    ]


def test_the_printed_skypilot_task_gives_each_node_its_rank(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    task = yaml.safe_load(printed_job("sky", "out", "--data", "it's.jsonl", nodes=2))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:1")
    environment = stub(tmp_path / "bin", environment, dus='printf "%s|" "$@"')
    told = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
    }
    commands = task["run"].replace("cd /work\n", "")
    done = run(["bash", "-c", commands], tmp_path, environment | told)
    assert done.stdout == (
        "heal|out|-o|out-healed|--data|it's.jsonl|--nproc-per-node|1|--nnodes|2|--node-rank|1|"
        "--rdzv-endpoint|10.0.0.7:29500|"
    )


def test_the_printed_hub_job_is_one_that_hf_takes_and_copies_its_output_back(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    line = printed_job("hf-jobs", "out", "--data", "a b.jsonl")
    programs = {
        "hf": 'printf "%s|" "$@" >>"$CALLS"; for script; do true; done; [[ $1 == buckets ]] || '
        'bash -c "$script"',
        "pip": "true",
        "dus": 'printf "%s|" "$@" >>"$CALLS"; exit 143',
    }
    stubbed = stub(tmp_path / "bin", environment, **programs) | {"BUCKET": "me/work"}
    done = run(["bash", "-c", line.replace("cd /work", "true")], tmp_path, stubbed)
    assert done.returncode == 143, done.stderr
    calls = (tmp_path / "bin/calls").read_text()
    assert calls.endswith(
        "buckets|sync|hf://buckets/me/work|/work|"
        "heal|out|-o|out-healed|--data|a b.jsonl|--nproc-per-node|1|"
        "buckets|sync|out-healed|hf://buckets/me/work/out-healed|"
    )
    without = run(["bash", "-c", line], tmp_path, environment)
    assert (without.returncode, "the bucket with the model" in without.stderr) == (127, True)
    real = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "BUCKET": "me/work",
        "HF_TOKEN": "hf_none",
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    dry = run(
        ["bash", "-c", line.replace("hf jobs run", "hf jobs run --dry-run")],
        tmp_path,
        environment | real,
    )
    assert dry.returncode == 0, dry.stderr
    assert re.search(r"flavor +h200\n", dry.stdout)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--data", "a.jsonl"), "must know the GPUs of a node; give --nproc-per-node"),
        (("--data", "-", "--nproc-per-node", "8"), "a job has no standard input"),
        (("--data", "/a.jsonl", "--nproc-per-node", "8"), "/a.jsonl is not a path that the job"),
        (
            ("--data", "a", "--eval-data", "docs=/b", "--nproc-per-node", "8"),
            "/b is not a path that the job",
        ),
        (("--data", "a", "--nproc-per-node", "3"), "no machine with 3 GPUs"),
        (("--data", "a", "--nproc-per-node", "8", "--nnodes", "2"), "is for one node"),
    ],
)
def test_a_job_that_could_not_run_is_not_printed(options: tuple[str, ...], why: str) -> None:
    done = tiny.forked_dus("heal", "out", *options, "--print-job", "hf-jobs")
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


# --- Kubernetes -----------------------------------------------------------------------------------


def pod(manifest: Any, volume: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """The commands of a pod in order, the volume's paths and the model replaced."""
    spec = manifest["spec"]["template"]["spec"]
    for container in (*spec["initContainers"], *spec["containers"]):
        (mount,) = container["volumeMounts"]
        words = [word.replace(mount["mountPath"], str(volume)) for word in container["command"]]
        variables = {item["name"]: item["value"] for item in container["env"] if "value" in item}
        yield (
            words,
            {
                name: value.replace(mount["mountPath"], str(volume))
                for name, value in variables.items()
            },
        )


def test_the_kubernetes_job_says_what_a_job_may_say() -> None:
    """By the API reference of batch/v1, Job: what podFailurePolicy demands, and names that are
    told twice.
    """
    manifest = yaml.safe_load((PIPELINES / "kubernetes-job.yaml").read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    assert set(manifest["spec"]) == {"backoffLimit", "podFailurePolicy", "template"}
    spec = manifest["spec"]["template"]["spec"]
    assert spec["restartPolicy"] == "Never"
    ignored, failed = manifest["spec"]["podFailurePolicy"]["rules"]
    assert ignored == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert failed == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    names = {volume["name"] for volume in spec["volumes"]}
    for container in (*spec["initContainers"], *spec["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= names
        # 8 without quotes would be a number
        assert all(isinstance(word, str) for word in container["command"])


def test_the_kubernetes_jobs_pod_scales_up_heals_and_a_second_one_has_nothing_to_do(
    home: Path, tmp_path: Path, forking: dict[str, str]
) -> None:
    manifest = yaml.safe_load((PIPELINES / "kubernetes-job.yaml").read_text(encoding="utf-8"))
    shutil.copy(home / "corpus.jsonl", tmp_path)
    for number in range(2):
        upscale, heal = pod(manifest, tmp_path)
        words = [
            {"mistralai/Mistral-7B-v0.1": str(home / "base"), "8": "1"}.get(word, word)
            for word in upscale[0]
        ]
        done = run(list(words), tmp_path, forking | upscale[1])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stderr.splitlines()[-1])["exit_code"] == 0
        done = run([*heal[0], *HEAL.split()], tmp_path, forking | heal[1])
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stderr.splitlines()]
        assert events[-1] == {"event": "exit", "exit_code": 0, "error": None}
        if number == 0:
            training = [event for event in events if event.get("stage") == "training"]
            assert [training[0]["event"], training[-1]["event"]] == ["start", "end"]
            assert (training[-1]["done"], training[-1]["total"], training[-1]["unit"]) == (
                2,
                2,
                "steps",
            )
            assert training[-1]["metrics"]["eval_loss"] > 0
            assert [event["event"] for event in events].count("run") == 1
        else:
            assert events == events[-1:]
            assert "nothing was done" in done.stdout
    assert json.loads((tmp_path / "healed/report.json").read_text())["steps"] == 2


def test_the_kubernetes_jobs_bad_command_line_is_the_code_that_fails_the_job(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    manifest = yaml.safe_load((PIPELINES / "kubernetes-job.yaml").read_text(encoding="utf-8"))
    upscale, _ = pod(manifest, tmp_path)
    words = ["much" if word == "8" else word for word in upscale[0]]
    done = run(list(words), tmp_path, environment)
    assert done.returncode == 2
    assert json.loads(done.stderr)["exit_code"] == 2


# --- all of them ----------------------------------------------------------------------------------


def test_every_option_in_the_examples_exists() -> None:
    known = set(
        re.findall(r"--[a-z][a-z-]+", (PIPELINES.parent / "cli.md").read_text(encoding="utf-8"))
    )
    for name in ("Makefile", "github-actions.yml", "slurm.sh", "kubernetes-job.yaml", "README.md"):
        text = (PIPELINES / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for command in re.findall(r"\bdus,? (?:upscale|verify|heal)\b[^`]*?$", text, re.MULTILINE):
            used = set(re.findall(r"--[a-z][a-z-]+", command))
            assert used <= known, (name, used - known)


def test_the_shell_script_is_sound_shell() -> None:
    assert subprocess.run(["bash", "-n", PIPELINES / "slurm.sh"], check=False).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("it parses; what shellcheck says of it is not known here")
    done = subprocess.run(
        ["shellcheck", PIPELINES / "slurm.sh"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout

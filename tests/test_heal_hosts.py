"""`dus heal` on several hosts: network namespaces with addresses of their own, joined by a bridge,
whose host name resolves to 127.0.0.1, as Debian's does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DUS

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny
from runs import last_step, until

STEPS = 120
RECIPE = (
    f"--steps {STEPS} --seq-length 32 --batch-tokens 128 --micro-batch 2 --lr 1e-3 --holdout 5% "
    "--eval-every 60 --eval-tokens 1K --save-every 20 --precision fp32 --sharding fsdp"
).split()

# Seconds; longer than any start on a busy machine.
PATIENCE = 900.0


# In a forked process: go where `ip netns exec` goes, but for the mounts.
ENTER = """
import ctypes, os
namespace = os.open("/run/netns/{}", os.O_RDONLY)
assert ctypes.CDLL(None).setns(namespace, 0x40000000) == 0  # CLONE_NEWNET
os.close(namespace)
"""


def send(signum: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def is_worker(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"dus_cli.heal.worker" in words and b"torch.distributed.run" not in words


class Hosts:
    """Hosts 0, 1 and 2, at 10.77.0.1, 10.77.0.2 and 10.77.0.3."""

    def __init__(self, tag: str) -> None:
        self.names = [f"{tag}{rank}" for rank in range(3)]
        self.links = [f"{tag}v{rank}" for rank in range(3)]
        self.bridge = f"{tag}br"

    @staticmethod
    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def open(self) -> None:
        self.ip("link", "add", self.bridge, "type", "bridge")
        self.ip("link", "set", self.bridge, "up")
        for rank, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            self.ip("netns", "add", name)
            self.ip(*("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name))
            self.ip("link", "set", link, "master", self.bridge, "up")
            self.ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                self.ip("-n", name, "link", "set", device, "up")

    def close(self) -> None:
        for name in self.names:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.ip("netns", "del", name)
        with contextlib.suppress(subprocess.CalledProcessError):
            self.ip("link", "del", self.bridge)

    def processes(self, *ranks: int) -> list[int]:
        """The processes of these hosts."""
        command = ("ip", "netns", "pids")
        found = [
            subprocess.run(
                [*command, self.names[rank]], check=True, capture_output=True, text=True
            ).stdout
            for rank in ranks
        ]
        return [int(pid) for pids in found for pid in pids.split()]

    def kill(self, rank: int) -> None:
        """Every process of a host, at once."""
        send(signal.SIGKILL, self.processes(rank))

    @contextlib.contextmanager
    def frozen(self, *ranks: int) -> Iterator[None]:
        """The workers that now run on these hosts stand still, so that the run is not over too
        soon. torchrun goes on, for it would be given up without a sign of life.
        """
        found = [pid for pid in self.processes(*ranks) if is_worker(pid)]
        send(signal.SIGSTOP, found)
        yield
        send(signal.SIGCONT, found)

    def link(self, rank: int, state: str) -> None:
        """Cut a host off, or join it again: "down" or "up"."""
        self.ip("link", "set", self.links[rank], state)

    def heal(
        self,
        rank: int,
        out: Path,
        *options: str | Path,
        nnodes: int = 2,
        workers: int = 1,
        address: str = "10.77.0.1",
        is_new: bool = False,
    ) -> tiny.ForkedDus | subprocess.Popen[str]:
        """`dus heal` on a host, which starts torchrun and its workers; `is_new` says whether each
        is a new interpreter, as a user's are, or forked.
        """
        command = ["heal", *map(str, options), "-o", str(out), "--nnodes", str(nnodes)]
        command += ["--node-rank", str(rank), "--nproc-per-node", str(workers)]
        command += ["--rdzv-endpoint", f"{address}:29500"]
        if not is_new:
            return tiny.ForkedDus(*command, first=ENTER.format(self.names[rank]))
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[rank], *DUS, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    found = Hosts(f"d{os.getpid() % 100_000}")
    try:
        found.open()
    except (OSError, subprocess.CalledProcessError) as error:
        found.close()
        pytest.skip(f"network namespaces need root and iproute2 ({error})")
    yield found
    for rank in range(3):
        found.kill(rank)
    found.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_home(tmp_path_factory.mktemp("hosts"), 600)


def test_two_hosts_outlive_a_late_start_a_cut_link_and_the_death_of_one(
    hosts: Hosts, home: Path
) -> None:
    """The curve is that of two workers on one machine to which nothing happens. The host that
    comes last runs the command in a new interpreter.
    """
    run: tuple[str | Path, ...] = (home / "scaled", "--data", home / "corpus.jsonl", *RECIPE)
    out = home / "healed"
    late = hosts.heal(1, out, *run)
    time.sleep(2)
    first = hosts.heal(0, out, *run)
    assert until(lambda: last_step(out) >= 10 or first.poll() is not None, PATIENCE)
    assert first.poll() is None, first.communicate()
    with hosts.frozen(0, 1):
        hosts.link(1, "down")
        # a run that would have the same port
        other = hosts.heal(0, home / "other", *run)
        told = other.communicate(timeout=PATIENCE)[1].splitlines()[-1]
    assert other.returncode == 1
    assert told == (
        "error: --rdzv-endpoint: port 29500 cannot be served by this machine, which is node 0 "
        "(Address already in use); another run may have it; give every node another port"
    )
    at = last_step(out)
    time.sleep(20)
    assert last_step(out) <= at + 1, "the link is not cut"
    assert first.poll() is None
    assert late.poll() is None
    hosts.link(1, "up")
    at = last_step(out)
    assert until(lambda: last_step(out) >= at + 25 or first.poll() is not None, PATIENCE)
    hosts.kill(1)
    late.communicate()
    again = hosts.heal(1, out, *run, is_new=True)
    codes = [process.communicate(timeout=PATIENCE)[1] for process in (first, again)]
    assert (first.returncode, again.returncode) == (0, 0), codes
    model, *rest = run
    failure = tiny.heal(Path(model), home / "alone", *rest, workers=2)
    assert failure == ""
    losses, expected = (
        {row["step"]: row["loss"] for row in tiny.metrics(folder) if row["step"]}
        for folder in (out, home / "alone")
    )
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == expected


# --- more hosts, more workers, a bad line --------------------------------------------------------

SHORT = (
    "--steps 4 --seq-length 32 --batch-tokens 256 --micro-batch 2 --lr 1e-3 --holdout 5% "
    "--eval-every 2 --eval-tokens 1K --precision fp32"
).split()


def heal_on(hosts: Hosts, home: Path, name: str, *options: str, nnodes: int, **launch: Any) -> Path:
    """The same command on each host."""
    out = home / name
    run = [str(home / "scaled"), "--data", str(home / "corpus.jsonl"), *SHORT, *options]
    healings = [hosts.heal(rank, out, *run, nnodes=nnodes, **launch) for rank in range(nnodes)]
    said = [healing.communicate(timeout=PATIENCE)[1] for healing in healings]
    assert [healing.returncode for healing in healings] == [0] * nnodes, said
    return out


def on_one_machine(home: Path, name: str, *options: str, workers: int, num_local: int) -> Path:
    """The same run by so many workers on one machine, of which `num_local` count as a node."""
    model, data = home / "scaled", ("--data", home / "corpus.jsonl")
    out = home / name
    failure = tiny.heal(model, out, *data, *SHORT, *options, workers=workers, num_local=num_local)
    assert failure == ""
    return out


def test_three_hosts_learn_what_three_workers_learn(hosts: Hosts, home: Path) -> None:
    three = heal_on(hosts, home, "three", "--sharding", "fsdp", nnodes=3)
    alone = on_one_machine(home, "three-alone", "--sharding", "fsdp", workers=3, num_local=3)
    assert tiny.curve(three) == tiny.curve(alone)


def test_hosts_with_two_workers_each_split_the_weights_among_these(
    hosts: Hosts, home: Path
) -> None:
    hsdp = heal_on(hosts, home, "hsdp", nnodes=2, workers=2)
    assert json.loads((hsdp / "run.json").read_text())["fit"]["sharding"] == "hsdp"
    alone = on_one_machine(home, "hsdp-alone", "--sharding", "hsdp", workers=4, num_local=2)
    assert tiny.curve(hsdp) == tiny.curve(alone)


def test_a_line_that_is_slow_and_loses_packets_changes_nothing(hosts: Hosts, home: Path) -> None:
    """50 ms there and back, and one packet in a hundred lost."""
    ends = (hosts.names[0], "10.78.0.1/24", hosts.names[1], "10.78.0.2/24", "0.025", "0.01")
    line = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("lossy_line.py"), *ends],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert line.stdout is not None
    if line.stdout.readline() != "ready\n":
        pytest.skip(f"there are no TUN devices here ({line.communicate()[1].splitlines()[-1]})")
    few = "--sharding fsdp --steps 4 --batch-tokens 64 --eval-tokens 256".split()
    try:
        slow = heal_on(hosts, home, "slow", *few, nnodes=2, address="10.78.0.1")
    finally:
        line.terminate()
        passed, dropped = map(int, line.communicate()[0].split())
    assert passed > 1000
    assert dropped > 5
    alone = on_one_machine(home, "slow-alone", *few, workers=2, num_local=2)
    assert tiny.curve(slow) == tiny.curve(alone)


def test_node_0_that_does_not_know_its_own_name_is_one_line(home: Path) -> None:
    files = (home / "scaled", "--data", home / "corpus.jsonl", "-o", home / "unknown")
    launch = "--nnodes 2 --node-rank 0 --rdzv-endpoint node-0.invalid:29500 --nproc-per-node 1"
    done = tiny.forked_dus("heal", *files, *RECIPE, *launch.split())
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: --rdzv-endpoint: node-0.invalid is no name that this machine knows ("
    )
    assert done.stderr.endswith("); give node 0's name or address\n")

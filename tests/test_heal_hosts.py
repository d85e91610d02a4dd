"""`dus heal` on several hosts: network namespaces with addresses of their own, joined by a bridge,
whose host name resolves to 127.0.0.1, as Debian's does.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import DUS, dus

pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny

STEPS = 240
RECIPE = (
    f"--steps {STEPS} --seq-length 32 --batch-tokens 128 --micro-batch 2 --lr 1e-3 --holdout 5% "
    "--eval-every 80 --save-every 20 --precision fp32 --sharding fsdp"
).split()

# Seconds; longer than any start on a busy machine.
PATIENCE = 400.0


def until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1


class Hosts:
    """Hosts 0 and 1, at 10.77.0.1 and 10.77.0.2."""

    def __init__(self, tag: str) -> None:
        self.names = [f"{tag}{rank}" for rank in range(2)]
        self.links = [f"{tag}v{rank}" for rank in range(2)]
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

    def kill(self, rank: int) -> None:
        """Every process of a host, at once."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.names[rank]], check=True, capture_output=True, text=True
        )
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def heal(
        self, rank: int, out: Path, *options: str | Path, port: int = 29500
    ) -> subprocess.Popen[str]:
        launch = ("--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1")
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", self.names[rank], *DUS, "heal", *map(str, options)),
                *("-o", str(out), *launch, "--rdzv-endpoint", f"10.77.0.1:{port}"),
            ],
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
    found.kill(0)
    found.kill(1)
    found.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    tiny.write_corpus(folder / "corpus.jsonl", 600)
    tiny.upscaled(tiny.write_base(folder / "base"), folder / "scaled")
    return folder


def test_two_hosts_outlive_a_late_start_a_cut_link_and_the_death_of_one(
    hosts: Hosts, home: Path
) -> None:
    """The curve is that of two workers on one machine to which nothing happens."""
    run: tuple[str | Path, ...] = (home / "scaled", "--data", home / "corpus.jsonl", *RECIPE)
    out = home / "healed"
    late = hosts.heal(1, out, *run)
    time.sleep(2)
    first = hosts.heal(0, out, *run)
    until(lambda: last_step(out) >= 10 or first.poll() is not None)
    assert first.poll() is None, first.communicate()
    # a run that would have the same port
    other = hosts.heal(0, home / "other", *run)
    told = other.communicate(timeout=PATIENCE)[1].splitlines()[-1]
    assert other.returncode == 1
    assert told == (
        "error: --rdzv-endpoint: port 29500 cannot be served by this machine, which is node 0 "
        "(Address already in use); another run may have it; give every node another port"
    )
    Hosts.ip("link", "set", hosts.links[1], "down")
    time.sleep(20)
    assert first.poll() is None
    assert late.poll() is None
    Hosts.ip("link", "set", hosts.links[1], "up")
    at = last_step(out)
    until(lambda: last_step(out) >= at + 25 or first.poll() is not None)
    hosts.kill(1)
    late.communicate()
    again = hosts.heal(1, out, *run)
    codes = [process.communicate(timeout=PATIENCE)[1] for process in (first, again)]
    assert (first.returncode, again.returncode) == (0, 0), codes
    alone = dus(
        "heal", *run, "-o", home / "alone", "--nproc-per-node", "2", "-q", OMP_NUM_THREADS="1"
    )
    assert alone.returncode == 0, alone.stderr
    losses, expected = (
        {row["step"]: row["loss"] for row in tiny.metrics(folder) if row["step"]}
        for folder in (out, home / "alone")
    )
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses == expected


def test_node_0_that_does_not_know_its_own_name_is_one_line(home: Path) -> None:
    files = (home / "scaled", "--data", home / "corpus.jsonl", "-o", home / "unknown")
    launch = "--nnodes 2 --node-rank 0 --rdzv-endpoint node-0.invalid:29500 --nproc-per-node 1"
    done = dus("heal", *files, *RECIPE, *launch.split())
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: --rdzv-endpoint: node-0.invalid is no name that this machine knows ("
    )
    assert done.stderr.endswith("); give node 0's name or address\n")

"""Run the workers under torchrun, or the only worker without it: command line, process, outcome."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dus_cli.common.storage import free_bytes
from dus_cli.errors import DataError, HealError, OutputError, StoppedError, shown
from dus_cli.heal import checkpoints_folder as folders
from dus_cli.heal.launch import hosts
from dus_cli.heal.launch.plan import num_processes
from dus_cli.heal.launch.report import read_report
from dus_cli.heal.launch.tokenising import LOG as TOKENISING_LOG
from dus_cli.heal.launch.tokenising import tokenising
from dus_cli.heal.options import LaunchOptions
from dus_cli.heal.run import FAILURE, REPORT, Run
from dus_cli.heal.run import NAME as RUN_NAME
from dus_cli.heal.watch.follower import MetricsFollower
from dus_cli.heal.watch.views import View

LOGS = "logs"

# Seconds that workers have to save a checkpoint after a signal, before torchrun kills them.
_PATIENCE = 600

# Seconds for a connection of this machine to itself.
_LOOPBACK_PATIENCE = 5.0

_POLL = 0.2

# Seconds until torchrun is started again on one of several nodes.
_PAUSE = 5.0

# Exit codes of workers that another process stopped by a signal; torchrun's is 0.
_STOPPED = {0: signal.SIGTERM} | {
    128 + signum: signum for signum in (signal.SIGTERM, signal.SIGINT)
}

# With fewer free bytes a disk counts as full: even failure.json or a log may not fit.
_NO_ROOM = 1 << 16


@dataclass
class _Relay:
    """Counts the signals that come while the workers run. `has_failed` says whether the process
    that tokenises for them has failed.
    """

    has_failed: Callable[[], bool]
    signum: int | None = None
    count: int = field(default=0)

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        self.count += 1


# --- torchrun -------------------------------------------------------------------------------------


def workers_command(launch: LaunchOptions, run_path: Path, address: str | None = None) -> list[str]:
    """The command line that starts the workers of one node. It needs nothing but run.json.

    A single worker is started without torchrun, which would open a port.

    Args:
        launch: how many workers on how many nodes.
        run_path: run.json.
        address: the node's own, by which other nodes reach it; the caller then restarts torchrun.
            None leaves both to torchrun, which goes by the host name.
    """
    worker = ["-m", "dus_cli.heal.worker", str(run_path)]
    if _is_alone(launch):
        return [sys.executable, *worker]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={num_processes(launch)}",
    ]
    if launch.nnodes == 1:
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        command += [
            f"--nnodes={launch.nnodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--rdzv-id={run_path.parent.name}",
            # torchrun would compare the endpoint with what this machine's host name resolves to
            f"--rdzv-conf=is_host={str(launch.node_rank == 0).lower()}",
        ]
        command += [] if address is None else [f"--local-addr={address}"]
    command += [
        f"--max-restarts={launch.max_restarts if address is None else 0}",
        f"--log-dir={run_path.parent / LOGS / str(launch.node_rank)}",
        "--redirects=3",
    ]
    return command + worker


def _is_alone(launch: LaunchOptions) -> bool:
    """Whether there is a single worker on all nodes."""
    return launch.nnodes == 1 and num_processes(launch) == 1


def check_loopback() -> None:
    """Check that workers on this machine can connect to each other; torchrun would retry for
    minutes.

    Raises:
        HealError: they cannot.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), _LOOPBACK_PATIENCE).close()
    except OSError as error:
        raise HealError(
            "several workers need this machine's loopback interface, and 127.0.0.1 cannot be used "
            f"({error.strerror or error}); bring it up (ip link set lo up), or give "
            "--nproc-per-node 1"
        ) from None


def run_workers(run: Run, launch: LaunchOptions, view: View) -> dict[str, Any]:
    """Run the workers to the end of the run, and tokenise meanwhile what is not tokenised yet;
    return the report.

    Raises:
        HealError, OutputError, DataError: the run failed.
        StoppedError: a signal ended it.
    """
    logs = run.folder / LOGS / str(launch.node_rank)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    log = logs / TOKENISING_LOG
    with tokenising(run, log, launch.max_restarts, view.note) as background:
        failure = (lambda: None) if background is None else background.failure
        code, signum = _run_torchrun(run, launch, logs, view, lambda: failure() is not None)
        why = failure()
    if why is not None and not (run.folder / REPORT).is_file():
        raise DataError(f"{why} (the run ended {_at_checkpoint(run)})")
    return outcome_of(run, code, signum)


def _run_torchrun(
    run: Run, launch: LaunchOptions, logs: Path, view: View, has_failed: Callable[[], bool]
) -> tuple[int, int | None]:
    """Run the workers to their end; return the exit code, and the signal that came meanwhile.

    The workers of one node are restarted by torchrun. A worker without torchrun, and torchrun
    itself on several nodes, are restarted here: torchrun's own restart would wait for the node that
    died.

    Raises:
        HealError: the nodes cannot find each other.
    """
    if launch.node_rank == 0:
        (run.folder / FAILURE).unlink(missing_ok=True)
    follower = MetricsFollower(run.metrics_path)
    with _relayed(has_failed) as relay:
        if launch.nnodes == 1 and not _is_alone(launch):
            return _start(run, launch, logs, view, follower, relay), relay.signum
        before, attempt, deadline = None, 0, time.monotonic() + _PATIENCE
        while attempt <= launch.max_restarts:
            own = logs / f"attempt_{attempt}"
            own.mkdir(exist_ok=True)
            num_logs = len(list(logs.rglob("stderr.log")))
            code = _start(run, launch, own, view, follower, relay)
            is_stopped = code in (128 + signal.SIGTERM, 128 + signal.SIGINT) or relay.count > 0
            is_stopped = is_stopped or has_failed()
            if code == 0 or is_stopped or (run.folder / FAILURE).is_file():
                break
            if len(list(logs.rglob("stderr.log"))) == num_logs:  # torchrun started no worker
                if time.monotonic() > deadline:
                    raise _unmet(run, launch)
                time.sleep(_PAUSE)
                continue
            state = (
                _last_log_line(own if _is_alone(launch) else logs),
                _size(run.metrics_path),
                folders.newest(run.checkpoints_folder),
            )
            if state == before:  # the last start made no progress
                break
            before, attempt, deadline = state, attempt + 1, time.monotonic() + _PATIENCE
            if launch.node_rank > 0:
                time.sleep(_PAUSE)  # node 0 serves a new rendezvous by then
    return code, relay.signum


def _unmet(run: Run, launch: LaunchOptions) -> HealError:
    return HealError(
        f"the {launch.nnodes} nodes did not all come to {launch.rdzv_endpoint} within ten minutes; "
        f"{shown(run.folder / LOGS)} has what torchrun said; the same command on every node goes "
        "on from the last checkpoint"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _start(
    run: Run,
    launch: LaunchOptions,
    logs: Path,
    view: View,
    follower: MetricsFollower,
    relay: _Relay,
) -> int:
    """Start torchrun or the only worker, and follow it to its end; return its exit code."""
    view.status("loading the model")
    address = None
    if launch.nnodes > 1:
        endpoint = str(launch.rdzv_endpoint)
        # the name of a pod that is not there yet is unknown, too
        if launch.node_rank > 0 and not _node_0_answers(endpoint, view, relay):
            return 128 + (relay.signum or signal.SIGTERM)
        address = hosts.local_address(endpoint)
        if launch.node_rank == 0:
            hosts.check_port(endpoint)
    # torchrun's workers have logs of their own
    name = "stderr.log" if _is_alone(launch) else "torchrun.log"
    with (logs / name).open("wb") as log:
        process = subprocess.Popen(
            workers_command(launch, run.folder / RUN_NAME, address),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(launch, address),
            start_new_session=True,  # Ctrl-C reaches the launcher, which lets the workers save
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (dus runs no threads here)
        )
        num_passed_on, is_ending = 0, False
        while process.poll() is None:
            if relay.has_failed() and not is_ending:
                view.status("saving a checkpoint")
                process.terminate()
                is_ending = True
            if relay.count > num_passed_on:
                view.status("saving a checkpoint" if relay.count == 1 else "ending at once")
                os.killpg(process.pid, signal.SIGKILL) if relay.count > 1 else process.terminate()
                num_passed_on = relay.count
            view.update(follower)
            time.sleep(_POLL)
        view.update(follower)
    return process.returncode


def _node_0_answers(endpoint: str, view: View, relay: _Relay) -> bool:
    """Wait until node 0 serves the rendezvous; torchrun would wait for one minute. Return False if
    a signal ended the wait.

    Raises:
        HealError: it does not answer within ten minutes.
    """
    deadline = time.monotonic() + _PATIENCE
    is_told = False
    while not hosts.answers(endpoint):
        if not is_told:
            view.status(f"waiting for node 0 at {endpoint}")
        is_told = True
        if relay.count:
            return False
        if time.monotonic() > deadline:
            raise HealError(
                f"--rdzv-endpoint: node 0 does not answer at {endpoint}; start it there with the "
                "same command, or give its address"
            )
        time.sleep(1)
    return True


def _environment(launch: LaunchOptions, address: str | None) -> dict[str, str]:
    import torch

    environment = os.environ | {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_PATIENCE),
        "PYTHONUNBUFFERED": "1",
    }
    if _is_alone(launch):  # overrides what a job's own launcher has set
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment.pop("TORCHELASTIC_RUN_ID", None)
    if address is not None and not hosts.is_loopback(address):
        interface = hosts.interface_of(address)
        if interface is not None:  # gloo would take the host name's
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    if torch.accelerator.is_available():
        return environment
    # torchrun would give each of several workers one thread; on a CPU they share the cores.
    environment.setdefault(
        "OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes(launch)))
    )
    # By default glibc returns each activation's memory to the kernel, and page faults then halve
    # the speed (docs/healing.md).
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 << 30))
    return environment


def _die_with_parent() -> None:
    """Run in the child before exec: if the launcher is killed, workers get SIGTERM and save."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _relayed(has_failed: Callable[[], bool]) -> Iterator[_Relay]:
    relay = _Relay(has_failed)
    # Python handles signals in the main thread only
    if threading.current_thread() is not threading.main_thread():
        yield relay
        return
    signals = [
        s
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(s) != signal.SIG_IGN
    ]
    before = [(signum, signal.signal(signum, relay)) for signum in signals]
    try:
        yield relay
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)


def outcome_of(run: Run, code: int, signum: int | None) -> dict[str, Any]:
    """The report of a finished run.

    Raises:
        HealError, OutputError: the run failed.
        StoppedError: a signal ended it.
    """
    if (run.folder / REPORT).is_file():
        return read_report(run.folder, Path(run.model))
    failure = run.folder / FAILURE
    if failure.is_file():
        raise HealError(json.loads(failure.read_text(encoding="utf-8"))["error"])
    signum = signum or _STOPPED.get(code)
    if signum is not None:
        raise StoppedError(
            f"ended by {signal.Signals(signum).name} {_at_checkpoint(run)}",
            signum,
        )
    free = free_bytes(run.folder)
    if free is not None and free < _NO_ROOM:  # the workers could not write failure.json
        raise OutputError(folders.disk_failure(run.checkpoints_folder, os.strerror(errno.ENOSPC)))
    line = _last_log_line(run.folder / LOGS)
    how = f" ({shown(line)})" if line else ", killed from outside or out of memory"
    if run.pilot_seconds is not None:
        raise HealError(
            f"a worker of the pilot died{how}; if it lacked memory, use more workers, "
            "--activation-checkpointing full or a smaller --seq-length"
        )
    raise HealError(
        f"a worker died{how}; {shown(run.folder / LOGS)} has its log; the same command goes on "
        "from the last checkpoint"
    )


def _at_checkpoint(run: Run) -> str:
    """Where a run that ended goes on."""
    if run.pilot_seconds is not None:
        return "in the pilot, of which nothing is kept"
    step = folders.newest(run.checkpoints_folder)
    if step is None:
        return "before the first checkpoint; the same command starts again"
    return f"with a checkpoint at step {step}; the same command goes on from there"


def _last_log_line(logs: Path) -> str:
    """The last line of the newest worker's log that is not empty; "" if there is none."""
    for path in sorted(
        logs.rglob("stderr.log"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        lines = [
            line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        ]
        filled = [line for line in lines if line]
        if filled:
            return filled[-1]
    return ""

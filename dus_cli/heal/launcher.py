"""The verb: check, tokenise, write run.json, start torchrun or the one worker, follow it, report.

The command line is built apart from running it, so that it can be printed and tested.
"""

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
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from dus_cli.errors import HealError, OutputError, StoppedError, shown
from dus_cli.heal import checkpoints_folder as folders
from dus_cli.heal import resolve
from dus_cli.heal.corpus import BadLine, Source, parse_sources
from dus_cli.heal.estimate import Shape, shape_of
from dus_cli.heal.live import MetricsFollower, View
from dus_cli.heal.options import Launch
from dus_cli.heal.plan import num_processes, plan_lines, plan_of
from dus_cli.heal.resolve import Model, Wishes, ties_embeddings
from dus_cli.heal.run import (
    FAILURE,
    REPORT,
    Run,
    changed_options,
    check_same,
    is_of_a_run,
    other_options,
    public,
    read_run,
)
from dus_cli.heal.run import NAME as RUN_NAME
from dus_cli.libraries import require
from dus_cli.maps.model_config import decoder_config
from dus_cli.storage import Storage, ask, free_bytes, known, remove, sync_refusal
from dus_cli.writing.staging import Staging, check_apart, why_within

LOGS = "logs"

# By one of these files a folder `tokens` is known as a run's.
_OF_TOKENS = (".lock", "sources.jsonl", "stdin.jsonl", ".stdin.jsonl.partial")

# Seconds that workers have to save a checkpoint after a signal, before torchrun kills them.
_PATIENCE = 600

# Seconds for a connection of this machine to itself.
_LOOPBACK_PATIENCE = 5.0

_POLL = 0.2

# Exit codes of workers that somebody else told to stop; torchrun's is 0.
_STOPPED = {0: signal.SIGTERM} | {128 + signum: signum for signum in (signal.SIGTERM, signal.SIGINT)}

# With less free than this a disk is full: a failure or a log line may find no place.
_NO_ROOM = 1 << 16


@dataclass
class _Prepared:
    """Data as the workers will see it, and its rows in an epoch."""

    record: dict[str, Any]
    rows_per_epoch: int


@dataclass
class _Relay:
    """Signals that came while torchrun ran."""

    signum: int | None = None
    count: int = field(default=0)

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        self.count += 1


def heal(wishes: Wishes, view: View) -> dict[str, Any]:
    """Heal a model, or go on healing it; the report when it is finished. The output is the model's place.

    Raises:
        DusError: any known failure, of a worker too.
        StoppedError: a signal ended it; a checkpoint is saved.
    """
    model = check(wishes)
    finished = _finished(wishes, model)
    if finished is not None:
        return finished | {"status": "unchanged"}
    run = prepare_run(wishes, model, view)
    plan = plan_of(run, model_shape(model, run), wishes.launch)
    view.plan(plan_lines(plan), plan)
    view.begin(run.num_steps, run.tokens_per_step, [phase.train for phase in wishes.recipe.phases])
    code, signum = _launch(run, wishes.launch, view)
    return _outcome(run, code, signum)


def check(wishes: Wishes) -> Model:
    """Everything that can be refused before data are read; the opened model.

    Raises:
        DusError: the model, the options or the output are not in order.
    """
    from dus_cli.heal.tracking import check_tracker

    model = resolve.open_model(wishes.model)
    resolve.check_wishes(wishes, model)
    resolve.rows_per_step(wishes, model)
    check_tracker(wishes.keeping.track.value)
    check_apart(wishes.output, wishes.model)
    check_run_folder(wishes.output)
    check_renames(wishes.output, known(wishes.output.resolve().parent))
    _check_devices(wishes)
    return model


def check_renames(output: Path, found: Storage | None) -> None:
    """Hold that folders can be renamed where the output will be: a checkpoint is complete by its name.

    Raises:
        OutputError: they cannot.
    """
    if found is not None and found.no_rename is not None:
        raise OutputError(
            f"{shown(output)} cannot be healed into, because {found.no_rename}: each checkpoint, and the model at the "
            "end, gets its name by one rename; heal on a disk (-o), and copy the result"
        )


def _check_devices(wishes: Wishes) -> None:
    import torch

    workers = num_processes(wishes.launch) * wishes.launch.nnodes
    if workers > 1:  # transformers places each worker's shards by it
        require("dus heal on several workers", "accelerate")
    if wishes.fit.offload and not (torch.accelerator.is_available() and workers > 1):
        raise HealError(
            "--offload moves what FSDP splits from GPUs to memory, and needs two workers on GPUs; leave it out"
        )
    if wishes.launch.nnodes > 1 and wishes.launch.rdzv_endpoint is None:
        raise HealError("--nnodes above 1 needs --rdzv-endpoint HOST:PORT, the same on every node")
    if wishes.launch.nnodes == 1 and workers > 1:
        _check_loopback()
    if wishes.launch.node_rank >= wishes.launch.nnodes:
        raise HealError(f"--node-rank {wishes.launch.node_rank} of {wishes.launch.nnodes} nodes: they count from 0")


def check_run_folder(output: Path) -> None:
    """Hold that OUT is free, or holds a run of dus heal.

    Raises:
        OutputError: it holds something else, or its name could not be given to the healed model.
    """
    if not output.resolve().parent.is_dir():
        raise OutputError(f"{shown(output.resolve().parent)} is not a directory; create it first")
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{shown(output)} exists and is not a directory; choose another name for -o")
    if (why := why_within(output.resolve())) is not None:
        raise OutputError(
            f"{shown(output)} cannot be healed into, because {why}: the healed model takes the place of the run's "
            f"folder at the end; name a folder in it, such as -o {shown(output / 'healed')}"
        )
    is_run = (output / RUN_NAME).is_file()
    strangers = sorted(path.name for path in output.iterdir() if not _is_ours(path))
    if strangers and not is_run:
        raise OutputError(f"{shown(output)} holds {shown(strangers[0])} and no run of dus heal; choose another -o")


def _is_ours(path: Path) -> bool:
    """Whether a folder in OUT is what a run leaves that ended before it wrote run.json: tokens alone."""
    return (
        path.name == "tokens"
        and path.is_dir()
        and (not any(path.iterdir()) or any((path / name).exists() for name in _OF_TOKENS))
    )


def _finished(wishes: Wishes, model: Model) -> dict[str, Any] | None:
    """The report of a run that is finished already with these options; None where there is none."""
    path = wishes.output / REPORT
    if not path.is_file():
        return None
    run = read_run(wishes.output / RUN_NAME)
    changed = changed_options(run, wishes.to_json())
    if run.model_key != resolve.model_key(model.checkpoint):
        changed.append("the model")
    for name in ("data.files", "data.eval_files"):  # the tokens are gone, so the names must do
        if public(run.options[name]) != public(wishes.to_json()[name]):
            changed.append("the data")
    if changed:
        raise other_options(run, changed)
    with Staging(wishes.output.resolve(), overwrite=True, claim=is_of_a_run):
        pass  # clears the run's folder, where a kill came between the rename and its removal
    return _read_report(wishes.output.resolve(), wishes.model.resolve())


def _read_report(folder: Path, model: Path) -> dict[str, Any]:
    """report.json of a folder, with the places that it keeps to itself."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report | {"model": str(model), "output": str(folder)}


def prepare_run(wishes: Wishes, model: Model, view: View) -> Run:
    """Tokenise and write run.json; of a run that goes on, hold that it is the same.

    Raises:
        DusError: the data cannot be used, or the run is another one.
    """
    output = wishes.output.resolve()
    probe = Path(tempfile.mkdtemp(prefix=f".{output.name}.probe-", dir=output.parent))
    try:
        check_renames(wishes.output, ask(probe))
        if (refusal := sync_refusal(probe)) is not None:  # torch's checkpoints insist on it
            raise OutputError(
                f"{shown(wishes.output)} cannot be healed into, because files cannot be synced there ({refusal}), and "
                "a checkpoint must be; heal on a disk (-o), and copy the result"
            )
    finally:
        remove(probe)
    output.mkdir(exist_ok=True)
    if wishes.launch.node_rank == 0:
        folders.check_unlocked(output / "checkpoints")
    run = _planned(wishes, model, output / "tokens", view)
    if (output / RUN_NAME).exists():
        begun = read_run(output / RUN_NAME)
        check_same(begun, run)
        run = replace(run, fit=replace(run.fit, precision=begun.fit.precision))  # auto, on whatever it goes on
        kept = replace(run.keeping, eval_tokens=begun.keeping.eval_tokens)  # whatever --eval-every now is
        run = _measured(replace(run, keeping=kept), output / "tokens")
    if wishes.launch.node_rank == 0 or not (output / RUN_NAME).exists():
        run.write()
    return run


def _planned(wishes: Wishes, model: Model, folder: Path, view: View) -> Run:
    """The run, with its data's token files in `folder`."""
    data = prepare_data(wishes, model, folder, view)
    return _measured(resolve.make_run(wishes, model, data.record, data.rows_per_epoch), folder)


def _measured(run: Run, folder: Path) -> Run:
    """The run, told what its measurements predict."""
    from dus_cli.heal.tokens import Prepared, heldout_rows

    data = Prepared.from_json(run.data)
    most = run.keeping.eval_tokens
    rows = heldout_rows(data, folder, run.seq_length, document_mask=run.document_mask, max_tokens=most)
    return replace(run, heldout_documents=rows.num_documents, heldout_tokens=rows.num_labels)


def prepare_data(wishes: Wishes, model: Model, folder: Path, view: View) -> _Prepared:
    """Token files of all data, made or found in `folder`.

    Raises:
        DataError: the data cannot be used.
    """
    from dus_cli.heal.prepare import prepare
    from dus_cli.heal.tokens import Rows

    folder.mkdir(parents=True, exist_ok=True)
    data = wishes.data
    sources, eval_sources = _sources(wishes, folder)
    view.status("tokenising")
    prepared = prepare(
        sources,
        eval_sources,
        wishes.model,
        folder,
        vocab_size=model.vocab_size,
        text_field=data.text_field,
        on_bad_line=BadLine(data.on_bad_line),
        holdout=data.holdout,
        special_tokens=data.special_tokens,
        wait=wishes.launch.nnodes > 1,
        say=view.note,
        on_progress=view.tokenising,
    )
    rows = Rows(prepared, folder, resolve.seq_length(wishes, model), wishes.recipe.seed)
    if not prepared.num_heldout_tokens:
        raise HealError("the held-out set is empty, and without one nothing is proven; give --eval-data or --holdout")
    return _Prepared(prepared.to_json(), rows.rows_per_epoch)


def _sources(wishes: Wishes, folder: Path) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    data = wishes.data
    return (
        parse_sources(data.files, folder, data.text_field),
        parse_sources(data.eval_files, folder, data.text_field),
    )


# --- torchrun -------------------------------------------------------------------------------------


def workers_command(launch: Launch, run_path: Path) -> list[str]:
    """The exact line that starts the workers of one node. It needs nothing but run.json.

    One worker in all needs no torchrun, which opens a port even then.
    """
    worker = ["-m", "dus_cli.heal.worker", str(run_path)]
    if _is_alone(launch):
        return [sys.executable, *worker]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes(launch)}"]
    if launch.nnodes == 1:
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        command += [
            f"--nnodes={launch.nnodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--rdzv-id={run_path.parent.name}",
        ]
    command += [
        f"--max-restarts={launch.max_restarts}",
        f"--log-dir={run_path.parent / LOGS / str(launch.node_rank)}",
        "--redirects=3",
    ]
    return command + worker


def _is_alone(launch: Launch) -> bool:
    """Whether there is one worker in all."""
    return launch.nnodes == 1 and num_processes(launch) == 1


def _check_loopback() -> None:
    """Hold that the workers of this machine can talk to each other; torchrun would try for minutes.

    Raises:
        HealError: they cannot.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), _LOOPBACK_PATIENCE).close()
    except OSError as error:
        raise HealError(
            f"several workers talk over this machine's loopback interface, and 127.0.0.1 cannot be used "
            f"({error.strerror or error}); bring it up (ip link set lo up), or give --nproc-per-node 1"
        ) from None


def prepared_command(wishes: Wishes, view: View) -> list[str]:
    """What `--print-command` prints, for a batch job or a container. Data and run.json are made first.

    Raises:
        DusError: as `heal`.
    """
    prepare_run(wishes, check(wishes), view)
    return workers_command(wishes.launch, wishes.output.resolve() / RUN_NAME)


def _launch(run: Run, launch: Launch, view: View) -> tuple[int, int | None]:
    """Run the workers to their end: the exit code, and the signal that came meanwhile."""
    logs = run.folder / LOGS / str(launch.node_rank)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    if launch.node_rank == 0:
        (run.folder / FAILURE).unlink(missing_ok=True)
    follower = MetricsFollower(run.metrics_path)
    with _relayed() as relay:
        if not _is_alone(launch):  # torchrun starts workers again by itself
            return _start(run, launch, logs, view, follower, relay), relay.signum
        before = None
        for attempt in range(launch.max_restarts + 1):
            own = logs / f"attempt_{attempt}"
            own.mkdir()
            code = _start(run, launch, own, view, follower, relay)
            is_stopped = code in (128 + signal.SIGTERM, 128 + signal.SIGINT) or relay.count > 0
            if code == 0 or is_stopped or (run.folder / FAILURE).is_file():
                break
            died = (_last_words(own), _size(run.metrics_path), folders.newest(run.checkpoints_folder))
            if died == before:  # nothing was gained by another start
                break
            before = died
    return code, relay.signum


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _start(run: Run, launch: Launch, logs: Path, view: View, follower: MetricsFollower, relay: _Relay) -> int:
    """Start torchrun, or the one worker, and follow it to its end; its exit code."""
    view.status("loading the model")
    name = "stderr.log" if _is_alone(launch) else "torchrun.log"  # the workers of which have logs of their own
    with (logs / name).open("wb") as log:
        process = subprocess.Popen(
            workers_command(launch, run.folder / RUN_NAME),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(launch),
            start_new_session=True,  # Ctrl-C reaches the launcher, which lets the workers save
            preexec_fn=_die_with_parent,  # noqa: PLW1509  (no thread of ours runs)
        )
        told = 0
        while process.poll() is None:
            if relay.count > told:
                view.status("saving a checkpoint" if relay.count == 1 else "ending at once")
                os.killpg(process.pid, signal.SIGKILL) if relay.count > 1 else process.terminate()
                told = relay.count
            view.update(follower)
            time.sleep(_POLL)
        view.update(follower)
    return process.returncode


def _environment(launch: Launch) -> dict[str, str]:
    import torch

    environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_PATIENCE), "PYTHONUNBUFFERED": "1"}
    if _is_alone(launch):  # whatever a job's own launcher has set
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environment.pop("TORCHELASTIC_RUN_ID", None)
    if torch.accelerator.is_available():
        return environment
    # torchrun gives each of several workers one thread; on a CPU they share the cores instead.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes(launch))))
    # glibc gives each activation back to the kernel and faults it in anew: half the speed (docs/healing.md).
    environment.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 30))
    environment.setdefault("MALLOC_TRIM_THRESHOLD_", str(16 << 30))
    return environment


def _die_with_parent() -> None:
    """In the child before exec: a launcher that is killed takes its workers along, and they save."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextlib.contextmanager
def _relayed() -> Iterator[_Relay]:
    relay = _Relay()
    signals = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = [(signum, signal.signal(signum, relay)) for signum in signals]
    try:
        yield relay
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)


def _outcome(run: Run, code: int, signum: int | None) -> dict[str, Any]:
    """The report of a finished run, or the reason why there is none."""
    if (run.folder / REPORT).is_file():
        return _read_report(run.folder, Path(run.model))
    failure = run.folder / FAILURE
    if failure.is_file():
        raise HealError(json.loads(failure.read_text(encoding="utf-8"))["error"])
    signum = signum or _STOPPED.get(code)
    if signum is not None:
        step = folders.newest(run.checkpoints_folder)
        where = (
            "before the first checkpoint; the same command starts again"
            if step is None
            else f"with a checkpoint at step {step}; the same command goes on from there"
        )
        raise StoppedError(
            f"ended by {signal.Signals(signum).name} {where}",
            signum,
        )
    free = free_bytes(run.folder)
    if free is not None and free < _NO_ROOM:  # then nobody could leave a word
        raise OutputError(folders.disk_failure(run.checkpoints_folder, os.strerror(errno.ENOSPC)))
    words = _last_words(run.folder / LOGS)
    raise HealError(
        f"a worker died{f' ({shown(words)})' if words else ', killed from outside or out of memory'}; "
        f"{shown(run.folder / LOGS)} has what it said; the same command goes on from the last checkpoint"
    )


def _last_words(logs: Path) -> str:
    """The last line of the newest worker's log that says something."""
    for path in sorted(logs.rglob("stderr.log"), key=lambda path: path.stat().st_mtime, reverse=True):
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
        said = [line for line in lines if line]
        if said:
            return said[-1]
    return ""


# --- the dry run ----------------------------------------------------------------------------------


def preview(wishes: Wishes, view: View) -> tuple[Run, Shape]:
    """The run as it would be, and the model's shape. Token files that OUT lacks are made elsewhere, and removed.

    Raises:
        DusError: as `heal`.
    """
    model = check(wishes)
    with contextlib.ExitStack() as stack:
        folder = wishes.output.resolve() / "tokens"
        if not folder.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = _planned(wishes, model, folder, view)
    return run, model_shape(model, run)


def model_shape(model: Model, run: Run) -> Shape:
    """What the model's FLOPs and memory depend on."""
    fields = decoder_config(model.checkpoint.config).fields
    tied = {"tie_word_embeddings": ties_embeddings(model.checkpoint)}
    return shape_of(fields | tied, run.num_parameters, run.num_layers)

"""What a process that tiny.py forks runs. Each of them imports this module anew, so it imports
nothing that the server has not imported: pytest alone would take as long as a short command.

torchrun and workers that such a process starts are forked from it in turn: they are processes of
their own, with the environment, files, session and command line that they were started with, but do
not import torch anew. Only that their command lines start them in a new interpreter is left to the
tests that run the command in one. The process that tokenises is a new interpreter unless a test
adds it to PROGRAMS, because others act before it has begun.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

# The programs that the command and torchrun start with `python -m`; each has a function main.
PROGRAMS = ["torch.distributed.run", "dus_cli.heal.worker"]


def run(
    log: str, environment: dict[str, str], target: str, arguments: list[str], first: str
) -> None:
    """Redirect output to `log` and `log`.err, then run `first`, which is Python code, and the
    program.
    """
    gc.freeze()  # else the first collection copies the memory of all imported modules
    for stream, path in ((sys.stdout, log), (sys.stderr, f"{log}.err")):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream.fileno())
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    # a shell's background jobs ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(first, {})  # noqa: S102  (a test's own)
    if target == "dus":
        _call("dus", *arguments)
        _dus(arguments)
    elif target == "server":
        _serve(*arguments)
    elif target == "logits":
        _save_logits(*map(Path, arguments))
    else:
        from dus_cli.heal import worker

        _call("dus_cli.heal.worker", *arguments)
        sys.exit(worker.main(arguments))


def _dus(arguments: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from dus_cli.cli import main

    for module in (subprocess, subprocess_handler):
        vars(module)["Popen"] = _Forked
    sys.argv = ["dus", *arguments]
    main()


def _serve(path: str) -> None:
    """Fork a `dus` for each process that runs asking.py."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            if not os.fork():  # who waits for the command
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> NoReturn:
    """Run the command that was asked for, with the files that came along, and tell its code."""
    parts, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while part := connection.recv(1 << 20):
        parts += part
    words, folder, environment = json.loads(parts)
    command = os.fork()
    if not command:
        for number, file in enumerate(files):
            os.dup2(file, number)
        os.chdir(folder)
        _become_new(environment, ["dus", *words])
        _end_with(_dus, words)
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    connection.sendall(str(code).encode())
    os._exit(0)


def _save_logits(run_path: Path, folder: Path) -> None:
    """A worker that loads its part of a run's model and writes the whole model's logits for some
    bytes.
    """
    import torch

    from dus_cli.heal.run import read_run
    from dus_cli.heal.train.loading import load
    from dus_cli.models.team import joined_team

    with joined_team() as team, torch.no_grad():
        decoder = load(read_run(run_path), team)
        ids = torch.arange(48).reshape(2, 24)
        logits = decoder.model(input_ids=ids, use_cache=False).logits
        torch.save(logits, folder / f"logits-{team.size}-{team.rank}.pt")


class _Forked(subprocess.Popen[Any]):
    """A program of this interpreter runs in the child where others are executed."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        preexec_fn: Callable[[], object] | None = None,
        **options: Any,
    ) -> None:
        words = [word for word in args if word != "-u"]
        is_ours = words[:2] == [sys.executable, "-m"] and words[2] in PROGRAMS

        def become() -> NoReturn:
            _become_new(dict(os.environ if env is None else env), list(args))
            if preexec_fn is not None:
                preexec_fn()
            _end_with(import_module(words[2]).main, words[3:])

        sys.stdout.flush()
        sys.stderr.flush()
        super().__init__(args, env=env, preexec_fn=become if is_ours else preexec_fn, **options)


def _become_new(environment: dict[str, str], words: list[str]) -> None:
    """Do what execve(2) and a new interpreter do for a program."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen waits for the end of a pipe among them
    # those of the server were opened on files of another kind
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", 1, encoding="utf-8", closefd=False) for number in (1, 2)
    )
    gc.enable()
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    # the threads of tokenizers' Rust are not forked, and it would wait for them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _call(*words)

    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))


def _end_with(main: Callable[[list[str]], int | None], arguments: list[str]) -> NoReturn:
    """Run a program and end with its code, once its threads have ended."""
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code if end.code is None or isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  (as the interpreter does)
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _call(*words: str) -> None:
    """Write another command line over that of the server, in /proc, by which tests find it."""
    status = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    start, end = int(status[45]), int(status[46])  # arg_start and arg_end of proc(5)
    line = b"".join(os.fsencode(word) + b"\0" for word in words)
    assert len(line) < end - start
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)

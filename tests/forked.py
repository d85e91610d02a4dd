"""The real command in processes forked from a server that has imported its modules, which takes a
tenth of the time.

huggingface_hub is imported by each process, because it reads its environment when it is imported.
To test how a new interpreter starts and ends (PYTHONPATH, imports), use `dus` of conftest.py.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from conftest import Run

_PRELOADED = (
    "dus_cli.cli, dus_cli.upscaling.verb, dus_cli.verification.verb, dus_cli.push.verb, "
    "dus_cli.release.remaking, httpx2, tqdm, filelock, fsspec, yaml, rich.progress, "
    "concurrent.futures"
)

# A request is a line of JSON; the answer is the exit status of the process that was forked for it.
_SERVER = f"""
import atexit, contextlib, gc, json, os, signal, sys, threading
import {_PRELOADED}
for name in dus_cli.cli.COMMANDS:  # their modules, and what typer imports to parse
    with contextlib.suppress(Exception):
        dus_cli.cli.load_command(name).make_context(name, ["base", "-o", "out"])
def run(request):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.alarm(150)  # end a command that hangs
    exec(request["first"], {{}})
    sys.argv = ["dus", *request["arguments"]]
    try:
        dus_cli.cli.main()
    except SystemExit as end:
        _end(end.code)
def _end(code):
    # Do everything that the interpreter does at its end but free all objects, which takes longer
    # than most commands.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
gc.collect()
gc.freeze()  # else the first collection in each child copies the memory of all imported modules
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

_servers: dict[str, subprocess.Popen[str]] = {}


def _server(more: str) -> subprocess.Popen[str]:
    """The server that has also imported `more`."""
    if more not in _servers:
        # A new session, so that a terminal's signals reach pytest only; the server ends when its
        # standard input closes.
        atexit.register(stop)
        _servers[more] = subprocess.Popen(
            [sys.executable, "-c", f"import {more or 'sys'}\n{_SERVER}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    return _servers[more]


def _umask() -> int:
    """The umask of this process, which can only be read by setting another one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def stop() -> None:
    """Stop all servers."""
    while _servers:
        _servers.popitem()[1].communicate()


def dus(
    *arguments: str | Path,
    cwd: Path | None = None,
    first: str = "",
    imported: str = "",
    **environment: str,
) -> Run:
    """Run the command. `first` is Python code that runs before it, to shorten a wait or count
    something; `imported` is a heavy library that the server imports for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": {**os.environ, **environment},
            "first": first,
            "umask": _umask(),
            "out": str(out),
            "err": str(err),
        }
        server = _server(imported)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Run(
            arguments, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )


# The command with torch already imported, which takes longer than most commands.
dus_with_torch = partial(dus, imported="torch")

"""The real command in processes forked from one that has imported what they import: a tenth of the
time.

huggingface_hub itself is left to each of them, because it reads its environment when it is
imported. What a new interpreter takes from its environment or command line (PYTHONPATH, what is
imported at all, how it ends) is a fact of a new process: `dus` of conftest.py.
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
    signal.alarm(150)  # what waits for ever fails
    exec(request["first"], {{}})
    sys.argv = ["dus", *request["arguments"]]
    try:
        dus_cli.cli.main()
    except SystemExit as end:
        _end(end.code)
def _end(code):
    # All that an interpreter's end does but to free every object, which takes longer than most
    # commands.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
gc.collect()
gc.freeze()  # else the first collection in each child copies all that was imported
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

_servers: dict[str, subprocess.Popen[str]] = {}


def _server(more: str) -> subprocess.Popen[str]:
    """The server that has imported `more`, too."""
    if more not in _servers:
        # Signals of a terminal are pytest's; the server ends with its standard input.
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
    """The mask of this process, which can be read by setting another alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def stop() -> None:
    """End the servers, if there are any."""
    while _servers:
        _servers.popitem()[1].communicate()


def dus(
    *arguments: str | Path,
    cwd: Path | None = None,
    first: str = "",
    imported: str = "",
    **environment: str,
) -> Run:
    """Run the command. `first` is Python that runs before it, to make a wait shorter or to count
    something; `imported` is a heavy library that it need not import itself.
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


# The command where torch is imported already, which takes longer than most commands.
dus_with_torch = partial(dus, imported="torch")

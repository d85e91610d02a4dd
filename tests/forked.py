"""The real command in processes forked from one that has imported what they import: a third of the
time.

huggingface_hub itself is left to each of them, because it reads its environment when it is
imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import Run

_PRELOADED = "dus_cli.cli, httpx2, tqdm, filelock, fsspec, yaml, rich.progress, concurrent.futures"

# A request is a line of JSON; the answer is the exit status of the process that was forked for it.
_SERVER = f"""
import json, os, signal, sys
import {_PRELOADED}
def run(request):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.alarm(150)  # what waits for ever fails
    exec(request["first"], {{}})
    sys.argv = ["dus", *request["arguments"]]
    dus_cli.cli.main()
for line in sys.stdin:
    child = os.fork()
    if not child:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

_servers: list[subprocess.Popen[str]] = []


def _server() -> subprocess.Popen[str]:
    if not _servers:
        # Signals of a terminal are pytest's; the server ends with its standard input.
        _servers.append(
            subprocess.Popen(
                [sys.executable, "-c", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return _servers[0]


def stop() -> None:
    """End the server, if there is one."""
    while _servers:
        server = _servers.pop()
        server.communicate()


def dus(
    *arguments: str | Path, cwd: Path | None = None, first: str = "", **environment: str
) -> Run:
    """Run the command. `first` is Python that runs before it, to make a wait shorter or to count
    something.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        request = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or Path.cwd()),
            "env": {**os.environ, **environment},
            "first": first,
            "out": str(out),
            "err": str(err),
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Run(
            arguments, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")
        )

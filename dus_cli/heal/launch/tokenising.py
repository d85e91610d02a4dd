"""The process that tokenises on each node while the workers train (`--stream`):
`python -m dus_cli.heal.launch.tokenising OUT/run.json`, started by the launcher.

It exits with 0 when every row that the run reads is on the disk, and with 1 on a failure, whose one
line is the last of its stderr. It ends with the launcher, however that ends: the launcher holds the
other end of its standard input.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dus_cli.common.unforeseen import explained
from dus_cli.heal.launch import resolve
from dus_cli.heal.launch.data import open_shelf, sources_of
from dus_cli.heal.run import NAME as RUN_NAME
from dus_cli.heal.run import Run, data_options, read_run

LOG = "tokenising.log"

# Added to the niceness, so that the workers keep the cores.
_NICE = 10

# Begins a line of the log that the launcher shows, such as that a store does not answer.
_NOTE = "note: "


class Tokenising:
    """The process as its launcher sees it. It is started again when it is killed.

    Args:
        run: which reads the tokens.
        log: where its stderr goes.
        max_restarts: how often it is started again.
        say: called with each line for a person that comes from it.
    """

    def __init__(
        self, run: Run, log: Path, max_restarts: int, say: Callable[[str], object]
    ) -> None:
        self._command = [sys.executable, "-m", __spec__.name, str(run.folder / RUN_NAME)]
        self._log, self._restarts = log, max_restarts
        self._start()
        self._say, self._lines = say, log.open("rb")  # read to its end, also where it is removed

    def _start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the launcher
            )

    def failure(self) -> str | None:
        """Why the process failed, in one line; None if it runs, or has done its work.

        Passes on what it has said since the last call.
        """
        code = self._process.poll()
        self._pass_on()
        if code is not None and code < 0 and self._restarts:
            self._restarts -= 1
            self._start()
            return None
        if not code:
            return None
        if code < 0:
            return (
                f"the process that tokenises was ended by {signal.Signals(-code).name} again and "
                "again, perhaps for lack of memory; see its node's log"
            )
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = [line for line in lines if line.strip()][-1:]
        return "".join(last).removeprefix("error: ") or f"tokenising ended with code {code}"

    def _pass_on(self) -> None:
        """Pass on the lines for a person that it has written since the last call."""
        for line in self._lines.read().decode(errors="replace").split("\n"):
            if line.startswith(_NOTE):
                self._say(line.removeprefix(_NOTE))

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._lines.close()


@contextmanager
def tokenising(
    run: Run, log: Path, max_restarts: int, say: Callable[[str], object]
) -> Iterator[Tokenising | None]:
    """The process that tokenises while a run trains; None if all its text is tokenised. `say` is
    called with each line for a person that comes from it.
    """
    if "growing" not in run.data:
        yield None
        return
    process = Tokenising(run, log, max_restarts, say)
    try:
        yield process
    finally:
        process.end()


# --- in the process -------------------------------------------------------------------------------


def tokenise(path: Path) -> None:
    """Tokenise what the run in this file reads.

    Raises:
        DusError: any known failure.
    """
    from dus_cli.data.growing import GrowingRows
    from dus_cli.data.segments import go_on
    from dus_cli.data.streams import Prepared

    run = read_run(path)
    data, model = data_options(run), Path(run.model)
    prepared = Prepared.from_json(run.data)
    folder = run.tokens_folder
    shelf = open_shelf(data, model, folder, resolve.open_model(model).vocab_size)
    sources, _ = sources_of(data, folder, lambda line: sys.stderr.write(f"{_NOTE}{line}\n"))
    rows = GrowingRows(prepared, folder, run.seq_length, run.recipe.seed)
    go_on(shelf, sources, prepared, rows, run.num_steps * run.rows_per_step)


def _end_with_launcher() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock Python would need when it ends
    os._exit(1)


def main(arguments: list[str]) -> int:
    """The program. Its only argument is the path of run.json."""
    os.nice(_NICE)
    threading.Thread(target=_end_with_launcher, daemon=True).start()
    try:
        tokenise(Path(arguments[0]))
    except Exception as error:
        if os.environ.get("DUS_DEBUG"):
            raise
        sys.stderr.write(f"error: {explained(error)}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

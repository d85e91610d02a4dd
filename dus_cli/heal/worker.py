"""The worker: `torchrun … -m dus_cli.heal.worker OUT/run.json`, one process for each device.

It loads its part of the model, measures the losses of base and scaled model, resumes from the
newest checkpoint, trains, and writes the healed model with its team. It exits with 0 when the run
is finished; with 1 on a failure, which it writes to `failure.json` in one line; and with 128 + the
signal after a signal, once a checkpoint is saved. Under torchrun it then exits with 0, because
torchrun restarts workers that fail.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import warnings
from pathlib import Path

from dus_cli.common.unforeseen import explained
from dus_cli.errors import DusError
from dus_cli.heal.checkpoints_folder import disk_failure
from dus_cli.heal.run import FAILURE, read_run
from dus_cli.models.stopping import Signals, StopRequested, end_with_torchrun

# Errors of the disk that a restart would not fix.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def work(path: Path, signals: Signals) -> int:
    """Run a worker of the run in this file; return its exit code.

    Raises:
        DusError: any known failure.
    """
    run = read_run(path)
    if run.keeping.track != "trackio":  # it may log to a Space
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Imported here, so that an error in run.json is reported without loading torch.
    from dus_cli.heal.train.setup import set_up
    from dus_cli.models.team import joined_team

    with joined_team() as team:
        training = set_up(run, team, signals)
        try:
            if run.pilot_seconds is not None:
                training.pilot(run.pilot_seconds)
            else:
                training.go()
                training.publish()
        except StopRequested:
            if run.pilot_seconds is None:
                training.keep()
            return signals.exit_code
    return 0


def _quiet_libraries() -> None:
    """Silence the libraries' progress bars and warnings, which would only fill logs."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"torch|transformers")


def main(arguments: list[str]) -> int:
    """The program. Its only argument is the path of run.json."""
    if len(arguments) != 1:
        sys.stderr.write("error: give one run.json; see dus heal --print-command\n")
        return 2
    signals = Signals()
    end_with_torchrun()
    path = Path(arguments[0])
    failure = path.parent / FAILURE
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if (
        failure.exists()
        and json.loads(failure.read_text(encoding="utf-8")).get("launch") == launch != ""
    ):
        return 1  # torchrun restarted this worker, but the failure would repeat
    _quiet_libraries()
    try:
        return work(path, signals)
    except Exception as error:
        if os.environ.get("DUS_DEBUG") or _may_pass(error):
            raise
        is_full = isinstance(error, OSError) and not isinstance(error, DusError)
        text = (
            disk_failure(path.parent / "checkpoints", error.strerror or "")  # type: ignore[attr-defined]
            if is_full
            else explained(error)
        )
        _leave(failure, launch, text)
        sys.stderr.write(f"error: {text}\n")
        sys.stderr.flush()
        # not sys.exit: cleaning up would wait for workers that wait for this one in a collective
        os._exit(1)


def _may_pass(error: Exception) -> bool:
    """Whether a restart may help. Failures of network and devices are torch's RuntimeErrors or
    OSErrors. A missing library, a wrong config or a bug in dus would fail again.
    """
    if isinstance(error, OSError):
        return error.errno not in _OF_THE_DISK
    return isinstance(error, (RuntimeError, MemoryError)) and not isinstance(
        error, (NotImplementedError, RecursionError)
    )


def _leave(path: Path, launch: str, error: str) -> None:
    """Write failure.json for the launcher, unless another worker has written it."""
    # if this fails, stderr has the error
    with (
        contextlib.suppress(OSError),
        path.open("x", encoding="utf-8") as file,
    ):
        try:
            file.write(json.dumps({"launch": launch, "error": error}))
            file.flush()
        except OSError:  # a full disk; half a line would be worse than no file
            path.unlink()
            raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

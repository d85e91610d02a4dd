"""The worker: `torchrun … -m dus_cli.heal.worker OUT/run.json`. One of these runs for each device.

It loads its part of the model, measures base and scaled loss, goes on from the newest checkpoint,
trains, and with its team writes the healed model. It exits 0 when the run is finished; 1 on a
failure, which it leaves in one line in `failure.json`; and with 128 + the signal when one asked it
to stop and a checkpoint is saved, under torchrun with 0, because torchrun starts again what failed.
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

# What a disk does that no restart mends.
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def work(path: Path, signals: Signals) -> int:
    """Be a worker of the run in this file; the exit code.

    Raises:
        DusError: any known failure.
    """
    run = read_run(path)
    # Imported here: a known failure that torchrun restarts is told again without loading torch
    # first.
    from dus_cli.heal.train.setup import set_up
    from dus_cli.models.team import gathered

    with gathered() as team:
        training = set_up(run, team, signals)
        try:
            training.go()
            training.publish()
        except StopRequested:
            training.keep()
            return signals.exit_code
    return 0


def _quiet_libraries() -> None:
    """Their progress bars and advice have no reader here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
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
        return 1  # torchrun restarts workers, a known failure stays what it is
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
        # others may wait for this worker in a collective: no clean-up that waits for them
        os._exit(1)


def _may_pass(error: Exception) -> bool:
    """Whether a restart may help: the network's failures and a device's are RuntimeErrors of torch,
    or OSErrors.

    A library that is missing, a config that is wrong and a fault of dus stay what they are.
    """
    if isinstance(error, OSError):
        return error.errno not in _OF_THE_DISK
    return isinstance(error, (RuntimeError, MemoryError)) and not isinstance(
        error, (NotImplementedError, RecursionError)
    )


def _leave(path: Path, launch: str, error: str) -> None:
    """Leave a failure for the launcher; the first one counts."""
    # stderr has it in any case
    with (
        contextlib.suppress(OSError),
        path.open("x", encoding="utf-8") as file,
    ):
        try:
            file.write(json.dumps({"launch": launch, "error": error}))
            file.flush()
        except OSError:  # a full disk: half a line would be worse than none
            path.unlink()
            raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

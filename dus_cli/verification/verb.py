"""The verb verify: read an output, run every check, and collect the findings."""

from __future__ import annotations

from pathlib import Path

from dus_cli.progress import NoProgress, Progress
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.source.incomplete import check_whole
from dus_cli.verification.checks import CHECKS, Request
from dus_cli.verification.options import VerifyOptions
from dus_cli.verification.output import read_output
from dus_cli.verification.report import Verification


def verify(
    folder: Path,
    base: Checkpoint | None = None,
    options: VerifyOptions | None = None,
    *,
    deep: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint and collect every problem.

    Checks every header, the index against the headers, and the config against the tensors; then
    runs `CHECKS`: with dus.json, copies of a layer are compared byte by byte; with `base`, every
    tensor with its source, and the config with the base's; with SHA256SUMS, every file's sum.

    Args:
        folder: the checkpoint.
        base: the open base, or None; `options.base` is ignored.
        options: engines, and how bytes are read.
        deep: read data, to compare copies of layers and to sum files.
        progress: receives the progress.

    Raises:
        CheckpointError: a run is writing the folder in place, or left it half-written.
    """
    check_whole(folder)
    request = Request(
        options=options or VerifyOptions(),
        base=base,
        deep=deep,
        progress=progress or NoProgress(),
    )
    output, finding = read_output(folder)
    findings = [finding, *(check(output, request) for check in CHECKS)]
    return Verification(
        str(folder),
        problems=[problem for one in findings for problem in one.problems],
        warnings=[warning for one in findings for warning in one.warnings],
        num_tensors=len(output.tensors),
        num_parameters=output.num_parameters,
        num_layers=None if output.decoder is None else output.decoder.num_layers,
        bytes_compared=sum(one.bytes_compared for one in findings),
        bytes_shared=sum(one.bytes_shared for one in findings),
        files_summed=sum(one.files_summed for one in findings),
        engines=[engine for one in findings for engine in one.engines],
        forward=next((one.forward for one in findings if one.forward is not None), None),
    )

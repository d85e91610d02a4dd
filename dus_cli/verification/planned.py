"""An output checked against its plan."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from enum import Enum
from pathlib import Path

from dus_cli.errors import DusError, VerificationError, shown, shown_list
from dus_cli.pictures.layer_map import PICTURES
from dus_cli.planning.layout import ShardLayout
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.scaling import Scale
from dus_cli.planning.treatment import Making
from dus_cli.progress import Progress
from dus_cli.release import card, lineage
from dus_cli.source.headers import TensorInfo, read_header
from dus_cli.verification.compare import Comparison, Place, compare
from dus_cli.verification.origin import Origin
from dus_cli.writing.staging import staged_files


class VerifyMode(str, Enum):
    """What `dus upscale` checks before it publishes."""

    none = "none"
    structure = "structure"
    full = "full"
    forward = "forward"


# --- before publishing: against the plan -------------------------------------------------------


def check_against_plan(plan: UpscalePlan, folder: Path, held: Container[str] = ()) -> None:
    """Headers, sizes, index and config of what was written, against what was planned. Reads no
    data.

    `held` are files that will be written, and read back, later.

    Raises:
        VerificationError: the first difference.
    """
    for name, layout in plan.shards.items():
        _check_shard(folder / name, name, layout)
    for name, text in plan.text_files().items():
        if name not in held and (folder / name).read_text(encoding="utf-8") != text:
            raise VerificationError(
                f"{name} is not what was planned; the disk or the file system failed"
            )
    records = (card.NAME, *PICTURES, lineage.NAME)  # their text may be edited later
    expected = {*plan.shards, *plan.text_files(), *records, *(name for name, _ in plan.files)}
    missing = sorted(name for name in expected - set(staged_files(folder)) if name not in held)
    if missing:
        raise VerificationError(
            f"{shown_list(missing)} was written and is gone; does something clean this folder?"
        )


def _check_shard(path: Path, name: str, layout: ShardLayout) -> None:
    try:
        header = read_header(path, name)
    except DusError as error:
        raise VerificationError(f"written shard is unsound: {error}") from error
    written = [(t.name, t.dtype, t.shape, t.start) for t in header.tensors if t.num_bytes]
    planned = [
        (p.name, p.dtype, p.tensor.shape, start) for p, start in layout.positions() if p.num_bytes
    ]
    if (
        written != planned
        or header.end != layout.num_bytes
        or len(header.tensors) != len(layout.placements)
    ):
        raise VerificationError(
            f"{name} is not what was planned; the disk or the file system failed"
        )


def check_bytes_against_plan(
    plan: UpscalePlan, folder: Path, jobs: int, on_bytes: Callable[[int], object]
) -> None:
    """Every byte that was written, against its source; where that is no file here, against the
    first of its twins.

    Raises:
        VerificationError: the first difference.
    """

    def comparisons() -> Iterator[Comparison]:
        first: dict[tuple[str, Scale | None], Place] = {}
        for name, layout in plan.shards.items():
            for placement, start in layout.positions():
                shape, end = placement.tensor.shape, start + placement.num_bytes
                written = Place(
                    folder / name, TensorInfo(placement.name, placement.dtype, shape, start, end)
                )
                is_here = placement.shard.fingerprint is not None
                if is_here or placement.making is Making.zeros:  # zeros have no need of a file
                    source = Place(
                        placement.shard.path if is_here else written.path, placement.tensor
                    )
                    making, scale = placement.making, placement.scale
                    yield Comparison(written, source, "its source", making, placement.dtype, scale)
                elif (
                    twin := first.setdefault((placement.tensor.name, placement.scale), written)
                ) is not written:
                    yield Comparison(written, twin, f"its twin {shown(twin.tensor.name)}")

    for problem in compare(comparisons(), jobs, on_bytes):
        raise VerificationError(f"{problem}; the disk or its driver failed, nothing was published")


def check_forward(plan: UpscalePlan, folder: Path, progress: Progress) -> None:
    """What was written, run beside the base's layers on a short text.

    Raises:
        VerificationError: a layer of it computes something else, or it cannot be compared.
        LoadError, ProbeError: transformers does not load or run one of the two.
    """
    from dus_cli.verification.forward import run_forward

    origin = Origin(plan.checkpoint, plan.layer_map, plan.treatment, dict(plan.request.assume))
    found = run_forward(folder, origin, (), progress)
    if found.problems:
        raise VerificationError(f"{found.problems[0]}; nothing was published")

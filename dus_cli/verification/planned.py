"""Check an output against its plan, before it is published."""

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
from dus_cli.verification.origin import OutputOrigin
from dus_cli.writing.staging import staged_files


class VerifyMode(str, Enum):
    """What `dus upscale` checks before it publishes."""

    none = "none"
    structure = "structure"
    full = "full"
    forward = "forward"


def check_against_plan(plan: UpscalePlan, folder: Path, held: Container[str] = ()) -> None:
    """Check that headers, sizes, index and config were written as planned. Reads no tensor data.

    `held` names files that are written, and read back, later.

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
    records = (card.NAME, *PICTURES, lineage.NAME)  # must exist, but may have been edited since
    expected = {*plan.shards, *plan.text_files(), *records, *(name for name, _ in plan.files)}
    missing = sorted(name for name in expected - set(staged_files(folder)) if name not in held)
    if missing:
        raise VerificationError(
            f"{shown_list(missing)} was written and has vanished; let nothing clean this folder"
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
        or len(header.tensors) != layout.num_tensors
    ):
        raise VerificationError(
            f"{name} is not what was planned; the disk or the file system failed"
        )


def check_bytes_against_plan(
    plan: UpscalePlan, folder: Path, jobs: int, on_bytes: Callable[[int], object]
) -> None:
    """Compare every byte that was written with its source; if that is not on this machine, compare
    the tensor's copies with the first of them.

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
                if is_here or placement.making is Making.zeros:  # zeros need no source
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
    """Run what was written on a short text, and compare it with the base's layers.

    Raises:
        VerificationError: a layer computes something else than the base's, or they cannot be
            compared.
        LoadError, ProbeError: transformers cannot load or run one of the models.
    """
    from dus_cli.verification.forward import run_forward

    origin = OutputOrigin(
        plan.checkpoint, plan.layer_map, plan.treatment, dict(plan.request.assume)
    )
    forward = run_forward(folder, origin, (), progress)
    if forward.problems:
        raise VerificationError(f"{forward.problems[0]}; nothing was published")

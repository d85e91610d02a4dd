"""The held-out text of --data: the same documents for every model, read again for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dus_cli.common.reports import public, shown_address
from dus_cli.data.documents import BadLine, ReadCounts, documents
from dus_cli.data.sources import Source, Unread, parse_sources
from dus_cli.errors import DataError
from dus_cli.evaluation.options import TextOptions

# Characters tokenised at a time: enough for every core.
_BATCH = 1 << 20


@dataclass(frozen=True)
class EvaluationText:
    """The files, how documents are found in them, and the most documents to read."""

    sources: tuple[Source, ...]
    text_field: str = "text"
    on_bad_line: BadLine = BadLine.error
    max_documents: int | None = None

    @property
    def name(self) -> str:
        """The text's name in a card: names of files, or the argument that matched several."""
        return ", ".join(
            source.paths[0].name if len(source.paths) == 1 else public(source.text)
            for source in self.sources
        )

    @property
    def unread(self) -> Unread:
        return sum((source.unread for source in self.sources), Unread())

    @property
    def num_file_bytes(self) -> int:
        return sum(path.stat().st_size for source in self.sources for path in source.paths)

    def batches(
        self, skipped: dict[str, int], on_bytes: Callable[[int], object]
    ) -> Iterator[list[str]]:
        """The documents in order, in batches. `on_bytes` is called with the bytes read since the
        last call. Lines and documents left out are counted in `skipped`, by reason.
        """
        batch: list[str] = []
        size = 0
        for text in self._documents(skipped, on_bytes):
            batch.append(text)
            size += len(text)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _documents(
        self, skipped: dict[str, int], on_bytes: Callable[[int], object]
    ) -> Iterator[str]:
        count = 0
        for path in (path for source in self.sources for path in source.paths):
            counts, position, size = ReadCounts(skipped=skipped), 0, path.stat().st_size
            for text in documents(path, self.text_field, self.on_bad_line, counts):
                yield text
                reached = min(counts.position, size)
                on_bytes(reached - position)
                position = reached
                count += 1
                if count == self.max_documents:
                    return
            on_bytes(size - position)


def open_text(
    options: TextOptions, spool: Path, say: Callable[[str], object] = lambda _: None
) -> EvaluationText:
    """The text of `--data`. Standard input is copied to the folder `spool`, because every model
    reads it. `say` is called with a line for a person if a store does not answer and is tried
    again.

    Raises:
        DataError: there are no files or no text in them, or a file has a weight.
    """
    sources = parse_sources(options.data, spool, options.text_field, say=say)
    for source in sources:
        if source.weight is not None:
            raise DataError(
                f"{shown_address(source.text)} has a weight, but every document counts once; leave "
                "out the weight"
            )
    return EvaluationText(sources, options.text_field, options.on_bad_line, options.max_documents)

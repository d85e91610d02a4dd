"""The held-out text: documents out of --data, the same ones for every model, read anew for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dus_cli.common.reports import public
from dus_cli.data.documents import BadLine, ReadCounts, documents
from dus_cli.data.sources import Source, Unread, parse_sources
from dus_cli.errors import DataError, shown
from dus_cli.evaluation.options import TextOptions

# Text tokenised at a time (characters): enough for every core.
_BATCH = 1 << 20


@dataclass(frozen=True)
class Text:
    """The files, how documents are found in them, and how many are read at most."""

    sources: tuple[Source, ...]
    text_field: str = "text"
    on_bad_line: BadLine = BadLine.error
    max_documents: int | None = None

    @property
    def name(self) -> str:
        """What it is called in a card: the names of the files, or of the argument that found
        many.
        """
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
        """The documents in order, some at a time; `on_bytes` is told how many bytes of the files
        were read.

        What is left out is counted in `skipped`, by reason.
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
            tally, position, size = ReadCounts(skipped=skipped), 0, path.stat().st_size
            for text in documents(path, self.text_field, self.on_bad_line, tally):
                yield text
                reached = min(tally.position, size)
                on_bytes(reached - position)
                position = reached
                count += 1
                if count == self.max_documents:
                    return
            on_bytes(size - position)


def open_text(options: TextOptions, spool: Path) -> Text:
    """The text behind `--data`. Standard input is kept in the folder `spool`, for every model reads
    it.

    Raises:
        DataError: nothing there, nothing that is text, or weights, which are for training.
    """
    sources = parse_sources(options.data, spool, options.text_field)
    for source in sources:
        if source.weight is not None:
            raise DataError(
                f"{shown(source.text)} has a weight, and every document counts once; leave out "
                "the weight"
            )
    return Text(sources, options.text_field, options.on_bad_line, options.max_documents)

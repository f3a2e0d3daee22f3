"""Text to train and evaluate on, read again from any document: from a list, a file or a hub data set.

- `.txt` (or `.txt.gz`): one document a line, empty lines left out;
- `.jsonl` or `.ndjson` (or `.gz` of it): one JSON object a line with the document in a field, or a JSON string a line;
- anything else: the name of a hub data set, streamed; `name:config` chooses its configuration.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from sae._files import parse_json
from sae._hub import hub_data_set
from sae.errors import UserError, near_paths

FIELDS = ("text", "content", "document", "story", "sentence")
"""Fields looked at, in this order, when none is given."""
JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Ends of the names of files whose lines are JSON."""
LONGEST_LINE = 2**24
"""Characters of a line; a packed file of a few kilobytes may hold a line of gigabytes."""
SAMPLES, SAMPLE_BYTES = 64, 2**16
"""Of a file, for its fingerprint: all of it up to four megabytes."""


@dataclass(frozen=True)
class TextSource:
    """Documents that can be iterated from the beginning any number of times."""

    name: str
    """Path, hub name, or a digest of the documents given; identifies the text in configs and caches."""
    documents: Sequence[str] | None = field(default=None, repr=False)
    """The documents themselves, where they were given."""
    text_field: str | None = None
    """Field of a record that holds the document; None takes the first known one."""
    digest: str | None = None
    """Fingerprint, where it is known without reading the text."""

    @classmethod
    def of(cls, texts: TextSource | str | Path | Iterable[str], *, text_field: str | None = None) -> TextSource:
        """From a path or hub name, or from documents."""
        if isinstance(texts, TextSource):
            return texts
        if isinstance(texts, str | Path):
            return cls(str(texts), text_field=text_field)
        documents = list(texts)
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()[:16]
        return cls(f"{len(documents)} documents, {digest}", documents=documents)

    @property
    def fingerprint(self) -> str:
        """Hash of a file's size and samples, which no path changes; else the name, and the field if one was given."""
        path = Path(self.name)
        if self.digest is not None or self.documents is not None or not path.is_file():
            return self.digest or (self.name if self.text_field is None else f"{self.name} {self.text_field}")
        size, digest = path.stat().st_size, hashlib.sha256()
        digest.update(f"{size} {self.text_field}".encode())
        with path.open("rb") as data:
            for i in range(SAMPLES):
                data.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
        return digest.hexdigest()[:16]

    def read(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on, without empty ones; numbering counts what is yielded."""
        if self.documents is not None:
            return islice(filter(str.strip, self.documents), start, None)
        path = Path(self.name)
        if path.is_file():
            return islice(self._read_file(path), start, None)
        if path.exists() and not path.is_dir():
            raise UserError(f"text {self.name!r} is a pipe or device, and text is read more than once: make it a file")
        if path.is_dir() or path.suffix in (".txt", ".gz", *JSON_LINES):
            raise UserError(
                f"no text file {self.name!r}: allowed are a .txt or .jsonl file (or .gz of it) or a hub data set"
                f"{near_paths(path)}"
            )
        return islice(self._read_hub(), start, None)

    def _read_file(self, path: Path) -> Iterator[str]:
        kinds = {suffix.lower() for suffix in path.suffixes}
        if table := sorted(kinds & {".csv", ".tsv"}):
            raise UserError(f"text {self.name!r} is a table ({table[0]}): write its documents to a .txt or .jsonl file")
        is_json = not kinds.isdisjoint(JSON_LINES)
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            document = self._parse(line, f"{path}, line {number}") if is_json else line.rstrip("\n")
            if document.strip():
                yield document

    def _parse(self, line: str, where: str) -> str:
        document = self._document(parse_json(line, where), where)
        if not document.isascii() and any("\ud800" <= char <= "\udfff" for char in document):
            raise UserError(f"{where}: the text holds half of a surrogate pair, which is no character")
        return document

    def _document(self, record: Any, where: str) -> str:
        """The document of a record: itself, or the text field."""
        if isinstance(record, str):
            return record
        names = FIELDS if self.text_field is None else (self.text_field,)
        name = next((name for name in names if isinstance(record, dict) and isinstance(record.get(name), str)), None)
        if name is None:
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{where}: no text: looked for the field {' or '.join(names)}, found {has}")
        return record[name]

    def _read_hub(self) -> Iterator[str]:
        name, _, configuration = self.name.partition(":")
        try:
            records = hub_data_set(name, configuration or None, split="train", streaming=True)
        except Exception as error:  # datasets raises many kinds for a name it cannot resolve
            raise UserError(
                f"no text {self.name!r}: neither a file nor a hub data set that can be loaded ({error})"
            ) from error
        for number, record in enumerate(records):
            document = self._document(record, f"{self.name}, record {number}")
            if document.strip():
                yield document


def read_texts(texts: TextSource | str | Path | Iterable[str]) -> Iterator[str]:
    """The documents of a file or a hub data set, or those given, which may be endless."""
    return TextSource.of(texts).read() if isinstance(texts, TextSource | str | Path) else iter(texts)


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, unpacked where its name ends in .gz."""
    opener = gzip.open if path.suffix == ".gz" else Path.open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            number = 0
            while line := lines.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{path}, line {number} has more than {LONGEST_LINE:,} characters: give a document a line"
                    )
                yield line
    except PermissionError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from None

"""Text or token ids from files, as sequences a model can be measured on."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyruntime.errors import InvalidInput

SUFFIXES = (".txt", ".py", ".md", ".jsonl")


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token sequences, each of at least two tokens: the first of a sequence has no prediction."""

    sequences: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    @property
    def sha256(self) -> str:
        """Digest, in hex, of the token ids and where the sequences end."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(array("q", [len(sequence), *sequence]).tobytes())
        return digest.hexdigest()


def read_corpus(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Encoder | None,
    *,
    vocab_size: int,
    length: int,
    limit: int | None = None,
) -> Corpus:
    """The documents of files and folders, cut into consecutive pieces of at most `length` tokens.

    A folder stands for every .txt, .py, .md and .jsonl file below it, in order of their paths. A
    line of a .jsonl file is an object with "text" or with "token_ids". Of more than `limit` tokens,
    about that many are taken, in pieces spread evenly over the whole.

    Raises:
        InvalidInput: a path, file, line or token that cannot be used, by name; or nothing is left.
    """
    if length < 2:
        raise InvalidInput(f"sequence length must be at least 2, got {length}")
    if limit is not None and limit < 2:
        raise InvalidInput(f"the number of tokens must be at least 2, got {limit}")
    pieces: list[list[int]] = []
    for file in _files(paths):
        for ids in _documents(file, tokenizer, vocab_size):
            pieces += [ids[i : i + length] for i in range(0, len(ids) - 1, length)]
    if not pieces:
        names = ", ".join(map(str, paths))
        raise InvalidInput(f"{names}: no document of at least two tokens")
    total = sum(map(len, pieces))
    if limit is not None and total > limit:
        count = max(1, round(limit * len(pieces) / total))
        pieces = [pieces[i * len(pieces) // count] for i in range(count)]
    return Corpus(pieces)


def _files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise InvalidInput(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
            yield from inside
        elif not path.is_file():
            raise InvalidInput(f"{path}: no such file or folder")
        elif path.suffix not in SUFFIXES:
            raise InvalidInput(f"{path}: expected one of {', '.join(SUFFIXES)}")
        else:
            yield path


def _documents(path: Path, tokenizer: Encoder | None, vocab_size: int) -> Iterator[list[int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path}: not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    if path.suffix != ".jsonl":
        if text:
            yield _encode(text, tokenizer, str(path))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _line(line, tokenizer, vocab_size, f"{path}:{number}")


def _line(line: str, tokenizer: Encoder | None, vocab_size: int, where: str) -> list[int]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidInput(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict) or ("text" in record) == ("token_ids" in record):
        raise InvalidInput(f'{where}: expected an object with either "text" or "token_ids"')
    if "text" in record:
        if not isinstance(record["text"], str):
            raise InvalidInput(f'{where}: "text" must be a string')
        return _encode(record["text"], tokenizer, where) if record["text"] else []
    ids = record["token_ids"]
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise InvalidInput(f'{where}: "token_ids" must be a list of integers')
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidInput(f"{where}: token {token} is outside the vocabulary of {vocab_size}")
    return ids


def _encode(text: str, tokenizer: Encoder | None, where: str) -> list[int]:
    if tokenizer is None:
        raise InvalidInput(
            f'{where}: this model has no tokenizer; give .jsonl lines with "token_ids"'
        )
    return tokenizer.encode(text)

"""What `--data` accepts, and what it says about what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyruntime.errors import InvalidInput
from pyruntime.profile.data import Corpus, read_corpus


class Letters:
    """One token per byte, after a first one for the start."""

    def encode(self, text: str) -> list[int]:
        return [1, *(3 + byte for byte in text.encode())]


def read(*paths: Path, length: int = 8, limit: int | None = None, ids: bool = False) -> Corpus:
    tokenizer = None if ids else Letters()
    return read_corpus(paths, tokenizer, vocab_size=300, length=length, limit=limit)


def test_documents_become_pieces_and_single_tokens_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 8)  # 9 tokens: the ninth predicts nothing
    (tmp_path / "b.txt").write_text("y" * 9)
    corpus = read(tmp_path)
    assert [len(s) for s in corpus.sequences] == [8, 8, 2]
    assert corpus.tokens == 18


def test_folders_are_read_in_order_whatever_lies_beside(tmp_path: Path) -> None:
    for name in ("b/z.py", "a.md", "image.png", "b/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(
            '{"text": "j"}\n\n{"token_ids": [7, 8]}\n' if "j" in name else name
        )
    corpus = read(tmp_path, length=100)
    start = [Letters().encode(text) for text in ("a.md", "j")]
    assert corpus.sequences == [*start, [7, 8], Letters().encode("b/z.py")]


def test_a_limit_takes_pieces_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text(
        "\n".join(json.dumps({"token_ids": [n] * 8}) for n in range(100))
    )
    corpus = read(tmp_path, limit=80, ids=True)
    assert [s[0] for s in corpus.sequences] == list(range(0, 100, 10))


def test_the_digest_is_of_tokens_and_boundaries() -> None:
    assert Corpus([[1, 2], [3, 4]]).sha256 == Corpus([[1, 2], [3, 4]]).sha256
    assert Corpus([[1, 2], [3, 4]]).sha256 != Corpus([[1, 2, 3, 4]]).sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"x", r"t\.csv: expected one of \.txt"),
        ("t.txt", b"", "no document of at least two tokens"),
        ("t.txt", b"ab\xff", "not UTF-8.*byte 2"),
        ("t.jsonl", b'{"text": "a"}\n{', r"t\.jsonl:2: not JSON"),
        ("t.jsonl", b"[1]", "either"),
        ("t.jsonl", b'{"text": "a", "token_ids": [1]}', "either"),
        ("t.jsonl", b'{"text": 1}', "must be a string"),
        ("t.jsonl", b'{"token_ids": [1, true]}', "list of integers"),
        ("t.jsonl", b'{"token_ids": [1, 300]}', "token 300 is outside the vocabulary of 300"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        read(tmp_path / name)


def test_missing_empty_and_too_short(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no such file"):
        read(tmp_path / "none")
    with pytest.raises(InvalidInput, match="the folder holds no"):
        read(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(InvalidInput, match="no tokenizer; give"):
        read(tmp_path, ids=True)
    with pytest.raises(InvalidInput, match="length must be at least 2"):
        read(tmp_path, length=1)
    with pytest.raises(InvalidInput, match="number of tokens"):
        read(tmp_path, limit=0)

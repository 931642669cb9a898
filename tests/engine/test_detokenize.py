from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.engine.detokenize import TextStream
from pyruntime.engine.tokenizer import Tokenizer, load_tokenizer
from tests.engine.fakes import EOS, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    loaded = load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("bytes")))
    assert loaded is not None
    return loaded


def pieces(stream: TextStream, data: bytes) -> list[str]:
    out = []
    for byte in data:
        out.append(stream.push(byte))
        if stream.stopped is not None:
            return out
    return [*out, stream.flush()]


@given(st.text(max_size=30))
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    out = pieces(stream, text.encode())
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in out)
        assert "".join(out) == text == stream.text


def test_a_character_comes_out_when_it_is_complete(tokenizer: Tokenizer) -> None:
    assert pieces(TextStream(tokenizer), "a€b".encode()) == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end_is_not_shown(tokenizer: Tokenizer) -> None:
    assert "".join(pieces(TextStream(tokenizer), "né€".encode()[:-1])) == "né"


@given(st.binary(max_size=60))
def test_noise_neither_fails_nor_is_held_for_ever(tokenizer: Tokenizer, data: bytes) -> None:
    stream = TextStream(tokenizer)
    pieces(stream, data)
    assert stream.text.rstrip("\ufffd") == data.decode(errors="replace").rstrip("\ufffd")
    assert len(stream._detokenizer._window) <= 20  # type: ignore[union-attr]


texts = st.text(alphabet="abE€", max_size=25)
stops = st.lists(st.text(alphabet="abE€", min_size=1, max_size=4), min_size=1, max_size=3)


@given(texts, stops)
def test_stop_strings_cut_the_text_and_never_leak(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    stream = TextStream(tokenizer, stops)
    shown = ""
    for piece in pieces(stream, text.encode()):
        shown += piece
        assert not any(stop in shown for stop in stops)
    # The specification: after the first byte that completes a stop, the earliest stop wins.
    for end in range(len(text) + 1):
        hits = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if hits:
            assert stream.stopped in stops
            assert shown == text[: min(hits)] == stream.text
            return
    assert stream.stopped is None and shown == text


def test_only_a_possible_stop_is_held_back(tokenizer: Tokenizer) -> None:
    assert pieces(TextStream(tokenizer, ["END"]), b"aENEx") == ["a", "", "", "EN", "Ex", ""]


def test_special_tokens_show_nothing(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(t) for t in (97, EOS, 98)] == ["a", "", "b"]


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    stream = TextStream(None)
    assert stream.push(1) == stream.flush() == stream.text == ""

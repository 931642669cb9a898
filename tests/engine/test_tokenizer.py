from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from pyruntime.engine.tokenizer import Tokenizer, load_tokenizer
from pyruntime.errors import FormatError, InvalidInput, Unavailable
from tests.engine.fakes import ECHO, write_tokenizer


def load(folder: Path, template: str | None = "echo") -> Tokenizer:
    tokenizer = load_tokenizer(write_tokenizer(folder, template))
    assert tokenizer is not None
    return tokenizer


def test_text_round_trip(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    assert tokenizer.encode("hé") == list("hé".encode())
    assert tokenizer.decode(list("hé".encode())) == "hé"


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    ids = load(tmp_path).encode_chat([{"role": "user", "content": "hi"}])
    assert ids == [*b"hi", ECHO]


def test_the_template_file_wins_and_sees_the_special_tokens(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{{ messages | tojson }}\n{%- for m in messages %}{% break %}{% endfor %}"
    )
    text = tokenizer.render_chat([{"role": "user", "content": "<é>"}])
    assert text == '<|bos|>[{"role": "user", "content": "<é>"}]'


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    tokenizer = load(tmp_path)
    config = {"chat_template": [{"name": "rag", "template": "no"},
                                {"name": "default", "template": "yes"}]}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.render_chat([]) == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].absent.field }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 if messages else 0 }}",
    ],
)
def test_a_template_cannot_do_harm(tmp_path: Path, template: str) -> None:
    with pytest.raises(InvalidInput, match="messages: the chat template refuses them"):
        load(tmp_path, template).render_chat([{"role": "user", "content": "x"}])


def test_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no chat template"):
        load(tmp_path, None).render_chat([])
    with pytest.raises(FormatError, match="chat template, line 1"):
        load(tmp_path, "{% for %}").render_chat([])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer\.json: not readable as JSON"):
        Tokenizer(tmp_path).encode("x")


def test_a_missing_package_is_named_at_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load(tmp_path)
    real = builtins.__import__

    def block(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("tokenizers", "jinja2"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", block)
    with pytest.raises(Unavailable, match="pip install tokenizers"):
        tokenizer.encode("x")
    with pytest.raises(Unavailable, match="pip install jinja2"):
        tokenizer.render_chat([])

"""The only module that needs `tokenizers` and `jinja2`: text and chats to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyruntime.errors import FormatError, InvalidInput, Unavailable

if TYPE_CHECKING:
    import jinja2
    import tokenizers

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """tokenizer.json of a model folder, with its chat template if it has one.

    The packages are imported at first use, so token-id prompts need neither.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / "tokenizer.json"

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; `special_tokens` adds those the tokenizer puts around a text (e.g. BOS)."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; an incomplete character shows as U+FFFD."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a chat, ready for the assistant's turn. Raises InvalidInput."""
        if self._template is None:
            raise InvalidInput("messages: this model has no chat template; send a prompt instead")
        import jinja2

        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidInput(f"messages: the chat template refuses them: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a chat; the template writes the special tokens itself."""
        return self.encode(self.render_chat(messages), special_tokens=False)

    @cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        try:
            import tokenizers
        except ImportError as error:
            raise Unavailable(
                "text prompts need the package `tokenizers` (pip install tokenizers); "
                "token-id prompts work without it"
            ) from error
        # The package raises a bare Exception for a file it cannot parse; parse the JSON ourselves
        # first so that a damaged file is told apart from an unsupported one.
        _read_json(self._file)
        return tokenizers.Tokenizer.from_file(str(self._file))

    @cached_property
    def _config(self) -> dict[str, Any]:
        path = self._folder / "tokenizer_config.json"
        return _read_json(path) if path.exists() else {}

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        tokens: dict[str, str] = {}
        for name in _SPECIAL_NAMES:
            value = self._config.get(name)
            if isinstance(value, Mapping):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
        return tokens

    @cached_property
    def _template_source(self) -> str | None:
        path = self._folder / "chat_template.jinja"
        if path.exists():
            return path.read_text(encoding="utf-8")
        source = self._config.get("chat_template")
        if isinstance(source, list):  # named templates; "default" is the one for plain chats
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default")
        return source if isinstance(source, str) else None

    @cached_property
    def _template(self) -> jinja2.Template | None:
        if self._template_source is None:
            return None
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise Unavailable(
                "chats need the package `jinja2` (pip install jinja2); prompts work without it"
            ) from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self._template_source)
        except jinja2.TemplateSyntaxError as error:
            raise FormatError(
                f"{self._folder}: chat template, line {error.lineno}: {error}"
            ) from error


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None when the folder has no tokenizer.json."""
    folder = Path(folder)
    return Tokenizer(folder) if (folder / "tokenizer.json").exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _tojson(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes HTML characters, which are ordinary text in a prompt.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)

"""config.json of a Hugging Face folder, read strictly: what we cannot run is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pyruntime.errors import ConversionError, FormatError, UnsupportedModel
from pyruntime.format.convert.rope import read_rope
from pyruntime.format.spec import DecoderSpec
from pyruntime.format.spec.decoder import Family


class Config:
    """The keys of config.json; problems are collected so that all are reported at once.

    `notes` are what the user should know of a conversion that succeeds.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        self.data = _read(self.path)
        generation = folder / "generation_config.json"
        self._generation = _read(generation) if generation.is_file() else {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; no default means that the key is required."""
        value = self.data.get(key)
        if value is None:
            value = default
        if type(value) is not int or value < 1:
            self.problems.append(f"{key} must be a positive integer, is {value!r}")
            return 1
        return value

    def number(self, key: str, default: float) -> float:
        """A number of either kind."""
        value = self.data.get(key, default)
        return self._finite(key, value, default)

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self.problems.append(f"{key} must be true or false, is {value!r}")
            return default
        return value

    def require(self, key: str, *accepted: object) -> None:
        """Refuse a value that changes the mathematics into one that is not implemented."""
        value = self.data.get(key)
        if value is not None and value not in accepted:
            names = " or ".join(map(repr, accepted)) or "absent"
            self.problems.append(f"{key} {value!r} is not implemented (must be {names})")

    def one_of(self, keys: tuple[str, ...], default: int | None = None) -> int:
        """A positive integer that families name differently; names that disagree are a problem."""
        given = {key: self.data[key] for key in keys if self.data.get(key) is not None}
        if len(set(map(repr, given.values()))) > 1:
            text = ", ".join(f"{key} is {value!r}" for key, value in given.items())
            self.problems.append(f"{text}: they must agree")
        return self.integer(next(iter(given), keys[0]), default)

    def layers(self, key: str, limit: int) -> tuple[int, ...]:
        """A list of layers below `limit`; empty when absent."""
        value = self.data.get(key) or []
        if not isinstance(value, list) or any(type(n) is not int for n in value):
            self.problems.append(f"{key} must be a list of layers, is {value!r}")
            return ()
        return tuple(n for n in value if 0 <= n < limit)

    def windows(self) -> dict[str, Any]:
        """DecoderSpec fields of a `sliding_window` in every layer; none when it hides nothing."""
        if self.data.get("sliding_window") is None:
            return {}
        window = self.integer("sliding_window")
        if window >= self.integer("max_position_embeddings"):
            return {}
        return {"window": window, "window_layers": tuple(range(self.integer("num_hidden_layers")))}

    def decoder(
        self,
        family: Family,
        *,
        qkv_bias: bool,
        o_bias: bool,
        theta: float = 10000.0,
        eps: float = 1e-6,
        full_attention: bool = True,
        quantized: bool = False,
        **fields: Any,
    ) -> DecoderSpec:
        """The decoder that this file describes; its dtype is decided later, from the weights.

        `theta` and `eps` are the family's defaults. `full_attention` and `quantized` say that the
        family has looked at its windows and its quantisation itself. `fields` are those of
        DecoderSpec, where they are not what the usual keys say.

        Raises:
            UnsupportedModel: every key that is missing, malformed or asks for too much.
        """
        self.require("hidden_act", "silu")
        if not quantized:
            self.require("quantization_config")
        self.require("partial_rotary_factor", 1, 1.0)
        # `sliding_window` itself may be set: without this flag it has no effect.
        self.require("use_sliding_window", False)
        kinds = (self.data.get("layer_types") or []) if full_attention else []
        for kind in sorted({str(kind) for kind in kinds} - {"full_attention"}):
            self.problems.append(f"layer_types {kind!r} is not implemented (full_attention is)")
        heads = self.integer("num_attention_heads")
        hidden = self.integer("hidden_size")
        limit = self.integer("max_position_embeddings")
        rope = read_rope(self.data, theta, limit, self.problems)
        self.notes += rope.notes
        values: dict[str, Any] = {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden,
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", max(hidden // heads, 1)),
            "intermediate_size": self.integer("intermediate_size"),
            "max_positions": rope.max_positions,
            "norm_eps": self.number("rms_norm_eps", eps),
            "rope_theta": rope.theta,
            "rope_scaling": rope.scaling,
            "tie_embeddings": self.flag("tie_word_embeddings"),
            "qkv_bias": qkv_bias,
            "o_bias": o_bias,
            "mlp_bias": False,
            "qk_norm": False,
            "bos_token_id": self.token("bos_token_id"),
            "eos_token_ids": self.eos(),
            "pad_token_id": self.token("pad_token_id"),
            "dtype": "float32",
        }
        if not self.problems:
            try:
                return DecoderSpec(source_family=family, **{**values, **fields})
            except FormatError as error:
                self.problems.append(str(error))
        raise UnsupportedModel("\n".join(f"{self.path}: {text}" for text in self.problems))

    def _finite(self, key: str, value: object, default: float) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value)):  # type: ignore[arg-type]
            self.problems.append(f"{key} must be a number, is {value!r}")
            return default
        return float(value)  # type: ignore[arg-type]

    def eos(self) -> tuple[int, ...]:
        """End tokens of both files: chat models name the end of a turn only in the second."""
        found = self._tokens("eos_token_id", self.data)
        found += self._tokens("eos_token_id", self._generation)
        return tuple(dict.fromkeys(found))

    def token(self, key: str) -> int | None:
        """The first token of a key that holds one, several or none."""
        return next(iter(self._tokens(key, self.data)), None)

    def _tokens(self, key: str, data: dict[str, Any]) -> list[int]:
        value = data.get(key)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int for token in tokens):
            self.problems.append(f"{key} must be a token id or a list of them, is {value!r}")
            return []
        # -1 is how some exporters write "none".
        return [token for token in tokens if token >= 0]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConversionError(f"{path}: expected an object, is {type(data).__name__}")
    return data

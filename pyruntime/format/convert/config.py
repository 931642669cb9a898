"""config.json of a Hugging Face folder, read strictly: what we cannot run is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from pyruntime.errors import ConversionError, FormatError, UnsupportedModel
from pyruntime.format.spec import ROPE_SCALING_KEYS, DecoderSpec, rope_scaling_problems


class Config:
    """The keys of config.json; problems are collected so that all are reported at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        self.data = _read(self.path)
        generation = folder / "generation_config.json"
        self._generation = _read(generation) if generation.is_file() else {}
        self.problems: list[str] = []

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

    def decoder(
        self,
        family: Literal["llama", "qwen2", "qwen3"],
        *,
        qkv_bias: bool,
        o_bias: bool,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        head_dim: int | None = None,
    ) -> DecoderSpec:
        """The decoder that this file describes; its dtype is decided later, from the weights.

        Raises:
            UnsupportedModel: every key that is missing, malformed or asks for too much.
        """
        self.require("hidden_act", "silu")
        self.require("quantization_config")
        self.require("partial_rotary_factor", 1, 1.0)
        # `sliding_window` itself may be set: without this flag it has no effect.
        self.require("use_sliding_window", False)
        kinds = self.data.get("layer_types") or []
        for kind in sorted({str(kind) for kind in kinds} - {"full_attention"}):
            self.problems.append(f"layer_types {kind!r} is not implemented (full_attention is)")
        heads = self.integer("num_attention_heads")
        hidden = self.integer("hidden_size")
        theta, scaling = self._rope()
        values: dict[str, Any] = {
            "vocab_size": self.integer("vocab_size"),
            "hidden_size": hidden,
            "num_layers": self.integer("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.integer("num_key_value_heads", heads),
            "head_dim": self.integer("head_dim", head_dim or hidden // heads),
            "intermediate_size": self.integer("intermediate_size"),
            "max_positions": self.integer("max_position_embeddings"),
            "norm_eps": self.number("rms_norm_eps", 1e-6),
            "tie_embeddings": self.flag("tie_word_embeddings"),
            "bos_token_id": self._tokens("bos_token_id", self.data)[:1],
            "eos_token_ids": self._eos(),
            "pad_token_id": self._tokens("pad_token_id", self.data)[:1],
        }
        for key in ("bos_token_id", "pad_token_id"):
            values[key] = values[key][0] if values[key] else None
        if not self.problems:
            try:
                return DecoderSpec(
                    source_family=family, rope_theta=theta, rope_scaling=scaling,
                    qkv_bias=qkv_bias, o_bias=o_bias, mlp_bias=mlp_bias, qk_norm=qk_norm,
                    dtype="float32", **values,
                )  # fmt: skip
            except FormatError as error:
                self.problems.append(str(error))
        raise UnsupportedModel("\n".join(f"{self.path}: {text}" for text in self.problems))

    def _finite(self, key: str, value: object, default: float) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value)):  # type: ignore[arg-type]
            self.problems.append(f"{key} must be a number, is {value!r}")
            return default
        return float(value)  # type: ignore[arg-type]

    def _rope(self) -> tuple[float, dict[str, Any] | None]:
        """(theta, scaling): transformers 5 keeps both in rope_parameters, 4 apart."""
        given = self.data.get("rope_parameters")
        if given is None:
            given = self.data.get("rope_scaling") or {}
        if not isinstance(given, dict) or any(isinstance(v, dict) for v in given.values()):
            self.problems.append("rope parameters that differ between layers are not implemented")
            return 1.0, None
        theta = given.get("rope_theta", self.data.get("rope_theta", 10000.0))
        theta = self._finite("rope_theta", theta, 10000.0)
        kind = given.get("rope_type", given.get("type", "default"))
        if kind == "default":
            return theta, None
        keys = ROPE_SCALING_KEYS.get(str(kind), frozenset())
        scaling = {key: given[key] for key in sorted(keys & given.keys())}
        scaling["rope_type"] = kind
        self.problems += rope_scaling_problems(scaling)
        return theta, scaling

    def _eos(self) -> tuple[int, ...]:
        """End tokens of both files: chat models name the end of a turn only in the second."""
        found = self._tokens("eos_token_id", self.data)
        found += self._tokens("eos_token_id", self._generation)
        return tuple(dict.fromkeys(found))

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

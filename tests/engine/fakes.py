"""A model whose answers are easy to predict, behind the real call signature.

It keeps its "keys and values" (the token ids) in the slots it is told to use and reads history back
through the block tables, so a paging mistake changes what it says.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyruntime.engine.tokenizer import Tokenizer, load_tokenizer
from pyruntime.format.spec import DecoderSpec
from pyruntime.gates.policy import ComputePolicy

BOS, EOS, ECHO, BOOM = 256, 257, 258, 259
VOCAB = 264


def spec(**changes: Any) -> DecoderSpec:
    base: dict[str, Any] = {
        "source_family": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 8,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "intermediate_size": 8,
        "max_positions": 512,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_embeddings": True,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "bos_token_id": BOS,
        "eos_token_ids": (EOS,),
        "pad_token_id": None,
        "dtype": "float32",
    }
    return DecoderSpec(**(base | changes))


class FakeModel:
    """Says a pseudo-random byte made from the whole history; after an ECHO token, repeats what came
    before it, then EOS. A BOOM token makes the step fail."""

    def __init__(self, step_seconds: float = 0.0) -> None:
        self.step_seconds = step_seconds
        self.cache: dict[int, int] = {}
        self.rows: list[int] = []

    def forward(self, batch: Any, kv: Any, router: Any) -> Tensor:
        time.sleep(self.step_seconds)
        tokens = batch.tokens.tolist()
        if BOOM in tokens:
            raise RuntimeError("injected fault")
        self.rows.append(len(tokens))
        self.cache.update(zip(batch.slots.tolist(), tokens, strict=True))
        return torch.stack([self._logits(batch, row) for row in batch.logit_rows.tolist()] or
                           [torch.zeros(VOCAB)])[: len(batch.logit_rows)]  # fmt: skip

    def _logits(self, batch: Any, row: int) -> Tensor:
        position = int(batch.positions[row])
        table = batch.block_tables[int(batch.seq_ids[row])].tolist()
        history = [self.cache[table[p // 32] * 32 + p % 32] for p in range(position + 1)]
        if ECHO in history:
            at = history.index(ECHO)
            logits = torch.zeros(VOCAB)
            logits[history[position - at] if position < 2 * at else EOS] = 50.0
            return logits
        seed = 0
        for token in history:
            seed = (seed * 1000003 + token + 1) % (2**61 - 1)
        logits = torch.full((VOCAB,), -100.0)
        logits[32:127] = torch.randn(95, generator=torch.Generator().manual_seed(seed)) * 3
        return logits


@dataclass
class FakeRuntime:
    """Claims to run exactly the share of the compute that the budget allows."""

    tokenizer: Tokenizer | None = None
    spec: DecoderSpec = field(default_factory=spec)
    model: FakeModel = field(default_factory=FakeModel)
    gates: Any = field(default_factory=lambda: SimpleNamespace(kv_mode="dense"))

    def resolve(self, policy: ComputePolicy) -> tuple[str, float]:
        return policy.mode or "calibrated", 1.0 if policy.budget is None else policy.budget

    def router(self, batch: Any, policies: Any) -> None:
        return None

    def trace(self, router: None, batch: Any, policies: Any) -> Any:
        budgets = torch.tensor([policy.budget for policy in policies])[batch.seq_ids.long()]
        return SimpleNamespace(per_token_compute=lambda: budgets)


def write_tokenizer(folder: Path, chat_template: str | None = "echo") -> Path:
    """A byte tokenizer: id = byte, then the special tokens above. Its chats end with ECHO."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = _byte_characters()
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>", "<|echo|>", "<|boom|>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"bos_token": {"content": "<|bos|>"}, "eos_token": "<|eos|>"}
    if chat_template == "echo":
        config["chat_template"] = (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<|echo|>{% endif %}"
        )
    elif chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def runtime_with_text(folder: Path, **parts: Any) -> FakeRuntime:
    return FakeRuntime(tokenizer=load_tokenizer(write_tokenizer(folder)), **parts)


def _byte_characters() -> list[str]:
    """The byte-level alphabet in byte order (GPT-2's table of printable stand-ins)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(stand_ins)) for b in range(256)]

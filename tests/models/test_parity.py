"""P1: the dense engine is transformers, to 1e-4 on every logit and to the token when greedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.engine.llm import LLM
from pyruntime.engine.request import SamplingParams
from pyruntime.format.convert import convert
from tests.checkpoints import write_hf_folder
from tests.models.session import Session, opened, random_tokens
from tests.parity import need_transformers

need_transformers()

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, head_dim from the config": {"head_dim": None},
    "llama, wide heads, all kv": {"seed": 1, "head_dim": 18, "num_heads": 4, "num_kv_heads": 4},
    "llama, gqa 4, tied": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 10, "tie": True},
    "llama, mqa": {"hidden_size": 42, "num_heads": 14, "num_kv_heads": 1, "head_dim": 6},
    "llama, biases": {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 5},
    "llama, llama3 scaling": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama, llama3 scaling, new names": {"rope_scaling": LLAMA3, "modern_config": True},
    "llama, linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama, odd vocabulary": {"vocab_size": 331, "hidden_size": 50, "intermediate_size": 77},
    "qwen2": {"family": "qwen2", "num_heads": 4, "num_kv_heads": 2},
    "qwen2, tied": {"family": "qwen2", "tie": True, "norm_eps": 1e-6},
    "qwen3": {"family": "qwen3", "num_heads": 4, "num_kv_heads": 1, "head_dim": 16},
    "qwen3, tied, new names": {
        "family": "qwen3", "tie": True, "modern_config": True, "num_heads": 6, "num_kv_heads": 6,
    },
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], Tensor]:
    """Their tokens, and how clear the closest choice was."""
    tokens: list[int] = []
    cache, new, margins = None, torch.tensor([prompt]), []
    for _ in range(count):
        output = model(new, past_key_values=cache, use_cache=True)
        cache, last = output.past_key_values, output.logits[0, -1]
        best, second = last.topk(2).values
        margins.append(best - second)
        tokens.append(int(last.argmax()))
        new = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(margins).min()


@pytest.mark.parametrize("case", CASES)
def test_transformers(tmp_path: Path, case: str) -> None:
    # Weights this large make logits of order 10 and choices that are clear.
    write_hf_folder(tmp_path / "hf", **CASES[case])
    convert(tmp_path / "hf", tmp_path / "model")
    model, runtime = theirs(tmp_path / "hf"), opened(tmp_path / "model")
    assert runtime.spec.dtype == "float32"
    for shape in ((1, 150), (3, 33)):
        tokens = random_tokens(1, *shape)
        with torch.no_grad():
            expected = model(tokens).logits
        actual = runtime.forward(tokens).logits
        assert isinstance(actual, Tensor)
        assert float(expected.std()) > 0.5
        assert float((actual - expected).abs().max()) <= 1e-4
    prompts = [random_tokens(2, 40).tolist(), random_tokens(3, 5).tolist()]
    outputs = LLM(runtime).generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        chosen, margin = greedy(model, prompt, 64)
        assert float(margin) > 2e-4, "this seed has a tie: choose another"
        assert output.outputs[0].token_ids == chosen


def test_left_padding_is_not_seen(tmp_path: Path) -> None:
    """attention_mask leaves padding out, as their position ids do for left-padded batches."""
    write_hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model")
    model, runtime = theirs(tmp_path / "hf"), opened(tmp_path / "model")
    tokens = random_tokens(4, 2, 20)
    mask = torch.ones_like(tokens)
    tokens[0, :6] = mask[0, :6] = 0
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(tokens, attention_mask=mask, position_ids=positions).logits
    actual = runtime.forward(tokens, attention_mask=mask).logits
    assert isinstance(actual, Tensor)
    seen = mask.bool()
    assert float((actual - expected)[seen].abs().max()) <= 1e-4


def test_bfloat16_follows_float32(tmp_path: Path) -> None:
    """No peer is bit-exact in bfloat16; ours must be no further from float32 than theirs."""
    write_hf_folder(tmp_path / "hf", dtype=torch.bfloat16, std=0.1, num_kv_heads=5)
    convert(tmp_path / "hf", tmp_path / "model")
    from transformers import AutoModelForCausalLM

    tokens = random_tokens(1, 2, 90)
    with torch.no_grad():
        exact = theirs(tmp_path / "hf")(tokens).logits
        rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
        distance = (rounded(tokens).logits.float() - exact).abs()
    actual = opened(tmp_path / "model").forward(tokens).logits
    assert isinstance(actual, Tensor)
    ours = (actual - exact).abs()
    assert float(ours.mean()) <= 1.1 * float(distance.mean())
    assert float(ours.max()) <= 2.0 * float(distance.max())


def test_decode_is_prefill(tmp_path: Path) -> None:
    """Our own cache, token by token, is our own full pass, bit for bit."""
    write_hf_folder(tmp_path / "hf", family="qwen3", num_heads=4, num_kv_heads=2)
    convert(tmp_path / "hf", tmp_path / "model")
    runtime, ids = opened(tmp_path / "model"), random_tokens(5, 70).tolist()
    whole = runtime.forward([ids]).logits
    logits, _ = Session(runtime).chunked("a", ids, 1)
    assert isinstance(whole, Tensor) and torch.equal(logits, whole[0])

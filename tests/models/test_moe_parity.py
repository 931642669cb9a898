"""P1 for expert models: transformers, to 1e-4 on every logit and to the token when greedy.

Every model is made and saved by transformers with random weights. Each case is checked twice: the
folder against transformers by a plain forward pass (`tests.oracle.decoder`), and the runtime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.engine.llm import LLM
from pyruntime.format.convert import convert
from tests.checkpoints import write_tokenizer
from tests.models.session import opened, random_tokens
from tests.models.test_parity import GREEDY, greedy
from tests.moe_checkpoints import write_moe_folder
from tests.oracle.decoder import logits_of_folder
from tests.parity import need_transformers

need_transformers()
pytestmark = pytest.mark.usefixtures("one_thread")
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 36, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 22, "kv_lora_rank": 26, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 6, "v_head_dim": 14, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
    "moe_intermediate_size": 21, "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MSCALE = {**YARN, "mscale": 0.707, "mscale_all_dim": 1.2}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.7, 2.2],
    "long_factor": [9.0] * 5, "short_mscale": 1.2, "long_mscale": 1.3, "factor": 1.0,
    "original_max_position_embeddings": 200,
}  # fmt: skip
_QWEN = {"moe_intermediate_size": 21, "shared_expert_intermediate_size": 27}


def _case(family: str, experts: int, k: int, **config: Any) -> dict[str, Any]:
    key = {"qwen2_moe": "num_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts",
           "deepseek_v2": "n_routed_experts", "deepseek_v3": "n_routed_experts"}  # fmt: skip
    config = {key.get(family, "num_local_experts"): experts, "num_experts_per_tok": k, **config}
    if family.startswith("qwen"):
        config = {**_QWEN, **config}
    if family.startswith("deepseek"):
        config = {**LATENT, **config}
    return {"family": family, **config}


CASES: dict[str, dict[str, Any]] = {
    "mixtral": _case("mixtral", 5, 2),
    "mixtral, 60 experts": _case("mixtral", 60, 8),
    "mixtral, one expert a token": _case("mixtral", 5, 1, head_dim=12),
    "mixtral, window": _case("mixtral", 5, 2, sliding_window=11),
    "qwen2_moe": _case("qwen2_moe", 60, 4),
    "qwen2_moe, normalised": _case("qwen2_moe", 5, 3, norm_topk_prob=True),
    "qwen2_moe, dense layers": _case(
        "qwen2_moe", 5, 1, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3]
    ),
    "qwen3_moe": _case("qwen3_moe", 60, 8, norm_topk_prob=True, head_dim=14),
    "qwen3_moe, not normalised": _case("qwen3_moe", 5, 5, attention_bias=True),
    "olmoe": _case("olmoe", 60, 8),
    "olmoe, normalised": _case("olmoe", 5, 4, norm_topk_prob=True, num_key_value_heads=4),
    "granitemoe": _case(
        "granitemoe", 5, 2, embedding_multiplier=3.0, attention_multiplier=0.2,
        residual_multiplier=0.6, logits_scaling=0.5,
    ),
    "granitemoe, tied": _case("granitemoe", 60, 6, tie_word_embeddings=True),
    "phimoe": _case("phimoe", 5, 2, attention_bias=True, lm_head_bias=True),
    "phimoe, longrope": _case("phimoe", 60, 2, rope_parameters=LONGROPE),
    "phimoe, near ties": _case("phimoe", 16, 2, router_jitter_noise=0.4, sliding_window=9),
    "gpt_oss": _case("gpt_oss", 5, 2, head_dim=10, sliding_window=7, rope_parameters=YARN),
    "gpt_oss, 60 experts": _case("gpt_oss", 60, 4, head_dim=12, swiglu_limit=1.5),
    "deepseek_v2, lite": _case("deepseek_v2", 5, 3, q_lora_rank=None, rope_parameters=MSCALE),
    "deepseek_v2": _case(
        "deepseek_v2", 60, 6, topk_method="group_limited_greedy", n_group=6, topk_group=2,
        routed_scaling_factor=1.7, attention_bias=True,
    ),
    "deepseek_v3": _case("deepseek_v3", 60, 8, n_group=6, topk_group=3, rope_parameters=MSCALE),
    "deepseek_v3, plain": _case(
        "deepseek_v3", 5, 2, norm_topk_prob=False, rope_interleave=False, q_lora_rank=None,
        n_shared_experts=1, routed_scaling_factor=1.0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of theirs, and the folder made of what it saves."""
    folder = tmp_path_factory.mktemp("model")
    model = theirs(**CASES[request.param])
    model.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf")
    convert(folder / "hf", folder / "model")
    return model, folder / "model"


@torch.no_grad()
def theirs(family: str, **config: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    described = AutoConfig.for_model(family, **{**SIZES, **config})
    model = AutoModelForCausalLM.from_config(
        described,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the others want widths that are multiples
    ).eval()
    random = torch.Generator().manual_seed(0)
    # Weights this large make logits of order 10 and choices that are clear.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("inv_freq"):
            continue
        normal = torch.randn(tensor.shape, generator=random)
        is_norm = name.endswith("norm.weight")
        tensor.copy_(1 + 0.1 * normal if is_norm else 0.2 * normal)
    return model


def test_the_folder(pair: Any) -> None:
    model, folder = pair
    tokens = random_tokens(1, 150)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    assert float(expected.std()) > 0.5
    assert float((logits_of_folder(folder, tokens) - expected).abs().max()) <= 1e-4


def test_mxfp4(tmp_path: Path) -> None:
    """Their own reading of 4-bit experts."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    sizes = {"hidden_size": 64, "expert_size": 96, "num_heads": 4}
    write_moe_folder(tmp_path / "hf", "gpt_oss", form="mxfp4", dtype=torch.bfloat16, **sizes)
    convert(tmp_path / "hf", tmp_path / "model", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )  # fmt: skip
    tokens = random_tokens(1, 90)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    actual = logits_of_folder(tmp_path / "model", tokens)
    assert float((actual - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


def test_the_runtime(pair: Any) -> None:
    model, folder = pair
    runtime = opened(folder)
    assert runtime.spec.dtype == "float32"
    for shape in ((1, 150), (3, 33)):
        tokens = random_tokens(1, *shape)
        with torch.no_grad():
            expected = model(tokens).logits
        actual = runtime.forward(tokens).logits
        assert isinstance(actual, Tensor)
        assert float((actual - expected).abs().max()) <= 1e-4
    prompts = [random_tokens(2, 40).tolist(), random_tokens(3, 5).tolist()]
    outputs = LLM(runtime).generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        chosen, margin = greedy(model, prompt, 64)
        assert float(margin) > 2e-4, "this seed has a tie: choose another"
        assert output.outputs[0].token_ids == chosen


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "granitemoe", "gpt_oss", "deepseek_v3"])
def test_bfloat16_follows_float32(tmp_path: Path, case: str) -> None:
    """No peer is bit-exact in bfloat16; ours must be no further from float32 than theirs."""
    model = theirs(**CASES[case])
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor.bfloat16())
    tokens = random_tokens(1, 4, 90)
    with torch.no_grad():
        exact = model(tokens).logits
        model.bfloat16().save_pretrained(tmp_path / "hf")
        distance = (model(tokens).logits.float() - exact).abs().mean(-1)
    convert(tmp_path / "hf", tmp_path / "model")
    runtime = opened(tmp_path / "model")
    assert runtime.spec.dtype == "bfloat16"
    actual = runtime.forward(tokens).logits
    assert isinstance(actual, Tensor)
    # The middle token: one rounding sends a token whose choice is close to another expert.
    assert float((actual - exact).abs().mean(-1).median()) <= 1.1 * float(distance.median())

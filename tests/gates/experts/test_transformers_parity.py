"""Every router of transformers that the gates stand for: the same experts, the same weights."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.format.spec.experts import ExpertSpec, RouterSpec
from pyruntime.gates.experts import Capacity, CappedGate, Gate, Linear, constructor_of, gate_of
from pyruntime.ops import Weight, native
from tests.gates.experts.cases import Given
from tests.parity import need_transformers

need_transformers()

pytestmark = pytest.mark.usefixtures("one_thread")
H, ROWS = 64, 2000
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def config_of(model: str, name: str, settings: dict[str, Any]) -> Any:
    module = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    return getattr(module, name + "Config")(hidden_size=H, **settings)


def module_of(model: str, name: str, config: Any, dtype: torch.dtype) -> Any:
    """Their module with random weights, spread so that choices are clear and ties are not rare."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    router = getattr(module, name)(config).to(dtype).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) / 8)
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            router.e_score_correction_bias = torch.randn(bias.shape, generator=random) / 20
    return router


@dataclasses.dataclass(frozen=True)
class Case:
    """A router: transformers' config and class, and the spec that a converter writes for it."""

    model: str
    config: str
    router: str
    settings: dict[str, Any]
    experts: int
    k: int
    spec: RouterSpec
    classifier: str = ""  # attribute that holds the matrix; "" is the router itself


V2 = {"n_routed_experts": 160, "num_experts_per_tok": 6, "routed_scaling_factor": 16.0}
V3 = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4}
CASES = {
    "mixtral": Case(
        "mixtral", "Mixtral", "MixtralTopKRouter",
        {"num_local_experts": 8, "num_experts_per_tok": 2}, 8, 2, RouterSpec(normalize=True),
    ),
    "qwen2_moe": Case(
        "qwen2_moe", "Qwen2Moe", "Qwen2MoeTopKRouter",
        {"num_experts": 60, "num_experts_per_tok": 4}, 60, 4, RouterSpec(round_weights=True),
    ),
    "qwen3_moe": Case(
        "qwen3_moe", "Qwen3Moe", "Qwen3MoeTopKRouter",
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False}, 128, 8,
        RouterSpec(round_weights=True),
    ),
    "qwen3_moe, normalized": Case(
        "qwen3_moe", "Qwen3Moe", "Qwen3MoeTopKRouter",
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}, 128, 8,
        RouterSpec(normalize=True, round_weights=True),
    ),
    "olmoe": Case(
        "olmoe", "Olmoe", "OlmoeTopKRouter",
        {"num_experts": 64, "num_experts_per_tok": 8}, 64, 8, RouterSpec(round_weights=True),
    ),
    "deepseek_v2, greedy": Case(
        "deepseek_v2", "DeepseekV2", "DeepseekV2TopkRouter",
        {**V2, "topk_method": "greedy"}, 160, 6, RouterSpec(scale=16.0),
    ),
    "deepseek_v2, group limited": Case(
        "deepseek_v2", "DeepseekV2", "DeepseekV2TopkRouter",
        {**V2, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, 160, 6,
        RouterSpec(scale=16.0, groups=8, top_groups=3),
    ),
    "deepseek_v3": Case(
        "deepseek_v3", "DeepseekV3", "DeepseekV3TopkRouter",
        {**V3, "routed_scaling_factor": 2.5, "norm_topk_prob": True}, 256, 8,
        RouterSpec(
            score="sigmoid", normalize=True, epsilon=1e-20, scale=2.5, selection_bias=True,
            groups=8, top_groups=4, group_score="sum2",
        ),
    ),
    "deepseek_v4": Case(
        "deepseek_v4", "DeepseekV4", "DeepseekV4TopKRouter",
        {"n_routed_experts": 64, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5}, 64, 6,
        RouterSpec(
            score="sqrt_softplus", normalize=True, epsilon=1e-20, scale=1.5, selection_bias=True
        ),
    ),
    "gpt_oss": Case(
        "gpt_oss", "GptOss", "GptOssTopKRouter",
        {"num_local_experts": 32, "num_experts_per_tok": 4}, 32, 4,
        RouterSpec(over_chosen=True, bias=True, round_weights=True),
    ),
    "granitemoe": Case(
        "granitemoe", "GraniteMoe", "GraniteMoeTopKRouter",
        {"num_local_experts": 40, "num_experts_per_tok": 8}, 40, 8,
        RouterSpec(over_chosen=True, round_weights=True),
    ),
    "phimoe": Case(
        "phimoe", "Phimoe", "PhimoeTopKRouter",
        {"num_local_experts": 16, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}, 16, 2,
        RouterSpec(kind="sparse_mixer", epsilon=0.1),
    ),
    "longcat_flash": Case(
        "longcat_flash", "LongcatFlash", "LongcatFlashTopkRouter",
        {"n_routed_experts": 48, "zero_expert_num": 16, "moe_topk": 6,
         "num_experts_per_tok": 6, "routed_scaling_factor": 6.0}, 64, 6,
        RouterSpec(scale=6.0, selection_bias=True), "classifier",
    ),
}  # fmt: skip


def ours(case: Case, router: Any) -> Gate:
    matrix = getattr(router, case.classifier) if case.classifier else router
    spec = ExpertSpec(case.experts, case.k, 16, (0,), case.spec)
    bias = matrix.bias.detach().float() if case.spec.bias else None
    selection = router.e_score_correction_bias if case.spec.selection_bias else None
    return gate_of(spec, Weight.pack(matrix.weight.detach()), bias, selection)


def spread(ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The weight of every expert, [N, E], and whether it is chosen."""
    dense = torch.zeros(len(ids), experts + 1)
    chosen = torch.zeros(len(ids), experts + 1, dtype=torch.bool)
    where = torch.where(ids < 0, experts, ids).long()
    return (
        dense.scatter_(1, where, weights.float())[:, :experts],
        chosen.scatter_(1, where, True)[:, :experts],
    )


def assert_agree(
    gate: Gate, x: Tensor, ids: Tensor, weights: Tensor, logits: Tensor, bits: float, near: float
) -> None:
    """The same experts with the same weights; or others, in place of ones that tie with them.

    Args:
        bits: relative error of a weight.
        near: logits this close are a tie: 0 where both sides read the same ones.
    """
    plan = gate.plan(native, x)
    theirs, their_ids = spread(ids, weights, gate.num_experts)
    mine, my_ids = spread(plan.choices(), plan.slot_weights(), gate.num_experts)
    swapped = (their_ids != my_ids).any(1)
    assert float(swapped.float().mean()) < 0.12
    allowed = bits * theirs + 1e-6 * theirs.max()
    assert bool(((mine - theirs).abs() <= allowed)[~swapped].all())
    for n in torch.nonzero(swapped)[:, 0].tolist():
        lost = logits[n, their_ids[n] & ~my_ids[n]].sort().values
        won = logits[n, my_ids[n] & ~their_ids[n]].sort().values
        assert lost.shape == won.shape
        assert float((lost - won).abs().max()) <= near, f"row {n} chose without a tie"


@DTYPES
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_logits(name: str, dtype: torch.dtype) -> None:
    """The rule alone; bfloat16 logits tie often, and torch.topk then takes any."""
    case = CASES[name]
    if name == "deepseek_v4" and dtype == torch.bfloat16:
        pytest.skip("theirs computes scores, sums and quotients in bfloat16; ours is float32")
    config = config_of(case.model, case.config, case.settings)
    router = module_of(case.model, case.router, config, dtype)
    x = torch.randn(ROWS, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits, weights, ids = router(x)
    gate = dataclasses.replace(ours(case, router), router=Given(case.experts))
    rounds = case.spec.round_weights or name == "phimoe"  # as does the softmax of phimoe itself
    bits = 2.0**-7 if rounds and dtype == torch.bfloat16 else 1e-6
    assert_agree(gate, logits.float(), ids, weights, logits.float(), bits, 0.0)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_rows(name: str) -> None:
    """With our matmul, whose logits differ from theirs in the last bits."""
    case = CASES[name]
    config = config_of(case.model, case.config, case.settings)
    router = module_of(case.model, case.router, config, torch.float32)
    x = torch.randn(ROWS, H, generator=torch.Generator().manual_seed(1))
    logits, weights, ids = router(x)
    if name == "phimoe":  # a weight jumps where a logit crosses the distance that counts
        keep = ~_on_the_edge(logits, 0.1)
        x, ids, weights, logits = x[keep], ids[keep], weights[keep], logits[keep]
    assert_agree(ours(case, router), x, ids, weights, logits, 1e-4, 1e-5)


def _on_the_edge(logits: Tensor, epsilon: float) -> Tensor:
    edge = torch.zeros(len(logits), dtype=torch.bool)
    left = logits.clone()
    for _ in range(2):
        top, best = left.max(1, keepdim=True)
        distance = (top - logits) / torch.maximum(logits.abs(), top)
        edge |= ((distance - 2 * epsilon).abs() < 1e-4).any(1)
        left.scatter_(1, best, -torch.inf)
    return edge


@torch.no_grad()
def test_sparse_mixer_is_bitwise() -> None:
    case = CASES["phimoe"]
    config = config_of(case.model, case.config, case.settings)
    router = module_of(case.model, case.router, config, torch.float32)
    x = torch.randn(ROWS, H, generator=torch.Generator().manual_seed(2))
    logits, weights, ids = router(x)
    plan = constructor_of("sparse_mixer")(Given(16), 0.1).plan(native, logits)
    assert torch.equal(plan.choices().long(), ids)
    assert torch.equal(plan.slot_weights(), weights)
    assert float((weights < 1).float().mean()) > 0.05


@torch.no_grad()
def test_switch_drops_what_theirs_drops() -> None:
    settings = {"num_experts": 8, "expert_capacity": 9, "d_model": H}
    config = _switch_config(settings)
    router = module_of("switch_transformers", "SwitchTransformersTop1Router", config, torch.float32)
    x = torch.randn(5, 70, H, generator=torch.Generator().manual_seed(1))
    kept, probability, _ = router(x)
    gate = constructor_of("switch")(Linear(Weight.pack(router.classifier.weight)))
    capped = CappedGate(gate, Capacity(9, "sequence"))
    sequences = torch.arange(5).repeat_interleave(70).int()
    plan = capped.plan(native, x.view(-1, H), sequences=sequences)
    mine, ids = spread(plan.choices(), plan.slot_weights(), 8)
    assert torch.equal(ids, kept.view(-1, 8).bool())
    assert 0 < plan.dropped < 350
    assert torch.allclose(mine, kept.view(-1, 8) * probability.view(-1, 1), atol=1e-5)


def _switch_config(settings: dict[str, Any]) -> Any:
    from transformers import SwitchTransformersConfig

    return SwitchTransformersConfig(**settings)


@torch.no_grad()
def test_llama4_weighs_by_sigmoid() -> None:
    module = importlib.import_module("transformers.models.llama4.configuration_llama4")
    settings = {"num_local_experts": 16, "num_experts_per_tok": 2, "hidden_size": H}
    config = module.Llama4TextConfig(**settings)
    router = module_of("llama4", "Llama4Router", config, torch.float32)
    x = torch.randn(ROWS, H, generator=torch.Generator().manual_seed(1))
    scores, logits = router(x)
    gate = constructor_of("sigmoid_of_chosen")(Given(16), 2)
    plan = gate.plan(native, logits)
    mine, _ = spread(plan.choices(), plan.slot_weights(), 16)
    assert gate.weights_input
    assert torch.allclose(mine, scores, atol=1e-6)


@torch.no_grad()
def test_deepseek_v4_hash_layers() -> None:
    config = config_of("deepseek_v4", "DeepseekV4", {"n_routed_experts": 64, "vocab_size": 300,
                       "num_experts_per_tok": 6, "routed_scaling_factor": 1.5})  # fmt: skip
    router = module_of("deepseek_v4", "DeepseekV4HashRouter", config, torch.float32)
    random = torch.Generator().manual_seed(1)
    table = torch.rand(300, 64, generator=random).argsort(1)[:, :6].contiguous()
    router.tid2eid = table
    x, tokens = torch.randn(500, H, generator=random), torch.arange(500) % 300
    logits, weights, ids = router(x, tokens)
    gate = constructor_of("hash")(table, 64, Given(64), scale=1.5)
    plan = gate.plan(native, logits, tokens=tokens)
    mine, chosen = spread(plan.choices(), plan.slot_weights(), 64)
    theirs, wanted = spread(ids, weights, 64)
    assert torch.equal(chosen, wanted) and torch.allclose(mine, theirs, atol=1e-6)

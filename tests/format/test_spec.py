"""Specs: strict records, and the tensor list against the layouts the kernels read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pyruntime.errors import FormatError
from pyruntime.format.spec import (
    DecoderSpec,
    ExpertSpec,
    GateSpec,
    LatentSpec,
    RouterSpec,
    TensorSpec,
    decoder_tensors,
    from_dict,
    to_dict,
)
from pyruntime.ops.weight import Weight

SPEC = DecoderSpec(
    source_family="llama", vocab_size=300, hidden_size=40, num_layers=2, num_heads=5,
    num_kv_heads=1, head_dim=8, intermediate_size=52, max_positions=64, norm_eps=1e-5,
    rope_theta=10000.0, rope_scaling=None, tie_embeddings=True, qkv_bias=False, o_bias=False,
    mlp_bias=False, qk_norm=False, bos_token_id=None, eos_token_ids=(2, 3), pad_token_id=0,
    dtype="bfloat16",
)  # fmt: skip
GATES = GateSpec(
    kind="gateskip", gate_type="mlp", mlp_scalar=True, shared=False, gating_mode="after_module",
    actually_gate=True, gate_attention=True, gate_mlp=True, rule="calibrated", skip_ratio=0.25,
    kv_mode="dense",
)  # fmt: skip


ROUTER = RouterSpec(score="sigmoid", normalize=True, groups=3, top_groups=2, selection_bias=True)
EXPERTS = ExpertSpec(
    num_experts=6, experts_per_token=3, intermediate_size=20, layers=(1,), router=ROUTER,
    shared_size=24, shared_gate=True,
)  # fmt: skip
SPARSE = dataclasses.replace(
    SPEC, experts=EXPERTS, latent=LatentSpec(None, 12, 6, 8, 10), head_dim=20, window=5,
    window_layers=(0,), norm="layer", head_bias=True, sinks=True,
    rope_scaling={"rope_type": "longrope", "factors": [1.0, 2.0, 3.0, 4.0],
                  "attention_factor": 1.1},
)  # fmt: skip


@pytest.mark.parametrize("record", [SPEC, GATES, SPARSE])
def test_records_survive_json(record: DecoderSpec | GateSpec) -> None:
    data = json.loads(json.dumps(to_dict(record)))
    assert from_dict(type(record), data, "here") == record


def test_every_problem_of_a_record_is_named() -> None:
    data = {**to_dict(SPEC), "hiden_size": 3, "num_heads": "5", "tie_embeddings": 1}
    del data["vocab_size"]
    with pytest.raises(FormatError) as caught:
        from_dict(DecoderSpec, data, "here")
    for part in ("unknown key 'hiden_size'", "missing key 'vocab_size'",
                 "num_heads must be int, is '5'", "tie_embeddings must be bool, is 1"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 2}, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be at least 1, is 0"),
        ({"eos_token_ids": (300,)}, "eos_token_ids holds 300, outside the vocabulary of 300"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'dynamic' is not implemented"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope scaling yarn lacks attention_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling linear lacks factor"),
    ],
)
def test_impossible_architectures(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(SPEC, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 7}, "experts_per_token 7 exceeds num_experts 6"),
        ({"intermediate_size": 0}, "intermediate_size must be at least 1, is 0"),
        ({"layers": (1, 0)}, r"layers must rise, are \[1, 0\]"),
        ({"shared_size": 0}, "shared_gate needs a shared expert"),
        ({"router": RouterSpec(groups=4)}, "6 experts do not form 4 groups"),
        ({"router": RouterSpec(groups=3, top_groups=4)}, r"top_groups 4 must lie in \[1, 3\]"),
        ({"router": RouterSpec(groups=6, top_groups=2)}, "2 groups hold fewer than 3 experts"),
        ({"router": RouterSpec(kind="sparse_mixer")}, "sparse_mixer chooses 2 experts per token"),
    ],
)
def test_impossible_experts(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(EXPERTS, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1, is 0"),
        ({"window_layers": (2,)}, "layer 2 is named, but there are 2"),
        ({"experts": dataclasses.replace(EXPERTS, layers=(0, 5))}, "layer 5 is named"),
        ({"head_dim": 22}, "latent attention needs one KV head of 20, has 1 of 22"),
        ({"rope_scaling": {"rope_type": "longrope", "factors": [1.0], "attention_factor": 1.0}},
         "1 rope factors, expected 4"),
        ({"rope_scaling": {"rope_type": "longrope", "factors": "1", "attention_factor": 1.0}},
         "rope scaling factors must be"),
    ],
)  # fmt: skip
def test_impossible_expert_models(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(SPARSE, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 2), (33, 7), (104, 40), (96, 41)])
def test_stored_shape_is_what_weight_packs(dtype: str, rows: int, columns: int) -> None:
    dense = torch.randn(rows, columns).to(getattr(torch, dtype))
    panel = TensorSpec("x", (rows, columns), "panel", dtype)  # type: ignore[arg-type]
    packed = Weight.pack(dense).data
    assert panel.stored_shape == packed.shape
    assert panel.nbytes == packed.nbytes
    pair = TensorSpec("x", (2 * rows, columns), "gate_up", dtype)  # type: ignore[arg-type]
    assert pair.stored_shape == Weight.pack_gate_up(dense, dense).data.shape
    several = TensorSpec("x", (3, rows, columns), "panel", dtype)  # type: ignore[arg-type]
    packed = Weight.pack(dense.expand(3, -1, -1)).data
    assert (several.stored_shape, several.nbytes) == (packed.shape, packed.nbytes)
    small = Weight.pack(dense.expand(3, -1, -1)).quantize().data
    several = dataclasses.replace(several, dtype="int8")
    assert (several.stored_shape, several.nbytes) == (small.shape, small.nbytes)


def test_the_list_holds_each_name_once() -> None:
    for gates in (None, GATES, dataclasses.replace(GATES, shared=True, gate_mlp=False)):
        names = [tensor.name for tensor in decoder_tensors(SPEC, gates)]
        assert len(names) == len(set(names))
    assert "gates.attn.down.bias" in names
    assert "lm_head.weight" not in names

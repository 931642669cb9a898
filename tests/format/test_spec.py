"""Specs: strict records, and the tensor list against the layouts the kernels read."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pyruntime.errors import FormatError
from pyruntime.format.spec import (
    DecoderSpec,
    GateSpec,
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


@pytest.mark.parametrize("record", [SPEC, GATES])
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
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not implemented"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling linear lacks factor"),
    ],
)
def test_impossible_architectures(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(SPEC, **change)  # type: ignore[arg-type]


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


def test_the_list_holds_each_name_once() -> None:
    for gates in (None, GATES, dataclasses.replace(GATES, shared=True, gate_mlp=False)):
        names = [tensor.name for tensor in decoder_tensors(SPEC, gates)]
        assert len(names) == len(set(names))
    assert "gates.attn.down.bias" in names
    assert "lm_head.weight" not in names

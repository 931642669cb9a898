"""What must be equal: specification G1 to G4, G9, G16, G18 to G21, G23."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.engine.runtime import Runtime
from pyruntime.errors import ConversionError
from pyruntime.format.convert import convert
from pyruntime.format.load import read, write_calibration
from pyruntime.gates.policy import ComputePolicy
from pyruntime.ops import Weight
from tests.checkpoints import State, read_hf_folder, write_gateskip_pt, write_hf_folder
from tests.models.session import (
    TOKENS,
    Session,
    calibration,
    every_gate,
    gated,
    logits_of,
    opened,
    plain,
    skip,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def constant_gates(folder: Path, bias: float, **options: Any) -> Path:
    """Gates that say sigmoid(bias) whatever they read."""
    state = write_gateskip_pt(folder / "gated.pt", folder / "hf", std=0.0, bias=bias, **options)
    assert any("gate.gate" in name for name in state)
    convert(folder / "gated.pt", folder / "constant", overwrite=True)
    return folder / "constant"


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gating_mode", ["after_module", "before_module"])
def test_g01_gates_of_one_are_the_dense_model(
    tmp_path: Path, gates: dict[str, Any], dtype: torch.dtype, gating_mode: str
) -> None:
    """P1, bit for bit; before_module multiplies twice by one (G19)."""
    base = opened(plain(tmp_path, dtype=dtype))
    path = constant_gates(tmp_path, 40.0, dtype=dtype, gating_mode=gating_mode, **gates)
    expected, actual = (logits_of(r.forward(TOKENS)) for r in (base, opened(path)))
    assert torch.equal(actual, expected)


@every_gate
@pytest.mark.parametrize(
    ("bias", "gate"),
    [(5.0, 0.9933071732521057), (1.0986122886681098, 0.75), (0.0, 0.5)],
    ids=["5", "ln 3", "0"],
)
def test_g02_open_gates_still_scale(
    tmp_path: Path, gates: dict[str, Any], bias: float, gate: float
) -> None:
    """A constant gate g is the base model with o_proj and down_proj times g."""
    write_hf_folder(tmp_path / "hf")
    actual = logits_of(opened(constant_gates(tmp_path, bias, **gates)).forward(TOKENS))
    base = read_hf_folder(tmp_path / "hf")
    scaled = {
        name: tensor * gate
        for name, tensor in base.items()
        if name.endswith(("o_proj.weight", "down_proj.weight"))
    }
    write_hf_folder(tmp_path / "scaled", extra=scaled)
    convert(tmp_path / "scaled", tmp_path / "scaled-model")
    convert(tmp_path / "hf", tmp_path / "model")
    expected = logits_of(opened(tmp_path / "scaled-model").forward(TOKENS))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    dense = logits_of(opened(tmp_path / "model").forward(TOKENS))
    assert float((actual - dense).abs().max()) > 1e-3


@every_gate
def test_g03_everything_skipped_is_the_embedding(tmp_path: Path, gates: dict[str, Any]) -> None:
    path, oracle = gated(tmp_path, **gates)
    runtime = opened(path)
    output = runtime.forward(TOKENS, skip(1.0))
    assert not bool(output.trace.kept.any())
    assert output.trace.paths == {"all": 0, "packed": 0, "dense": 0, "none": 6}
    embedded = oracle.state["model.embed_tokens.weight"][TOKENS.flatten()]
    ops, model = runtime.model.ops, runtime.container.tensors
    head = model["lm_head.weight"]
    assert isinstance(head, Weight)
    normed, _ = ops.rms_norm(embedded, oracle.state["model.norm.weight"], runtime.spec.norm_eps)
    assert torch.equal(logits_of(output).flatten(0, 1), ops.segment_matmul(normed, head))


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_g04_a_skipped_row_keeps_its_bits(
    tmp_path: Path, gates: dict[str, Any], dtype: torch.dtype
) -> None:
    path, _ = gated(tmp_path, {"dtype": dtype}, dtype=dtype, **gates)
    runtime = opened(path)
    session = Session(runtime)
    session.step({"a": TOKENS[0].tolist()}, skip(0.5))
    plans = session.router.plans
    # The same step again, by hand, looking at the residual before and after every branch.
    from pyruntime.engine.runtime import full_batch
    from pyruntime.layers.kv import PagedKV
    from pyruntime.layers.residual import Step

    batch, blocks = full_batch([TOKENS[0].tolist()])
    router = runtime.router(batch, [skip(0.5)])
    model = runtime.model
    cos_sin = model._positions_to(batch)
    step = Step(model.ops, batch, PagedKV(runtime.spec, blocks), router, cos_sin)
    h = model._lookup(batch.tokens).clone()
    for layer, pair in enumerate(model.layers):
        for branch in (0, 1):
            before = h.clone()
            pair[branch](h, step)
            kept = plans[layer, branch].inverse[:, 0] >= 0
            assert 0 < int(kept.sum()) < len(kept)
            assert torch.equal(h[~kept], before[~kept])
            assert not torch.equal(h[kept], before[kept])


@pytest.mark.parametrize("mode", ["batch_quantile", "seq_quantile", "exact_k"])
def test_g09_padding_changes_no_decision(tmp_path: Path, mode: str) -> None:
    path, _ = gated(tmp_path, gate_type="scalar")
    runtime = opened(path)
    policy = ComputePolicy(budget=0.7, mode=mode)
    alone = runtime.forward(TOKENS[:1], policy).trace.kept
    assert not bool(alone.all())
    for special in (0, 2):  # pad and eos
        for count in (1, 5):
            tokens = torch.cat([TOKENS[:1], torch.full((1, count), special)], 1)
            kept = runtime.forward(tokens, policy).trace.kept
            assert torch.equal(kept[..., :37], alone)
            assert bool(kept[..., 37:].all())
    masked = torch.cat([torch.full((1, 3), 9), TOKENS[:1]], 1)
    mask = torch.ones_like(masked)
    mask[0, :3] = 0
    output = runtime.forward(masked, policy, attention_mask=mask)
    assert torch.equal(output.trace.kept, alone)
    assert not bool(logits_of(output)[0, :3].any())
    assert torch.equal(logits_of(output)[0, 3:], logits_of(runtime.forward(TOKENS[:1], policy))[0])


@every_gate
@pytest.mark.parametrize("gating_mode", ["after_module", "before_module"])
def test_g16_running_every_row_gives_the_same_bits(
    tmp_path: Path, gates: dict[str, Any], gating_mode: str
) -> None:
    path, _ = gated(tmp_path, gating_mode=gating_mode, **gates)
    runtime = opened(path)
    packed = runtime.forward(TOKENS, skip(0.05))
    runtime.decisions.packed_below = 0.0
    fallback = runtime.forward(TOKENS, skip(0.05))
    assert packed.trace.paths["packed"] == fallback.trace.paths["dense"] == 6
    assert torch.equal(packed.trace.kept, fallback.trace.kept)
    assert torch.equal(logits_of(packed), logits_of(fallback))
    # What ran is what is counted (P4).
    assert fallback.trace.macs_executed > packed.trace.macs_executed


def variant_of(folder: Path, name: str, state: State, **options: Any) -> Runtime:
    """The model of `folder` with chosen gate tensors."""
    extra = {key: tensor for key, tensor in state.items() if ".gate.gate." in key}
    write_gateskip_pt(folder / f"{name}.pt", folder / "hf", extra=extra, **options)
    convert(folder / f"{name}.pt", folder / name)
    return opened(folder / name)


def test_g18_scalar_is_a_vector_of_equal_rows(tmp_path: Path) -> None:
    path, oracle = gated(tmp_path, gate_type="scalar")
    wide = {
        name: tensor.expand(40, *tensor.shape[1:]).contiguous()
        for name, tensor in oracle.state.items()
        if ".gate.gate." in name
    }
    vector = variant_of(tmp_path, "wide", wide, gate_type="vector")
    assert vector.gates is not None and vector.gates.gate_type == "vector"
    for ratio in (0.0, 0.3, 0.7):
        scalar, other = (r.forward(TOKENS, skip(ratio)) for r in (opened(path), vector))
        assert torch.equal(scalar.trace.kept, other.trace.kept)
        torch.testing.assert_close(scalar.logits, other.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("gate_type", ["vector", "scalar", "mlp"])
def test_g18_shared_is_per_layer_with_equal_tensors(tmp_path: Path, gate_type: str) -> None:
    path, oracle = gated(tmp_path, shared=True, gate_type=gate_type)
    separate = variant_of(
        tmp_path, "separate", oracle.state, gate_type=gate_type, sidecar={"shared": False}
    )
    shared = opened(path)
    assert shared.gates is not None and shared.gates.shared
    assert separate.gates is not None and not separate.gates.shared
    for ratio in (0.0, 0.4):
        first, second = (logits_of(r.forward(TOKENS, skip(ratio))) for r in (shared, separate))
        assert torch.equal(first, second)


@every_gate
def test_g19_entry_gates_scale_the_input_too(tmp_path: Path, gates: dict[str, Any]) -> None:
    """Against the oracle in tests/oracle; here: it is another model, and equal for gates of one."""
    path, oracle = gated(tmp_path, **gates)
    entry = variant_of(tmp_path, "entry", oracle.state, gating_mode="before_module", **gates)
    after, before = (logits_of(r.forward(TOKENS)) for r in (opened(path), entry))
    assert float((after - before).abs().max()) > 1e-2


def test_g20_restricted_skipping(tmp_path: Path) -> None:
    path, _ = gated(tmp_path)
    write_calibration(path, calibration(opened(path)))
    runtime = opened(path)
    for mode in ("batch_quantile", "seq_quantile", "exact_k", "calibrated"):

        def kept(mode: str = mode, **options: Any) -> Tensor:
            policy = ComputePolicy(budget=0.5, mode=mode, **options)
            return runtime.forward(TOKENS, policy).trace.kept

        only_mlp, only_attn = kept(branches=("mlp",)), kept(branches=("attn",))
        assert bool(only_mlp[:, 0].all()) and not bool(only_mlp[:, 1].all(1).any())
        assert bool(only_attn[:, 1].all()) and not bool(only_attn[:, 0].all(1).any())
        second = kept(every_second_layer=True)
        assert bool(second[::2].all()) and not bool(second[1::2].all(2).any())
        assert bool(kept(branches=()).all())


@pytest.mark.parametrize("branch", ["gate_attention", "gate_mlp"])
def test_g20_a_branch_without_gates_always_runs(tmp_path: Path, branch: str) -> None:
    gates: dict[str, Any] = {branch: False}
    path, _ = gated(tmp_path, **gates)
    kept = opened(path).forward(TOKENS, skip(1.0)).trace.kept
    ungated, other = (0, 1) if branch == "gate_attention" else (1, 0)
    assert bool(kept[:, ungated].all()) and not bool(kept[:, other].any())


@pytest.mark.parametrize("hidden", [272, 328, 40])
@pytest.mark.parametrize("gate_type", ["vector", "scalar"])
def test_g21_widths_that_fit_no_block(tmp_path: Path, hidden: int, gate_type: str) -> None:
    """Random masks, d > 256 and no multiple of a block: the round trip through packed rows."""
    shape = {"hidden_size": hidden, "num_layers": 1, "intermediate_size": 90, "std": 0.05}
    path, oracle = gated(tmp_path, shape, gate_type=gate_type)
    forced = torch.rand(1, 2, 2, 37, generator=torch.Generator().manual_seed(hidden)) < 0.5
    actual = opened(path).forward(TOKENS, replay=forced.flatten(2))
    expected = oracle.forward(TOKENS, forced=forced)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-4)


GATE = "model.layers.1.mlp.gate.gate"


def test_g23_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    path, oracle = gated(tmp_path, {"tie": True}, tied_copy=True)
    assert "lm_head.weight" in oracle.state
    assert read(path).spec.tie_embeddings
    torch.testing.assert_close(
        logits_of(opened(path).forward(TOKENS)), oracle.forward(TOKENS).logits, atol=2e-5, rtol=1e-4
    )
    other = {"lm_head.weight": torch.ones(300, 40)}
    with pytest.raises(ConversionError, match=r"lm_head\.weight"):
        write_gateskip_pt(tmp_path / "other.pt", tmp_path / "hf", extra=other)
        convert(tmp_path / "other.pt", tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"drop": (f"{GATE}.bias",)}, [f"missing {GATE}.bias"]),
        ({"drop": (f"{GATE}.weight", f"{GATE}.bias")}, [f"missing {GATE}.weight", f"{GATE}.bias"]),
        ({"extra": {"model.layers.1.mlp.gat.weight": torch.ones(1)}},
         ["unused model.layers.1.mlp.gat.weight"]),
        ({"extra": {f"{GATE}.weight": torch.ones(40, 41)}}, [f"misshapen {GATE}.weight [40, 41]"]),
        ({"drop": ("model.norm.weight",), "extra": {"model.nrm.weight": torch.ones(40)}},
         ["missing model.norm.weight", "unused model.nrm.weight"]),
    ],
)  # fmt: skip
def test_g23_unknown_and_missing_names_are_errors(
    tmp_path: Path, options: dict[str, Any], messages: list[str]
) -> None:
    with pytest.raises(ConversionError) as caught:
        gated(tmp_path, **options)
    for message in messages:
        assert message in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_g23_gate_proj_is_not_a_gate(tmp_path: Path) -> None:
    """Swapping the two names would still load: d x d on both sides. The numbers tell."""
    shape = {"hidden_size": 40, "intermediate_size": 40}
    path, oracle = gated(tmp_path, shape)
    tensors = read(path).tensors
    packed, gate = tensors["layers.0.mlp.gate_up.weight"], tensors["layers.0.mlp.gate.weight"]
    assert isinstance(packed, Weight) and isinstance(gate, Weight)
    mlp = "model.layers.0.mlp"
    assert torch.equal(packed.dense()[0, :40], oracle.state[f"{mlp}.module.gate_proj.weight"])
    assert torch.equal(gate.dense()[0], oracle.state[f"{mlp}.gate.gate.weight"])

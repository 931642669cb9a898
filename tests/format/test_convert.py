"""Round trips: every number of a source is in the folder, at the place the runtime looks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pyruntime.format import inspect
from pyruntime.format.convert import convert
from pyruntime.format.load import read
from pyruntime.format.spec import decoder_tensors
from pyruntime.ops.weight import Weight
from tests.checkpoints import State, write_hf_folder

PROJECTIONS = {
    "attn.q": ("self_attn.q_proj",), "attn.kv": ("self_attn.k_proj", "self_attn.v_proj"),
    "attn.o": ("self_attn.o_proj",), "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",), "attn.norm": ("input_layernorm",),
    "mlp.norm": ("post_attention_layernorm",), "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
}  # fmt: skip


def values(tensor: Tensor | Weight) -> Tensor:
    return tensor.dense()[0] if isinstance(tensor, Weight) else tensor


def expected(state: State, name: str) -> Tensor:
    """The tensor of our `name`, put together from the Hugging Face names."""
    parts, (module, suffix) = name.split("."), name.rsplit(".", 1)
    if parts[0] != "layers":
        theirs = {"embed": "model.embed_tokens", "norm": "model.norm"}.get(module, module)
        return state[f"{theirs}.{suffix}"]
    ours = ".".join(parts[2:-1])
    names = [f"model.layers.{parts[1]}.{theirs}.{suffix}" for theirs in PROJECTIONS[ours]]
    return torch.cat([state[name] for name in names])


def check(folder: Path, state: State) -> None:
    container = read(folder)
    for spec in decoder_tensors(container.spec, None):
        found = values(container.tensors[spec.name])
        assert found.shape == spec.shape
        assert found.dtype == getattr(torch, spec.dtype)
        assert torch.equal(found, expected(state, spec.name).to(found.dtype)), spec.name


@pytest.mark.parametrize("files", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "shape",
    [
        {"family": "llama"},
        {"family": "llama", "tie": True, "head_dim": None, "num_kv_heads": 5, "shards": 3},
        {"family": "llama", "attention_bias": True, "mlp_bias": True, "intermediate_size": 47},
        {"family": "qwen2", "hidden_size": 33, "num_heads": 3, "num_kv_heads": 3, "shards": 2},
        {"family": "qwen3", "num_heads": 4, "num_kv_heads": 2, "head_dim": 18, "tie": True},
        {"family": "qwen3", "attention_bias": True, "vocab_size": 259, "num_layers": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(tmp_path: Path, shape: dict[str, Any], files: str, dtype: torch.dtype) -> None:
    state = write_hf_folder(tmp_path / "src", files=files, dtype=dtype, **shape)
    report = convert(tmp_path / "src", tmp_path / "dst", shard_bytes=20_000)
    wanted = "float32" if dtype == torch.float32 else "bfloat16"
    assert report.spec.dtype == wanted
    assert report.shards > 1
    assert any("float16 weights" in note for note in report.notes) == (dtype == torch.float16)
    check(tmp_path / "dst", state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_explicit_dtype(tmp_path: Path, dtype: Any) -> None:
    state = write_hf_folder(tmp_path / "src", dtype=torch.float16)
    assert convert(tmp_path / "src", tmp_path / "dst", dtype=dtype).spec.dtype == dtype
    check(tmp_path / "dst", state)


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 128},
    ],
)  # fmt: skip
def test_config_of_both_transformers(tmp_path: Path, modern: bool, scaling: Any) -> None:
    write_hf_folder(tmp_path / "src", modern_config=modern, rope_scaling=scaling, rope_theta=5e5)
    spec = convert(tmp_path / "src", tmp_path / "dst").spec
    assert (spec.rope_theta, spec.rope_scaling) == (5e5, scaling)


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, {"attention_factor": 0.1 * math.log(4) + 1, "original_max_position_embeddings": 256}),
        ({"attention_factor": 1.5, "beta_fast": 8, "truncate": False}, {
            "original_max_position_embeddings": 256}),
        ({"mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 64}, {
            "attention_factor": (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)}),
        ({"attention_factor": None, "original_max_position_embeddings": 64}, {
            "attention_factor": 0.1 * math.log(4) + 1}),
    ],
)  # fmt: skip
def test_yarn_is_written_out(
    tmp_path: Path, given: dict[str, Any], missing: dict[str, Any]
) -> None:
    given = {"rope_type": "yarn", "factor": 4.0, **given}
    write_hf_folder(tmp_path / "src", rope_scaling=given)
    scaling = convert(tmp_path / "src", tmp_path / "dst").spec.rope_scaling
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    expected = {**defaults, **given, **missing}
    assert scaling == {k: v for k, v in expected.items() if not k.startswith("mscale")}


def test_longrope_reaches_as_far_as_its_short_factors(tmp_path: Path) -> None:
    longrope = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5],
                "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}  # fmt: skip
    write_hf_folder(tmp_path / "src", rope_scaling=longrope)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert report.spec.max_positions == 64
    assert report.spec.rope_scaling == {
        "rope_type": "longrope", "factors": [1.0, 1.5, 2.0, 2.5],
        "attention_factor": math.sqrt(1 + math.log(4) / math.log(64)),
    }  # fmt: skip
    assert any(note.startswith("64 positions, not 256") for note in report.notes)


def test_end_tokens_of_both_configs(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", eos=[2, 7], bos=None)
    (tmp_path / "src/generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    spec = convert(tmp_path / "src", tmp_path / "dst").spec
    assert (spec.eos_token_ids, spec.bos_token_id, spec.pad_token_id) == ((2, 7, 9), None, 0)


def test_harmless_extras_are_accepted(tmp_path: Path) -> None:
    state = write_hf_folder(tmp_path / "src", tie=True)
    extra = {
        "lm_head.weight": state["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    write_hf_folder(tmp_path / "src", tie=True, extra=extra)
    convert(tmp_path / "src", tmp_path / "dst")
    check(tmp_path / "dst", state)


def test_any_safetensors_reader_reads_the_folder(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", dtype=torch.bfloat16, vocab_size=301, hidden_size=41)
    convert(tmp_path / "src", tmp_path / "dst")
    (path,) = (tmp_path / "dst").glob("weights-*.safetensors")
    with safe_open(path, framework="pt") as file:
        panels = [name for name in file.keys() if len(file.get_slice(name).get_shape()) == 5]
        assert panels
        # What the kernels' aligned loads rely on.
        assert all(file.get_tensor(name).data_ptr() % 64 == 0 for name in panels)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    report = convert(tmp_path / "src", tmp_path / "dst", dry_run=True)
    assert str(report).startswith("would convert")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    seen: list[tuple[int, int]] = []
    report = convert(tmp_path / "src", tmp_path / "dst", progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (report.bytes, report.bytes)


def test_tokenizer_travels_and_inspect_tells(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()
    facts = inspect.describe(tmp_path / "dst")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["tokenizer"] is True
    state = write_hf_folder(tmp_path / "src")
    assert facts["parameters"]["total"] == sum(tensor.numel() for tensor in state.values())
    assert facts["provenance"]["command"].startswith("pyruntime convert ")
    text = inspect.text(tmp_path / "dst")
    assert "llama decoder, float32" in text
    assert "gates" in text


def test_without_tokenizer_the_report_says_so(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", tokenizer=False)
    report = convert(tmp_path / "src", tmp_path / "dst")
    assert any("tokenizer.json" in note for note in report.notes)
    assert not inspect.describe(tmp_path / "dst")["tokenizer"]

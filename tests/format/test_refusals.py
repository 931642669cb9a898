"""What cannot be converted is refused whole: every problem named, the destination untouched."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import ConversionError, UnsupportedModel
from pyruntime.format.convert import convert
from tests.checkpoints import write_hf_folder

LAYER = "model.layers.1"


def refusal(tmp_path: Path, source: str = "src", **options: Any) -> str:
    """The message of a refused conversion, after checking that nothing was left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / source, tmp_path / "dst", **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported (supported: llama,"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented (must be 'silu')"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor must be a number, is '4'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is not implemented"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling longrope lacks factors"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "1 rope factors, "),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {}}}, "differ between layers"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling linear lacks factor"),
        ({"use_sliding_window": True}, "use_sliding_window True is not implemented"),
        ({"layer_types": ["sliding_attention"]}, "layer_types 'sliding_attention'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": "40"}, "hidden_size must be a positive integer, is '40'"),
        ({"vocab_size": None}, "vocab_size must be a positive integer, is None"),
        ({"num_key_value_heads": 2}, "num_heads 5 is not a multiple of num_kv_heads 2"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"rope_theta": "big"}, "rope_theta must be a number, is 'big'"),
        ({"rope_theta": -1}, "rope_theta -1.0 is negative"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps must be a number, is inf"),
        ({"eos_token_id": 999}, "eos_token_ids holds 999"),
    ],
)
def test_config(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write_hf_folder(tmp_path / "src", config_extra=config)
    text = refusal(tmp_path)
    assert message in text
    assert "\n" not in text


def test_all_config_problems_at_once(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", config_extra={"hidden_act": "relu", "num_hidden_layers": 0})
    with pytest.raises(UnsupportedModel) as caught:
        convert(tmp_path / "src", tmp_path / "dst")
    assert len(str(caught.value).splitlines()) == 2


def test_all_tensor_problems_at_once(tmp_path: Path) -> None:
    extra = {
        f"{LAYER}.self_attn.query_proj.weight": torch.ones(40, 40),
        f"{LAYER}.mlp.up_proj.weight": torch.ones(51, 40),
        f"{LAYER}.mlp.down_proj.weight": torch.ones(40, 52, dtype=torch.int8),
        "model.layers.7.input_layernorm.weight": torch.ones(40),
    }
    write_hf_folder(tmp_path / "src", extra=extra, drop=(f"{LAYER}.self_attn.q_proj.weight",))
    lines = refusal(tmp_path).splitlines()
    assert lines[0].endswith("5 problems")
    query = f"{LAYER}.self_attn.query_proj.weight"
    assert set(lines[1:]) == {
        f"missing {LAYER}.self_attn.q_proj.weight [40, 40], nearest name: {query}",
        f"unused {query} [40, 40], nearest name: {LAYER}.self_attn.q_proj.weight",
        "unused model.layers.7.input_layernorm.weight [40], "
        "nearest name: model.layers.0.input_layernorm.weight",
        f"misshapen {LAYER}.mlp.up_proj.weight [51, 40], expected [52, 40]",
        f"mistyped {LAYER}.mlp.down_proj.weight I8, expected float32 or float16 or bfloat16",
    }


def test_tied_head_that_differs(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", tie=True, extra={"lm_head.weight": torch.ones(300, 40)})
    assert "contradicting lm_head.weight: differs from model.embed_tokens" in refusal(tmp_path)


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_tensor_that_is_not_finite(tmp_path: Path, dry_run: bool) -> None:
    names = ["model.embed_tokens.weight", f"{LAYER}.self_attn.v_proj.weight", "model.norm.weight"]
    state = write_hf_folder(tmp_path / "src")
    for name, value in zip(names, (float("nan"), float("inf"), float("-inf")), strict=True):
        state[name].view(-1)[-1] = value
    write_hf_folder(tmp_path / "src", extra={name: state[name] for name in names})
    text = refusal(tmp_path, shard_bytes=5000, dry_run=dry_run)
    assert [line.split(":")[0] for line in text.splitlines()] == sorted(names)


def test_float32_too_large_for_bfloat16(tmp_path: Path) -> None:
    state = write_hf_folder(tmp_path / "src")
    state["lm_head.weight"][0, 0] = torch.finfo(torch.float32).max
    write_hf_folder(tmp_path / "src", extra={"lm_head.weight": state["lm_head.weight"]})
    assert "lm_head.weight: NaN, infinity, or out of range of bfloat16" in refusal(
        tmp_path, dtype="bfloat16"
    )


class Bomb:
    """Unpickling this runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_pickles_with_code(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", files="bin", extra={"x": Bomb()})  # type: ignore[dict-item]
    text = refusal(tmp_path)
    assert "holds code or objects" in text
    assert "(exec)" in text
    assert "\n" not in text
    (tmp_path / "src/pytorch_model.bin").write_bytes(pickle.dumps({"x": Bomb()}))
    assert "bare pickles are not read" in refusal(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    write_hf_folder(tmp_path / "bin", files="bin")
    for path in (tmp_path / "src/model.safetensors", tmp_path / "bin/pytorch_model.bin"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        text = refusal(tmp_path, path.parent.name)
        assert str(path) in text
        assert "\n" not in text


def test_index_problems_are_listed_together(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src", shards=3)
    index = tmp_path / "src/model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = table["weight_map"]["model.norm.weight"]
    (tmp_path / "src" / next(f for f in table["weight_map"].values() if f != first)).unlink()
    table["weight_map"] |= {"model.ghost": first, "model.thief": "../../etc/passwd"}
    index.write_text(json.dumps(table))
    text = refusal(tmp_path)
    for part in ("no such file", "lacks model.ghost", "'../../etc/passwd' is not in this folder"):
        assert part in text
    assert len(text.splitlines()) == 3


def test_sources_that_are_none(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path)
    (tmp_path / "src").mkdir()
    assert "config.json: cannot be read" in refusal(tmp_path)
    write_hf_folder(tmp_path / "src")
    (tmp_path / "src/model.safetensors").unlink()
    assert "no weights: looked for" in refusal(tmp_path)
    assert "base given" in refusal(tmp_path, base=tmp_path)
    assert "dtype must be" in refusal(tmp_path, dtype="int3")


def test_destinations(tmp_path: Path) -> None:
    write_hf_folder(tmp_path / "src")
    dst = tmp_path / "dst"
    dst.write_text("a file")
    assert "exists already" in refusal(tmp_path)
    assert "not a model folder" in refusal(tmp_path, overwrite=True)
    dst.unlink()
    dst.mkdir()
    convert(tmp_path / "src", dst)
    assert "exists already" in refusal(tmp_path)
    (dst / "marker").touch()
    convert(tmp_path / "src", dst, overwrite=True)
    assert not (dst / "marker").exists()
    (dst / "runtime.json").unlink()
    assert "not a model folder" in refusal(tmp_path, overwrite=True)

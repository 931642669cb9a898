"""Random checkpoints in the formats that users bring: Hugging Face folders and GateSkip files.

Every writer returns the state dict it saved, so that a test can compare numbers. Shapes are odd on
purpose: nothing in the runtime may depend on multiples of anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def write_hf_folder(
    path: str | Path,
    *,
    family: str = "llama",
    vocab_size: int = 300,
    hidden_size: int = 40,
    num_layers: int = 3,
    num_heads: int = 5,
    num_kv_heads: int = 1,
    head_dim: int | None = 8,
    intermediate_size: int = 52,
    max_positions: int = 256,
    norm_eps: float = 1e-5,
    rope_theta: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    tie: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    bos: int | None = 1,
    eos: int | list[int] | None = 2,
    pad: int | None = 0,
    dtype: torch.dtype = torch.float32,
    std: float = 0.2,
    seed: int = 0,
    files: str = "safetensors",
    shards: int = 1,
    modern_config: bool = False,
    tokenizer: bool = True,
    config_extra: dict[str, Any] | None = None,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
) -> State:
    """Write a random-weight model folder and return its state dict (dtype as stored).

    `head_dim` None leaves it out of config.json (hidden_size / num_heads). `files` is
    "safetensors" or "bin", `shards` > 1 writes an index. `modern_config` uses the key names of
    transformers 5. `tokenizer` adds a byte-level tokenizer: ids 0, 1, 2 are pad, bos, eos and byte
    b is 3 + b, so `vocab_size` must be at least 259. `extra` adds or replaces tensors, `drop`
    removes some, to make the folder wrong.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    width = head_dim or hidden_size // num_heads
    qkv_bias = attention_bias or family == "qwen2"
    random = torch.Generator().manual_seed(seed)
    state: State = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=random) * std
        if bias:
            state[f"{name}.bias"] = torch.randn(rows, generator=random) * std

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(size, generator=random) * 0.1

    matrix("model.embed_tokens", vocab_size, hidden_size)
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", hidden_size)
        matrix(f"{layer}.self_attn.q_proj", num_heads * width, hidden_size, qkv_bias)
        matrix(f"{layer}.self_attn.k_proj", num_kv_heads * width, hidden_size, qkv_bias)
        matrix(f"{layer}.self_attn.v_proj", num_kv_heads * width, hidden_size, qkv_bias)
        matrix(f"{layer}.self_attn.o_proj", hidden_size, num_heads * width, attention_bias)
        if family == "qwen3":
            norm(f"{layer}.self_attn.q_norm", width)
            norm(f"{layer}.self_attn.k_norm", width)
        norm(f"{layer}.post_attention_layernorm", hidden_size)
        matrix(f"{layer}.mlp.gate_proj", intermediate_size, hidden_size, mlp_bias)
        matrix(f"{layer}.mlp.up_proj", intermediate_size, hidden_size, mlp_bias)
        matrix(f"{layer}.mlp.down_proj", hidden_size, intermediate_size, mlp_bias)
    norm("model.norm", hidden_size)
    if not tie:
        matrix("lm_head", vocab_size, hidden_size)
    state = {name: tensor.to(dtype) for name, tensor in state.items() if name not in drop}
    state |= extra or {}

    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu",
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        "intermediate_size": intermediate_size, "max_position_embeddings": max_positions,
        "rms_norm_eps": norm_eps, "tie_word_embeddings": tie,
        "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad,
    }  # fmt: skip
    if head_dim is not None:
        config["head_dim"] = head_dim
    if family != "qwen2":
        config["attention_bias"] = attention_bias
    if family == "llama":
        config["mlp_bias"] = mlp_bias
    name = str(dtype).removeprefix("torch.")
    if modern_config:
        rope = {"rope_type": "default", **(rope_scaling or {}), "rope_theta": rope_theta}
        config |= {"dtype": name, "rope_parameters": rope}
    else:
        config |= {"torch_dtype": name, "rope_theta": rope_theta, "rope_scaling": rope_scaling}
    write_json(folder / "config.json", config | (config_extra or {}))
    write_weights(folder, state, files, shards)
    if tokenizer:
        write_tokenizer(folder)
    return state


def write_gateskip_pt(
    path: str | Path,
    base_folder: str | Path,
    gate_type: str = "vector",
    *,
    mlp_scalar: bool = False,
    shared: bool = False,
    gating_mode: str = "after_module",
    actually_gate: bool = True,
    gate_attention: bool = True,
    gate_mlp: bool = True,
    adapter: bool = False,
    prefix: str = "",
    wrapper: str | None = None,
    bias: float = 1.0,
    std: float = 0.2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tied_copy: bool = False,
    sidecar: dict[str, Any] | None = None,
    write_sidecar: bool = True,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
) -> State:
    """Wrap the model of `base_folder` (from `write_hf_folder`) in random gates; write a `.pt`.

    Returns the state dict under GateSkip's plain names (`model.layers.0.self_attn.gate.gate.weight`
    and so on), before `prefix` ("model.", "base_model.model.", "module."), before `wrapper`
    ("state_dict") and before `adapter` reduces the file to `attn_{i}` / `mlp_{i}` gates alone.
    `bias` and `std` set the gate's output bias and its weights: trained-looking gates spread, the
    official start (5.0, 0.01) hardly does. `sidecar` replaces keys of the JSON beside the file;
    a value of None removes the key.
    """
    path, base = Path(path), Path(base_folder)
    random = torch.Generator().manual_seed(seed + 1)
    config = json.loads((base / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=random) * std

    def make_gate() -> State:
        if gate_type == "mlp":
            out = 1 if mlp_scalar else hidden
            return {
                "0.weight": normal(2 * hidden, hidden),
                "0.bias": normal(1, 2 * hidden)[0],
                "2.weight": normal(out, 2 * hidden),
                "2.bias": bias + normal(1, out)[0],
            }
        out = 1 if gate_type == "scalar" else hidden
        return {"weight": normal(out, hidden), "bias": bias + normal(1, out)[0]}

    gated = {"self_attn": gate_attention, "mlp": gate_mlp}
    once = {branch: make_gate() for branch in gated}
    gates: State = {}
    for i in range(layers):
        for branch, on in gated.items():
            tensors = once[branch] if shared else make_gate()
            for name, tensor in tensors.items() if on else ():
                gates[f"model.layers.{i}.{branch}.gate.gate.{name}"] = tensor.to(dtype).clone()
    state: State = {}
    for name, tensor in read_hf_folder(base).items():
        for branch, on in gated.items():
            if on:
                name = name.replace(f".{branch}.", f".{branch}.module.")
        state[name] = tensor.to(dtype)
    state |= gates
    if tied_copy:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state = {name: tensor for name, tensor in state.items() if name not in drop} | (extra or {})

    saved: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if adapter:
        saved = {}
        for name, tensor in gates.items():
            _, _, i, branch, _, rest = name.split(".", 5)
            key = f"{'attn' if branch == 'self_attn' else 'mlp'}_{i}"
            saved.setdefault(key, {})[rest] = tensor
    if wrapper is not None:
        saved = {wrapper: saved, "epoch": 3}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, path)
    if write_sidecar:
        notes: dict[str, Any] = {
            "base_model": str(_relative(base, path.parent)), "gate_type": gate_type,
            "mlp_scalar": mlp_scalar, "shared": shared, "gating_mode": gating_mode,
            "actually_gate": actually_gate, "gate_attention": gate_attention,
            "gate_mlp": gate_mlp, "rule": "calibrated", "skip_ratio": 0.0, "kv_mode": "dense",
        }  # fmt: skip
        notes |= sidecar or {}
        notes = {key: value for key, value in notes.items() if value is not None}
        write_json(path.with_suffix(".json"), notes)
    return state


def read_hf_folder(path: str | Path) -> State:
    """Every tensor of a folder that `write_hf_folder` wrote."""
    from safetensors.torch import load_file

    state: State = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        state |= load_file(file)
    for file in sorted(Path(path).glob("*.bin")):
        state |= torch.load(file, weights_only=True)
    return state


def _relative(target: Path, start: Path) -> Path:
    import os

    return Path(os.path.relpath(target.resolve(), start.resolve()))


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def write_weights(folder: Path, state: State, files: str, shards: int) -> None:
    stem, suffix = ("model", "safetensors") if files == "safetensors" else ("pytorch_model", "bin")

    def save(part: State, name: str) -> None:
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            # safetensors refuses storages that are shared, which a tied copy is.
            save_file({k: v.clone().contiguous() for k, v in part.items()}, folder / name)

    if shards == 1:
        return save(state, f"{stem}.{suffix}")
    names = list(state)
    where: dict[str, str] = {}
    for n in range(shards):
        file = f"{stem}-{n + 1:05d}-of-{shards:05d}.{suffix}"
        part = names[n::shards]
        save({name: state[name] for name in part}, file)
        where |= dict.fromkeys(part, file)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": where})


def write_tokenizer(folder: Path) -> None:
    # GPT-2's byte alphabet: printable bytes stand for themselves, the others are moved up.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    special = ["<pad>", "<s>", "</s>"]
    vocab = {word: n for n, word in enumerate(special)}
    vocab |= {letters[byte]: 3 + byte for byte in range(256)}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": n, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for n, word in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": [],
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False},
    })  # fmt: skip
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": "<pad>", "add_bos_token": True,
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
                         "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    })  # fmt: skip

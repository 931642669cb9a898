"""Random mixture-of-experts checkpoints, in every form in which such models are stored.

`write_moe_folder` returns what a conversion must find, under the runtime's names: numbers are made
first, and then laid out as the family does it. Nothing here uses the converter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import State, write_json, write_tokenizer, write_weights

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "olmoe": "OlmoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM", "phimoe": "PhiMoEForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip
# family: (prefix of the experts' block, router, per-expert names, fused names)
_QWEN = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("experts.gate_up_proj", "experts.down_proj")
_LAYOUTS: dict[str, tuple[str, str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", "gate", ("w1", "w3", "w2")),
    "phimoe": ("block_sparse_moe", "gate", ("w1", "w3", "w2")),
    "granitemoe": ("block_sparse_moe", "router.layer", _QWEN),
    "gpt_oss": ("mlp", "router", _QWEN),
}
MXFP4_VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
FP8_BLOCK = (16, 24)


def write_moe_folder(
    path: str | Path,
    family: str = "mixtral",
    *,
    form: str = "apart",
    experts: int = 5,
    top_k: int = 2,
    expert_size: int = 21,
    hidden_size: int = 40,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 10,
    intermediate_size: int = 52,
    vocab_size: int = 300,
    max_positions: int = 256,
    shared_size: int = 27,
    q_rank: int | None = 22,
    kv_rank: int = 26,
    nope_dim: int = 12,
    rope_dim: int = 6,
    value_dim: int = 14,
    dense_layers: tuple[int, ...] = (),
    tie: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    std: float = 0.2,
    seed: int = 0,
    shards: int = 1,
    files: str = "safetensors",
    tokenizer: bool = True,
    config_extra: dict[str, Any] | None = None,
    extra: State | None = None,
    drop: tuple[str, ...] = (),
) -> State:
    """Write a random model folder; return the tensors of the converted one, in float32 or `dtype`.

    `form`: "apart" (a tensor for every expert; Granite and gpt-oss have none), "fused" (as
    transformers 5 has them in memory), "mxfp4" (gpt-oss), "fp8" (DeepSeek-V3). `bias`: attention
    has biases, and Phi's head. DeepSeek's shared expert is twice `expert_size` wide. `extra` adds
    or replaces stored tensors, `drop` removes some.
    """
    model = _Model(family, form, seed, std, dtype, experts, expert_size, hidden_size)
    latent = family.startswith("deepseek")
    model.matrix("embed", "model.embed_tokens", vocab_size, hidden_size)
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        model.norm(f"layers.{i}.attn.norm", f"{layer}.input_layernorm")
        if latent:
            ranks = (q_rank, kv_rank, nope_dim, rope_dim, value_dim)
            model.latent_attention(i, num_heads, *ranks)
        else:
            model.attention(i, num_heads, num_kv_heads, head_dim, bias)
        model.norm(f"layers.{i}.mlp.norm", f"{layer}.post_attention_layernorm")
        if i in dense_layers:
            model.gated(f"layers.{i}.mlp", f"{layer}.mlp", intermediate_size)
        else:
            model.experts(i, shared_size)
    model.norm("norm", "model.norm")
    if not tie:
        model.matrix("lm_head", "lm_head", vocab_size, hidden_size, bias and family == "phimoe")
    stored = {name: t for name, t in model.stored.items() if name not in drop} | (extra or {})

    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]], "model_type": family, "hidden_act": "silu",
        "vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads,
        "intermediate_size": expert_size, "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6 if latent else 1e-5, "tie_word_embeddings": tie,
        "rope_theta": 10000.0, "num_experts_per_tok": top_k,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    if latent:
        config |= {
            "n_routed_experts": experts, "n_shared_experts": 2, "intermediate_size":
            intermediate_size, "moe_intermediate_size": expert_size, "kv_lora_rank": kv_rank,
            "q_lora_rank": q_rank, "qk_nope_head_dim": nope_dim, "qk_rope_head_dim": rope_dim,
            "v_head_dim": value_dim, "num_key_value_heads": num_heads,
            "first_k_dense_replace": len(dense_layers), "n_group": 1, "topk_group": 1,
        }  # fmt: skip
    elif family.startswith("qwen"):
        config |= {
            "num_experts": experts, "moe_intermediate_size": expert_size, "intermediate_size":
            intermediate_size, "mlp_only_layers": list(dense_layers), "head_dim": head_dim,
        }  # fmt: skip
        config["shared_expert_intermediate_size"] = shared_size
    else:
        config |= {"num_local_experts": experts, "head_dim": head_dim}
    if family == "gpt_oss":
        config |= {"rope_scaling": {"rope_type": "default"}, "sliding_window": 7}
    if family not in ("mixtral", "qwen2_moe"):
        config["attention_bias"] = bias or family == "gpt_oss"
    if family == "phimoe":
        config["lm_head_bias"] = bias
    if form == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(FP8_BLOCK),
        }  # fmt: skip
    if form == "mxfp4":
        config["quantization_config"] = {"quant_method": "mxfp4"}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config | (config_extra or {}))
    write_weights(folder, stored, files, shards)
    if tokenizer:
        write_tokenizer(folder)
    return model.found


class _Model:
    """`stored` is the checkpoint, `found` the runtime's tensors made of the same numbers."""

    def __init__(
        self,
        family: str,
        form: str,
        seed: int,
        std: float,
        dtype: torch.dtype,
        experts: int,
        inner: int,
        d: int,
    ) -> None:
        self.stored: State = {}
        self.found: State = {}
        self.family, self.form, self.std, self.dtype = family, form, std, dtype
        self.count, self.inner, self.d = experts, inner, d
        self.random = torch.Generator().manual_seed(seed)
        self.layer_norm = family == "phimoe"

    def normal(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.random) * self.std).to(self.dtype)

    def put(self, name: str, rows: int, columns: int) -> Tensor:
        """A stored matrix; quantised where the form says so. Returns its numbers."""
        if self.form != "fp8" or not name.startswith("model.layers") or name.endswith("mlp.gate"):
            self.stored[f"{name}.weight"] = self.normal(rows, columns)
            return self.stored[f"{name}.weight"]
        height, width = FP8_BLOCK
        numbers = torch.randn(rows, columns, generator=self.random) * 100
        numbers = numbers.to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // height), -(-columns // width), generator=self.random) / 400
        self.stored[f"{name}.weight"] = numbers
        self.stored[f"{name}.weight_scale_inv"] = scales
        whole = torch.empty(rows, columns)
        for r in range(rows):
            for c in range(columns):
                whole[r, c] = numbers[r, c].float() * scales[r // height, c // width]
        return whole

    def matrix(self, ours: str, theirs: str, rows: int, columns: int, bias: bool = False) -> None:
        self.found[f"{ours}.weight"] = self.put(theirs, rows, columns)
        if bias:
            self.stored[f"{theirs}.bias"] = self.normal(rows)
            self.found[f"{ours}.bias"] = self.stored[f"{theirs}.bias"].float()

    def norm(self, ours: str, theirs: str, size: int | None = None) -> None:
        """A layer norm where the family has them, unless `size` names an inner one."""
        weight = 1 + self.normal(size or self.d)
        self.stored[f"{theirs}.weight"], self.found[f"{ours}.weight"] = weight, weight.float()
        if self.layer_norm and size is None:
            self.stored[f"{theirs}.bias"] = self.normal(self.d)
            self.found[f"{ours}.bias"] = self.stored[f"{theirs}.bias"].float()

    def gated(self, ours: str, theirs: str, inner: int) -> None:
        parts = [self.put(f"{theirs}.{name}_proj", inner, self.d) for name in ("gate", "up")]
        self.found[f"{ours}.gate_up.weight"] = torch.cat(parts)
        self.matrix(f"{ours}.down", f"{theirs}.down_proj", self.d, inner)

    def attention(self, i: int, heads: int, kv_heads: int, width: int, bias: bool) -> None:
        ours, theirs = f"layers.{i}.attn", f"model.layers.{i}.self_attn"
        inside = bias or self.family in ("qwen2_moe", "gpt_oss")
        outside = inside and self.family != "qwen2_moe"
        self.matrix(f"{ours}.q", f"{theirs}.q_proj", heads * width, self.d, inside)
        for part in ("k", "v"):
            name = f"{theirs}.{part}_proj"
            self.matrix(f"{ours}.{part}", name, kv_heads * width, self.d, inside)
        for suffix in ("weight", "bias") if inside else ("weight",):
            parts = [self.found.pop(f"{ours}.{part}.{suffix}") for part in ("k", "v")]
            self.found[f"{ours}.kv.{suffix}"] = torch.cat(parts)
        self.matrix(f"{ours}.o", f"{theirs}.o_proj", self.d, heads * width, outside)
        if self.family in ("qwen3_moe", "olmoe"):
            whole = self.family == "olmoe"
            self.norm(f"{ours}.q_norm", f"{theirs}.q_norm", width * (heads if whole else 1))
            self.norm(f"{ours}.k_norm", f"{theirs}.k_norm", width * (kv_heads if whole else 1))
        if self.family == "gpt_oss":
            self.stored[f"{theirs}.sinks"] = self.normal(heads)
            self.found[f"{ours}.sinks"] = self.stored[f"{theirs}.sinks"].float()

    def latent_attention(
        self, i: int, heads: int, q_rank: int | None, rank: int, nope: int, rope: int, value: int
    ) -> None:
        ours, theirs = f"layers.{i}.attn", f"model.layers.{i}.self_attn"
        halves = [*range(0, rope, 2), *range(1, rope, 2)]
        if q_rank is not None:
            self.matrix(f"{ours}.q_a", f"{theirs}.q_a_proj", q_rank, self.d)
            self.norm(f"{ours}.q_a_norm", f"{theirs}.q_a_layernorm", q_rank)
        name = "q_proj" if q_rank is None else "q_b_proj"
        query = self.put(f"{theirs}.{name}", heads * (nope + rope), q_rank or self.d)
        query = query.unflatten(0, (heads, nope + rope))
        self.found[f"{ours}.q_nope.weight"] = query[:, :nope].flatten(0, 1)
        self.found[f"{ours}.q_rope.weight"] = query[:, nope:][:, halves].flatten(0, 1)
        down = self.put(f"{theirs}.kv_a_proj_with_mqa", rank + rope, self.d)
        down = torch.cat([down[:rank], down[rank:][halves]])
        self.found[f"{ours}.kv_a.weight"] = down
        self.norm(f"{ours}.kv_a_norm", f"{theirs}.kv_a_layernorm", rank)
        both = self.put(f"{theirs}.kv_b_proj", heads * (nope + value), rank)
        both = both.unflatten(0, (heads, nope + value))
        self.found[f"{ours}.k_b.weight"] = both[:, :nope].transpose(1, 2)
        self.found[f"{ours}.v_b.weight"] = both[:, nope:]
        self.matrix(f"{ours}.o", f"{theirs}.o_proj", self.d, heads * value)

    def experts(self, i: int, shared: int) -> None:
        ours, layer = f"layers.{i}.mlp", f"model.layers.{i}"
        block, router, names = _LAYOUTS.get(self.family, ("mlp", "gate", _QWEN))
        fused = self.form == "fused"
        if fused:
            block = block if self.family == "granitemoe" else "mlp"
            router = "router" if self.family in ("phimoe", "gpt_oss", "granitemoe") else "gate"
        self.matrix(f"{ours}.router", f"{layer}.{block}.{router}", self.count, self.d,
                    self.family == "gpt_oss")  # fmt: skip
        if self.family == "deepseek_v3":
            correction = torch.randn(self.count, generator=self.random)
            self.stored[f"{layer}.mlp.gate.e_score_correction_bias"] = correction
            self.found[f"{ours}.router.selection_bias"] = correction
        if self.family == "gpt_oss":
            self._gpt_oss(f"{ours}.experts", f"{layer}.mlp.experts")
        elif fused or self.family == "granitemoe":
            gate_up = self.normal(self.count, 2 * self.inner, self.d)
            down = self.normal(self.count, self.d, self.inner)
            pair = ("input_linear.weight", "output_linear.weight")
            for name, tensor in zip(_FUSED if fused else pair, (gate_up, down), strict=True):
                self.stored[f"{layer}.{block}.{name}"] = tensor
        else:
            triples = []
            for e in range(self.count):
                sizes = ((self.inner, self.d), (self.inner, self.d), (self.d, self.inner))
                triples.append([
                    self.put(f"{layer}.{block}.experts.{e}.{name}", *size)
                    for name, size in zip(names, sizes, strict=True)
                ])  # fmt: skip
            gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in triples])
            down = torch.stack([down for _, _, down in triples])
        if self.family != "gpt_oss":
            self.found[f"{ours}.experts.gate_up.weight"] = gate_up
            self.found[f"{ours}.experts.down.weight"] = down
        if self.family == "qwen2_moe":
            self.gated(f"{ours}.shared", f"{layer}.mlp.shared_expert", shared)
            gate = self.put(f"{layer}.mlp.shared_expert_gate", 1, self.d)
            self.found[f"{ours}.shared.gate.weight"] = gate.float()
        elif self.family.startswith("deepseek"):
            self.gated(f"{ours}.shared", f"{layer}.mlp.shared_experts", 2 * self.inner)

    def _gpt_oss(self, ours: str, theirs: str) -> None:
        """Gate and up rows alternate; bfloat16 matrices are transposed, MXFP4 ones are not."""
        for name, part, rows, columns in (
            ("gate_up_proj", "gate_up", 2 * self.inner, self.d),
            ("down_proj", "down", self.d, self.inner),
        ):
            bias = self.normal(self.count, rows)
            if self.form == "mxfp4":
                matrix = self._mxfp4(f"{theirs}.{name}", rows, columns)
            else:
                matrix = self.normal(self.count, rows, columns)
                self.stored[f"{theirs}.{name}"] = matrix.transpose(1, 2).contiguous()
            self.stored[f"{theirs}.{name}_bias"] = bias
            if part == "gate_up":
                matrix = torch.cat([matrix[:, 0::2], matrix[:, 1::2]], dim=1)
                bias = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
            self.found[f"{ours}.{part}.weight"] = matrix
            self.found[f"{ours}.{part}.bias"] = bias.float()

    def _mxfp4(self, name: str, rows: int, columns: int) -> Tensor:
        shape = (self.count, rows, columns // 32, 32)
        codes = torch.randint(0, 16, shape, generator=self.random, dtype=torch.uint8)
        scales = torch.randint(120, 128, shape[:3], generator=self.random, dtype=torch.uint8)
        self.stored[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        self.stored[f"{name}_scales"] = scales
        values = torch.tensor(MXFP4_VALUES)[codes.int()]
        return (values * 2.0 ** (scales[..., None].float() - 127)).flatten(2)

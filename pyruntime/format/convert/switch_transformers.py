"""The encoder of Switch Transformers (arXiv 2101.03961); their decoder is left out."""

from __future__ import annotations

from types import MappingProxyType

from pyruntime.errors import FormatError, UnsupportedModel
from pyruntime.format.convert.checkpoint import Checkpoint
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.derive import Derivation
from pyruntime.format.convert.family import Modules, Reading
from pyruntime.format.spec import EncoderSpec

ARCHITECTURE = "SwitchTransformersForConditionalGeneration"
_BLOCK = "encoder.block.{i}.layer"
_ATTENTION = f"{_BLOCK}.0.SelfAttention"
_MLP = f"{_BLOCK}.1.mlp"
MODULES: Modules = MappingProxyType({
    "embed": ("shared",),
    "position_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",),
    "layers.{i}.attn.norm": (f"{_BLOCK}.0.layer_norm",),
    "layers.{i}.attn.q": (f"{_ATTENTION}.q",),
    "layers.{i}.attn.kv": (f"{_ATTENTION}.k", f"{_ATTENTION}.v"),
    "layers.{i}.attn.o": (f"{_ATTENTION}.o",),
    "layers.{i}.mlp.norm": (f"{_BLOCK}.1.layer_norm",),
    "layers.{i}.mlp.up": (f"{_MLP}.wi",),
    "layers.{i}.mlp.down": (f"{_MLP}.wo",),
    "layers.{i}.mlp.router": (f"{_MLP}.router.classifier",),
    "layers.{i}.mlp.experts.up": (f"{_MLP}.experts.expert_{{e}}.wi",),
    "layers.{i}.mlp.experts.down": (f"{_MLP}.experts.expert_{{e}}.wo",),
    "norm": ("encoder.final_layer_norm",),
})  # fmt: skip


def read(config: Config) -> Reading:
    """config.json -> Reading."""
    config.require("feed_forward_proj", "relu")
    config.require("dense_act_fn", "relu")
    config.require("quantization_config")
    layers = config.integer("num_layers", 12)
    sparse = config.data.get("num_sparse_encoder_layers", 3)
    # transformers' rule: 0 stands for a step of all layers, which leaves one of them sparse.
    step = layers // sparse if type(sparse) is int and sparse > 0 else layers
    spec = None
    try:
        spec = EncoderSpec(
            source_family="switch_transformers",
            vocab_size=config.integer("vocab_size", 32128),
            hidden_size=config.integer("d_model", 768),
            num_layers=layers,
            num_heads=config.integer("num_heads", 12),
            head_dim=config.integer("d_kv", 64),
            intermediate_size=config.integer("d_ff", 2048),
            norm_eps=config.number("layer_norm_epsilon", 1e-6),
            buckets=config.integer("relative_attention_num_buckets", 32),
            max_distance=config.integer("relative_attention_max_distance", 128),
            num_experts=config.integer("num_experts", 8),
            expert_layers=tuple(i for i in range(layers) if step and (step == 1 or i % step == 1)),
            capacity=config.integer("expert_capacity", 64),
            router_bias=config.flag("router_bias"),
            eos_token_ids=config.eos(),
            pad_token_id=config.token("pad_token_id"),
            dtype="float32",
        )
    except FormatError as error:
        config.problems.append(str(error))
    if spec is None or config.problems:
        raise UnsupportedModel("\n".join(f"{config.path}: {text}" for text in config.problems))
    note = "the decoder is left out: only the encoder of a Switch Transformer can be run"
    return Reading(spec, MODULES, _view, (note,), {_EMBED: "shared.weight"})


_EMBED = "encoder.embed_tokens.weight"


def _view(weights: Checkpoint) -> Checkpoint:
    made = Derivation(weights)
    for prefix in ("decoder.", "lm_head."):
        made.drop(prefix)
    return made.result()

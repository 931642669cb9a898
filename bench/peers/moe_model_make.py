"""A Qwen3-MoE folder with random weights, as transformers saves it: what every engine loads.

    PEER_PYTHON bench/peers/moe_model_make.py FOLDER [LAYERS]

703 M parameters in bfloat16, 32 experts of which 4 run per token, and a small byte-level tokenizer,
because the converter to GGUF wants one. Nothing about such a model says anything about accuracy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "moe_intermediate_size": 512, "intermediate_size": 2048, "max_position_embeddings": 2048,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    "tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.02,
}  # fmt: skip


def main() -> None:
    """Writes the folder and prints what is in it."""
    folder = Path(sys.argv[1])
    layers = int(sys.argv[2]) if len(sys.argv) > 2 else SHAPE["num_hidden_layers"]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE | {"num_hidden_layers": layers}))
    model.save_pretrained(folder)
    trained = ByteLevelBPETokenizer()
    special = ["<pad>", "<s>", "</s>"]
    trained.train_from_iterator(["the cat and the hat"] * 9, vocab_size=300, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    print(json.dumps({"parameters": sum(sizes.values()), "in_experts": experts}))


if __name__ == "__main__":
    main()

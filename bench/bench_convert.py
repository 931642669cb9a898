"""How fast is conversion, against a plain copy of the same bytes on the same disk?

Makes a random Llama-shaped checkpoint of at least --gb gigabytes in a temporary folder (or in
--dir), then alternates copy and conversion, each flushed to the disk and each starting with the
source out of the page cache. Conversion runs in a child process, whose peak memory counts from
the moment torch and the converter are imported. Prints one JSON line per row; the last one is the
verdict: ratio of the median rates, and peak memory against 2 x the largest tensor + 300 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 2048, 8192, 32000, 32, 8, 64
CHILD = """
import json, sys, time
import torch
from pyruntime.format.convert import convert
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
before = status("VmRSS")
started = time.perf_counter()
report = convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before, "bytes": report.bytes}))
"""


def make_checkpoint(folder: Path, gigabytes: float, dtype: torch.dtype) -> int:
    """Shards of a Llama 3.2 1B shape with as many layers as needed; returns the bytes written."""
    layer = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH), "self_attn.k_proj": (512, WIDTH),
        "self_attn.v_proj": (512, WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    per_layer = sum(torch.Size(shape).numel() for shape in layer.values()) * dtype.itemsize
    ends = {"model.embed_tokens": (VOCAB, WIDTH), "model.norm": (WIDTH,), "lm_head": (VOCAB, WIDTH)}
    total = sum(torch.Size(shape).numel() for shape in ends.values()) * dtype.itemsize
    layers = max(1, -int(-(gigabytes * 1e9 - total) // per_layer))
    parts = [ends] + [
        {f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(layers)
    ]
    where, size = {}, 0
    random = torch.Generator().manual_seed(0)
    for n, part in enumerate(parts):
        tensors = {
            f"{name}.weight": torch.randn(shape, generator=random).to(dtype)
            for name, shape in part.items()
        }
        name = f"model-{n:05d}.safetensors"
        save_file(tensors, folder / name)
        where |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": WIDTH, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "intermediate_size": INNER,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }))  # fmt: skip
    return size


def evict(folder: Path) -> None:
    """Flush a folder's files and drop them from the page cache: the next reader meets the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder as cp does, flushed."""
    target.mkdir()
    started = time.perf_counter()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--dir", type=Path, help="where to work; default: the temporary folder")
    args = parser.parse_args()
    machine = {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        work = Path(name)
        source, target = work / "source", work / "target"
        source.mkdir()
        size = make_checkpoint(source, args.gb, getattr(torch, args.dtype))
        copied, converted, peaks = [], [], []
        for _ in range(args.rounds):
            evict(source)
            copied.append(size / copy(source, target) / 1e9)
            shutil.rmtree(target)
            print(json.dumps({"op": "copy", "bytes": size, "gb_per_s": copied[-1]}), flush=True)
            evict(source)
            run = subprocess.run(
                [sys.executable, "-c", CHILD, str(source), str(target), args.dtype],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            row = json.loads(run.stdout)
            shutil.rmtree(target)
            converted.append(size / row["seconds"] / 1e9)
            peaks.append(row["peak"])
            row = {"op": "convert", "bytes": size, "dtype": args.dtype,
                   "gb_per_s": converted[-1], "peak_rss": peaks[-1]}  # fmt: skip
            print(json.dumps(row), flush=True)
        largest = VOCAB * WIDTH * getattr(torch, args.dtype).itemsize
        print(json.dumps({
            "op": "convert", "dtype": args.dtype, "bytes": size, "rounds": args.rounds,
            "gb_per_s": statistics.median(converted), "copy_gb_per_s": statistics.median(copied),
            "ratio_to_copy": statistics.median(converted) / statistics.median(copied),
            "ratio_wanted": 0.6, "peak_rss": max(peaks), "peak_allowed": 2 * largest + 300_000_000,
            **machine,
        }))  # fmt: skip


if __name__ == "__main__":
    main()

"""A random Llama of a real size with random gates, as a peer's folder and as our runtimes.

Weights are random, so nothing here says anything about accuracy: the model serves for speed only.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pyruntime.engine.runtime import Runtime
from pyruntime.format.convert import convert
from pyruntime.format.load import Container, read
from pyruntime.format.spec import GateSpec, decoder_tensors
from pyruntime.gates.calibration import Calibration
from pyruntime.ops.weight import Weight
from tests.checkpoints import write_hf_folder

# 218 M parameters in the layers, 284 M with the embedding and the head.
SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "num_layers": 16, "num_heads": 16, "num_kv_heads": 4,
    "head_dim": 64, "intermediate_size": 3584, "max_positions": 2048,
}  # fmt: skip
FIRST_TOKEN = 3  # 0, 1, 2 are padding, begin and end: protected from skipping


def open_models(work: Path, shape: dict[str, Any], *gate_types: str) -> dict[str, Runtime]:
    """Runtimes "dense" (no gates at all) and one per gate type, sharing one set of weights.

    Writes the folders work/hf and work/model unless they are there.
    """
    if not (work / "model").exists():
        write_hf_folder(work / "hf", **shape, dtype=torch.bfloat16, std=0.02, tokenizer=False)
        convert(work / "hf", work / "model")
    container = read(work / "model", verify=False)
    found = {"dense": Runtime(container)}
    for gate_type in gate_types:
        found[gate_type] = Runtime(_with_gates(container, gate_type))
    return found


def parameters(runtime: Runtime) -> dict[str, int]:
    """Parameters of the layers, and with embedding and head."""
    sizes = {t.name: torch.Size(t.shape).numel() for t in decoder_tensors(runtime.spec, None)}
    layers = sum(size for name, size in sizes.items() if name.startswith("layers."))
    return {"in_layers": layers, "with_embeddings": sum(sizes.values())}


def random_tokens(count: int, seed: int, vocab_size: int) -> list[int]:
    """Token ids without protected ones."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, vocab_size, (count,), generator=random).tolist()


def set_thresholds(runtime: Runtime, tables: dict[float, torch.Tensor]) -> None:
    """Calibrate a runtime: thresholds float32 [L, 2] per skip share."""
    never = torch.full((runtime.spec.num_layers, 2), -torch.inf)
    grid = {1.0: never} | {1.0 - skip: tables[skip] for skip in sorted(tables)}
    thresholds = [
        [[None if tau == -torch.inf else tau for tau in layer] for layer in table.tolist()]
        for table in grid.values()
    ]
    runtime.decisions.calibration = Calibration(
        {"kind": "gateskip", "budgets": list(grid), "thresholds": thresholds}
    )


def _with_gates(container: Container, gate_type: str) -> Container:
    gates = GateSpec(
        kind="gateskip", gate_type=gate_type, mlp_scalar=False, shared=False,
        gating_mode="after_module", actually_gate=True, gate_attention=True, gate_mlp=True,
        rule="calibrated", skip_ratio=0.0, kv_mode="dense",
    )  # type: ignore[arg-type]  # fmt: skip
    tensors = dict(container.tensors)
    random = torch.Generator().manual_seed(7)
    for tensor in decoder_tensors(container.spec, gates):
        if tensor.name in tensors:
            continue
        data = torch.randn(tensor.shape, generator=random) * 0.05
        if tensor.layout == "plain":
            tensors[tensor.name] = data
        else:
            tensors[tensor.name] = Weight.pack(data.to(getattr(torch, tensor.dtype)))
    return dataclasses.replace(container, gates=gates, tensors=tensors)

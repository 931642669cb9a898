"""A dense backbone in torch as a peer: eager, and compiled by inductor.

    PEER_PYTHON bench/peers/vit_torch.py FOLDER THREADS

timm's module where the folder is timm's, else the plain torch module of examples/jei_dnn. Inductor
gets every advantage it has on a CPU: a graph per batch size, and frozen weights, which it packs.
It needs a C++ compiler, and keeps what it made in FOLDER/inductor. See vit_server for the commands.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(sys.argv[1]) / "inductor"))

import torch
from torch import Tensor, nn
from vit_case import DTYPES, Dense, images, load
from vit_server import About, serve


class Torch:
    """One module per dtype, and a compiled one per dtype and batch size."""

    def __init__(self, arguments: list[str]) -> None:
        folder, threads = arguments
        torch.set_num_threads(int(threads))
        torch.set_grad_enabled(False)
        torch._inductor.config.freezing = True
        model = load(Path(folder))
        self._models: dict[str, nn.Module] = {
            "float32": model, "bfloat16": copy.deepcopy(model).bfloat16(),
        }  # fmt: skip
        self._takes = {
            dtype: torch.float32 if isinstance(model, Dense) else DTYPES[dtype] for dtype in DTYPES
        }
        versions = {"torch": str(torch.__version__)}
        if "timm" in sys.modules:
            versions["timm"] = sys.modules["timm"].__version__
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        absent = {} if compiler else {"compiled": "no C++ compiler"}
        kinds = [kind for kind in ("eager", "compiled") if kind not in absent]
        arms = {f"{kind} {dtype}": dtype for kind in kinds for dtype in DTYPES}
        self.about = About(versions, arms, absent)

    def prepare(self, arm: str, batch: int) -> Callable[[], Tensor]:
        """See Engine."""
        kind, dtype = arm.split()
        x, model = images(batch).to(self._takes[dtype]), self._models[dtype]
        if kind == "eager":
            return lambda: model(x)
        compiled = torch.compile(copy.deepcopy(model), dynamic=False)

        def run() -> Tensor:
            logits: Tensor = compiled(x)
            return logits

        return run


if __name__ == "__main__":
    serve(Torch)

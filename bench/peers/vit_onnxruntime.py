"""A dense backbone of timm in onnxruntime as a peer, float32.

    PEER_PYTHON bench/peers/vit_onnxruntime.py FOLDER THREADS

The graph comes from torch.onnx.export with a free batch size. Its CPU provider has no bfloat16
matrix multiplication: what it says to one is announced. See vit_server for the commands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor
from vit_case import images, load
from vit_server import About, serve


class OnnxRuntime:
    """A session with its own threads."""

    def __init__(self, arguments: list[str]) -> None:
        folder, threads = arguments
        torch.set_num_threads(1)  # two pools would spin against each other
        graph = Path(folder) / "model.onnx"
        if not graph.exists():
            export(Path(folder), graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
        self._session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        versions = {"onnxruntime": onnxruntime.__version__, "torch": str(torch.__version__)}
        refusal = bfloat16_refusal()
        absent = {} if refusal is None else {"bfloat16": refusal}
        self.about = About(versions, {"float32": "float32"}, absent)

    def prepare(self, arm: str, batch: int) -> Callable[[], Tensor]:
        """See Engine."""
        x = images(batch).numpy()
        return lambda: torch.from_numpy(self._session.run(None, {"images": x})[0])


def export(folder: Path, graph: Path) -> None:
    """FOLDER's model as ONNX, in one file."""
    program = torch.onnx.export(
        load(folder), (images(2),), dynamo=True, input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
    )  # fmt: skip
    if program is None:
        raise SystemExit("torch.onnx.export made nothing")
    program.save(graph, external_data=False)


def bfloat16_refusal() -> str | None:
    """What the CPU provider says to a bfloat16 product, or None if it takes it."""
    ends = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, [4, 4]) for n in "xy"]
    node = helper.make_node("MatMul", ["x", "x"], ["y"])
    graph = helper.make_graph([node], "probe", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        return str(error)
    return None


if __name__ == "__main__":
    serve(OnnxRuntime)

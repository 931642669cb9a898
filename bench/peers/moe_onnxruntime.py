"""onnxruntime's contrib operator com.microsoft.MoE on the CPU as a peer.

    PEER_PYTHON bench/peers/moe_onnxruntime.py THREADS

The operator takes float32 and float16, not bfloat16, so its rows are not of the same dtype as ours:
read them as "what this runtime offers for such a layer". Its SwiGLU wants gate and up interleaved
row by row, and is silu(gate) * up with activation_alpha 1 and activation_beta 0. Router, softmax,
top-k and renormalisation are inside the graph. See moe_server for the commands.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch
from moe_case import Call, Flush, Shape, Weights
from moe_server import About, serve
from onnx import TensorProto, helper
from torch import Tensor

TYPES = {"fp32": (TensorProto.FLOAT, torch.float32), "fp16": (TensorProto.FLOAT16, torch.float16)}


class Session:
    """One graph per dtype: MatMul, then MoE."""

    def __init__(self, shape: Shape, weights: Weights, threads: int) -> None:
        fc1 = torch.stack([weights.gate, weights.up], dim=2).flatten(1, 2)
        constants = {"router": weights.router.t(), "fc1": fc1, "fc2": weights.down}
        self._sessions = {}
        for arm, (kind, dtype) in TYPES.items():
            arrays = {name: t.to(dtype).contiguous().numpy() for name, t in constants.items()}
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
            values = list(map(onnxruntime.OrtValue.ortvalue_from_numpy, arrays.values()))
            options.add_external_initializers(list(arrays), values)
            graph = _graph(shape, kind, {name: a.shape for name, a in arrays.items()})
            session = onnxruntime.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
            # The session may read its constants where they are: they live as long as it does.
            self._sessions[arm] = session, (arrays, values)

    def prepare(self, arm: str, part: str, x: Tensor) -> Call:
        """See Layer."""
        session, _ = self._sessions[arm]
        copy = x.to(TYPES[arm][1]).numpy()
        return lambda: session.run(None, {"x": copy})[0]


class OnnxRuntime:
    """Sessions with their own threads."""

    def __init__(self, threads: int) -> None:
        self.about = About(
            {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
            {"fp32": "float32", "fp16": "float16"},
            ("layer",),
            "router, softmax, top-k, experts, weighted sum: one graph of MatMul and MoE",
        )
        self._threads = threads
        torch.set_num_threads(1)  # two pools would spin against each other
        self.flush = Flush()

    def load(self, shape: Shape, weights: Weights) -> Session:
        """See Engine."""
        return Session(shape, weights, self._threads)

    def result(self, found: object) -> Tensor:
        """See Engine."""
        assert isinstance(found, np.ndarray)
        return torch.from_numpy(found)


def _graph(shape: Shape, kind: int, sizes: dict[str, tuple[int, ...]]) -> bytes:
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node(
            "MoE", ["x", "logits", "fc1", "", "fc2"], ["y"], domain="com.microsoft",
            k=shape.top_k, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0,
            activation_beta=0.0, normalize_routing_weights=1,
        ),
    ]  # fmt: skip
    constants = []
    for name, size in sizes.items():
        constant = TensorProto(name=name, data_type=kind, dims=size)
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value=f"{name}.in_memory")
        constants.append(constant)
    ends = [helper.make_tensor_value_info(n, kind, ["T", shape.hidden]) for n in "xy"]
    graph = helper.make_graph(nodes, "moe", ends[:1], ends[1:], constants)
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(
        graph, opset_imports=domains, ir_version=10
    ).SerializeToString()
    return model


if __name__ == "__main__":
    serve(OnnxRuntime)

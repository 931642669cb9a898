"""llama.cpp's MoE layer as a peer: the graph it builds for Qwen3-MoE, of one layer alone.

    PEER_PYTHON bench/peers/moe_llama_cpp.py THREADS

The shared libraries of llama-cpp-python are driven through ctypes: mul_mat, soft_max, top-k,
mul_mat_id for up, gate and down, swiglu, weighting and the sum over choices, node for node what
build_moe_ffn emits. Weights are Q8_0 (blocks of 32 with a scale each) and bfloat16, the router
float32, activations float32, as in its models. See moe_server for the commands.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from moe_case import Call, Flush, Shape, Weights
from moe_server import About, serve
from torch import Tensor

F32, Q8_0, BF16 = 0, 8, 30  # ggml_type
KINDS = {"q8_0": Q8_0, "bf16": BF16}
NODES = 256

_T, _CTX = c_void_p, c_void_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "free": (None, [_CTX]),
    "new_tensor_2d": (_T, [_CTX, c_int, c_int64, c_int64]),
    "new_tensor_3d": (_T, [_CTX, c_int, c_int64, c_int64, c_int64]),
    "reshape_2d": (_T, [_CTX, _T, c_int64, c_int64]),
    "reshape_3d": (_T, [_CTX, _T, c_int64, c_int64, c_int64]),
    "view_2d": (_T, [_CTX, _T, c_int64, c_int64, c_size_t, c_size_t]),
    "mul_mat": (_T, [_CTX, _T, _T]),
    "mul_mat_id": (_T, [_CTX, _T, _T, _T]),
    "soft_max": (_T, [_CTX, _T]),
    "argsort_top_k": (_T, [_CTX, _T, c_int]),
    "get_rows": (_T, [_CTX, _T, _T]),
    "sum_rows": (_T, [_CTX, _T]),
    "clamp": (_T, [_CTX, _T, c_float, c_float]),
    "div": (_T, [_CTX, _T, _T]),
    "mul": (_T, [_CTX, _T, _T]),
    "add": (_T, [_CTX, _T, _T]),
    "cont": (_T, [_CTX, _T]),
    "swiglu_split": (_T, [_CTX, _T, _T]),
    "new_graph_custom": (c_void_p, [_CTX, c_size_t, ctypes.c_bool]),
    "build_forward_expand": (None, [c_void_p, _T]),
    "graph_overhead_custom": (c_size_t, [c_size_t, ctypes.c_bool]),
    "tensor_overhead": (c_size_t, []),
    "set_input": (None, [_T]),
    "set_output": (None, [_T]),
    "quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)],
    ),
    "gallocr_new": (c_void_p, [c_void_p]),
    "gallocr_free": (None, [c_void_p]),
    "gallocr_alloc_graph": (ctypes.c_bool, [c_void_p, c_void_p]),
    "backend_alloc_ctx_tensors": (c_void_p, [_CTX, c_void_p]),
    "backend_buffer_free": (None, [c_void_p]),
    "backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "backend_tensor_set": (None, [_T, c_void_p, c_size_t, c_size_t]),
    "backend_tensor_get": (None, [_T, c_void_p, c_size_t, c_size_t]),
    "backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """The functions of libggml without their prefix, and a CPU backend."""

    def __init__(self, threads: int) -> None:
        found = importlib.util.find_spec("llama_cpp")  # importing it would load more
        if found is None or found.origin is None:
            raise SystemExit("llama-cpp-python is not installed in this environment")
        folder = Path(found.origin).with_name("lib")
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self._functions: dict[str, Callable[..., Any]] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(base, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        base.ggml_init.restype, base.ggml_init.argtypes = c_void_p, [_InitParams]
        self._init = base.ggml_init
        cpu.ggml_backend_cpu_init.restype = c_void_p
        cpu.ggml_backend_cpu_set_n_threads.argtypes = [c_void_p, c_int]
        self.backend = cpu.ggml_backend_cpu_init()
        cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        self.buffer_type = self.backend_get_default_buffer_type(self.backend)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self._functions[name]
        except KeyError:
            raise AttributeError(name) from None

    def context(self, tensors: int, graph: int = 0) -> int:
        """A context for descriptions of tensors, without their data."""
        size = tensors * self.tensor_overhead()
        if graph:
            size += self.graph_overhead_custom(graph, False)
        context: int = self._init(_InitParams(size, None, True))
        return context


class Layer:
    """Weights in ggml's memory, and one graph per arm and number of tokens."""

    def __init__(self, ggml: Ggml, shape: Shape, weights: Weights) -> None:
        self._ggml, self._shape = ggml, shape
        e, h, i = shape.experts, shape.hidden, shape.inner
        self._context = ggml.context(16)
        self._router = ggml.new_tensor_2d(self._context, F32, h, e)
        self._weights: dict[str, tuple[int, int, int]] = {}
        for arm, kind in KINDS.items():
            up, gate = (ggml.new_tensor_3d(self._context, kind, h, i, e) for _ in range(2))
            self._weights[arm] = up, gate, ggml.new_tensor_3d(self._context, kind, i, h, e)
        self._buffer = ggml.backend_alloc_ctx_tensors(self._context, ggml.backend)
        self._set(self._router, weights.router.float())
        for arm in KINDS:
            sources = weights.up, weights.gate, weights.down
            for to, data in zip(self._weights[arm], sources, strict=True):
                self._fill(to, KINDS[arm], data)
        self._graphs: dict[tuple[str, int], tuple[int, int, int, int, int]] = {}

    def __del__(self) -> None:
        for context, allocator, *_ in self._graphs.values():
            self._ggml.gallocr_free(allocator)
            self._ggml.free(context)
        self._ggml.backend_buffer_free(self._buffer)
        self._ggml.free(self._context)

    def prepare(self, arm: str, part: str, x: Tensor) -> Call:
        """See Layer of moe_server."""
        key = arm, x.shape[0]
        if key not in self._graphs:
            self._graphs[key] = self._build(*key)
        _, _, graph, x_in, y_out = self._graphs[key]
        self._set(x_in, x.float())
        compute, backend = self._ggml.backend_graph_compute, self._ggml.backend

        def run() -> tuple[int, tuple[int, int]]:
            compute(backend, graph)
            return y_out, (x.shape[0], x.shape[1])

        return run

    def _set(self, to: int, data: Tensor, offset: int = 0) -> None:
        data = data.contiguous()
        self._ggml.backend_tensor_set(to, data.data_ptr(), offset, data.nbytes)

    def _fill(self, to: int, kind: int, data: Tensor) -> None:
        if kind == BF16:
            self._set(to, data)
            return
        offset = 0
        for matrix in data:  # one expert at a time: float32 of all would be large
            rows, columns = matrix.shape
            source, packed = (
                matrix.float(),
                torch.empty(rows * columns // 32 * 34, dtype=torch.int8),
            )
            self._ggml.quantize_chunk(
                kind, source.data_ptr(), packed.data_ptr(), 0, rows, columns, None
            )
            self._set(to, packed, offset)
            offset += packed.nbytes

    def _build(self, arm: str, tokens: int) -> tuple[int, int, int, int, int]:
        g, shape = self._ggml, self._shape
        e, k, h = shape.experts, shape.top_k, shape.hidden
        up_w, gate_w, down_w = self._weights[arm]
        c = g.context(NODES, NODES)
        graph = g.new_graph_custom(c, NODES, False)
        x = g.new_tensor_2d(c, F32, h, tokens)
        g.set_input(x)
        shares = g.soft_max(c, g.mul_mat(c, self._router, x))
        chosen = g.argsort_top_k(c, shares, k)
        best = g.get_rows(c, g.reshape_3d(c, shares, 1, e, tokens), chosen)
        best = g.reshape_2d(c, best, k, tokens)
        total = g.clamp(c, g.sum_rows(c, best), 6.103515625e-5, float("inf"))
        best = g.reshape_3d(c, g.div(c, best, total), 1, k, tokens)
        g.build_forward_expand(graph, best)
        rows = g.reshape_3d(c, x, h, 1, tokens)
        up = g.mul_mat_id(c, up_w, rows, chosen)
        gate = g.mul_mat_id(c, gate_w, rows, chosen)
        parts = g.mul_mat_id(c, down_w, g.swiglu_split(c, gate, up), chosen)
        parts = g.mul(c, parts, best)
        g.build_forward_expand(graph, parts)
        row = h * 4
        views = [g.view_2d(c, parts, h, tokens, k * row, j * row) for j in range(k)]
        for view in views:
            g.build_forward_expand(graph, view)
        out = views[0]
        for view in views[1:]:
            out = g.add(c, out, view)
        if k == 1:
            out = g.cont(c, out)
        g.set_output(out)
        g.build_forward_expand(graph, out)
        allocator = g.gallocr_new(g.buffer_type)
        if not g.gallocr_alloc_graph(allocator, graph):
            raise MemoryError("ggml could not allocate the graph")
        return c, allocator, graph, x, out


class LlamaCpp:
    """ggml with its own threads."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(1)  # two OpenMP runtimes would spin against each other
        self._ggml = Ggml(threads)
        version = importlib.metadata.version("llama-cpp-python")
        self.about = About(
            {"llama-cpp-python": version, "torch": torch.__version__},
            {"q8_0": "q8_0", "bf16": "bfloat16"},
            ("layer",),
            "router, softmax, top-k, experts, weighted sum: the graph of build_moe_ffn",
        )
        self.flush = Flush()

    def load(self, shape: Shape, weights: Weights) -> Layer:
        """See Engine."""
        return Layer(self._ggml, shape, weights)

    def result(self, found: object) -> Tensor:
        """See Engine."""
        assert isinstance(found, tuple)
        tensor, size = found
        out = torch.empty(size)
        self._ggml.backend_tensor_get(tensor, out.data_ptr(), 0, out.nbytes)
        return out


if __name__ == "__main__":
    serve(LlamaCpp)

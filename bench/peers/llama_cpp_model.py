"""A whole model in llama.cpp as a peer, one GGUF file per arm.

    PEER_PYTHON bench/peers/llama_cpp_model.py THREADS bf16=FILE q8_0=FILE

llama_decode of llama-cpp-python's library, called directly: no sampler, no scheduler. See
moe_model_server for the commands.
"""

from __future__ import annotations

import ctypes
import time

import llama_cpp
from moe_model_server import About, serve

LONGEST = 1024
SEQUENCES = 8
ROWS = 512  # of one computation: llama.cpp's default


class Model:
    """Weights and a cache for some sequences."""

    def __init__(self, path: str, threads: int) -> None:
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max = SEQUENCES * LONGEST, SEQUENCES
        wanted.n_batch, wanted.n_ubatch = SEQUENCES * LONGEST, ROWS
        wanted.n_threads = wanted.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def run(self, sequences: list[list[int]], start: int) -> float:
        """Seconds to append tokens to sequences that hold `start` tokens; logits of the last."""
        rows = [(i, start + j, t) for i, s in enumerate(sequences) for j, t in enumerate(s)]
        last = {i: start + len(s) - 1 for i, s in enumerate(sequences)}
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for row, (sequence, position, token) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = position == last[sequence]
        begin = time.perf_counter()
        status = llama_cpp.llama_decode(self._context, batch)
        found = llama_cpp.llama_get_logits_ith(self._context, -1)  # waits for the result
        seconds = time.perf_counter() - begin
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: status {status}")
        self.logits = list(ctypes.cast(found, ctypes.POINTER(ctypes.c_float))[: self._size])
        return seconds

    def forget(self, start: int) -> None:
        """Cut every sequence off at `start` tokens."""
        for sequence in range(SEQUENCES):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1)


class LlamaCpp:
    """A model per arm; their caches hold what was asked last."""

    def __init__(self, arguments: list[str]) -> None:
        threads, *files = arguments
        paths = dict(text.split("=", 1) for text in files)
        llama_cpp.llama_backend_init()
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._models = {arm: Model(path, int(threads)) for arm, path in paths.items()}
        self._cached: dict[str, list[list[int]]] = {}
        self.about = About(
            {"llama-cpp-python": llama_cpp.__version__},
            {arm: "bfloat16" if arm == "bf16" else arm for arm in paths},
            "llama_decode, logits of the last rows",
        )

    def logits(self, arm: str, tokens: list[int]) -> list[float]:
        """See Engine."""
        self.prefill(arm, tokens)
        return self._models[arm].logits

    def prefill(self, arm: str, tokens: list[int]) -> float:
        """See Engine."""
        self._cached.pop(arm, None)
        self._models[arm].forget(0)
        return self._models[arm].run([tokens], 0)

    def context(self, arm: str, tokens: list[list[int]]) -> None:
        """See Engine."""
        self._models[arm].forget(0)
        self._models[arm].run(tokens, 0)
        self._cached[arm] = tokens

    def decode(self, arm: str, tokens: list[int], steps: int) -> float:
        """See Engine."""
        start, step = len(self._cached[arm][0]), [[token] for token in tokens]
        seconds = sum(self._models[arm].run(step, start + i) for i in range(steps))
        self._models[arm].forget(start)
        return seconds


if __name__ == "__main__":
    serve(LlamaCpp)

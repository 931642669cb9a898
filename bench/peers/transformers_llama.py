"""Hugging Face transformers as a peer: runs in its own interpreter, told what to do line by line.

    PEER_PYTHON bench/peers/transformers_llama.py FOLDER THREADS

Reads one JSON object per line, does the work, answers with one JSON line; between two lines it is
blocked and takes no processor time. Commands:

    {"do": "prefill", "tokens": [[...], ...]}               last-row logits of every sequence
    {"do": "context", "tokens": [...]}                      fill the cache of one sequence
    {"do": "decode", "tokens": [...]}                       one step per token after that context

Every answer has "seconds"; prefill and decode also "logits", those of the last row of the last
sequence, so that the driver can see that both engines compute the same model.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache


class Peer:
    """One model, and the cached context that decoding starts from."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._cache: Any = None

    def prefill(self, tokens: list[list[int]]) -> dict[str, Any]:
        ids = torch.tensor(tokens)
        start = time.perf_counter()
        out = self._model(ids, use_cache=True, past_key_values=DynamicCache(), logits_to_keep=1)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "logits": out.logits[-1, -1].float().tolist()}

    def context(self, tokens: list[int]) -> dict[str, Any]:
        self._cache = DynamicCache()
        start = time.perf_counter()
        self._model(torch.tensor([tokens]), past_key_values=self._cache, logits_to_keep=1)
        return {"seconds": time.perf_counter() - start}

    def decode(self, tokens: list[int]) -> dict[str, Any]:
        steps = [torch.tensor([[token]]) for token in tokens]
        start = time.perf_counter()
        for ids in steps:
            out = self._model(ids, past_key_values=self._cache, logits_to_keep=1)
        seconds = time.perf_counter() - start
        self._cache.crop(-len(tokens))
        return {"seconds": seconds, "logits": out.logits[-1, -1].float().tolist()}


def main() -> None:
    """Announces versions, then serves commands until the input ends."""
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print must not look like an answer
    transformers.utils.logging.set_verbosity_error()
    with torch.inference_mode():
        peer = Peer(folder)
        commands = {"prefill": peer.prefill, "context": peer.context, "decode": peer.decode}
        hello = {"transformers": transformers.__version__, "torch": torch.__version__}
        print(json.dumps(hello), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            answer = commands[request["do"]](request["tokens"])
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

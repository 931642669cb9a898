"""`pyruntime generate`: a continuation whose tokens show what they cost."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from pyruntime.cli import policies
from pyruntime.engine.detokenize import Detokenizer
from pyruntime.engine.engine import Prompt
from pyruntime.engine.llm import LLM
from pyruntime.engine.request import RequestOutput, SamplingParams
from pyruntime.engine.runtime import Runtime
from pyruntime.errors import InvalidInput
from pyruntime.format.load import read
from pyruntime.gates.policy import ComputePolicy
from pyruntime.gates.routing import Router
from pyruntime.gates.trace import Trace
from pyruntime.layers.batch import Batch

# Background of a token that ran nothing, and of one that ran everything: light, for black letters.
_CHEAP, _FULL = (236, 253, 245), (249, 115, 22)


class _Recorder(Runtime):
    """Remembers what every engine step executed: totals are counted, not estimated."""

    traces: list[Trace]

    def trace(self, router: Router, batch: Batch, policies: object) -> Trace:
        trace = super().trace(router, batch, policies)  # type: ignore[arg-type]
        self.traces.append(trace)
        return trace


def generate(args: argparse.Namespace) -> int:
    """Streams the text to stdout, then one line of totals."""
    runtime = _Recorder(read(args.model))
    runtime.traces = []
    policy = ComputePolicy(
        budget=args.budget,
        mode=args.mode,
        experts=None if args.experts is None else policies.experts(args.experts),
    )
    sampling = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=tuple(args.stop),
    )
    shaded = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    prompt: Prompt = args.prompt if args.prompt is not None else _ids(args.prompt_ids)
    started = time.perf_counter()
    shown = 0
    for last in LLM(runtime).generate([prompt], sampling, policy, stream=True):
        output = last.outputs[0]
        if len(output.token_ids) == 1:
            _write_prompt(runtime, last, shaded)
        piece = output.text[shown:] if runtime.tokenizer else f" {output.token_ids[-1]}"
        shown = len(output.text)
        _write(piece, output.compute[-1], shaded)
    print(f"\n\n{_totals(runtime, last, time.perf_counter() - started)}")
    return 0


def shade(text: str, compute: float) -> str:
    """Text on a background between light green (no compute) and orange (all of it).

    Line ends stay outside of the colour, which would otherwise fill the rest of the line.
    """
    part = min(max(compute, 0.0), 1.0)
    r, g, b = (round(c + (f - c) * part) for c, f in zip(_CHEAP, _FULL, strict=True))
    lines = text.split("\n")
    return "\n".join(f"\x1b[30;48;2;{r};{g};{b}m{line}\x1b[0m" if line else "" for line in lines)


def _write(text: str, compute: float, shaded: bool) -> None:
    sys.stdout.write(shade(text, compute) if shaded else text)
    sys.stdout.flush()


def _write_prompt(runtime: _Recorder, output: RequestOutput, shaded: bool) -> None:
    ids = output.prompt_token_ids
    compute = _per_token(runtime.traces)[: len(ids)].tolist() or [1.0] * len(ids)
    if runtime.tokenizer is None:
        for token, used in zip(ids, compute, strict=True):
            _write(f"{token} ", used, shaded)
        return
    detokenizer = Detokenizer(runtime.tokenizer)
    for token, used in zip(ids, compute, strict=True):
        _write(detokenizer.push(token), used, shaded)
    _write(detokenizer.flush(), compute[-1], shaded)


def _per_token(traces: list[Trace]) -> Tensor:
    parts = [trace.per_token_compute() for trace in traces]
    return torch.cat(parts) if parts else torch.empty(0)


def _totals(runtime: _Recorder, output: RequestOutput, seconds: float) -> str:
    made = len(output.outputs[0].token_ids)
    executed = sum(trace.macs_executed for trace in runtime.traces)
    dense = sum(trace.macs_dense for trace in runtime.traces)
    saved = 1 - executed / dense if dense else 0.0  # a model that decides nothing keeps no traces
    return (
        f"{len(output.prompt_token_ids)} prompt + {made} new tokens, budget "
        f"{output.policy.budget:g} ({output.policy.mode}), {_experts(runtime, output)}"
        f"mean compute {output.compute_mean:.1%}, MACs saved {saved:.1%}, "
        f"{made / seconds:.1f} tokens/s"
    )


def _experts(runtime: _Recorder, output: RequestOutput) -> str:
    """How many ran, and the limits that were asked for; empty without experts."""
    experts, limits = runtime.spec.experts, output.policy.expert_policy
    if experts is None:
        return ""
    k, asked = experts.experts_per_token, "" if limits is None else f" ({limits})"
    used = [(trace.experts_per_token or 0.0, trace.budgets.shape[0]) for trace in runtime.traces]
    rows = sum(count for _, count in used)
    mean = sum(per * count for per, count in used) / rows if rows else k
    return f"{mean:.2f} of {k} experts per token{asked}, "


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise InvalidInput(f"--prompt-ids: expected integers, got {text!r}") from None

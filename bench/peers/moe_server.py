"""The loop of a MoE-layer peer: commands in, one JSON line each; answers out, one JSON line each.

A driver defines an Engine and calls `serve`. Between two lines it is blocked and takes no processor
time. Commands:

    {"do": "load", "shape": "64x8x2048x768"}                   make the weights, pack them
    {"do": "check", "arm": A, "cases": [[T, R], ...]}          worst error against float32
    {"do": "time", "arm": A, "part": "layer", "tokens": T, "routing": R, "calls": N}
                                                               seconds of N calls, N inputs
    {"do": "unload"}                                           give the memory back

`part` may be "router": scores and choice of experts alone, where the engine can be asked for that.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from moe_case import TOLERANCE, Call, Flush, Shape, Weights, error, inputs, reference, time_calls
from torch import Tensor


class Layer(Protocol):
    """Packed weights."""

    def prepare(self, arm: str, part: str, x: Tensor) -> Call:
        """Write x [T, H] where the layer reads it; the call runs the part: layer or router."""
        ...


@dataclass(frozen=True, slots=True)
class About:
    """What a driver announces."""

    versions: dict[str, str]
    arms: dict[str, str]  # name of an arm to the dtype of its weights, a key of TOLERANCE
    parts: tuple[str, ...]  # what can be timed: "layer", perhaps "router"
    includes: str  # what the time of a layer contains


class Engine(Protocol):
    """What a driver brings."""

    about: About

    def load(self, shape: Shape, weights: Weights) -> Layer:
        """Pack the weights of a layer."""
        ...

    def result(self, found: object) -> Tensor:
        """[T, H] of what a layer's call returned."""
        ...

    def flush(self) -> None:
        """Empty the caches."""
        ...


class Server:
    """Commands by name; examples and reference outputs of a case are made once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shape: Shape | None = None
        self._layer: Layer | None = None
        self._tiny: Layer | None = None
        self._examples: dict[tuple[Shape, int, str], list[Tensor]] = {}
        self._wanted: dict[tuple[int, str], Tensor] = {}

    def load(self, shape: str) -> dict[str, Any]:
        """Weights of a shape."""
        self.unload()
        self._shape = Shape.parse(shape)
        self._tiny = self._engine.load(self._shape.tiny(), Weights.random(self._shape.tiny()))
        self._layer = self._engine.load(self._shape, Weights.random(self._shape))
        return {"loaded": shape}

    def unload(self) -> dict[str, Any]:
        """Memory back to the machine."""
        self._layer = self._tiny = None
        self._examples.clear()
        self._wanted.clear()
        return {}

    def check(self, arm: str, cases: list[tuple[int, str]]) -> dict[str, Any]:
        """Whether the engine computes this layer: tokens and routing of each case."""
        assert self._shape is not None and self._layer is not None
        first = {(t, r): self._inputs(self._shape, t, r, 1)[0] for t, r in cases}
        missing = first.keys() - self._wanted.keys()
        if missing:
            weights = Weights.random(self._shape)  # the engine may have packed its own in place
            for case in missing:
                self._wanted[case] = reference(self._shape, weights, first[case])
        errors = [
            error(self._engine.result(self._layer.prepare(arm, "layer", x)()), self._wanted[case])
            for case, x in first.items()
        ]
        return {"error": max(errors), "tolerance": TOLERANCE[self._engine.about.arms[arm]]}

    def time(self, arm: str, part: str, tokens: int, routing: str, calls: int) -> dict[str, Any]:
        """Seconds of calls on different inputs."""
        layer, tiny, shape = self._layer, self._tiny, self._shape
        assert layer is not None and tiny is not None and shape is not None
        warm = tiny.prepare(arm, part, self._inputs(shape.tiny(), tokens, routing, 1)[0])
        examples = self._inputs(shape, tokens, routing, calls)[:calls]

        def prepare(x: Tensor) -> Call:
            return layer.prepare(arm, part, x)

        return {"seconds": time_calls(prepare, examples, self._engine.flush, warm)}

    def _inputs(self, shape: Shape, tokens: int, routing: str, count: int) -> list[Tensor]:
        made = self._examples.setdefault((shape, tokens, routing), [])
        while len(made) < count:
            made.append(inputs(shape, tokens, routing, len(made)))
        return made


class TorchThreads:
    """Flush and result of an engine that computes with torch's threads."""

    def __init__(self) -> None:
        self.flush = Flush()

    def result(self, found: object) -> Tensor:
        """See Engine."""
        assert isinstance(found, Tensor)
        return found.view(-1, found.shape[-1])


def serve(make: Callable[[int], Engine]) -> None:
    """Announce versions, arms and what a layer contains, then obey until the input ends."""
    threads = int(sys.argv[1])
    torch.set_num_threads(threads)
    # Libraries print, some from C: nothing but answers may reach the file of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with torch.inference_mode():
        engine = make(threads)
        print(json.dumps(asdict(engine.about)), file=answers, flush=True)
        server = Server(engine)
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(server, request.pop("do"))(**request)
            print(json.dumps(answer), file=answers, flush=True)

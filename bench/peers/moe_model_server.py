"""The loop of a whole-model peer: commands in, one JSON line each; answers out, one JSON line each.

A driver defines an Engine and calls `serve`. Between two lines it is blocked and takes no processor
time. Commands:

    {"do": "logits", "arm": A, "tokens": [...]}          log-probabilities after these tokens
    {"do": "prefill", "arm": A, "tokens": [...]}         seconds to the next token
    {"do": "context", "arm": A, "tokens": [[...], ...]}  the sequences that decoding continues
    {"do": "decode", "arm": A, "tokens": [...], "steps": S}
                                                         seconds of S steps of the sequences

In every step sequence i gets tokens[i], again and again: whatever an engine would choose itself,
all compute the same rows and reach the same experts. Then the sequences are what they were.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class About:
    """What a driver announces."""

    versions: dict[str, str]
    arms: dict[str, str]  # name of an arm to the dtype of its weights
    includes: str  # what the times contain


class Engine(Protocol):
    """What a driver brings."""

    about: About

    def logits(self, arm: str, tokens: list[int]) -> list[float]:
        """Logits or log-probabilities [V] after the tokens."""
        ...

    def prefill(self, arm: str, tokens: list[int]) -> float:
        """Seconds from token ids to the next token, or to its logits."""
        ...

    def context(self, arm: str, tokens: list[list[int]]) -> None:
        """Remember, and cache where possible, the sequences that decoding continues."""
        ...

    def decode(self, arm: str, tokens: list[int], steps: int) -> float:
        """Seconds of some steps; token i is appended to sequence i in each."""
        ...


def serve(make: Callable[[list[str]], Engine]) -> None:
    """Announce versions and arms, then obey until the input ends. The program's arguments go in."""
    # Libraries print, some from C: nothing but answers may reach the file of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    engine = make(sys.argv[1:])
    names = {"logits": "logits", "prefill": "seconds", "context": "done", "decode": "seconds"}
    print(json.dumps(asdict(engine.about)), file=answers, flush=True)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        do = request.pop("do")
        answer = {names[do]: getattr(engine, do)(**request)}
        print(json.dumps(answer), file=answers, flush=True)

"""The loop of a dense-backbone peer: commands in, one JSON line each; answers out, likewise.

A driver defines an Engine and calls `serve`. Between two lines it is blocked and takes no processor
time. Commands:

    {"do": "logits", "arm": A, "batch": B}      logits of B images
    {"do": "time", "arm": A, "batch": B}        seconds from B images to their logits

The images are those of vit_case, already in the dtype the engine wants.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class About:
    """What a driver announces."""

    versions: dict[str, str]
    arms: dict[str, str]  # name of an arm to the dtype of its weights
    absent: dict[str, str]  # what the engine cannot run, and why


class Engine(Protocol):
    """What a driver brings."""

    about: About

    def prepare(self, arm: str, batch: int) -> Callable[[], Tensor]:
        """The call that turns the images into logits [B, C]; the first of all may compile."""
        ...


def serve(make: Callable[[list[str]], Engine]) -> None:
    """Announce versions and arms, then obey until the input ends. The program's arguments go in."""
    # Libraries print, some from C: nothing but answers may reach the file of the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    engine = make(sys.argv[1:])
    print(json.dumps(asdict(engine.about)), file=answers, flush=True)
    calls: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        case = request["arm"], request["batch"]
        if case not in calls:
            calls[case] = engine.prepare(*case)
            calls[case]()
        start = time.perf_counter()
        logits = calls[case]()
        seconds = time.perf_counter() - start
        done: dict[str, Any] = {"seconds": seconds}
        if request["do"] == "logits":
            done["logits"] = logits.float().tolist()
        print(json.dumps(done), file=answers, flush=True)

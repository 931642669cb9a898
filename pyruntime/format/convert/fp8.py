"""Block-scaled 8-bit weights (DeepSeek-V3): float8_e4m3 numbers, one float32 scale per block."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from pyruntime.format.convert.checkpoint import Checkpoint, Entry, Need
from pyruntime.format.convert.config import Config
from pyruntime.format.convert.derive import Computed


def block_size(config: Config) -> tuple[int, int] | None:
    """Rows and columns of a block in `quantization_config`; None where nothing is quantised.

    What is not this kind of quantisation is left in `config` as a problem.
    """
    match config.data.get("quantization_config"):
        case None:
            return None
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)], **rest} if (
            rows > 0 and columns > 0 and rest.get("fmt", "e4m3") == "e4m3"
        ):
            config.notes.append("8-bit weights are dequantised; --quantize int8 keeps 8 bits")
            return rows, columns
        case other:
            config.problems.append(
                f"quantization_config {other!r} is not implemented "
                "(must be fp8 of fmt e4m3, with a weight_block_size)"
            )
            return None


def dequantized(weights: Checkpoint, block: tuple[int, int]) -> Checkpoint:
    """`weights` with X and X_scale_inv as one X of ordinary numbers, float32 when read."""
    entries = dict(weights.entries)
    for name, entry in weights.entries.items():
        if entry.dtype == "float8_e4m3fn" and len(entry.shape) == 2:
            entries[name] = _dequantized(weights, name, entry, block)
    return Checkpoint(entries, weights.paths, weights.problems)


def _dequantized(weights: Checkpoint, name: str, entry: Entry, block: tuple[int, int]) -> Entry:
    height, width = block
    scale = f"{name}_scale_inv"

    def read(start: int, stop: int) -> Tensor:
        numbers = weights.rows(name, start, stop).float()
        first = start // height
        scales = weights.rows(scale, first, -(-stop // height)).float()
        skipped = start - first * height
        scales = scales.repeat_interleave(height, 0)[skipped : skipped + stop - start]
        return numbers * scales.repeat_interleave(width, 1)[:, : numbers.shape[1]]

    rows, columns = entry.shape
    needs = {scale: Need((-(-rows // height), -(-columns // width)))}
    return dataclasses.replace(entry, dtype="bfloat16", file=Computed(read), needs=needs)

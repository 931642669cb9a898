"""Rows of cuda_suite.py for the ops of vision models, against torch's own ways to do the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.cuda_harness import Call, Report, copies_for, measure
from pyruntime.ops import Pixels, Weight, cuda, reference

BF16 = torch.bfloat16
DEVICE = "cuda"

# images, heads, columns of a head, tokens of the shortest and of the longest image
ATTENTION = (
    (1, 6, 64, 197, 197),
    (64, 6, 64, 197, 197),
    (64, 6, 64, 50, 197),  # mixed scales
    (256, 6, 64, 50, 197),
    (64, 12, 64, 197, 197),
    (16, 16, 80, 257, 257),  # ViT-H/14
    (16, 12, 64, 577, 577),  # 384 pixels
)
# images, pixels a side, size of a patch, share of the coarse patches (ratio 2) that stay so
PATCHES = ((1, 224, 16, 0.0), (64, 224, 16, 0.0), (64, 224, 16, 0.5), (64, 224, 14, 0.0))


def bench_vision(report: Report) -> None:
    """attention_varlen, gather_patches, embed_patches, layer_norm."""
    for attention in ATTENTION:
        attention_case(report, *attention)
    for patches in PATCHES:
        patches_case(report, *patches)
    for rows, width in ((197, 384), (12_608, 384), (12_608, 768)):
        norm_case(report, rows, width)


def attention_case(
    report: Report, images: int, heads: int, dim: int, shortest: int, longest: int
) -> None:
    """Ragged, against torch's ragged kernel, a call for every image, and padding with a mask."""
    sizes = torch.randint(shortest, longest + 1, (images,)).tolist()
    total, width = sum(sizes), heads * dim
    nbytes = 8 * total * width
    copies = copies_for(nbytes)
    wide = [torch.randn(total, 3 * width, device=DEVICE).to(BF16) for _ in range(copies)]
    parts = [x.split(width, 1) for x in wide]
    ends = torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)

    def split_heads(x: Tensor) -> Tensor:
        out: Tensor = x.unflatten(1, (heads, dim))  # [rows, heads, D]
        return out

    def each(i: int) -> Tensor:
        done = []
        for q, k, v in zip(*(split_heads(x).split(sizes) for x in parts[i]), strict=True):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            done.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
        return torch.cat(done)

    rows = torch.arange(total, device=DEVICE).split(sizes)
    grid = pad_sequence(list(rows), batch_first=True, padding_value=-1)  # [images, longest]
    seen = (grid >= 0)[:, None, None] if shortest < longest else None
    packed = (grid.flatten() >= 0).nonzero()[:, 0]

    def padded(i: int) -> Tensor:
        q, k, v = (split_heads(x)[grid].transpose(1, 2) for x in parts[i])
        out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.transpose(1, 2).flatten(0, 1)[packed]

    def packed_rows(i: int) -> Tensor:
        q, k, v = parts[i]
        return cuda.attention_varlen(q, k, v, ends, ends, heads, dim**-0.5)

    candidates: dict[str, Call] = {
        "cuda": packed_rows,
        "sdpa each": each,
        "sdpa padded": padded,
    }
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        print("attention_varlen: this torch has no varlen_attn to compare with", flush=True)
    else:

        def ragged(i: int) -> object:
            q, k, v = (split_heads(x) for x in parts[i])
            return varlen_attn(q, k, v, ends, ends, max(sizes), max(sizes))

        candidates["varlen_attn"] = ragged
    shape = {
        "B": images, "heads": heads, "D": dim, "tokens": [shortest, longest], "dtype": "bf16",
    }  # fmt: skip
    flops = 4.0 * width * sum(size * size for size in sizes)
    report.add("attention_varlen", shape, nbytes, flops, measure(candidates, copies))


def mixed_places(images: int, side: int, size: int, coarse: float) -> Tensor:
    """int32 [R, 4]: coarse patches of ratio 2, and the fine ones of the squares that do not stay.

    ``coarse`` of 0 is the plain grid.
    """
    rows = []
    for image in range(images):
        step = 2 * size if coarse else size
        corners = [(y, x) for y in range(0, side, step) for x in range(0, side, step)]
        stays = torch.rand(len(corners)) < coarse
        rows += [(image, y, x, 2) for (y, x), stay in zip(corners, stays, strict=True) if stay]
        for (y, x), stay in zip(corners, stays, strict=True):
            if not stay:
                offsets = ((0, 0), (0, size), (size, 0), (size, size)) if coarse else ((0, 0),)
                rows += [(image, y + dy, x + dx, 1) for dy, dx in offsets]
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def patches_case(report: Report, images: int, side: int, size: int, coarse: float) -> None:
    """Patches alone against a copy of the pixels, and the embedding against a convolution."""
    width, depth = 384, 3 * size * size
    places = mixed_places(images, side, size, coarse)
    count = places.shape[0]
    read = 4 * depth * int((places[:, 3] ** 2).sum())
    copies = copies_for(read)
    batches = [torch.randn(images, 3, side, side, device=DEVICE) for _ in range(copies)]
    pixels = [Pixels.of(batch) for batch in batches]
    shape = {
        "B": images, "side": side, "size": size, "coarse": coarse, "rows": count, "dtype": "bf16",
    }  # fmt: skip
    candidates: dict[str, Call] = {
        "cuda": lambda i: cuda.gather_patches(pixels[i], places, size, out_dtype=BF16),
        "copy": lambda i: batches[i].to(BF16),  # all pixels, whatever is coarse
    }
    if not coarse:
        candidates["torch"] = lambda i: reference.patches(batches[i], size, size, out_dtype=BF16)
    nbytes = read + 2 * count * depth
    report.add("gather_patches", shape, nbytes, 0, measure(candidates, copies))

    kernel = (torch.randn(width, 3, size, size, device=DEVICE) / depth**0.5).to(BF16)
    weight = Weight(kernel.view(1, width, depth), width, depth, "dense")
    bias, positions = (torch.randn(n, device=DEVICE) for n in (width, count * width))
    positions = positions.view(count, width)
    rows = torch.arange(count, device=DEVICE, dtype=torch.int32)
    out = torch.empty(count, width, device=DEVICE, dtype=BF16)

    def convolution(i: int) -> Tensor:
        map_of = F.conv2d(batches[i].to(BF16), kernel, bias.to(BF16), stride=size)
        return map_of.flatten(2).transpose(1, 2).flatten(0, 1) + positions.to(BF16)

    candidates = {
        "cuda": lambda i: cuda.embed_patches(
            pixels[i], places, weight, bias, size=size, positions=positions, position_rows=rows,
            out=out,
        )
    }  # fmt: skip
    if not coarse:
        candidates["conv2d"] = convolution
    nbytes = read + 2 * width * depth + 6 * count * width
    flops = 2.0 * count * depth * width
    report.add("embed_patches", shape, nbytes, flops, measure(candidates, copies))


def norm_case(report: Report, rows: int, width: int) -> None:
    nbytes = 4 * rows * width
    copies = copies_for(nbytes)
    xs = [torch.randn(rows, width, device=DEVICE).to(BF16) for _ in range(copies)]
    weight, bias = torch.randn(width, device=DEVICE), torch.randn(width, device=DEVICE)
    narrow = weight.to(BF16), bias.to(BF16)
    candidates: dict[str, Call] = {
        "cuda": lambda i: cuda.layer_norm(xs[i], weight, bias, 1e-6),
        "torch": lambda i: F.layer_norm(xs[i], (width,), *narrow, 1e-6),
    }
    shape = {"N": rows, "H": width, "dtype": "bf16"}
    report.add("layer_norm", shape, nbytes, 0, measure(candidates, copies))

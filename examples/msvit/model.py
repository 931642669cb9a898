"""MSViT in plain torch: a vision transformer whose tokens are small or large patches of the image.

A gate looks at every coarse region alone and says whether it stays one coarse token or becomes
ratio² fine ones; the blocks are those of an ordinary ViT and see only the active tokens. Names in
the state dict are timm's, and ``msvit.*`` for the gate, so that any timm ViT of this shape loads
the backbone.

Shapes: B images, N tokens, D width, F fine and R coarse places (regions). A choice of scales is a
bool [B, R], True where the region stays coarse. Tokens stand in the order class, coarse raster,
fine raster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """A small ViT for 64 px scenes; `ratio` 1 is a plain ViT: one scale and no gate."""

    side: int = 64
    patch: int = 4
    ratio: int = 4
    width: int = 96
    depth: int = 4
    heads: int = 3
    mlp_ratio: int = 4
    classes: int = 10
    gate_widths: tuple[int, int, int] = (64, 64, 32)

    @property
    def grid(self) -> int:
        """Fine places along a side."""
        return self.side // self.patch

    @property
    def region_px(self) -> int:
        return self.patch * self.ratio

    @property
    def regions(self) -> int:
        """Coarse places of an image; 0 for a plain ViT."""
        return 0 if self.ratio == 1 else (self.side // self.region_px) ** 2


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[B, N, D]; `valid` bool [B, N] marks the tokens that may be looked at, None: all."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mask = None if valid is None else valid[:, None, None, :]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=EPS)
        self.attn = Attention(c.width, c.heads)
        self.norm2 = nn.LayerNorm(c.width, eps=EPS)
        self.mlp = Mlp(c.width, c.mlp_ratio * c.width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


class Gate(nn.Module):
    """Four linear layers on the raw pixels of one region, with a learned term per place."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        widths = (3 * c.region_px**2, *c.gate_widths, 1)
        for i in range(4):
            self.add_module(f"fc{i}", nn.Linear(widths[i], widths[i + 1]))
        for i in range(3):
            self.add_module(f"norm{i}", nn.LayerNorm(widths[i + 1], eps=EPS))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.regions, widths[1]))

    def start(self, gain: float = 6.0) -> None:
        """Start blind to mean brightness and with a strong first layer.

        Rows of weights that sum to zero answer contrast, which is what tells regions apart; a gain
        of 1 can leave training on its plateau for hundreds of steps. The wide biases keep the
        LayerNorm from blowing up the noise of an empty region, and the last one starts all coarse.
        """
        with torch.no_grad():
            weight = self.fc0.weight
            weight.sub_(weight.mean(dim=1, keepdim=True)).mul_(gain)
            nn.init.normal_(self.fc0.bias, std=0.3)
            nn.init.constant_(self.fc3.bias, 2.0)

    def forward(self, regions: Tensor) -> Tensor:
        """Pixels [B, R, 3·S·S] -> logits [B, R]; positive: stays coarse."""
        x = F.gelu(self.norm0(self.fc0(regions) + self.pos_embed))
        x = F.gelu(self.norm1(self.fc1(x)))
        x = F.gelu(self.norm2(self.fc2(x)))
        return self.fc3(x)[..., 0]


class PatchEmbed(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, c.width, c.patch, stride=c.patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, h, w] -> [B, places, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class MSViT(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + c.grid**2, c.width) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=EPS)
        self.head = nn.Linear(c.width, c.classes)
        if c.regions:
            self.msvit = nn.ModuleDict({"gate": Gate(c)})

    @property
    def gate(self) -> Gate:
        return self.msvit["gate"]

    def backbone(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("msvit.")]

    def parent(self) -> Tensor:
        """The region that holds each fine place, int64 [F]."""
        c = self.config
        side = torch.arange(c.grid) // c.ratio
        return (side[:, None] * (c.grid // c.ratio) + side[None]).flatten()

    def regions(self, images: Tensor) -> Tensor:
        """[B, 3, side, side] -> pixels of every region [B, R, 3·S·S], channel slowest."""
        px = self.config.region_px
        return F.unfold(images, px, stride=px).transpose(1, 2)

    def gate_logits(self, images: Tensor) -> Tensor:
        """Normalised float32 [B, 3, side, side] -> [B, R]; above the threshold: coarse."""
        return self.gate(self.regions(images))

    def tokens(self, images: Tensor) -> Tensor:
        """Every token of every scale [B, 1 + R + F, D], positions added.

        A coarse token is the same embedding of the region shrunk to one patch by the mean, at the
        mean of its places' positions.
        """
        c, table = self.config, self.pos_embed
        parts = [(self.cls_token + table[:, :1]).expand(len(images), -1, -1)]
        if c.regions:
            places = table[0, 1:].T.unflatten(1, (c.grid, c.grid))
            shrunk = self.patch_embed(F.avg_pool2d(images, c.ratio))
            parts.append(shrunk + F.avg_pool2d(places, c.ratio).flatten(1).T)
        parts.append(self.patch_embed(images) + table[:, 1:])
        return torch.cat(parts, dim=1)

    def active(self, coarse: Tensor) -> Tensor:
        """The choice [B, R] as a mask of tokens, bool [B, 1 + R + F]."""
        first = torch.ones_like(coarse[:, :1])
        return torch.cat([first, coarse, ~coarse[:, self.parent()]], dim=1)

    def trim(self, tokens: Tensor, active: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The active tokens first, cut to the longest image of the batch.

        Returns rows [B, n, D], which of them are real (None: all are) and where each came from,
        int64 [B, n].
        """
        counts = active.sum(dim=1)
        longest = int(counts.max())
        order = (~active).byte().argsort(dim=1, stable=True)[:, :longest]
        rows = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
        if int(counts.min()) == longest:
            return rows, None, order
        return rows, torch.arange(longest)[None] < counts[:, None], order

    def run(self, rows: Tensor, valid: Tensor | None) -> Tensor:
        """Blocks and the final norm, [B, n, D] -> [B, n, D]."""
        for block in self.blocks:
            rows = block(rows, valid)
        return self.norm(rows)

    def logits(self, images: Tensor, active: Tensor) -> Tensor:
        """[B, classes] from the tokens that `active` [B, 1 + R + F] names."""
        rows, valid, _ = self.trim(self.tokens(images), active)
        return self.head(self.run(rows, valid)[:, 0])

    def forward(self, images: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Normalised float32 [B, 3, side, side] -> [B, classes]; `coarse` None: all fine."""
        if coarse is None:
            coarse = torch.zeros(len(images), self.config.regions, dtype=torch.bool)
        if not self.config.regions:
            return self.head(self.run(self.tokens(images), None)[:, 0])
        return self.logits(images, self.active(coarse))

    def forward_masked(self, images: Tensor, coarse: Tensor) -> Tensor:
        """The same function the slow way: all tokens run, the inactive ones are never looked at."""
        return self.head(self.run(self.tokens(images), self.active(coarse))[:, 0])

    def features(self, images: Tensor, coarse: Tensor) -> Tensor:
        """Normed outputs on the fine grid [B, rows, columns, D]; a coarse one is repeated."""
        c = self.config
        rows, valid, order = self.trim(self.tokens(images), self.active(coarse))
        out = self.run(rows, valid)
        # Padded rows go to their own, inactive places, which nothing reads below.
        wide = torch.zeros(len(images), 1 + c.regions + c.grid**2, c.width)
        wide.scatter_(1, order[..., None].expand_as(out), out)
        parent = self.parent()
        fine, repeated = wide[:, 1 + c.regions :], wide[:, 1 + parent]
        chosen = torch.where(coarse[:, parent, None], repeated, fine)
        return chosen.unflatten(1, (c.grid, c.grid))


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, side, side, 3] -> float32 [B, 3, side, side]; mean and deviation 0.5."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def metadata(c: Config) -> dict[str, str]:
    """What a reader of the container cannot take from names and shapes."""
    common = {
        "img_size": str(c.side),
        "patch": str(c.patch),
        "embed_dim": str(c.width),
        "depth": str(c.depth),
        "num_heads": str(c.heads),
        "mlp_ratio": str(c.mlp_ratio),
        "ln_eps": "1e-6",
        "act": "gelu_erf",
        "mean": "0.5,0.5,0.5",
        "std": "0.5,0.5,0.5",
    }
    if not c.regions:
        return {"format": "vit-1", **common}
    return {
        "format": "msvit-1",
        **common,
        "ratio": str(c.ratio),
        "token_order": "cls,coarse_raster,fine_raster",
        "coarse_embed": "area_resize_shared",
        "coarse_pos": "area",
        "gate_input": "normalized_rgb_coarse_patch_CHW",
        "gate_threshold": "0",
        "gate_positive": "coarse",
    }


def save(model: MSViT, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path, metadata(model.config))


def load(path: Path | str) -> MSViT:
    """A model from its container; widths come from the shapes, the rest from the metadata."""
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if meta.get("format") not in ("msvit-1", "vit-1"):
        raise ValueError(f"{path}: format must be msvit-1 or vit-1, not {meta.get('format')!r}")
    gate = [tensors[f"msvit.gate.fc{i}.bias"] for i in range(3) if meta["format"] == "msvit-1"]
    config = Config(
        side=int(meta["img_size"]),
        patch=int(meta["patch"]),
        ratio=int(meta.get("ratio", "1")),
        width=int(meta["embed_dim"]),
        depth=int(meta["depth"]),
        heads=int(meta["num_heads"]),
        mlp_ratio=int(meta["mlp_ratio"]),
        classes=len(tensors["head.bias"]),
        gate_widths=(len(gate[0]), len(gate[1]), len(gate[2])) if gate else (64, 64, 32),
    )
    model = MSViT(config)
    model.load_state_dict({name: t.float() for name, t in tensors.items()})
    return model.eval()

"""T2T-ViT with performer tokens and JEI-DNN's intermediate heads and gates, in plain torch.

Parameter names and shapes are those of the JEI-DNN repository (networkslab/dynn), so that a
checkpoint made here reads like one made there. Shapes: B images, N tokens, D width, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKEN_PX = 16
TOKEN_DIM = 64
# The original has 1, and far more training to get over it.
POSITION_SCALE = 0.3


@dataclass(frozen=True)
class Config:
    """T2T-ViT-7 at 96 px with ten classes; a gate after every block except the last."""

    image_px: int = 96
    width: int = 256
    depth: int = 7
    heads: int = 4
    mlp_ratio: int = 2
    classes: int = 10

    @property
    def grid(self) -> int:
        return self.image_px // TOKEN_PX

    @property
    def gates(self) -> int:
        return self.depth - 1


def sinusoids(count: int, width: int) -> Tensor:
    """The fixed position table [1, count, width]: sines on even, cosines on odd columns."""
    exponent = (torch.arange(width, dtype=torch.float64) // 2) * 2 / width
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000**exponent
    table = torch.empty(count, width, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = angles[:, 0::2].sin(), angles[:, 1::2].cos()
    return table.float()[None]


class Performer(nn.Module):
    """Attention by 32 random features, linear in the token count; the skip is v, not the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        features = TOKEN_DIM // 2
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = nn.Linear(dim, 3 * TOKEN_DIM)
        self.proj = nn.Linear(TOKEN_DIM, TOKEN_DIM)
        self.norm2 = nn.LayerNorm(TOKEN_DIM)
        self.mlp = nn.Sequential(
            nn.Linear(TOKEN_DIM, TOKEN_DIM), nn.GELU(), nn.Linear(TOKEN_DIM, TOKEN_DIM)
        )
        random = nn.init.orthogonal_(torch.empty(features, TOKEN_DIM)) * math.sqrt(features)
        self.w = nn.Parameter(random, requires_grad=False)

    def features(self, u: Tensor) -> Tensor:
        """[B, N, 64] -> [B, N, 32], positive."""
        half_square = u.square().sum(-1, keepdim=True) / 2
        return torch.exp(u @ self.w.T - half_square) / math.sqrt(self.w.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, N, 64]."""
        # Exponentials of squares: bf16 would lose them, also under autocast.
        kqv = self.kqv(self.norm1(x)).float()
        with torch.autocast("cpu", enabled=False):
            k, q, v = kqv.split(TOKEN_DIM, dim=-1)
            k, q = self.features(k), self.features(q)
            total = q @ k.sum(1)[..., None]
            y = q @ (k.transpose(1, 2) @ v) / (total + 1e-8)
        x = v + self.proj(y)
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """The stem: three overlapping cuts of the image with a performer after the first two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention1 = Performer(3 * 7 * 7)
        self.attention2 = Performer(TOKEN_DIM * 3 * 3)
        self.project = nn.Linear(TOKEN_DIM * 3 * 3, width)

    def scale_up(self) -> None:
        """Start the value path at unit scale.

        The stem has no skip from its input: at the usual 0.02 a token's content starts far below
        its position, and training takes many times longer to begin. Keys and queries must stay
        small, because the random features take the exponential of their squares.
        """
        linears = [self.project]
        for layer in (self.attention1, self.attention2):
            linears += [layer.proj, *(m for m in layer.mlp if isinstance(m, nn.Linear))]
            nn.init.normal_(layer.kqv.weight[2 * TOKEN_DIM :], std=layer.kqv.in_features**-0.5)
        for linear in linears:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, side, side] -> [B, (side / 16)², width]."""
        side = images.shape[-1] // 4
        x = F.unfold(images, 7, stride=4, padding=2).transpose(1, 2)
        x = self.attention1(x).transpose(1, 2).unflatten(2, (side, side))
        x = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2)
        x = self.attention2(x).transpose(1, 2).unflatten(2, (side // 2, side // 2))
        x = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2)
        return self.project(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        out = F.scaled_dot_product_attention(q, k, v)
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
        self.norm1 = nn.LayerNorm(c.width)
        self.attn = Attention(c.width, c.heads)
        self.norm2 = nn.LayerNorm(c.width)
        self.mlp = Mlp(c.width, c.mlp_ratio * c.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gate(nn.Module):
    """How sure a head's answer is, as a share of the probability mass that leaves there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, logits: Tensor) -> Tensor:
        """[B, C] -> [B] logits of the share; no gradient reaches the head."""
        return self.linear(gate_features(logits.detach()))[:, 0]


def gate_features(logits: Tensor) -> Tensor:
    """[B, C] -> float32 [B, 4]: largest probability, entropy, margin, entropy of p² normalised."""
    log_p = logits.float().log_softmax(-1)
    log_p2 = (2 * log_p).log_softmax(-1)
    top = log_p.exp().topk(2, dim=-1).values
    entropy, entropy_squared = (-(lp.exp() * lp).sum(-1) for lp in (log_p, log_p2))
    return torch.stack([top[:, 0], entropy, top[:, 0] - top[:, 1], entropy_squared], dim=-1)


class T2TViT(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.config = c
        self.tokens_to_token = TokensToToken(c.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        table = POSITION_SCALE * sinusoids(1 + c.grid**2, c.width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.classes)
        self.intermediate_heads = nn.ModuleList(
            nn.Linear(c.width, c.classes) for _ in range(c.gates)
        )
        self.gates = nn.ModuleList(Gate() for _ in range(c.gates))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.tokens_to_token.scale_up()

    def class_rows(self, images: Tensor, corner: tuple[int, int] = (0, 0)) -> Tensor:
        """Normalised images [B, 3, side, side] -> the class row after every block [depth, B, D].

        Rows are normalised by the final LayerNorm, as every head takes them. An image smaller than
        the configuration's is a crop; `corner` is its place on the token grid (row, column).
        """
        grid, side = self.config.grid, images.shape[-1] // TOKEN_PX
        table = self.pos_embed[0, 1:].unflatten(0, (grid, grid))
        row, column = corner
        places = table[row : row + side, column : column + side].flatten(0, 1)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        x = torch.cat([first, self.tokens_to_token(images) + places], dim=1)
        rows = []
        for block in self.blocks:
            x = block(x)
            rows.append(self.norm(x[:, 0]))
        return torch.stack(rows)

    def logits(self, rows: Tensor) -> Tensor:
        """Class rows [depth, B, D] -> logits of every head [depth, B, C], the final one last."""
        heads = [*self.intermediate_heads, self.head]
        return torch.stack([head(row) for head, row in zip(heads, rows, strict=True)])

    def gate_logits(self, logits: Tensor) -> Tensor:
        """Logits of every head [depth, B, C] -> [depth - 1, B]."""
        return torch.stack([gate(z) for gate, z in zip(self.gates, logits, strict=False)])


def normalise(images: Tensor) -> Tensor:
    """uint8 [B, side, side, 3] -> float32 [B, 3, side, side]; mean and deviation 0.5."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def save(model: T2TViT, path: Path, accuracy: float, epoch: int, dtype: torch.dtype) -> None:
    """The container of the JEI-DNN repository: names as DataParallel leaves them."""
    net = {f"module.{name}": t.detach().to(dtype) for name, t in model.state_dict().items()}
    torch.save({"net": net, "acc": accuracy, "epoch": epoch}, path)


def load(path: Path, config: Config | None = None) -> T2TViT:
    model = T2TViT(config or Config())
    net = torch.load(path, weights_only=True)["net"]
    model.load_state_dict({name.removeprefix("module."): t.float() for name, t in net.items()})
    return model.eval()

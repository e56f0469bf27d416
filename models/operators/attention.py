"""Softmax attention: over all tokens (`mha`), and within a band (`swa`). H heads of E = D / H channels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftwork.models.operators import register
from graftwork.models.operators.kernels import FLASH_ATTENTION, choose, on_gpu, remember
from graftwork.specs.operators import Mha, Place, Swa
from graftwork.specs.problems import shortened

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

FLEX_BLOCK = 128  # tokens in a block of FlexAttention's mask
FLEX_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLEX_CHANNELS = 16  # the fewest a head may have there
MAX_REASON = 200  # characters
FLEX_FAILURES: list[str] = []  # why FlexAttention could not be compiled in this process, if it was tried


@register(Mha, inherits={"qkv": "qkv", "proj": "proj"})
class Attention(nn.Module):
    """Attention over all tokens; DiT's own names, `qkv` and `proj`."""

    def __init__(self, spec: Mha, place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.heads = place.heads
        self.qkv = nn.Linear(place.width, 3 * place.width)
        self.proj = nn.Linear(place.width, place.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads)
        flash = choose(FLASH_ATTENTION, self.spec, q, q.shape[-1])
        if flash is not None:
            y = flash(q, k, v)
        else:
            y = F.scaled_dot_product_attention(*heads_first(q, k, v)).transpose(1, 2)
        return self.proj(y.flatten(2))


@register(Swa, inherits={"Wqkv": "qkv", "out_proj": "proj"})
class SlidingWindowAttention(nn.Module):
    """Each token attends to the `window` tokens on each side of it and to itself; flash-attn's names.

    Cost grows with N * window, and no N x N matrix is ever made: not by flash-attn, not by FlexAttention, which stands
    in for it on a GPU, and not by the definition, which gathers keys and values into bands.
    """

    def __init__(self, spec: Swa, place: Place) -> None:
        super().__init__()
        self.spec = spec
        self.heads = place.heads
        self.Wqkv = nn.Linear(place.width, 3 * place.width)
        self.out_proj = nn.Linear(place.width, place.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.Wqkv(x), self.heads)
        window = self.spec.window
        flash = choose(FLASH_ATTENTION, self.spec, q, q.shape[-1])
        if flash is not None:
            y = flash(q, k, v, window_size=(window, window))
        else:
            y = self._without_flash(*heads_first(q, k, v)).transpose(1, 2)
        return self.out_proj(y.flatten(2))

    def _without_flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B,H,N,E) each, by FlexAttention on a GPU, if it takes them and there is a C compiler; else as defined."""
        if not on_gpu(q):
            return band_attention(q, k, v, self.spec.window)
        y = None if flex_obstacle(q) else flex_band_attention(q, k, v, self.spec.window)
        remember(self.spec.kind, "FlexAttention", flex_obstacle(q))
        return band_attention(q, k, v, self.spec.window) if y is None else y


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B,N,3D), rows ordered q, k, v -> three of (B,N,H,E)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three of (B,N,H,E) -> three of (B,H,N,E)."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def band_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(B,H,N,E) each: every query against its own 2 * window + 1 keys."""
    num_tokens, band = q.shape[2], 2 * window + 1
    # (B,H,N,E,band); positions beyond either end are padding, masked below.
    k, v = (F.pad(a, (0, 0, window, window)).unfold(2, band, 1) for a in (k, v))
    scores = (q[:, :, :, None] @ k)[:, :, :, 0] * q.shape[-1] ** -0.5
    position = torch.arange(num_tokens, device=q.device)[:, None] + torch.arange(-window, window + 1, device=q.device)
    scores = scores.masked_fill((position < 0) | (position >= num_tokens), float("-inf"))
    return (v @ scores.softmax(-1)[..., None])[..., 0]


def flex_obstacle(q: Tensor) -> str | None:
    """Return why FlexAttention is not called on (B,H,N,E), None if it is."""
    if q.dtype not in FLEX_DTYPES:
        return f"it takes {', '.join(map(str, FLEX_DTYPES))}, not {q.dtype}"
    if q.shape[-1] < FLEX_CHANNELS:
        return f"it takes {FLEX_CHANNELS} channels a head or more, not {q.shape[-1]}"
    return FLEX_FAILURES[0] if FLEX_FAILURES else None


def flex_band_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor | None:
    """(B,H,N,E) each -> the same of the band; None, with a line in FLEX_FAILURES, if it cannot be compiled here.

    Its first call compiles it, which needs a C compiler. Within a compiled operator it is compiled with that.
    """
    flex, mask = compiled_flex_attention(), band_mask(q.shape[2], window, q.device)
    if torch.compiler.is_compiling():
        return flex(q, k, v, block_mask=mask)
    try:
        return flex(q, k, v, block_mask=mask)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whatever kind compilers raise
        reason = shortened(" ".join(str(error).split()), MAX_REASON)
        FLEX_FAILURES.append(f"it cannot be compiled: {reason}")
        return None


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """Return FlexAttention as one fused kernel; uncompiled it would make the N x N matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


@functools.cache
def band_mask(num_tokens: int, window: int, device: torch.device) -> BlockMask:
    """Return the band as FlexAttention's BlockMask, built block by block: torch's own maker evaluates it on N x N."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = torch.arange(-(-num_tokens // FLEX_BLOCK), device=device)
    first = ((blocks * FLEX_BLOCK - window) // FLEX_BLOCK).clamp(min=0)
    last = (((blocks + 1) * FLEX_BLOCK - 1 + window) // FLEX_BLOCK).clamp(max=len(blocks) - 1)
    # The key blocks of each query block: those within the band first, then the others.
    key_blocks = (first[:, None] + blocks) % len(blocks)
    reach = torch.tensor(window, device=device)  # a tensor, so that another window is not another kernel

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= reach

    return BlockMask.from_kv_blocks(
        (last - first + 1).int()[None, None],
        key_blocks.int()[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=within,
        seq_lengths=(num_tokens, num_tokens),
    )

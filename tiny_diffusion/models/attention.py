"""Attention between the pixels of an image: softmax(q k^T / sqrt(d)) v.

On a CPU torch's kernel is slow for narrow heads, because it multiplies tall, thin matrices in their slowest order.
For these the same products are computed with the long side last, for a few heads at a time so that the square matrices
stay in the cache: with heads of 8 channels, as diffusers' networks have them, a training step is 1.1 times as fast
(benchmarks/attention.py; RESULTS.md).  Everywhere else torch's kernel is used.

Under autocast a CPU computes attention in float32: torch's kernel for bfloat16 takes longer there (RESULTS.md).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_NARROW = 16  # channels per head; 16 is no faster, but runs with such heads resume to the same bits
SCORES_AT_ONCE = 300_000  # numbers per core: about a megabyte of float32, which its cache holds


def attend(q: Tensor, k: Tensor, v: Tensor, head_width: int) -> Tensor:
    """q, k, v: (B, C, H, W), where every `head_width` channels are a head.   Returns (B, C, H, W)."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attend(q.float(), k.float(), v.float(), head_width)
    exact = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    if exact and head_width <= MAX_NARROW and not torch.compiler.is_compiling():
        return _Attend.apply(q, k, v, head_width)
    heads = (x.flatten(2).unflatten(1, (-1, head_width)).mT for x in (q, k, v))  # (B, heads, H*W, head_width)
    return F.scaled_dot_product_attention(*heads).mT.flatten(1, 2).unflatten(2, q.shape[2:])


class _Attend(torch.autograd.Function):
    """Keeps q, k and v for the backward pass and recomputes the scores, as Dao et al. (2022)."""

    @staticmethod
    def forward(ctx, q, k, v, head_width):
        flat = [_heads(x, head_width) for x in (q * head_width**-0.5, k, v)]
        ctx.save_for_backward(*flat)
        ctx.image = q.shape
        out = torch.empty_like(flat[2])
        for rows, (q, k, v) in _parts(*flat):
            torch.bmm(v, _scores(q, k).mT, out=out[rows])
        return out.view(ctx.image)

    @staticmethod
    def backward(ctx, grad):
        flat = ctx.saved_tensors
        grad = _heads(grad, flat[0].shape[1])
        d_q, d_k, d_v = (torch.empty_like(x) for x in flat)
        for rows, (q, k, v, g) in _parts(*flat, grad):
            with torch.enable_grad():
                logits = torch.bmm(q.mT, k).requires_grad_()
                scores = logits.softmax(-1)
                total = scores.sum()
            torch.bmm(g, scores.detach(), out=d_v[rows])
            # The gradient enters by a hook: given to torch.autograd.grad, it would make that import sympy first.
            d_scores = torch.bmm(g.mT, v)
            scores.register_hook(lambda _, d_scores=d_scores: d_scores)
            (d_logits,) = torch.autograd.grad(total, logits)
            torch.bmm(k, d_logits.mT, out=d_q[rows])
            torch.bmm(q, d_logits, out=d_k[rows])
        d_q *= flat[0].shape[1] ** -0.5
        return *(x.view(ctx.image) for x in (d_q, d_k, d_v)), None


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q, k: (heads, d, N) -> attention weights (heads, N, N)."""
    return torch.bmm(q.mT, k).softmax(-1)


def _parts(*tensors: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Neighbouring rows of all tensors, as many at a time as fill the cache of every core."""
    heads, _, pixels = tensors[0].shape
    many = max(1, SCORES_AT_ONCE * torch.get_num_threads() // pixels**2)
    for start in range(0, heads, many):
        rows = slice(start, start + many)
        yield rows, [tensor[rows] for tensor in tensors]


def _heads(x: Tensor, head_width: int) -> Tensor:
    """(B, C, H, W) in any memory format -> (B * heads, head_width, H * W), contiguous."""
    return x.reshape(-1, head_width, x.shape[2] * x.shape[3]).contiguous()

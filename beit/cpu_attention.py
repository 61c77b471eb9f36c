"""Attention for training on a CPU, where torch's own is slow with a bias that learns, and in bf16.

With such a bias `scaled_dot_product_attention` takes a reference path with five more passes over
the logits, separates q, k and v by one copy each, and under autocast to bf16 widens the logits.
Without one it has a fused kernel whose gradient is slow in bf16. Written out with its gradient the
same takes less time (benchmarks/results/attention.md: 0.84 of it with a bias, 0.44 to 0.11 in bf16
without one) and more memory: the weights of all pairs are kept, in the type of q, k and v.
"""

from typing import Any

import torch
from torch import Tensor


def wanted(qkv: Tensor, bias: Tensor | None) -> bool:
    """Whether `attention` is the faster one here: eager training on a CPU, a bias or bf16."""
    return (
        ((bias is not None and bias.requires_grad) or qkv.dtype == torch.bfloat16)
        and qkv.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def attention(qkv: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v: (B, T, 3 * D) and (1, heads, T, T) to (B, T, D).

    Products in the precision of qkv. Under autocast logits and the bias are float32, as on a GPU.
    """
    out: Tensor = _Attention.apply(qkv, bias, num_heads)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
        B, T, _ = qkv.shape
        # (B, T, 3 * D) -> (3, B * heads, T, D / heads)
        parts = (
            qkv.view(B, T, 3, num_heads, -1).permute(2, 0, 3, 1, 4).reshape(3, B * num_heads, T, -1)
        )
        q, k, v = parts.unbind(0)
        scale = q.shape[-1] ** -0.5
        wide = torch.promote_types(q.dtype, torch.float32) if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            wide_q, wide_k = q.to(wide), k.to(wide).transpose(1, 2)
            logits = torch.baddbmm(wide_q.new_empty(1, 1, 1), wide_q, wide_k, beta=0, alpha=scale)
            if bias is not None:
                logits.view(B, num_heads, T, T).add_(bias)
            weights = logits.softmax(dim=-1).to(v.dtype)
        ctx.save_for_backward(parts, weights)
        ctx.num_heads, ctx.wide = num_heads, wide
        # (B * heads, T, D / heads) -> (B, T, D)
        return torch.bmm(weights, v).view(B, num_heads, T, -1).transpose(1, 2).reshape(B, T, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        parts, weights = ctx.saved_tensors
        heads = ctx.num_heads
        q, k, v = parts.unbind(0)
        rows, T, width = q.shape
        B, scale = rows // heads, width**-0.5
        # (B, T, D) -> (B * heads, T, D / heads)
        grad = grads[0].reshape(B, T, heads, width).transpose(1, 2).reshape(rows, T, width)
        d_parts = torch.empty_like(parts)
        torch.bmm(weights.transpose(1, 2), grad, out=d_parts[2])
        d_weights = torch.bmm(grad, v.transpose(1, 2))
        d_logits = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_bias = None
        if ctx.needs_input_grad[1]:
            d_bias = d_logits.view(B, heads, T, T).sum(dim=0, keepdim=True, dtype=ctx.wide)
        empty = q.new_empty(1, 1, 1)
        torch.baddbmm(empty, d_logits, k, beta=0, alpha=scale, out=d_parts[0])
        torch.baddbmm(empty, d_logits.transpose(1, 2), q, beta=0, alpha=scale, out=d_parts[1])
        # (3, B * heads, T, D / heads) -> (B, T, 3 * D)
        d_qkv = d_parts.view(3, B, heads, T, width).permute(1, 3, 0, 2, 4).reshape(B, T, -1)
        return d_qkv, d_bias, None

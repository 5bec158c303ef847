"""Attention over text and picture together, and the maps of a few keys beside it, at the price of the attention alone.

torch's flash attention also gives every query's log-sum-exp, so the map of a key needs the products with that key
alone. Its backward pass computes the gradient of the scores as P (dP - D), D = rowsum(dO * O) (arXiv 2307.08691); a
gradient g of the log-sum-exp makes that P (dP - D + g), so an output O' with rowsum(dO * O') = D - g brings it along.
"""

import torch

from .attention import widened

aten = torch.ops.aten


def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch has the kernel for split heads q, k, v [b, heads, n, d], in a dtype whose range holds O'."""
    if q.device.type == "cpu":
        return q.dtype != torch.float16 and q.shape[-1] == v.shape[-1]
    if q.device.type != "cuda" or q.dtype != torch.bfloat16 or q.shape[-1] % 8:
        return False
    known = torch.backends.cuda
    return known.can_use_flash_attention(known.SDPAParams(q, k, v, None, 0.0, False, False))


def _forward(q, k, v) -> tuple:
    """Output [b, heads, n, d], log-sum-exp [b, heads, n], and what else the backward pass wants."""
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:8]


def _backward(gradient, q, k, v, out, lse, *more) -> tuple:
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, out, lse, 0.0, False, scale=scale
        )
    starts, random = more[:4], more[4:]
    return aten._scaled_dot_product_flash_attention_backward(
        gradient, q, k, v, out, lse, *starts, 0.0, False, *random, scale=scale
    )


def _looks(q, k, lse, chosen, first: int) -> torch.Tensor:
    """Probabilities [b, heads, n - first, s] of the chosen keys."""
    keys = widened(k[:, :, chosen]) * q.shape[-1] ** -0.5
    return (widened(q[:, :, first:]) @ keys.mT - lse[:, :, first:, None]).exp()


def _carrying(from_out, out, g) -> tuple[torch.Tensor, torch.Tensor]:
    """dO and O' for which rowsum(dO * O') = rowsum(from_out * out) - g, of rows [..., d], g [..., 1].

    Where a row of ``from_out`` is nothing beside g, as in a last block, a row that is nothing too stands in.
    """
    facts = torch.finfo(g.dtype)
    length = torch.linalg.vector_norm(from_out, dim=-1, keepdim=True, dtype=g.dtype)
    least = facts.eps * g.abs()
    short = length <= least
    from_out = torch.where(short, (least * from_out.shape[-1] ** -0.5).to(from_out), from_out)
    length = torch.where(short, least, length)
    there = length > facts.tiny
    unit = from_out * torch.where(there, 1 / length, 0)  # the square of a length may be too small
    return from_out, (out - unit * torch.where(there, g / length, 0)).to(out)


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, weights, chosen, first):
        out, lse, *more = _forward(q, k, v)
        ctx.save_for_backward(q, k, v, weights, chosen, out, lse, *filter(torch.is_tensor, more))
        ctx.first, ctx.more = first, [None if torch.is_tensor(m) else (m,) for m in more]  # a tensor may be missing
        return out, _looks(q, k, lse, chosen, first).mean(1) @ weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, from_out, from_maps):
        q, k, v, weights, chosen, out, lse, *tensors = ctx.saved_tensors
        rest, first, scale = iter(tensors), ctx.first, q.shape[-1] ** -0.5
        more = [next(rest) if given is None else given[0] for given in ctx.more]
        p = _looks(q, k, lse, chosen, first)
        slope = p * (from_maps @ weights.mT / q.shape[1])[:, None]
        pixels = slice(first, None)
        from_out, out = from_out.clone(), out.clone()
        from_out[:, :, pixels], out[:, :, pixels] = _carrying(
            from_out[:, :, pixels], out[:, :, pixels], -slope.sum(-1, keepdim=True)
        )
        dq, dk, dv = _backward(from_out, q, k, v, out, lse, *more)
        dq[:, :, pixels] += slope @ (widened(k[:, :, chosen]) * scale)
        dk.index_add_(2, chosen, (slope.mT @ widened(q[:, :, pixels]) * scale).to(dk))
        return dq, dk, dv, None, None, None


def joint(q, k, v, chosen: torch.Tensor, weights: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and weightings of a few columns of its map for the queries from ``first`` on.

    q, k, v [b, heads, n, d], ``usable``; keys ``chosen`` [s], with weights [b or 1, s, c]. Maps lead gradients to
    queries and keys. Returns: output [b, n, heads * d]; maps [b, n - first, c], fp32 or wider, mean over heads.
    """
    weights = weights.to(torch.promote_types(q.dtype, torch.float32))
    out, maps = _Joint.apply(q, k, v, weights, chosen, first)
    return out.transpose(1, 2).flatten(2), maps

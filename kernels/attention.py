"""Attention maps that are kept as a few columns, and losses between two prompts' maps of the same queries.

What depends on queries x keys is never kept: a forward pass leaves its inputs, and the backward pass recomputes. A
column is a weighting of keys: one key, the mean of a word's pieces, a sum over repeated keys.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

OF_CONCEPT = ("moments", "means")
LOSSES = ("probabilities", "logits", *OF_CONCEPT)
PIECE = 1 << 25
"""Elements of a softmax that exist at the same time."""
CACHED = 1 << 19
"""The same on CPUs, where a piece should stay in the cache."""
VECTOR = 16
"""Products are faster with so many columns, or a multiple."""
TEXT = 1024
"""Keys of a text, at most; torch's fused product is faster on a CPU where there are more."""
PIXELS = 1024
"""Pixels that a map counts as having, whatever its resolution: 32 x 32, SD1's at 512 px."""


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[b, n, heads * d] -> [b, heads, n, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def widened(x: torch.Tensor) -> torch.Tensor:
    """fp32, or what is wider already."""
    return x if x.dtype == torch.float64 else x.float()


def _softmax(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Probabilities [b, h, n, m] of queries [b, h, n, d] over keys [b, h, m, d]."""
    return (widened(q) * q.shape[-1] ** -0.5 @ widened(k).transpose(-1, -2)).softmax(-1)


def fused(q, k, v, columns):
    """Output [b, heads, n, d] and maps [b, n, c] of split heads q [b, heads, n, d], k and v [b, heads, m, d].

    Columns [b or 1, m, c] are values too, so torch's fused product gives both, and maps lead gradients to the queries.
    """
    wide, count = v.shape[-1], columns.shape[-1]
    aligned = [-(-width // 8) * 8 for width in (q.shape[-1], wide + count)]  # which fast kernels want
    if q.device.type not in ("cuda", "xpu"):  # CPUs are faster so, MPS gives the queries' width (pytorch #176767)
        aligned = [max(aligned)] * 2
    own = F.pad(columns.to(v), (0, aligned[1] - wide - count))[:, None]
    scale, more = q.shape[-1] ** -0.5, aligned[0] - q.shape[-1]
    q, k = (F.pad(x, (0, more)) if more else x for x in (q, k))
    both = torch.cat([v, own.expand(*v.shape[:2], -1, -1)], -1)
    found = F.scaled_dot_product_attention(q, k, both, scale=scale)
    out, maps, _ = found.split([wide, count, found.shape[-1] - wide - count], -1)
    return out, maps.mean(1, dtype=torch.promote_types(maps.dtype, torch.float32))


def _pieces(q, k, v, columns, more: int):
    """Softmax of a piece of one sample's queries at a time, in memory that all pieces share.

    Yields: sample; piece of the queries; q of the piece [heads, p, d]; keys [heads, m, d], times the scale; values
    [heads, m, e]; columns [m, c]; probabilities [heads, p, m], and ``more`` times as much room. Keys are filled up with
    ones that nothing attends to.
    """
    (heads, queries, d), count = q.shape[1:], k.shape[2]
    m = -(-count // VECTOR) * VECTOR
    dtype = torch.promote_types(k.dtype, torch.float32)
    keys, values, columns = (
        torch.cat([x.to(dtype), x.new_zeros(*x.shape[:-2], m - count, x.shape[-1], dtype=dtype)], -2)
        for x in (k, v, columns)
    )
    keys, columns = keys * d**-0.5, columns.expand(len(q), -1, -1)
    most = CACHED if q.device.type == "cpu" else PIECE
    step = max(1, min(queries, most // max(1, heads * m)))
    room = keys.new_empty(1 + more, heads * step * m)
    for sample in range(len(q)):
        for start in range(0, queries, step):
            which = slice(start, min(start + step, queries))
            part = widened(q[sample, :, which])
            p, scores, *others = room[:, : heads * part.shape[1] * m].view(len(room), heads, -1, m)
            torch.bmm(part, keys[sample].mT, out=scores)[..., count:] = -torch.inf
            torch.softmax(scores, -1, out=p)
            yield sample, which, part, keys[sample], values[sample], columns[sample], p, scores, *others


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, columns, follow):
        ctx.save_for_backward(q, k, v, columns)
        ctx.follow = follow
        if q.device.type != "cpu" or k.shape[2] > TEXT:
            return fused(q, k, v, columns)
        out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        maps = widened(q).new_empty(len(q), q.shape[2], columns.shape[-1])
        for sample, which, _, _, values, own, p, _ in _pieces(q, k, v, columns, 1):
            out[sample, :, which] = torch.bmm(p, values)
            maps[sample, which] = p.mean(0) @ own
        return out, maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, from_out, from_maps):
        q, k, v, columns = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(widened(k)), torch.zeros_like(widened(v))

        def slope(gradient, p, out):
            return torch.ops.aten._softmax_backward_data.out(gradient, p, -1, p.dtype, grad_input=out)

        for sample, which, part, keys, values, own, p, through, found in _pieces(q, k, v, columns, 2):
            out = widened(from_out[sample, :, which])
            dv[sample] += torch.bmm(p.mT, out)[:, : k.shape[2]]
            torch.bmm(out, values.mT, out=through)
            if not ctx.follow:
                dq[sample, :, which] = torch.bmm(slope(through, p, found), keys)
            through += from_maps[sample, which].to(p) @ own.mT / q.shape[1]
            slope(through, p, found)
            if ctx.follow:
                dq[sample, :, which] = torch.bmm(found, keys)
            dk[sample] += torch.bmm(found.mT, part)[:, : k.shape[2]]
        return dq, dk.mul_(q.shape[-1] ** -0.5).to(k), dv.to(v), None, None


def attend(q, k, v, heads: int, columns: torch.Tensor, follow_queries: bool = False):
    """Attention and chosen columns of its map out of one softmax.

    q [b, n, heads * d]; k, v [b, m, heads * d]; columns [b or 1, m, c]. Maps lead gradients to the keys, and to the
    queries with ``follow_queries``. Returns: output [b, n, heads * d]; maps [b, n, c], mean over heads.
    """
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    if follow_queries and q.device.type == "cuda":  # where torch's fused backward keeps no maps either
        out, maps = fused(q, k, v, columns)
    else:
        out, maps = _Attend.apply(q, k, v, columns, follow_queries)
    return out.transpose(1, 2).flatten(2), maps


def attention_columns(q, k, heads: int, columns: torch.Tensor) -> torch.Tensor:
    """Chosen columns [b, n, c] of softmax(q k^T / sqrt(d)), softmax over all keys, mean over heads; shapes as above."""
    return attend(q, k, k[..., :0], heads, columns, True)[1]


def _difference(q, k, reference, columns, of_reference, kind):
    if kind == "logits":  # linear in the keys, so the columns are taken before the product
        own, other = (c.transpose(-1, -2)[:, None] for c in (columns, of_reference))
        own = own / own.sum(-1, keepdim=True).clamp_min(1e-8)
        other = other / other.sum(-1, keepdim=True).clamp_min(1e-8)
        k, reference = widened(k), widened(reference)
        gap = widened(q) @ (own.to(k) @ k - other.to(k) @ reference).transpose(-1, -2)
        count = (columns.sum(1) > 0).sum().clamp_min(1) * q.shape[0] // columns.shape[0]
        return (gap * q.shape[-1] ** -0.5).square().sum() / (count * q.shape[1] * q.shape[2])
    ours, theirs = _softmax(q, k), _softmax(q, reference)
    ours, theirs = ours @ columns.to(ours)[:, None], theirs @ of_reference.to(ours)[:, None]
    if kind == "probabilities":
        return (ours - theirs).square().sum() * PIXELS / (q.shape[2] * q.shape[0] * q.shape[1])
    return attention_moments(ours, theirs, (columns.sum(1) > 0).sum(-1), 2.5 if kind == "moments" else 0.0)


def attention_moments(ours: torch.Tensor, theirs: torch.Tensor, count: torch.Tensor, variance: float) -> torch.Tensor:
    """Distance between mean and variance, over heads and pixels, of two maps [b, h, n, c] (AttnDreamBooth, 2024).

    ``count`` [b or 1]: columns that show anything; ``variance``: weight beside that of the means. The authors' stages 2
    and 3 weigh them 2 and 5, their first the means alone.
    Returns: scalar, mean over columns and batch.
    """
    means = (ours.mean((1, 2)) - theirs.mean((1, 2))).square()
    spreads = (ours.var((1, 2)) - theirs.var((1, 2))).square()
    return ((means + variance * spreads).sum(-1) / count.clamp_min(1)).mean()


def attention_loss(q, k, reference, heads: int, columns, of_reference, kind: str = "probabilities") -> torch.Tensor:
    """Subject-wise attention loss of SeFi-IDE (arXiv 2402.00631) between the maps of one layer.

    q [b, n, heads * d]; k [b, m, heads * d]; reference [b, r, heads * d], keys of the reference prompt for the same
    queries; columns [b, m, c] and of_reference [b, r, c] say which keys are compared, columns of zeros count nothing.
    ``probabilities``: squared difference summed over tokens and pixels, mean over heads and batch, scaled to 1,024
    pixels; ``logits``: mean square before the softmax; ``moments``: ``attention_moments``; ``means``: of the means
    alone.
    Returns: scalar. Raises: ValueError for an unknown kind.
    """
    if kind not in LOSSES:
        raise ValueError(f"Unknown attention loss {kind!r}; known: {', '.join(LOSSES)}.")
    q, k, reference = (split_heads(x, heads) for x in (q, k, reference))
    given = (q, k, reference, columns, of_reference, kind)
    return checkpoint(_difference, *given, use_reentrant=False, preserve_rng_state=False)

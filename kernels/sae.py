"""Sparse autoencoders by gather: of each token only the active latents are touched, forwards and backwards.

x [n, d]: tokens. encoder [m, d], encoder_bias [m], decoder [m, d], decoder_bias [d]: one row per latent. A code is two
tensors [n, k]: values, largest first, and indices of latents; a value of 0 stands for no latent. Values and gradients
are those of the dense formulas z = act((x - decoder_bias) encoder^T + encoder_bias), x' = z decoder + decoder_bias
(TopK and AuxK: arXiv 2406.04093; BatchTopK: arXiv 2412.06410; JumpReLU: arXiv 2407.14435).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

Code = tuple[torch.Tensor, torch.Tensor]


def gathered_dots(x: torch.Tensor, rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """x[n] . rows[indices[n, j]] -> [n, k]. x [n, d], rows [m, d]."""
    (n, k), cpu = indices.shape, x.device.type == "cpu"
    step = max(1, (1280 if cpu else 1 << 17) // max(1, k))  # on a CPU so many rows stay in the cache
    found = x.new_empty(n, k)
    buffer = x.new_empty(min(step, n) * k, x.shape[1])
    for s in range(0, n, step):
        part = indices[s : s + step]
        taken = buffer[: part.numel()]
        torch.index_select(rows, 0, part.reshape(-1), out=taken)
        torch.bmm(x[s : s + step, None], taken.view(*part.shape, -1).mT, out=found[s : s + step, None])
    return found


def weighted_rows(values: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum over j of values[n, j] rows[indices[n, j]] -> [n, d]."""
    if not indices.shape[1]:
        return rows.new_zeros(len(indices), rows.shape[1])
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def spread_rows(values: torch.Tensor, indices: torch.Tensor, x: torch.Tensor, count: int) -> torch.Tensor:
    """Sum over (n, j) with indices[n, j] == i of values[n, j] x[n] -> [count, d]: ``weighted_rows`` transposed."""
    flat = indices.reshape(-1)
    if not flat.numel():
        return x.new_zeros(count, x.shape[1])
    order = flat.argsort()
    offsets = torch.bincount(flat, minlength=count).cumsum(0).roll(1)
    offsets[0] = 0
    weights = values.reshape(-1)[order]
    return F.embedding_bag(order // indices.shape[1], x, offsets, per_sample_weights=weights, mode="sum")


class _Encode(torch.autograd.Function):
    """Pre-activations of the latents that ``select`` chooses."""

    @staticmethod
    def forward(ctx, x, encoder, bias, select):
        values, indices = select(x, encoder, bias)
        ctx.save_for_backward(x, encoder, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, encoder, indices = ctx.saved_tensors
        grad, count = grad.contiguous(), len(encoder)
        to_x = weighted_rows(grad, indices, encoder) if ctx.needs_input_grad[0] else None
        to_encoder = spread_rows(grad, indices, x, count) if ctx.needs_input_grad[1] else None
        to_bias = grad.new_zeros(count).index_add_(0, indices.reshape(-1), grad.reshape(-1))
        return to_x, to_encoder, to_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, decoder):
        ctx.save_for_backward(values, indices, decoder)
        return weighted_rows(values, indices, decoder)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        values, indices, decoder = ctx.saved_tensors
        grad = grad.contiguous()
        to_values = gathered_dots(grad, decoder, indices) if ctx.needs_input_grad[0] else None
        to_decoder = spread_rows(values, indices, grad, len(decoder)) if ctx.needs_input_grad[2] else None
        return to_values, None, to_decoder


def encode(x, encoder, encoder_bias, decoder_bias, select: Callable[..., Code]) -> Code:
    """Code of tokens x [n, d], differentiable in all four; ``select``: ``top``, ``batch_top`` or ``above``, bound."""
    values, indices = _Encode.apply(x - decoder_bias, encoder, encoder_bias, select)
    return values.relu(), indices


def decode(values: torch.Tensor, indices: torch.Tensor, decoder: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Reconstruction [n, d] of a code, differentiable."""
    return _Decode.apply(values, indices, decoder) + bias


def _largest(p: torch.Tensor, count: int) -> Code:
    """The ``count`` largest of each row of p [n, m], largest first; over maxima of groups where that is faster."""
    n, m = p.shape
    size = next((s for s in (32, 16, 8) if m % s == 0 and m // s >= 4 * count), 0)
    if not size:
        return p.topk(count)
    groups = p.view(n, size, m // size)  # the largest lie in the groups with the largest maxima
    wide = torch.promote_types(p.dtype, torch.float32)  # bf16 is slow to sort on a CPU
    best = groups.amax(1).to(wide).topk(count, sorted=False).indices
    values, place = groups.gather(2, best[:, None].expand(-1, size, -1)).reshape(n, -1).to(wide).topk(count)
    return values.to(p.dtype), (place // count) * (m // size) + best.gather(1, place % count)


def _blocks(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(256 if x.device.type == "cpu" else 4096)


@torch.no_grad()
def top(x, encoder, bias, k: int, rough: torch.Tensor | None = None) -> Code:
    """Pre-activations of the k largest latents of each token.

    ``rough``: the encoder in bf16. It then chooses a quarter more candidates than needed, and their values are computed
    exactly; a latent is missed only when bf16 ranks it behind all of these.
    """
    k, found, blocks = min(k, len(encoder)), [], _blocks(x)
    table, more = (encoder, k) if rough is None else (rough, min(len(encoder), k + max(8, k // 4)))
    low = bias.to(table.dtype)
    # One page for all blocks: fresh memory for each costs a third of the time on a CPU.
    page = torch.empty(len(blocks[0]), len(table), dtype=table.dtype, device=x.device)
    for part in blocks:
        p = torch.mm(part.to(table.dtype), table.T, out=page[: len(part)]).add_(low)
        values, indices = _largest(p, more)
        if rough is not None:
            values, place = (gathered_dots(part, encoder, indices) + bias[indices]).topk(k)
            indices = indices.gather(1, place)
        found.append((values, indices))
    return torch.cat([v for v, _ in found]), torch.cat([i for _, i in found])


@torch.no_grad()
def batch_top(x, encoder, bias, k: int, rough: torch.Tensor | None = None) -> Code:
    """Pre-activations of the k n largest latents of all n tokens together; tokens with fewer are filled up with 0."""
    n, m = len(x), len(encoder)
    count = min(4 * k, m)
    while True:
        values, indices = top(x, encoder, bias, count, rough)
        limit = values.flatten().topk(min(k * n, values.numel())).values[-1].clamp_min(0)
        if count == m or bool((values[:, -1] <= limit).all()):
            return _narrowed(torch.where((values >= limit) & (values > 0), values, 0), indices)
        count = min(2 * count, m)


@torch.no_grad()
def above(x, encoder, bias, threshold: torch.Tensor) -> Code:
    """Pre-activations of every latent above its ``threshold`` [m] or [1], 0 at least; filled up with 0."""
    found = []
    for part in _blocks(x):
        p = F.linear(part, encoder, bias)
        p = torch.where((p > threshold) & (p > 0), p, 0)
        found.append(p.topk(max(1, int((p > 0).sum(1).max()))))
    width = max(v.shape[1] for v, _ in found)
    values, indices = ([F.pad(one[which], (0, width - one[0].shape[1])) for one in found] for which in (0, 1))
    return torch.cat(values), torch.cat(indices)


def _narrowed(values: torch.Tensor, indices: torch.Tensor) -> Code:
    """Without the columns in which every value is 0; rows have theirs at the end."""
    width = max(1, int((values > 0).sum(1).max()))
    return values[:, :width].contiguous(), indices[:, :width].contiguous()


def dense(values: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    """The code as [n, count] with zeros."""
    return values.new_zeros(len(values), count).scatter_add_(1, indices, values)


def nested(values, indices, decoder, bias, ends: Sequence[int], by: str) -> list[torch.Tensor]:
    """Reconstructions [n, d] from growing parts of a code, differentiable; the last ``ends`` must reach everything.

    ``by``: ``rank`` uses the ends[l] largest latents (MSAE, arXiv 2502.20578), ``prefix`` those with an index below
    ends[l] (Matryoshka, arXiv 2503.17547).
    """
    edges = torch.tensor(ends, device=values.device)
    which = (
        torch.arange(values.shape[1], device=values.device).expand_as(indices).contiguous() if by == "rank" else indices
    )
    level = torch.bucketize(which, edges, right=True)
    found, total = [], bias
    for number in range(len(ends)):
        total = total + _Decode.apply(values * (level == number), indices, decoder)
        found.append(total)
    return found


def fvu(x: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Fraction of the variance of x [n, d] over its tokens that ``rebuilt`` leaves unexplained."""
    return (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum().clamp_min(1e-12)


def auxiliary(x, rebuilt, encoder, encoder_bias, decoder, decoder_bias, dead: torch.Tensor, k: int) -> torch.Tensor:
    """AuxK: what the k strongest of the ``dead`` [m] latents leave of the error, as ``fvu``; 0 without dead ones.

    No gradient reaches ``rebuilt``, nor the decoder's bias through the error.
    """
    which = dead.nonzero()[:, 0]
    if not len(which):
        return x.new_zeros(())
    error = (x - rebuilt).detach()
    p = F.linear(x - decoder_bias, encoder[which], encoder_bias[which]).relu()
    if k < len(which):
        chosen = p.topk(k, sorted=False)
        p = torch.zeros_like(p).scatter(1, chosen.indices, chosen.values)
    return fvu(error, p @ decoder[which])


def normed(x: torch.Tensor, norm: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = (x - shift) factor [n, d] as ``Coder`` explains it; shift and factor [n, 1]."""
    shift, factor = x.new_zeros(len(x), 1), x.new_ones(len(x), 1)
    if norm == "layer":
        shift = x.mean(-1, keepdim=True)
        factor = 1 / ((x - shift).std(-1, keepdim=True) + 1e-5)
    elif norm == "length":
        factor = x.shape[1] ** 0.5 / x.norm(dim=-1, keepdim=True)
    return (x - shift) * factor, shift, factor


class Coder:
    """A dictionary at work on tokens in their own units, which are brought to its own first: (y - mean) scale.

    parts: encoder, encoder_bias, decoder, decoder_bias, mean [d], scale [d]; with threshold [m] or [1] every latent
    above it is active, else the k largest. ``norm``: y is x itself (``none``), x after a LayerNorm (``layer``, eps 1e-5
    on the deviation), or x at length sqrt(d) (``length``).
    """

    def __init__(self, parts: Mapping[str, torch.Tensor], k: int, norm: str = "none"):
        self.parts, self.k, self.norm = parts, k, norm

    def prepared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x' = ((x - shift) factor - mean) scale [n, d]; shift and factor [n, 1]."""
        y, shift, factor = normed(x, self.norm)
        return (y - self.parts["mean"]) * self.parts["scale"], shift, factor

    def encode(self, x: torch.Tensor) -> Code:
        """Code of tokens x [n, d]."""
        p = self.parts
        select = partial(above, threshold=p["threshold"]) if "threshold" in p else partial(top, k=self.k)
        return encode(self.prepared(x)[0], p["encoder"], p["encoder_bias"], p["decoder_bias"], select)

    def rebuilt(self, x: torch.Tensor) -> torch.Tensor:
        """What the code of x [n, d] says x was."""
        p, (_, shift, factor) = self.parts, self.prepared(x)
        own = decode(*self.encode(x), p["decoder"], p["decoder_bias"])
        return (own / p["scale"] + p["mean"]) / factor + shift

    def moved(self, x: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """x [n, d] with ``values`` [n, k] added to its latents ``indices``; what the code does not say stays."""
        return x + _Decode.apply(values, indices, self.parts["decoder"]) / self.parts["scale"] / self.prepared(x)[2]

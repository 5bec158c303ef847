"""Two sets of word vectors become one."""

import torch


def slerp(a: torch.Tensor, b: torch.Tensor, amount: float) -> torch.Tensor:
    """Row by row along the great circle, the length linear in ``amount``; a, b [..., width] of one shape.

    The interpolation of Directional Textual Inversion. Parallel rows and rows of length zero are mixed linearly;
    opposite rows, which have no shortest way, turn through the axis that they use least. ``amount`` 0 and 1 give a and
    b bit for bit.
    """
    if amount in (0.0, 1.0):
        return (b if amount else a).clone()
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = a / lengths[0].clamp_min(1e-20), b / lengths[1].clamp_min(1e-20)
    # from the sum and the difference, because acos loses half of the digits near 0 and pi
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    side = v - (u * v).sum(-1, keepdim=True) * u
    axis = torch.zeros_like(u).scatter_(-1, u.abs().argmin(-1, keepdim=True), 1.0)
    other = axis - (u * axis).sum(-1, keepdim=True) * u
    side = torch.where(torch.pi - angle < 1e-3, other, side)
    side = side / side.norm(dim=-1, keepdim=True).clamp_min(1e-20)
    turned = (amount * angle).cos() * u + (amount * angle).sin() * side
    length = (1 - amount) * lengths[0] + amount * lengths[1]
    straight = (angle < 1e-4) | (lengths[0] == 0) | (lengths[1] == 0)
    return torch.where(straight, lerp(a, b, amount), length * turned)


def lerp(a: torch.Tensor, b: torch.Tensor, amount: float) -> torch.Tensor:
    """On the straight line; ``amount`` 0 and 1 give a and b bit for bit."""
    return (b if amount else a).clone() if amount in (0.0, 1.0) else a + amount * (b - a)


def outer_layers(a: torch.Tensor, b: torch.Tensor, amount: float, first: int, end: int) -> torch.Tensor:
    """Shape-style mixing of P+ (arXiv 2303.09522): layers ``first`` .. ``end`` - 1 of a, the others ``amount`` of the
    way from a to b (``slerp``); a, b [stages, layers, roles, vectors, width] of one shape."""
    mixed = slerp(a, b, amount)
    mixed[:, first:end] = a[:, first:end]
    return mixed


def noisy_stages(a: torch.Tensor, b: torch.Tensor, stages: int) -> torch.Tensor:
    """The last ``stages`` stages, which are the noisiest, of b, the others of a; both [stages, ...] of one shape."""
    return torch.cat([a[: len(a) - stages], b[len(b) - stages :]])

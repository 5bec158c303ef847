"""The gated rank-one edit of Perfusion (arXiv 2305.01644), on what a projection reads instead of on its weights.

Perfusion has W e_perp + o g in the place of W e. With o = W u that is W applied to e_perp + g u, so that whoever may
change the rows needs no change of W; o then lies in the range of W.
"""

import torch

SINGULAR = 1e-5
"""Directions that are this near to others, as a share of the largest, count as the same one."""


def edited(
    rows: torch.Tensor,
    directions: torch.Tensor,
    duals: torch.Tensor,
    targets: torch.Tensor,
    beta: torch.Tensor,
    tau: torch.Tensor,
    strength: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """Rows [m, d] without their part along ``directions``, and with ``targets`` as far as the gates are open.

    directions [j, d]: i of each edit; duals [j, d]: C^-1 i, with C [d, d] the uncentred covariance of such rows;
    targets [..., j, d]: u; beta, tau, strength [j] or scalars. Of one edit: s = i.C^-1 e / i.C^-1 i, and
    e - s i + sigmoid((s - beta) / tau) u. Of several, what is taken away is the projection onto all of ``directions``
    that is orthogonal in the metric C^-1. ``strength`` scales each edit; at 0 the rows stay.
    Returns: [..., m, d].
    """
    seen, gram = rows @ duals.mT, directions @ duals.mT
    gates = torch.sigmoid((seen / gram.diagonal() - beta) / tau)
    shares = seen @ torch.linalg.pinv(gram.cpu().double(), rtol=SINGULAR).to(rows)  # not every device has fp64
    return rows - (strength * shares) @ directions + (strength * gates) @ targets


def pull(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A scalar that is zero and whose gradient is ``value - target``: descending it by a rate r makes ``value`` a
    moving average of targets that keeps 1 - r of itself."""
    half = 0.5 * (value - target.detach()).square().sum()
    return half - half.detach()

"""Several low-rank changes of one matrix fused so that each does to its own inputs what it did alone.

Gradient fusion of Mix-of-Show (arXiv 2305.18292): W minimises the sum over concepts of |(W0 + U_i D_i) X_i - W X_i|^2.
The minimum is linear in what it fuses, so it is again of low rank, with the same U_i: no decomposition is needed.
"""

from collections.abc import Sequence

import torch

RIDGE = 1e-2
"""Pull towards the plain sum, as a share of the inputs' mean square; where no input lies the sum is the result."""


def fused(downs: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], ridge: float = RIDGE) -> list[torch.Tensor]:
    """The factors [r_i, k] that stand in the place of ``downs`` D_i [r_i, k] once all changes are one.

    ``grams``: X_i X_i^T [k, k] of each concept's inputs X_i [k, n_i]; more of them than ``downs`` are inputs that are
    to stay as without any change. With G the sum of the grams and e the ridge, D_i (G_i + e) (G + e)^-1: one change
    alone comes out as it went in. Computed in fp64. Raises: ValueError for inputs that are not finite.
    """
    own = [gram.double() for gram in grams]
    total = torch.stack(own).sum(0)
    if not bool(torch.isfinite(total).all()):
        raise ValueError("A layer's inputs are not finite.")
    pull = ridge * float(total.diagonal().mean()) + torch.finfo(torch.float32).tiny
    eye = pull * torch.eye(len(total), dtype=total.dtype, device=total.device)
    root = torch.linalg.cholesky(total + eye)
    pairs = zip(downs, own, strict=False)
    return [torch.cholesky_solve((down.double() @ (gram + eye)).T, root).T.to(down) for down, gram in pairs]


def change(ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor], gram: torch.Tensor) -> float:
    """|sum of U_i D_i X|^2 of inputs with X X^T = ``gram`` [k, k]; U_i [out, r_i], D_i [r_i, k]."""
    up, down = torch.cat([u.double() for u in ups], 1), torch.cat([d.double() for d in downs])
    return float(((up.T @ up) * (down @ gram.double() @ down.T)).sum().clamp_min(0))

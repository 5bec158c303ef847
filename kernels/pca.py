"""Principal components of many vectors, exact and with a fixed sign."""

import torch


def principal(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of largest variance of rows [n, c], fp64 inside.

    From the eigenvectors of the covariance, or of the rows' products where there are fewer rows than channels. Of each
    direction the entry of largest size is positive; beyond the rank of the rows directions are zero.
    Returns: mean [c]; directions [c, count] of length one, largest variance first.
    """
    wide = rows.double()
    mean = wide.mean(0)
    wide = wide - mean
    few = wide.shape[0] < wide.shape[1]
    values, vectors = torch.linalg.eigh(wide @ wide.T if few else wide.T @ wide)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    if few:
        vectors = wide.T @ vectors
    vectors = vectors / vectors.norm(dim=0).clamp_min(1e-300)
    vectors = vectors * (values > values[:1].clamp_min(0) * 1e-12)
    top = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(top < 0, -1.0, 1.0)
    found = torch.zeros(rows.shape[1], count, dtype=torch.float64, device=rows.device)
    found[:, : vectors.shape[1]] = vectors
    return mean.to(rows), found.to(rows)


def spread(values: torch.Tensor) -> torch.Tensor:
    """Each column of values [n, k] to 0..1, its quantiles 0.02 and 0.98 to 0 and 1; constant columns to 0.5."""
    ends = values.sort(0).values
    last = len(values) - 1
    bottom, top = ends[round(0.02 * last)], ends[round(0.98 * last)]
    flat = top - bottom <= 1e-12
    found = ((values - bottom) / torch.where(flat, torch.ones_like(top), top - bottom)).clamp(0, 1)
    return torch.where(flat, torch.full_like(found, 0.5), found)

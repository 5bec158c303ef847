"""Training losses from a denoised estimate, in the model's own prediction space.

Noised inputs follow the host's convention: x = x0 + sigma n (eps, v, edm) or x = (1 - sigma) x0 + sigma n (flow).
"""

import torch

SPACES = ("eps", "v", "edm", "flow", "x0")
DISTANCES = ("length", "square")


def residual(
    space: str, sigma: torch.Tensor, denoised: torch.Tensor, clean: torch.Tensor, sigma_data: float = 1.0
) -> torch.Tensor:
    """Prediction minus target of the network, whose square is the usual loss.

    sigma [b]; denoised, clean [b, ...]. eps: n' - n; v: v' - v (arXiv 2202.00512); edm: F' - F (arXiv 2206.00364);
    flow: velocity n - x0 (arXiv 2209.03003); x0: x0' - x0.
    Returns: [b, ...]. Raises: ValueError for an unknown space.
    """
    s = sigma.view(-1, *[1] * (denoised.ndim - 1))
    d = denoised - clean
    if space in ("eps", "flow"):
        return -d / s
    if space == "v":
        return -d * (s**2 + sigma_data**2) ** 0.5 / (s * sigma_data)
    if space == "edm":
        return d * (s**2 + sigma_data**2) ** 0.5 / (s * sigma_data)
    if space == "x0":
        return d
    raise ValueError(f"Unknown prediction space {space!r}; known: {', '.join(SPACES)}.")


def masked_mse(error: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean square per sample; with a mask [b, 1, h, w] the mean over its area.

    error [b, c, h, w]. Returns: [b]. A sample with an empty mask counts in full.
    """
    square = error.square()
    if mask is None:
        return square.flatten(1).mean(1)
    area = mask.flatten(1).sum(1)
    weight = torch.where(area.view(-1, 1, 1, 1) > 0, mask, torch.ones_like(mask))
    return (square.mean(1, keepdim=True) * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def map_loss(maps: torch.Tensor, masks: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """How far attention maps, each divided by its highest value, are from masks (Break-A-Scene, arXiv 2305.16311).

    maps, masks [b, c, h, w]; drawn [b, c]: 1 for the things that a sample counts, 0 for others.
    Returns: scalar, the mean square over pixels, over a sample's things, and over samples.
    """
    top = maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)  # maps of things that are not there are zero
    apart = (maps / top - masks).square().mean((-2, -1))
    return ((apart * drawn).sum(1) / drawn.sum(1)).mean()


def pair_distance(first: torch.Tensor, second: torch.Tensor, kind: str = "length") -> torch.Tensor:
    """How far features of matched points are apart (Per-Query Visual Concept Learning, arXiv 2508.09045).

    first, second [pairs, c]. ``length``: mean over the pairs of the difference's L2 norm, the paper's; ``square``: mean
    square over pairs and channels, as PDMBooth's code has it. Equal points give no gradient.
    Returns: scalar. Raises: ValueError for an unknown kind.
    """
    if kind not in DISTANCES:
        raise ValueError(f"Unknown distance {kind!r}; known: {', '.join(DISTANCES)}.")
    square = (first - second).square()
    if kind == "square":
        return square.mean()
    total = square.sum(-1)
    away = total > 0
    return torch.where(away, torch.where(away, total, 1).sqrt(), 0).mean()


def exclusion(
    space: str, sigma: torch.Tensor, denoised: torch.Tensor, null: torch.Tensor, sigma_data: float = 1.0
) -> torch.Tensor:
    """ConceptPrism's exclusion loss (arXiv 2602.19575): mean square of two predictions' difference at one noised input.

    sigma [b]; denoised, null [b, ...]: estimates with the residual vectors and with the empty prompt, which gets no
    gradient. The target cancels, so ``residual`` between the two estimates is their difference in the space.
    Returns: [b]. Raises: ValueError for an unknown space.
    """
    return residual(space, sigma, denoised, null.detach(), sigma_data).square().flatten(1).mean(1)

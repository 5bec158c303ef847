"""Random draws that are pure functions of (seed, step, purpose), so that a resumed run repeats an unbroken one."""

import hashlib

import torch

LAWS = ("uniform", "logit-normal", "high noise", "low noise")
SLOTS = 16


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A private CPU generator; torch's global one is never touched."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def times(count: int, law: str, low: float, high: float, draw: torch.Generator) -> torch.Tensor:
    """Training times in [low, high], 1 = pure noise.

    ``law``: uniform; logit-normal (SD3, arXiv 2403.03206); high noise / low noise: linear densities 2t and 2(1-t).
    Returns: [count], fp64. Raises: ValueError for an unknown law or an empty range.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"The timestep range {low} to {high} is empty; it needs 0 <= low < high <= 1.")
    if law == "logit-normal":
        u = torch.randn(count, generator=draw, dtype=torch.float64).sigmoid()
    else:
        u = torch.rand(count, generator=draw, dtype=torch.float64)
        if law == "high noise":
            u = u.sqrt()
        elif law == "low noise":
            u = 1 - (1 - u).sqrt()
        elif law != "uniform":
            raise ValueError(f"Unknown timestep law {law!r}; known: {', '.join(LAWS)}.")
    return low + (high - low) * u


def split_times(count: int, border: float, share: float, draw: torch.Generator) -> torch.Tensor:
    """Training times of which ``share`` lie in [border, 1] and the rest below, uniform in either part.

    TokenVerse (arXiv 2501.12224): border 0.8, share 0.92 and then 0.08. Returns: [count], fp64.
    """
    above = torch.rand(count, generator=draw, dtype=torch.float64) < share
    u = torch.rand(count, generator=draw, dtype=torch.float64)
    return torch.where(above, border + (1 - border) * u, border * u)


def subset(count: int, draw: torch.Generator) -> tuple[int, ...]:
    """Some of the numbers 0 .. ``count`` - 1 in random order: first how many, 1 to all alike, and then which.

    Union sampling of Break-A-Scene (arXiv 2305.16311), as its authors' code has it.
    """
    size = int(torch.randint(1, count + 1, (1,), generator=draw))
    return tuple(torch.randperm(count, generator=draw)[:size].tolist())


def slot_rows(width: int, rank: int, slot: int) -> torch.Tensor:
    """Directions that belong to one slot of a random orthonormal basis, the same for everyone.

    Orthogonal Adaptation (arXiv 2312.02432), whose random columns of a shared basis may meet: row k is vector
    16 k + slot - 1, so rows of two slots are orthogonal whatever their ranks are.
    Returns: [rank, width], fp32, length one. Raises: ValueError for another slot than 1 to 16, or too high a rank.
    """
    if not 1 <= slot <= SLOTS:
        raise ValueError(f"There are slots 1 to {SLOTS}, not {slot}.")
    if rank * SLOTS > width:
        raise ValueError(f"A slot of {width} numbers has room for rank {width // SLOTS}, not {rank}; lower the rank.")
    drawn = torch.randn(rank * SLOTS, width, generator=generator(0, width, "slots"), dtype=torch.float64)
    basis, upper = torch.linalg.qr(drawn.T)
    return (basis * upper.diagonal().sign()).T[slot - 1 :: SLOTS].float()


def linear_start(shape: tuple[int, ...], inputs: int, draw: torch.Generator) -> torch.Tensor:
    """First weights or biases of a layer that reads ``inputs`` numbers, as torch's Linear draws them."""
    return (2 * torch.rand(shape, generator=draw) - 1) / inputs**0.5

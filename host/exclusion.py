"""Exclusion (arXiv 2602.19575): what is measured on the other pictures, and with which noise."""

from typing import NamedTuple

import torch

from ..kernels.draws import generator, times
from ..kernels.losses import exclusion
from .denoise import Denoiser, sigmas_at


class Anchor(NamedTuple):
    """One input of the exclusion loss."""

    entry: list
    """Conditioning: the residual of another picture, alone."""
    x: torch.Tensor
    """Noised latent [1, c, h, w]."""
    sigma: torch.Tensor
    """Noise level [1]."""
    null: torch.Tensor | None
    """Estimate with the empty prompt [1, c, h, w], where the bank keeps it."""


class Exclusion:
    """Draws anchors and compares estimates with those of the empty prompt, which is encoded once."""

    def __init__(self, denoiser: Denoiser, clean: list[torch.Tensor], owners: list[int], settings, null: list):
        """``clean``: model-space latents [1, c, h, w]; ``owners``: number of the original of each picture;
        ``settings``: a learn_residual.ResidualSettings; ``null``: conditioning of the empty prompt."""
        self.denoiser, self.clean, self.owners, self.settings, self.null = denoiser, clean, owners, settings, null
        self.count = anchor_count(settings.anchors, owners)
        self.bank: dict[tuple[int, int], torch.Tensor] = {}
        noise = settings.space == "noise" and denoiser.space != "flow"
        self.space = "eps" if noise else denoiser.space

    def anchors(self, picture: int, draw: torch.Generator) -> list[int]:
        """``count`` other pictures in random order, of the same size first, no original twice."""
        order = torch.randperm(len(self.clean), generator=draw).tolist()
        order.sort(key=lambda i: self.clean[i].shape != self.clean[picture].shape)
        chosen = {self.owners[picture]: picture}
        for other in order:
            chosen.setdefault(self.owners[other], other)
        return list(chosen.values())[1 : 1 + self.count]

    def anchor(self, picture: int, entry: list, draw: torch.Generator) -> Anchor:
        """A picture at a time and noise of its own, or at one of the bank's."""
        s, key = self.settings, None
        if s.null_bank:
            key = picture, int(torch.randint(s.null_bank, (1,), generator=draw))
            draw = generator(s.seed, picture * s.null_bank + key[1], "bank")
        when = times(1, s.time_law, s.time_low, s.time_high, draw)
        x, sigma = self.noised(self.clean[picture], when, draw)
        if key and key not in self.bank:
            with torch.no_grad():  # one at a time: its bits must not depend on what else is in a batch
                self.bank[key] = self.denoiser(x, sigma, [self.null])
        return Anchor(entry, x, sigma, self.bank[key] if key else None)

    def noised(self, clean: torch.Tensor, when: torch.Tensor, draw: torch.Generator) -> tuple:
        """Noised latents [b, c, h, w] at times [b], and their noise levels [b]."""
        sigma = sigmas_at(self.denoiser.sampling, when, self.settings.shifted).to(self.denoiser.device)
        noise = torch.randn(clean.shape, generator=draw).to(self.denoiser.device)
        return self.denoiser.noised(clean, noise, sigma), sigma

    def loss(self, members: list[Anchor], denoised: torch.Tensor) -> torch.Tensor:
        """Exclusion [b] of anchors of one size, from their residuals' estimates [b, c, h, w]."""
        sigma = torch.cat([a.sigma for a in members])
        if self.settings.null_bank:
            null = torch.cat([a.null for a in members])
        else:
            with torch.no_grad():
                null = self.denoiser(torch.cat([a.x for a in members]), sigma, [self.null] * len(members))
        return exclusion(self.space, sigma, denoised, null, self.denoiser.sigma_data)


def anchor_count(wanted: int, owners: list[int]) -> int:
    """How many other pictures there are, at most ``wanted``."""
    return min(wanted, max(owners))

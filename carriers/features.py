"""Features of pictures: what a denoiser holds of them in its middle, cell by cell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import CarrierError


@dataclass(frozen=True)
class Features:
    """Maps of one or several pictures of one size, for matching, transfer and looking at.

    Maps are copied to the CPU as ordinary (never inference-mode) tensors.
    Raises: CarrierError when a map has a wrong shape or numbers that are not finite.
    """

    maps: Mapping[str, torch.Tensor]
    """``dift``, ``query``, ``key``, ``value``, ``attention <word>`` -> [pictures, c, h, w], fp32; grids may differ."""
    height: int
    """Of the pictures, in pixels."""
    width: int
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON facts: architecture, base, prompt, seed, passes, the pictures' ``thumbnails`` (host/features.py), and under
    ``sources`` per map its layer, timestep, noise, ensemble and a note."""
    conditioning: Any = None
    """The host's conditioning entry of a prompt without concepts, under which others can be read alike."""

    def __post_init__(self):
        with torch.inference_mode(False):
            maps = {
                k: v.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
                for k, v in self.maps.items()
            }
        if not maps:
            raise CarrierError("There are no features; ask for at least one map.")
        for name, value in maps.items():
            if value.dim() != 4 or not value.numel() or len(value) != len(next(iter(maps.values()))):
                raise CarrierError(
                    f"Feature map {name} has shape {tuple(value.shape)}, expected (pictures, channels, rows, columns)."
                )
            if not bool(torch.isfinite(value).all()):
                raise CarrierError(f"Feature map {name} holds numbers that are not finite; use another layer or dtype.")
        object.__setattr__(self, "maps", maps)

    def map(self, name: str) -> torch.Tensor:
        """One map [pictures, c, h, w]. Raises: CarrierError listing the maps that there are."""
        if name not in self.maps:
            raise CarrierError(f"These features hold no map {name!r}, but: {', '.join(self.maps)}; extract it first.")
        return self.maps[name]

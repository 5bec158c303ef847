"""NeTI in prompts (arXiv 2305.15391): its mapper read at parts of the noise schedule, and its bypass.

The authors add the bypass to the last hidden state before the encoder's final norm; here it is added to what the host's
encoder returns, which for SD1.5 and SD2 is behind that norm.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..carriers.concept import Concept
from ..carriers.mapper import networks
from ..kernels.neti import BYPASS, STEPS, bypassed, mapped

TIMES = 10
"""Equal parts of the noise schedule at whose middles a prompt reads the mapper: as many as NeTI's time anchors."""


class Place(NamedTuple):
    """One row of a concept in an encoder's output."""

    key: str
    position: int
    columns: slice
    weight: float


def places(encoders: Iterable, tokens: Mapping[str, list], number: float) -> list[Place]:
    """Where the rows that are filled with ``number`` come out of the encoders of a UNet (host sdxl_clip.py)."""
    found, start = [], 0
    for encoder in sorted(encoders, key=lambda e: e.key != "clip_l"):  # the host lays L before G
        flat = [token for chunk in tokens[encoder.slot] for token in chunk]
        columns = slice(start, start + encoder.width)
        found += [
            Place(encoder.key, position, columns, float(weight))
            for position, (token, weight, *_) in enumerate(flat)
            if torch.is_tensor(token) and float(token[0]) == number
        ]
        start += encoder.width
    return found


def with_bypass(contexts: torch.Tensor, found: list[Place], bypass: Mapping[str, torch.Tensor], strength: float = 1.0):
    """Contexts [n, tokens, width] with ``bypass`` (encoder key -> [n, own width]) at the concept's places."""
    own = contexts.clone()
    for place in found:
        if place.key in bypass and place.position < contexts.shape[1]:
            state = contexts[:, place.position, place.columns]
            share = strength * place.weight * BYPASS
            own[:, place.position, place.columns] = bypassed(state, bypass[place.key].to(state), share)
    return own


def read(concept: Concept, times: int = TIMES) -> tuple[Concept, dict[str, torch.Tensor]]:
    """A ``mapper`` concept as rows: a piecewise constant reading in time.

    Returns: a ``tokens`` concept [times, layers, 2, 1, width], K and V alike, and the bypass vectors
    [times, layers, width] that V gets, per encoder key.
    """
    layers, rows, bypass = len(concept.info["layers"]), {}, {}
    when = ((torch.arange(times) + 0.5) * (STEPS / times)).repeat_interleave(layers)
    for key, network in networks(concept.tensors).items():
        words, more = mapped(network, when, torch.arange(layers).repeat(times), concept.info["norms"][key])
        rows[key] = words.view(times, layers, 1, 1, -1).expand(-1, -1, 2, -1, -1)
        bypass[key] = more.view(times, layers, -1)
    return Concept(concept.name, "tokens", rows, concept.info), bypass

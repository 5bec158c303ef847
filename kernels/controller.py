"""Concept-Mod of TokenVerse (arXiv 2501.12224): from what a text encoder says of a token to its directions in the
modulation space of a diffusion transformer.

Two layers give one direction for all blocks, two more what each block adds. The paper leaves their sizes open; the
second pair serves all blocks, which weigh its hidden units each in their own way, instead of having an output of its
own for each. Output layers begin at zero, so that learning begins at the model as it is, and have no bias; without
biases in the hidden layers either, an input of zeros has no direction at all (SAEPer's sparse codes).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .draws import linear_start
from .sae import Coder, normed

READING = ("weight", "bias", "threshold")
PARTS = ("shared.in.weight", "shared.in.bias", "shared.out.weight")
BLOCK_PARTS = ("block.in.weight", "block.in.bias", "block.gate", "block.out.weight")


def dense(features: torch.Tensor) -> torch.Tensor:
    """Features [..., width] at a root mean square of 1, so that one learning rate suits every text encoder."""
    return features * features.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def coded(reading: Mapping[str, torch.Tensor], features: torch.Tensor, kept: torch.Tensor, norm: str) -> torch.Tensor:
    """Activations [n, s] of s latents of a dictionary in features [n, width]; 0 for those that are not ``kept`` [s].

    reading: weight [s, width], bias and threshold [s], as ``reading_of`` makes them; ``norm``: as for ``sae.normed``.
    """
    p = F.linear(normed(features, norm)[0], reading["weight"], reading["bias"])
    return torch.where((p > reading["threshold"]) & (p > 0), p, 0) * kept


def reading_of(coder: Coder, latents: torch.Tensor, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``coded`` needs of a dictionary to tell its ``latents`` [s], at a root mean square near 1.

    Where the k largest of all latents are active, the threshold is the median of the smallest of them over ``features``
    [n, width], so that the latents that were left out need not be kept; latents that are off in all of them count
    from there.
    """
    p, values = coder.parts, coder.encode(features)[0]
    weight, mean = p["encoder"][latents] * p["scale"], p["mean"]
    bias = p["encoder_bias"][latents] - weight @ mean - p["encoder"][latents] @ p["decoder_bias"]
    if "threshold" in p:
        threshold = p["threshold"].expand(len(p["encoder"]))[latents]
    else:
        threshold = values[:, -1].median().expand(len(latents))
    active = values[values > 0]
    gain = active.square().mean().clamp_min(1e-12).rsqrt() if len(active) else values.new_ones(())
    return {"weight": gain * weight, "bias": gain * bias, "threshold": gain * threshold}


def start(
    inputs: int, outputs: int, blocks: int, hidden: int, draw: torch.Generator, biases: bool = True
) -> dict[str, torch.Tensor]:
    """First weights, fp32: hidden layers as torch's Linear, gates around 1, output layers zero."""

    made = {}
    for part in ("shared", "block"):
        made[f"{part}.in.weight"] = linear_start((hidden, inputs), inputs, draw)
        if biases:
            made[f"{part}.in.bias"] = linear_start((hidden,), inputs, draw)
        if part == "block":
            made["block.gate"] = 1 + 0.1 * torch.randn(blocks, hidden, generator=draw)
        made[f"{part}.out.weight"] = torch.zeros(outputs, hidden)
    return made


def directions(parts: Mapping[str, torch.Tensor], inputs: torch.Tensor, each_block: bool = True) -> torch.Tensor:
    """Directions [n, blocks, width] of inputs [n, m]; [n, 1, width] without what each block adds."""

    def hidden(part: str) -> torch.Tensor:
        return F.silu(F.linear(inputs, parts[f"{part}.in.weight"], parts.get(f"{part}.in.bias")))

    shared = F.linear(hidden("shared"), parts["shared.out.weight"])[:, None]
    if not each_block:
        return shared
    return shared + F.linear(hidden("block")[:, None] * parts["block.gate"], parts["block.out.weight"])

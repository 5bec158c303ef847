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

PARTS = ("shared.in.weight", "shared.in.bias", "shared.out.weight")
BLOCK_PARTS = ("block.in.weight", "block.in.bias", "block.gate", "block.out.weight")


def dense(features: torch.Tensor) -> torch.Tensor:
    """Features [..., width] at a root mean square of 1, so that one learning rate suits every text encoder."""
    return features * features.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def start(
    inputs: int, outputs: int, blocks: int, hidden: int, draw: torch.Generator, biases: bool = True
) -> dict[str, torch.Tensor]:
    """First weights, fp32: hidden layers as torch's Linear, gates around 1, output layers zero."""

    def uniform(*shape: int) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=draw) - 1) / inputs**0.5

    made = {}
    for part in ("shared", "block"):
        made[f"{part}.in.weight"] = uniform(hidden, inputs)
        if biases:
            made[f"{part}.in.bias"] = uniform(hidden)
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

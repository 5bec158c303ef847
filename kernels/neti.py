"""The mapper of NeTI (arXiv 2305.15391): (time, layer) -> a word vector and a vector added after the text encoder.

A network is a dict of tensors, so that whatever learns tensors can learn it. Times run over the paper's 1000 steps.
"""

from collections.abc import Mapping

import torch
from torch.nn.functional import layer_norm, leaky_relu, linear

from .draws import linear_start

STEPS = 1000
"""Length of the noise schedule in the units of ``times``; the encoding's frequencies are made for it."""
ANCHORS, HIDDEN, FREQUENCIES = 10, 128, 1024
SIGMA_TIME, SIGMA_LAYER = 0.03, 2.0
DROPOUT = 0.5
"""Chance of nested dropout per row."""
BYPASS = 0.2
"""Length of the bypass, as a share of the state it is added to."""
FIXED = "frequencies"
"""The part that is drawn once and never learned."""
PARTS = (
    FIXED,
    *(f"{p}.{w}" for p in ("input", "hidden1", "norm1", "hidden2", "norm2", "output") for w in ("weight", "bias")),
)


def encode(frequencies: torch.Tensor, times: torch.Tensor, layers: torch.Tensor) -> torch.Tensor:
    """Fourier features [b, 2f] of length one; frequencies [f, 2], times [b] in 0..STEPS, layers [b] as numbers."""
    angle = torch.stack([times, layers], dim=-1).to(frequencies) @ frequencies.T
    return torch.cat([angle.sin(), angle.cos()], dim=-1) / len(frequencies) ** 0.5  # sin^2 + cos^2 of each is one


def start(
    layers: int,
    width: int,
    draw: torch.Generator,
    anchors: int = ANCHORS,
    hidden: int = HIDDEN,
    count: int = FREQUENCIES,
    frequencies: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """A new network, fp32: its input layer holds the encodings of ``anchors`` times x ``layers`` layers, the others
    are uniform in +-1/sqrt(inputs), as torch's are. ``frequencies``: those of an earlier network."""
    if frequencies is None:
        frequencies = torch.randn(count, 2, generator=draw) * torch.tensor([SIGMA_TIME, SIGMA_LAYER])
    times = torch.arange(anchors).repeat_interleave(layers) * (STEPS / anchors)
    weight = encode(frequencies, times, torch.arange(layers).repeat(anchors))
    made = {
        FIXED: frequencies,
        "input.weight": weight,
        "input.bias": linear_start((len(weight),), weight.shape[1], draw),
    }
    sizes = (("hidden1", len(weight), hidden), ("hidden2", hidden, hidden), ("output", hidden, 2 * width))
    for name, before, after in sizes:
        made[f"{name}.weight"] = linear_start((after, before), before, draw)
        made[f"{name}.bias"] = linear_start((after,), before, draw)
    for name in ("norm1", "norm2"):
        made |= {f"{name}.weight": torch.ones(hidden), f"{name}.bias": torch.zeros(hidden)}
    return {part: made[part] for part in PARTS}


def truncation(rows: int, hidden: int, draw: torch.Generator, chance: float = DROPOUT) -> torch.Tensor:
    """Hidden units that each row keeps under nested dropout, [rows] int64: all, or with ``chance`` 0..hidden - 1."""
    dropped = torch.rand(rows, generator=draw) < chance
    return torch.where(dropped, torch.randint(hidden, (rows,), generator=draw), hidden)


def mapped(
    network: Mapping[str, torch.Tensor],
    times: torch.Tensor,
    layers: torch.Tensor,
    norm: float,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Word vectors [b, width] of length ``norm``, and bypass vectors [b, width] of any length.

    times, layers [b]; ``kept`` [b]: only so many of the last hidden units count, the first ones.
    """
    state = linear(encode(network[FIXED], times, layers), network["input.weight"], network["input.bias"])
    for number in ("1", "2"):
        state = linear(state, network[f"hidden{number}.weight"], network[f"hidden{number}.bias"])
        state = layer_norm(state, state.shape[-1:], network[f"norm{number}.weight"], network[f"norm{number}.bias"])
        state = leaky_relu(state)
    if kept is not None:
        state = state * (torch.arange(state.shape[-1], device=state.device) < kept[:, None].to(state.device))
    word, bypass = linear(state, network["output.weight"], network["output.bias"]).chunk(2, dim=-1)
    return norm * torch.nn.functional.normalize(word, dim=-1), bypass


def bypassed(state: torch.Tensor, bypass: torch.Tensor, share: float | torch.Tensor = BYPASS) -> torch.Tensor:
    """``state`` [..., width] with ``bypass`` added at ``share`` of its length, whatever the bypass's own is."""
    return state + share * state.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(bypass, dim=-1)

"""A transformer block that turns a class word into rows per stage and role, as plain functions of a dict of weights.

The block of ProSpect (arXiv 2305.16225, code zyxElsa/ProSpect): two self-attentions and a gated feed-forward whose
last layer has one output per row. Here that layer starts at zero and adds to the class word, so every row begins there.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from .draws import linear_start

HEAD = 64
"""Largest width of a head."""
WIDE = 1024
"""Encoders wider than this get a narrower feed-forward; the last layer would hold most of the weights."""


def heads_of(width: int) -> int:
    """Fewest equal heads of at most HEAD."""
    return next(h for h in range(max(1, -(-width // HEAD)), width + 1) if width % h == 0)


def start(width: int, stages: int, roles: int, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights, fp32: uniform in +-1/sqrt(inputs) as torch's Linear, the last layer zero."""
    inner = width * (4 if width <= WIDE else 1)

    def linear(out: int, inputs: int) -> torch.Tensor:
        return linear_start((out, inputs), inputs, draw)

    found = {}
    for part in ("attention1", "attention2"):
        found |= {f"{part}.norm.weight": torch.ones(width), f"{part}.norm.bias": torch.zeros(width)}
        found |= {f"{part}.{name}.weight": linear(width, width) for name in ("query", "key", "value", "out")}
        found[f"{part}.out.bias"] = torch.zeros(width)
    found |= {"feed.norm.weight": torch.ones(width), "feed.norm.bias": torch.zeros(width)}
    found |= {"feed.gate.weight": linear(2 * inner, width), "feed.gate.bias": torch.zeros(2 * inner)}
    rows = stages * roles * width
    return found | {"feed.out.weight": torch.zeros(rows, inner), "feed.out.bias": torch.zeros(rows)}


def _attention(w: Mapping[str, torch.Tensor], part: str, x: torch.Tensor) -> torch.Tensor:
    heads = heads_of(x.shape[-1])
    y = F.layer_norm(x, x.shape[-1:], w[f"{part}.norm.weight"], w[f"{part}.norm.bias"])
    q, k, v = (
        F.linear(y, w[f"{part}.{name}.weight"]).unflatten(-1, (heads, -1)).transpose(0, 1)
        for name in ("query", "key", "value")
    )
    seen = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).flatten(1)
    return x + F.linear(seen, w[f"{part}.out.weight"], w[f"{part}.out.bias"])


def stage_rows(w: Mapping[str, torch.Tensor], word: torch.Tensor, stages: int, roles: int) -> torch.Tensor:
    """Rows [stages, 1, roles, 1, width] for a class word [pieces, width], whose pieces attend to each other.

    The residual is the word's mean row; what the pieces add is averaged.
    """
    x = _attention(w, "attention2", _attention(w, "attention1", word))
    x = F.layer_norm(x, x.shape[-1:], w["feed.norm.weight"], w["feed.norm.bias"])
    value, gate = F.linear(x, w["feed.gate.weight"], w["feed.gate.bias"]).chunk(2, -1)
    out = F.linear(value * F.gelu(gate), w["feed.out.weight"], w["feed.out.bias"]).mean(0)
    return word.mean(0) + out.view(stages, 1, roles, 1, -1)

"""What must be true of a ``mapper`` concept: one network of NeTI (kernels/neti.py) per text encoder.

Tensors are named ``<encoder key>.<part>``. Info holds ``layers`` (names of the cross-attention layers, in order),
``anchors`` (times per layer in the input layer) and, per encoder key, ``norms`` (length of the word vectors).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.neti import PARTS
from .errors import CarrierError


def networks(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The networks by encoder key."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key, _, part = name.partition(".")
        found.setdefault(key, {})[part] = value
    return found


def width(network: Mapping[str, torch.Tensor]) -> int:
    """Length of the word vectors."""
    return len(network["output.weight"]) // 2


def check_mapper(name: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
    """Raises: CarrierError saying which part is missing or of another shape than the others imply."""
    layers, anchors, norms = info.get("layers"), info.get("anchors"), info.get("norms")
    if not tensors or not isinstance(layers, list) or not layers or not isinstance(anchors, int) or anchors < 1:
        raise CarrierError(
            f"Concept <{name}> holds no mapper, or does not say for which layers and times; learn it again."
        )
    for key, network in networks(tensors).items():
        norm = norms.get(key) if isinstance(norms, dict) else None
        if not isinstance(norm, (int, float)) or not 0 < norm < math.inf:
            raise CarrierError(f"Concept <{name}>: the length of the word vectors of {key[:80]!r} is missing.")
        have = {part: tuple(value.shape) for part, value in network.items()}
        if have != _shapes(have, len(layers) * anchors):
            raise CarrierError(
                f"Concept <{name}>: the mapper of {key[:80]!r} is not whole, or not made for {len(layers)} layers and "
                f"{anchors} times; learn it again."
            )
        if not all(bool(torch.isfinite(value).all()) for value in network.values()):
            raise CarrierError(
                f"Concept <{name}>: {key} holds numbers that are not finite; learn it again with a lower learning rate."
            )


def _shapes(have: Mapping[str, tuple], inputs: int) -> dict[str, tuple]:
    """The shapes that the number of frequencies, of hidden units and the width imply."""
    count, hidden, output = (have.get(part, (0,))[:1] or (0,) for part in (PARTS[0], "norm1.weight", "output.bias"))
    sizes = {"input": (2 * count[0], inputs), "hidden1": (inputs, *hidden), "hidden2": (*hidden, *hidden)}
    sizes["output"] = (*hidden, output[0] - output[0] % 2)
    shapes = {f"{k}.weight": (after, before) for k, (before, after) in sizes.items()}
    shapes |= {f"{k}.bias": (after,) for k, (_, after) in sizes.items()}
    shapes |= {f"{k}.{w}": hidden for k in ("norm1", "norm2") for w in ("weight", "bias")}
    shapes[PARTS[0]] = (count[0], 2)
    return shapes if all(n > 0 for shape in shapes.values() for n in shape) else {}

"""What must be true of an ``edit`` concept: a key-locked rank-one edit (Perfusion, arXiv 2305.01644) of text rows.

``row.<encoder key>`` [1, width] is what the text encoder reads in the concept's place. The others are as wide as the
rows that cross-attention reads, d: ``direction`` [d], which rows are compared with; ``dual`` [d], C^-1 times it;
``keys`` [1 or layers, d] and ``values`` [layers, d], what comes into the rows' place for K and for V. Info holds
``layers`` (names of the cross-attention layers, in order) and the gate's ``beta`` and ``tau``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .errors import CarrierError

ROW, DIRECTION, DUAL, KEYS, VALUES = "row.", "direction", "dual", "keys", "values"


def rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Input rows [1, width] by encoder key."""
    return {k.removeprefix(ROW): v for k, v in tensors.items() if k.startswith(ROW)}


def check(name: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
    """Raises: CarrierError saying which part is missing or of another shape than the others imply."""
    layers, gate = info.get("layers"), [info.get("beta"), info.get("tau")]
    if not isinstance(layers, list) or not layers:
        raise CarrierError(f"Concept <{name}> does not say which layers it edits; learn it again.")
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in gate) or gate[1] <= 0:
        raise CarrierError(f"Concept <{name}> does not say how its gate opens (beta and tau); learn it again.")
    width = tuple(tensors[DIRECTION].shape) if DIRECTION in tensors else ()
    shapes = {DIRECTION: [width], DUAL: [width], VALUES: [(len(layers), *width)]}
    shapes[KEYS] = [(1, *width), (len(layers), *width)]
    for part, fitting in shapes.items():
        if part not in tensors:
            raise CarrierError(f"Concept <{name}>: {part} of its edit is missing; learn it again.")
        if len(width) != 1 or not tensors[part].numel() or tuple(tensors[part].shape) not in fitting:
            raise CarrierError(
                f"Concept <{name}>: {part} has shape {tuple(tensors[part].shape)}, which does not fit {len(layers)} "
                f"layers and rows of {tuple(width)}; learn it again."
            )
    if not rows(tensors):
        raise CarrierError(f"Concept <{name}> holds no vector for a text encoder; learn it again.")
    for key, value in tensors.items():
        if key not in shapes and not (key.startswith(ROW) and value.dim() == 2 and len(value) == 1 and value.numel()):
            raise CarrierError(f"Concept <{name}>: {key[:80]} of shape {tuple(value.shape)} is not part of an edit.")
        if not bool(torch.isfinite(value).all()):
            raise CarrierError(
                f"Concept <{name}>: {key} holds numbers that are not finite; learn it again with a lower learning rate."
            )
    if not float(tensors[DIRECTION] @ tensors[DUAL]) > 0:
        raise CarrierError(f"Concept <{name}>: direction and dual of its edit do not belong together; learn it again.")


def lines(tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> list[str]:
    """What it holds, for people."""
    keys = "keys of their own" if len(tensors[KEYS]) > 1 else "locked keys"
    moved = (tensors[VALUES] - tensors[KEYS]).norm(dim=-1).mean()
    found = [f"{k}: 1 vectors, {v.shape[1]} width; mean norm {float(v.norm()):.3f}" for k, v in rows(tensors).items()]
    return [
        *found,
        f"edit: {len(info['layers'])} layers of {len(tensors[DIRECTION])} width with {keys}; gate at {info['beta']:g}, "
        f"width {info['tau']:g}; values differ from keys by {float(moved):.3f}, whose norm is "
        f"{float(tensors[KEYS].norm(dim=-1).mean()):.3f}",
    ]

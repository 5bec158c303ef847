"""Weight deltas of low rank under the names of stock LoRA files, with the token rows they were learned with.

Per layer ``<layer>.lora_down.weight`` [rank, in], ``<layer>.lora_up.weight`` [out, rank] and ``<layer>.alpha`` []: the
weight changes by alpha / rank * up @ down (comfy/lora.py load_lora). Bundled rows lie under
``bundle_emb.<concept>.<encoder key>`` (comfy/sd1_clip.py load_embed).
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .errors import CarrierError

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
BUNDLE = "bundle_emb."
BUNDLED = re.compile(r"bundle_emb\.([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_]{1,64})")
LAYER = re.compile(r"lora_unet_[A-Za-z0-9_]{1,200}")


def layers(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the changed layers, in order."""
    return [k.removesuffix(DOWN) for k in tensors if k.endswith(DOWN)]


def weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What changes the model: everything but the bundled rows."""
    return {k: v for k, v in tensors.items() if not k.startswith(BUNDLE)}


def bundled(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Rows [stages, layers, roles, n, width] per encoder key that are bundled under ``name``.

    When they are all under one other name, those: the concept was renamed. Empty when there are none.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if match := BUNDLED.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = value
    return found.get(name) or (next(iter(found.values())) if len(found) == 1 else {})


def check(name: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
    """Raises: CarrierError when a layer is not a whole pair, a rank differs, or a number is not finite."""
    if not layers(tensors):
        raise CarrierError(f"Concept <{name}> changes no layer of a model; learn it again.")
    expected = {f"{layer}{part}" for layer in layers(tensors) for part in (DOWN, UP, ALPHA)}
    own = weights(tensors)
    for key in sorted(expected ^ set(own)):
        raise CarrierError(f"Concept <{name}>: {key[:120]} is {'missing' if key in expected else 'not known'}.")
    for layer in layers(tensors):
        down, up, alpha = (tensors[layer + part] for part in (DOWN, UP, ALPHA))
        fits = down.dim() == up.dim() == 2 and alpha.dim() == 0 and 0 < down.shape[0] == up.shape[1]
        if not LAYER.fullmatch(layer) or not fits or not down.numel() or not up.numel():
            raise CarrierError(
                f"Concept <{name}>: {layer[:120]} has shapes {tuple(down.shape)} and {tuple(up.shape)}, expected "
                "[rank, in] and [out, rank]."
            )
    for key, value in tensors.items():
        if key.startswith(BUNDLE) and (not BUNDLED.fullmatch(key) or value.dim() != 5 or not value.numel()):
            raise CarrierError(f"Concept <{name}>: {key[:120]} does not hold rows of a text encoder.")
        if not bool(torch.isfinite(value).all()):
            raise CarrierError(
                f"Concept <{name}>: {key[:120]} holds numbers that are not finite; learn it again with a lower "
                "learning rate."
            )


def lines(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What a person wants to know: how many layers, their rank, how far they moved, what is bundled."""
    names = layers(tensors)
    ranks = sorted({tensors[n + DOWN].shape[0] for n in names})
    scales = sorted({float(tensors[n + ALPHA]) / tensors[n + DOWN].shape[0] for n in names})
    norms = [
        float((tensors[n + UP] @ tensors[n + DOWN]).norm() * tensors[n + ALPHA]) / tensors[n + DOWN].shape[0]
        for n in names
    ]
    found = [
        f"{len(names)} layers from {names[0]} to {names[-1]}",
        f"rank {_span(ranks)}, scale {_span(scales)}; mean norm of a layer's change {sum(norms) / len(norms):.4f}",
    ]
    for key, value in tensors.items():
        if match := BUNDLED.fullmatch(key):
            found.append(
                f"bundled rows of <{match[1]}> for {match[2]}: {' x '.join(map(str, value.shape))}; mean norm "
                f"{float(value.norm(dim=-1).mean()):.3f}"
            )
    return found


def _span(values: list) -> str:
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"

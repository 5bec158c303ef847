"""What must be true of a ``modulation`` concept: directions of words in a diffusion transformer's modulation space.

``word.<n>`` holds the cached directions [1 or blocks, pieces, width] of the n-th of ``info["words"]``, one for all
blocks or one for each of ``info["blocks"]``; ``controller.<part>`` the network that makes them anew in every prompt
(kernels/controller.py), where it is kept. ``info["encoders"]`` names the text encoders whose rows carry the words, in
the order in which the model reads them, ``info["input"]`` what the network reads of a row: ``dense``, or ``codes``, the
activations of some latents of a dictionary. ``reading.<part>`` then holds what tells them (kernels/controller.py), and
``reading.kept`` [words, latents] which of them count for which word; ``info["latents"]`` are their numbers.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.controller import BLOCK_PARTS, PARTS, READING
from .errors import CarrierError

WORD, CONTROLLER, READS = "word.", "controller.", "reading."
NORMS = ("none", "layer", "length")
SPELLING = re.compile(r"[^\[\]<>:]{1,64}")


def words(tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Cached directions [1 or blocks, pieces, width] by word."""
    return {word: tensors[f"{WORD}{number}"] for number, word in enumerate(info["words"])}


def controller(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's parts; empty when the concept holds cached directions alone."""
    return {k.removeprefix(CONTROLLER): v for k, v in tensors.items() if k.startswith(CONTROLLER)}


def reading(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What tells the activations of latents, and which count; empty when the network reads the row itself."""
    return {k.removeprefix(READS): v for k, v in tensors.items() if k.startswith(READS)}


def row_width(tensors: Mapping[str, torch.Tensor]) -> int:
    """Numbers of a row of the text that the network reads, by way of latents or not."""
    return tensors.get(f"{READS}weight", tensors[f"{CONTROLLER}shared.in.weight"]).shape[1]


def _names(info: Mapping[str, Any], key: str) -> list[str]:
    """A list of different strings, or nothing."""
    found = info.get(key)
    whole = isinstance(found, list) and all(isinstance(v, str) and v for v in found) and len(set(found)) == len(found)
    return found if whole else []


def check(name: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
    """Raises: CarrierError saying which word or part is missing, or of another shape than the others imply."""
    spelt, blocks = _names(info, "words"), _names(info, "blocks")
    if not spelt or not blocks or not _names(info, "encoders") or not all(SPELLING.fullmatch(w) for w in spelt):
        raise CarrierError(
            f"Concept <{name}> does not say which words it modulates in which blocks, or of which text encoder; learn "
            "it again."
        )
    cached = {f"{WORD}{number}" for number in range(len(spelt))}
    parts, network = set(), controller(tensors)
    if network:
        optional = {p for p in (*PARTS, *BLOCK_PARTS) if p.endswith(".bias") and p not in network}
        parts = {f"{CONTROLLER}{p}" for p in {*PARTS, *BLOCK_PARTS} - optional}
    coded = network and info.get("input") == "codes"
    if coded:
        parts |= {f"{READS}{p}" for p in (*READING, "kept")}
        if info.get("norm") not in NORMS:
            raise CarrierError(f"Concept <{name}> does not say how its dictionary prepares rows; learn it again.")
    for key in sorted((cached | parts) ^ set(tensors)):
        raise CarrierError(f"Concept <{name}>: {key[:120]} is {'missing' if key in cached | parts else 'not known'}.")
    width = tensors[f"{WORD}0"].shape[-1] if tensors[f"{WORD}0"].dim() else 0
    shapes = _shapes(network, len(blocks), width) if network else {}
    if coded:
        shapes |= _reading_shapes(tensors, len(spelt))
    for key, value in tensors.items():
        if key in cached:
            fits = (
                value.dim() == 3 and value.shape[0] in (1, len(blocks)) and value.shape[1] and value.shape[2] == width
            )
        else:
            fits = tuple(value.shape) == shapes[key.removeprefix(CONTROLLER)]
        if not fits or not value.numel():
            raise CarrierError(
                f"Concept <{name}>: {key} has shape {tuple(value.shape)}, which does not fit {len(blocks)} blocks of "
                f"width {width}; learn it again."
            )
        if not bool(torch.isfinite(value).all()):
            raise CarrierError(
                f"Concept <{name}>: {key} holds numbers that are not finite; learn it again with a lower learning rate."
            )


def _shapes(network: Mapping[str, torch.Tensor], blocks: int, width: int) -> dict[str, tuple]:
    """The shapes that the first layer, the number of blocks and the width imply."""
    first = network["shared.in.weight"]
    hidden, inputs = first.shape if first.dim() == 2 else (0, 0)
    shapes: dict[str, tuple] = {"block.gate": (blocks, hidden)}
    for part in ("shared", "block"):
        shapes |= {f"{part}.in.weight": (hidden, inputs), f"{part}.in.bias": (hidden,)}
        shapes[f"{part}.out.weight"] = (width, hidden)
    return shapes


def _reading_shapes(tensors: Mapping[str, torch.Tensor], count: int) -> dict[str, tuple]:
    """As many latents as the network has inputs."""
    first, weight = tensors[f"{CONTROLLER}shared.in.weight"], tensors[f"{READS}weight"]
    latents, width = first.shape[-1] if first.dim() == 2 else 0, weight.shape[-1] if weight.dim() == 2 else 0
    own = {"weight": (latents, width), "bias": (latents,), "threshold": (latents,), "kept": (count, latents)}
    return {READS + part: shape for part, shape in own.items()}


def lines(tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> list[str]:
    """What a person wants to know: the words, how far they go, and where."""
    found, network = [], controller(tensors)
    for word, value in words(tensors, info).items():
        kind = "one direction for all blocks" if len(value) == 1 else f"a direction for each of {len(value)} blocks"
        norm = float(value.norm(dim=-1).mean())
        found.append(f"{word}: {kind}, {value.shape[1]} pieces, {value.shape[2]} width; mean norm {norm:.4f}")
    if network:
        count, shape = sum(v.numel() for v in network.values()), network["shared.in.weight"].shape
        found.append(f"a network of {count} numbers from {shape[1]} inputs over {shape[0]} hidden units")
        if reads := reading(tensors):
            kept = ", ".join(f"{w} {int((k > 0).sum())}" for w, k in zip(info["words"], reads["kept"], strict=True))
            found.append(f"inputs are latents of dictionary {info.get('dictionary')}; per word: {kept}")
    else:
        found.append("no network: the cached directions serve every prompt")
    return found

"""One ``tokens`` concept out of two."""

from collections.abc import Sequence
from fractions import Fraction

import torch

from ..kernels.mix import lerp, noisy_stages, outer_layers, slerp
from .concept import Concept
from .errors import CarrierMismatch

MODES = ("slerp", "linear", "layers", "stages")
FINEST = 20
"""Most parts of the noise schedule that mixing by stages makes of two concepts without stages."""


def mix(
    a: Concept,
    b: Concept,
    name: str,
    mode: str = "slerp",
    amount: float = 0.5,
    first: int = 5,
    end: int = 10,
    layers: Sequence[str] = (),
) -> Concept:
    """Rows of ``a`` and ``b`` mixed; ``amount`` 0 gives those of ``a`` bit for bit.

    slerp, linear: every row on the way from a to b, at 1 b's bit for bit. layers: layers ``first`` .. ``end`` - 1 stay
    a's, the others go the way to b by slerp; ``layers`` names them when neither concept does. stages: the noisiest
    ``amount`` of the noise schedule is b's, the rest a's.
    Axes of stages, layers and roles of length one serve for any length. What else ``a`` says about itself is kept.
    Raises: CarrierMismatch when the two do not fit together; ValueError for a setting out of range.
    """
    if mode not in MODES or not 0 <= amount <= 1:
        raise ValueError(f"Mixing by {mode!r} with amount {amount} is unknown; use one of {MODES} and 0 to 1.")
    for concept in (a, b):
        if concept.kind != "tokens":
            raise CarrierMismatch(
                f"Concept <{concept.name}> is of kind {concept.kind}, and only tokens can be mixed; "
                + (
                    "learn it with mapper set to none."
                    if concept.kind == "mapper"
                    else "connect one from Learn Concept Tokens, Learn Residual Tokens or Learn K/V Tokens."
                )
            )
    if {k: v.shape[-2:] for k, v in a.tensors.items()} != {k: v.shape[-2:] for k, v in b.tensors.items()}:
        raise CarrierMismatch(
            f"Concept <{a.name}> holds {_sizes(a)}, concept <{b.name}> {_sizes(b)}; learn both for the same text "
            "encoders with the same number of vectors."
        )
    names = _layers(a, b, layers if mode == "layers" else ())
    if mode == "layers" and not names:
        raise ValueError(
            f"Neither <{a.name}> nor <{b.name}> says which layers there are; connect a model with cross-attention "
            "layers (SD1.5, SD2 or SDXL) to the mixing, or choose another mode."
        )
    if mode == "layers" and not 0 <= first < end <= len(names):
        raise ValueError(
            f"Layers {first} to {end} are not a part of the {len(names)} layers; set from_layer below to_layer, and "
            f"to_layer to at most {len(names)}."
        )
    rows = {k: _mixed(a, b, k, mode, amount, first, end, len(names)) for k in a.tensors}
    info = {k: a.info[k] for k in ("init_text", "architecture", "base", "clip", "encoders") if k in a.info}
    info |= {"mixed": [a.name, b.name], "mode": mode, "amount": amount, "layers": list(names)}
    return Concept(name, "tokens", rows, info | ({"from_layer": first, "to_layer": end} if mode == "layers" else {}))


def _mixed(a, b, key: str, mode: str, amount: float, first: int, end: int, layers: int) -> torch.Tensor:
    x, y = a.tensors[key], b.tensors[key]
    sizes = [max(x.shape[axis], y.shape[axis]) for axis in range(3)]
    part = Fraction(amount).limit_denominator(FINEST)
    if mode == "stages" and sizes[0] == 1:
        sizes[0] = part.denominator
    if mode == "layers":
        sizes[1] = layers
    for axis, what in enumerate(("stages", "layers", "roles")):
        if any(v.shape[axis] not in (1, sizes[axis]) for v in (x, y)):
            raise CarrierMismatch(
                f"Concept <{a.name}> has {x.shape[axis]} {what} for {key}, concept <{b.name}> has {y.shape[axis]}; mix "
                "concepts of the same number, or one that has a single one."
            )
    x, y = (v.expand(*sizes, *v.shape[3:]) for v in (x, y))
    if mode == "layers":
        return outer_layers(x, y, amount, first, end)
    if mode == "stages":
        return noisy_stages(x, y, round(amount * sizes[0]))
    return (slerp if mode == "slerp" else lerp)(x, y, amount)


def _layers(a: Concept, b: Concept, given: Sequence[str]) -> tuple[str, ...]:
    """The names of the layers, from whoever knows them."""
    own = [tuple(c.info["layers"]) for c in (a, b) if any(v.shape[1] > 1 for v in c.tensors.values())]
    known = {*own, *([tuple(given)] if given else [])}
    if len(known) > 1:
        raise CarrierMismatch(
            f"The layers of <{a.name}>, <{b.name}> and the model are not the same ones "
            f"({', '.join(str(len(names)) for names in sorted(known))}); use concepts and a model of one kind."
        )
    return known.pop() if known else ()


def _sizes(concept: Concept) -> str:
    return ", ".join(f"{k} {v.shape[-2]} vectors of {v.shape[-1]}" for k, v in sorted(concept.tensors.items()))

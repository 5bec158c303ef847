"""A learned concept in memory."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import delta, edit, modulation
from .errors import CarrierError
from .mapper import check_mapper, networks, width

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ENCODER = re.compile(r"[A-Za-z0-9_]{1,64}")
AXES = ("stages", "layers", "roles", "vectors", "width")


def check_name(name: str, what: str = "concept") -> None:
    """Raises: CarrierError for what cannot be written as ``<name>``."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise CarrierError(f"{str(name)[:80]!r} cannot be a {what}'s name; use 1 to 64 letters, digits, - or _.")


@dataclass(frozen=True)
class Concept:
    """A concept: its name in prompts, what was learned, and how.

    Tensors are copied to the CPU as ordinary (never inference-mode) tensors, so a concept is safe to keep and to share.
    Raises: CarrierError when a name, shape, number or note is not allowed.
    """

    name: str
    """Written as ``<name>`` in prompts: letters, digits, - and _."""
    kind: str
    """One of ``KINDS``."""
    tensors: Mapping[str, torch.Tensor]
    """For ``tokens``: rows of the encoder's input [stages, layers, roles, vectors, width] per encoder key, fp32.
    For ``delta``: the names and shapes of delta.py. For ``mapper``: a network's parts per encoder key (mapper.py). For
    ``modulation``: directions per word, and the network that makes them (modulation.py). For ``edit``: a row per
    encoder key, and what comes into the place of its encoding (edit.py)."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON facts: settings, losses, base model."""
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Optimiser state for continuing; may be empty."""

    def __post_init__(self):
        check_name(self.name)
        if self.kind not in KINDS:
            raise CarrierError(
                f"Concept <{self.name}> is of kind {str(self.kind)[:80]!r}, which this version does not know "
                f"({', '.join(KINDS)}); update the pack."
            )
        try:
            info = json.loads(json.dumps(dict(self.info), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CarrierError(f"The facts about concept <{self.name}> cannot be written as JSON: {error}.") from error
        tensors = {k: _own(v, torch.float32) for k, v in self.tensors.items()}
        KINDS[self.kind](self.name, tensors, info)
        for name, value in (
            ("tensors", tensors),
            ("info", info),
            ("state", {k: _own(v) for k, v in self.state.items()}),
        ):
            object.__setattr__(self, name, value)

    def summary(self) -> str:
        """What it holds and how it was learned, in a few lines."""
        lines = [f"<{self.name}>: {self.kind}", *self.contents()]
        lines += [f"{key}: {value}" for key, value in sorted(self.info.items())]
        lines.append(
            "training state: " + (f"{len(self.state)} tensors, learning can continue" if self.state else "none")
        )
        return "\n".join(lines)

    def contents(self) -> list[str]:
        """Lines about the tensors alone."""
        if self.kind == "delta":
            return delta.lines(self.tensors)
        if self.kind == "modulation":
            return modulation.lines(self.tensors, self.info)
        if self.kind == "edit":
            return edit.lines(self.tensors, self.info)
        lines = []
        for key, network in networks(self.tensors).items() if self.kind == "mapper" else ():
            count = sum(value.numel() for value in network.values())
            lines.append(
                f"{key}: a network of {count} numbers for {len(self.info['layers'])} layers and {self.info['anchors']} "
                f"times, {width(network)} width; norm {self.info['norms'][key]:.3f}"
            )
        if self.kind == "mapper":
            return lines
        for key, value in self.tensors.items():
            shape = ", ".join(
                f"{n} {axis}" for n, axis in zip(value.shape, AXES, strict=True) if n > 1 or axis in AXES[3:]
            )
            lines.append(f"{key}: {shape}; mean norm {float(value.norm(dim=-1).mean()):.3f}")
        return lines


def _own(value: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An ordinary CPU copy, also of an inference-mode tensor and inside inference mode."""
    with torch.inference_mode(False):
        return value.detach().to("cpu", dtype or value.dtype, copy=True).contiguous()


def _check_tokens(name: str, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
    if not tensors:
        raise CarrierError(f"Concept <{name}> holds no vectors.")
    for key, value in tensors.items():
        if not ENCODER.fullmatch(key):
            raise CarrierError(f"Concept <{name}>: {key[:80]!r} cannot be the name of a text encoder.")
        if value.dim() != len(AXES) or not value.numel():
            raise CarrierError(f"Concept <{name}>: {key} has shape {tuple(value.shape)}, expected ({', '.join(AXES)}).")
        if not bool(torch.isfinite(value).all()):
            raise CarrierError(
                f"Concept <{name}>: {key} holds numbers that are not finite; learn it again with a lower learning rate."
            )
        if value.shape[2] > 2 or value.shape[1] > 1 and len(info.get("layers") or ()) != value.shape[1]:
            raise CarrierError(
                f"Concept <{name}>: {key} has {value.shape[1]} layers and {value.shape[2]} roles, but names "
                f"{len(info.get('layers') or ())} layers; roles are one, or K and V. Learn it again."
            )


KINDS = {
    "tokens": _check_tokens,
    "delta": delta.check,
    "mapper": check_mapper,
    "modulation": modulation.check,
    "edit": edit.check,
}

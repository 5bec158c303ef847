"""Attention maps out of a forward pass, and losses on them, without changing what the pass computes.

Cross-attention of UNets (ldm/modules/attention.py): an ``attn2_patch``, asked after all others, marks the layer, and
may lay the context of a reference prompt behind that of the keys; ``optimized_attention_override`` finds the mark,
parts the keys again and looks. So two prompts' maps of the same queries need one pass. Attention over text and picture
together (Flux, SD3): text rows first, the override alone. All of it lies in the ``transformer_options`` of one call.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..carriers.errors import CarrierMismatch
from ..kernels.attention import attend, attention_columns, split_heads
from ..kernels.flash import joint, usable
from .denoise import OVERRIDE, Attention

LAYERS = ("half", "quarter", "all")
"""Which maps: those of half or a quarter of the latent's side, or all."""


class Layer(NamedTuple):
    """One attention of one pass."""

    name: str
    """``input.1`` as in ``variants.layers_of``; ``double.0`` and the like where text and picture attend together."""
    block: int
    """Number inside a SpatialTransformer."""
    scale: int
    """Latent pixels per side of one map pixel."""
    height: int
    width: int


def layer_of(name: str, block: int, size: tuple[int, int], pixels: int) -> Layer | None:
    """The layer whose queries are ``pixels`` cells of a latent of ``size``; None where no halving of it has as many."""
    (height, width), scale = size, 1
    while height * width > pixels:
        height, width, scale = -(-height // 2), -(-width // 2), 2 * scale
    return Layer(name, block, scale, height, width) if height * width == pixels else None


def chosen(layers: str | tuple[str, ...]) -> Callable[[Layer], bool]:
    """Whether a layer is meant by ``half``, ``quarter``, ``all``, or a tuple of names. Raises: ValueError."""
    if isinstance(layers, str):
        if layers not in LAYERS:
            raise ValueError(f"Unknown choice of layers {layers!r}; known: {', '.join(LAYERS)}, or names.")
        scale = {"half": 2, "quarter": 4}.get(layers)
        return lambda layer: scale in (None, layer.scale)
    return lambda layer: layer.name in layers


class AttentionTap:
    """Looks at the cross-attention of one forward pass of a UNet.

    ``look(q, k, v, heads, reference)`` -> (output or None for the model's own, what is recorded), with q [b, n, c],
    k and v [b, m, c], and the reference prompt's keys [b, r, c] or None. ``reference``: its context [b, r, width].
    Recomputing blocks in the backward pass calls ``look`` again and records nothing.
    """

    def __init__(self, look: Callable, layers: str | tuple[str, ...] = "all", reference: torch.Tensor | None = None):
        self.look, self.wanted, self.reference = look, chosen(layers), reference
        self.records: dict[Layer, torch.Tensor] = {}
        self.seen: set[int] = set()

    def take(self) -> dict[Layer, torch.Tensor]:
        """What was recorded, in order of execution; the tap forgets it and goes on recording with the next ``change``.

        Raises: CarrierMismatch when no layer was one of those asked for.
        """
        records, self.records = self.records, {}
        found = dict(records)
        records.clear()  # the options of the pass still hold it
        if not found:
            sides = ", ".join(f"1/{s}" for s in sorted(self.seen)) or "none"
            raise CarrierMismatch(
                f"No cross-attention layer has a map of the size asked for; for this picture the sides of the maps "
                f"are, as parts of the latent's, {sides}. Choose one of these, or all."
            )
        return found

    def change(self, options: dict) -> dict:
        """``transformer_options`` of the call that is looked at. Raises: CarrierMismatch when attention is replaced."""
        if options.get("patches_replace", {}).get("attn2"):
            raise CarrierMismatch(
                "Another node replaces this model's cross-attention, so its maps cannot be seen; connect the model as "
                "it is before that node."
            )
        self.records, marked = {}, []
        records = self.records

        def patch(n, key, value, extra):
            marked.clear()
            block = extra["block"]
            layer = layer_of(
                f"{block[0]}.{block[1]}", extra.get("block_index", 0), extra["original_shape"][-2:], n.shape[1]
            )
            self.seen |= {layer.scale} if layer else set()
            if layer and self.wanted(layer):
                marked.append((layer, key.shape[1]))
                if self.reference is not None:
                    key = torch.cat([key, self.reference.to(key)], 1)
            return n, key, value

        def override(run, q, k, v, heads, mask, kwargs):
            if not marked:
                return run(k)
            layer, own = marked.pop()
            k, reference = k[:, :own], k[:, own:] if self.reference is not None else None
            out, record = self.look(q, k, v, heads, reference)
            if self.records is records:  # taken: the backward pass recomputes this block
                records.setdefault(layer, record)
            return run(k) if out is None or mask is not None else out

        patches = dict(options.get("patches", {}))
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), patch]
        return {**_overridden(options, override), "patches": patches}


class JointTap:
    """Looks at the picture's view of the text in models that attend to both at once.

    ``columns`` [1 or b, text, c]; ``size``: rows and columns of the picture's tokens. Records maps [b, n, c], whose
    gradients lead to queries and keys. Recomputing blocks in the backward pass records nothing.
    """

    def __init__(self, columns: torch.Tensor, size: tuple[int, int]):
        self.columns, self.size, self.records = columns, size, {}
        self.chosen = columns.abs().sum((0, 2)).nonzero()[:, 0]
        self.weights = columns[:, self.chosen]

    def take(self) -> dict[Layer, torch.Tensor]:
        """What was recorded. Raises: CarrierMismatch when text and picture were not attended to together."""
        found, self.records = self.records, {}
        if not found:
            raise CarrierMismatch(
                "No attention of this model has the text's rows before the picture's; maps are read from SD1.5, SD2, "
                "SDXL, SD3 and Flux."
            )
        return found

    def change(self, options: dict) -> dict:
        """``transformer_options`` of the call that is looked at."""
        self.records = records = {}
        text, pixels = self.columns.shape[1], self.size[0] * self.size[1]
        before = options.get(OVERRIDE)
        own = before is None or isinstance(before, Attention) and (before.learns() or not before.earlier)

        def override(run, q, k, v, heads, mask, kwargs):
            split, out = kwargs.get("skip_reshape", False), None
            if q.shape[2 if split else 1] == text + pixels:
                apart = (q, k, v) if split else [split_heads(x, heads) for x in (q, k, v)]
                if own and mask is None and not kwargs.get("skip_output_reshape") and usable(*apart):
                    out, seen = joint(*apart, self.chosen.to(q.device), self.weights.to(q.device), text)
                else:
                    flat = [x.transpose(1, 2).flatten(2) if split else x for x in (q, k)]
                    columns = F.pad(self.columns, (0, 0, 0, pixels)).to(q.device)
                    seen = attention_columns(flat[0][:, text:], flat[1], heads, columns)
                if self.records is records:  # taken: the backward pass recomputes this block, and saves what it saved
                    here = kwargs.get("transformer_options") or {}
                    kind, number = here.get("block_type", "joint"), len(records)
                    records[Layer(f"{kind}.{here.get('block_index', number)}", number, 2, *self.size)] = seen
            return run(k) if out is None else out

        return _overridden(options, override)


def _overridden(options: dict, override: Callable) -> dict:
    """Options in which ``override`` stands before whatever overrides attention already (denoise.py)."""
    previous = options.get(OVERRIDE)

    def replaced(func, q, k, v, heads, *args, **kwargs):
        mask = args[0] if args else kwargs.get("mask")

        def run(keys):
            before = (func, q) if previous else (q,)
            return (previous or func)(*before, keys, v, heads, *args, **kwargs)

        return override(run, q, k, v, heads, mask, kwargs)

    return {**options, OVERRIDE: replaced}


def maps_of(columns: torch.Tensor, follow_queries: bool = False) -> Callable:
    """A ``look`` that records columns [1 or b, m, c] of the maps, [b, n, c], out of the attention's own softmax."""

    repeated: dict[tuple, torch.Tensor] = {}

    def look(q, k, v, heads, reference):
        which = q.device, max(1, k.shape[1] // columns.shape[1])
        if which not in repeated:  # a pass has many layers, and all ask for the same
            repeated[which] = columns.to(q.device).repeat(1, which[1], 1)
        return attend(q, k, v, heads, repeated[which], follow_queries)

    return look


def both(change: Callable | None, tap: AttentionTap | JointTap) -> Callable:
    """A change of ``transformer_options``, if any, and then the tap's."""
    return lambda options: tap.change(change(options) if change else options)

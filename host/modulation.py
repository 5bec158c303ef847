"""Directions for single text tokens in the modulation space of a diffusion transformer: M+ of TokenVerse (2501.12224).

A block's shift, scale and gate are lin(SiLU(y)) of one vector y per picture; a concept's text rows get those of y + d.
Only these rows are computed anew and laid into the others' by their place, picture rows never. Everything hangs on the
call: an APPLY_MODEL wrapper puts hooks on the blocks (ldm/flux/layers.py Modulation; the ``context_block`` of
ldm/modules/diffusionmodules/mmdit.py) and takes them off again, also after an error. In a CONDITIONING the wrapper
travels as variants.py describes, whose ``Marked`` tells which rows are the prompt's.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import comfy.patcher_extension
import torch
import torch.nn.functional as F
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

from ..carriers.errors import CarrierMismatch
from .denoise import ROWS
from .gradients import AROUND
from .variants import Marked

PLACES = "concept_modulation_places"
"""Key in ``transformer_options``: the placements of one call, in order; whoever comes first installs the hooks."""
ALONE = "concept_modulation_alone"
"""Key in ``transformer_options``: true when every row of the batch belongs to the one prompt (show.py)."""
CHOICES = {"all": ("double", "single", "joint"), "double blocks": ("double", "joint")}
"""Which blocks are modulated: TokenVerse takes all, XVerse (bytedance/XVerse) the double blocks alone."""


class Place(NamedTuple):
    """A word's rows and their directions."""

    positions: tuple[int, ...]
    """Rows of the text."""
    directions: torch.Tensor
    """[positions, 1 or blocks, width]."""
    blocks: tuple[str, ...]
    """Names of the blocks that are modulated, as ``blocks_of`` spells them."""
    name: str
    """Of the concept, for messages."""

    def at(self, block: str) -> torch.Tensor | None:
        """Directions [positions, width] in a block; None where it is left alone."""
        if block not in self.blocks:
            return None
        return self.directions[:, self.blocks.index(block) if self.directions.shape[1] > 1 else 0]


class Placement(NamedTuple):
    """A place in some rows of a batch."""

    rows: tuple[int, ...]
    place: Place


def blocks_of(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Blocks that modulate text tokens, by name in order of execution: ``double.0``, ``single.0`` of Flux, ``joint.0``
    of SD3. Raises: CarrierMismatch for any other network.
    """
    if isinstance(network, MMDiT):
        found = {f"joint.{i}": b for i, b in enumerate(network.joint_blocks)}
        if not any(b.context_block.scale_mod_only for b in network.joint_blocks):
            return found
    if isinstance(network, Flux) or type(network).__name__ == "Chroma":
        found = {f"double.{i}": b for i, b in enumerate(network.double_blocks)}
        found |= {f"single.{i}": b for i, b in enumerate(network.single_blocks)}
        if all(getattr(b, "txt_mod" if n.startswith("double") else "modulation", None) for n, b in found.items()):
            return found
        raise CarrierMismatch(
            f"{type(network).__name__} of this kind (Flux.2, Chroma) computes its modulation once, outside of its "
            "blocks, so that single words of single blocks cannot be modulated; use Flux.1 or SD3."
        )
    raise CarrierMismatch(
        f"{type(network).__name__} does not modulate text tokens, so directions of words have no place in it; use "
        "Flux.1 or SD3."
    )


def chosen_blocks(network: torch.nn.Module, choice: str) -> tuple[str, ...]:
    """Names of the blocks that one of ``CHOICES`` means. Raises: CarrierMismatch as ``blocks_of`` does."""
    return tuple(name for name in blocks_of(network) if name.split(".")[0] in CHOICES[choice])


def fits(network: torch.nn.Module, place: Place) -> None:
    """Raises: CarrierMismatch when the directions were learned for other blocks or another width."""
    kinds = {name.split(".")[0] for name in place.blocks}
    here = tuple(name for name in blocks_of(network) if name.split(".")[0] in kinds)
    if here != place.blocks or network.hidden_size != place.directions.shape[-1]:
        raise CarrierMismatch(
            f"Concept <{place.name}> modulates {len(place.blocks)} blocks of width {place.directions.shape[-1]} "
            f"({place.blocks[0]} to {place.blocks[-1]}); this model has {len(here)} such blocks of width "
            f"{network.hidden_size}. Connect the model it was learned on."
        )


class _Rows(NamedTuple):
    """What is modulated in one block of one call."""

    row: torch.Tensor
    position: torch.Tensor
    direction: torch.Tensor


class _Call:
    """One call of the model, whose placements may still grow until its first block runs."""

    def __init__(self, placements: list[Placement]):
        self.placements = placements
        self.lengths: dict[str, int] = {}
        """Rows that each block of Flux sees, and under ``text`` those of the text."""
        self.indices: dict[tuple, torch.Tensor] = {}

    def rows(self, block: str, like: torch.Tensor, length: int) -> _Rows | None:
        """Batch row, text row [m] and direction [m, width] of everything modulated in a block; None when nothing is.

        ``length``: rows of the text. Raises: CarrierMismatch when a word stands beyond it.
        """
        directions = [place.at(block) for _, place in self.placements]
        mine = tuple(number for number, own in enumerate(directions) if own is not None)
        if not mine:
            return None
        if mine not in self.indices:
            used = [self.placements[number] for number in mine]
            for _, place in used:
                if max(place.positions) >= length:
                    raise CarrierMismatch(
                        f"<{place.name}> modulates row {max(place.positions) + 1} of a text that has {length} in the "
                        "model; another node made the conditioning shorter. Put Concept Prompt behind that node."
                    )
            pairs = [(r, p) for rows, place in used for r in rows for p in place.positions]
            self.indices[mine] = torch.tensor(pairs, device=like.device).T.contiguous()
        row, position = self.indices[mine]
        own = [directions[number].to(like).repeat(len(self.placements[number].rows), 1) for number in mine]
        return _Rows(row, position, torch.cat(own))


def _laid(parts: list[torch.Tensor], new: tuple[torch.Tensor, ...], rows: _Rows, length: int) -> list[torch.Tensor]:
    """Parts [b, 1 or n, width] over all rows, with ``new`` [m, width] at theirs."""
    return [
        part.expand(-1, length, -1).index_put((rows.row, rows.position), own)
        for part, own in zip(parts, new, strict=True)
    ]


def _on_flux(name: str, block: torch.nn.Module, call: _Call) -> list[Callable]:
    """Hooks on one block of Flux; returns what takes them off."""
    double = name.startswith("double")

    def note(module, args, kwargs):
        seen = (kwargs["txt"] if "txt" in kwargs else args[1]) if double else (args[0] if args else kwargs["x"])
        call.lengths[name] = seen.shape[1]
        if double:
            call.lengths["text"] = seen.shape[1]

    def modulated(module, args, out):
        vector = args[0][:, None] if args[0].ndim == 2 else args[0]
        length = call.lengths[name]
        rows = call.rows(name, vector, call.lengths.get("text", length))
        if rows is None:
            return None
        own = vector[rows.row, rows.position if vector.shape[1] > 1 else 0] + rows.direction
        new = module.lin(F.silu(own)[None])[0].chunk(module.multiplier, -1)
        given = [o for o in out if o is not None]
        base = [part for o in given for part in (o.shift, o.scale, o.gate)]
        parts = _laid(base, new, rows, length)
        made = [type(o)(*parts[3 * i : 3 * i + 3]) for i, o in enumerate(given)]
        return (*made, *out[len(made) :])

    target = block.txt_mod if double else block.modulation
    handles = [block.register_forward_pre_hook(note, with_kwargs=True), target.register_forward_hook(modulated)]
    return [handle.remove for handle in handles]


def _on_sd3(name: str, block: torch.nn.Module, call: _Call) -> list[Callable]:
    """Text side of one joint block of SD3, with modulation per row where it is asked for."""
    text = block.context_block
    before, after = text.pre_attention, text.post_attention

    def pre_attention(x, c):
        rows = call.rows(name, c, x.shape[1])
        if rows is None:
            return before(x, c)
        count = 2 if text.pre_only else 6
        base = text.adaLN_modulation(c)[:, None].chunk(count, -1)
        new = text.adaLN_modulation(c[rows.row] + rows.direction).chunk(count, -1)
        shift, scale, *rest = _laid(list(base), new, rows, x.shape[1])
        qkv = text.attn.pre_attention(torch.addcmul(shift, text.norm1(x), 1 + scale))
        return qkv, ((x, *rest) if rest else None)

    def post_attention(attention, x, gate, shift, scale, gate_mlp):
        if gate.ndim == 2:
            return after(attention, x, gate, shift, scale, gate_mlp)
        x = x + gate * text.attn.post_attention(attention)
        return x + gate_mlp * text.mlp(torch.addcmul(shift, text.norm2(x), 1 + scale))

    kept = {k: text.__dict__.get(k) for k in ("pre_attention", "post_attention")}
    text.pre_attention, text.post_attention = pre_attention, post_attention

    def put_back():
        for key, value in kept.items():
            if value is None:
                del text.__dict__[key]
            else:
                setattr(text, key, value)

    return [put_back]


@contextlib.contextmanager
def _installed(blocks: Mapping[str, torch.nn.Module], call: _Call):
    """Modulates the blocks while the context is open."""
    with contextlib.ExitStack() as stack:
        for name, block in blocks.items():
            on = _on_sd3 if name.startswith("joint") else _on_flux
            for undo in on(name, block, call):
                stack.callback(undo)
        yield


def _wrapper(find: Callable[[dict, torch.Tensor, torch.Tensor], list[Placement]]) -> Callable:
    """An APPLY_MODEL wrapper. ``find``: (transformer_options, latents, text) -> what is modulated in this call."""

    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        options, model = transformer_options or {}, executor.class_obj
        given = model.diffusion_model
        network = getattr(given, "_orig_mod", given)
        mine = find(options, x, c_crossattn)
        for placement in mine:
            fits(network, placement.place)
        if not mine or PLACES in options:
            options.get(PLACES, []).extend(mine)
            return executor(x, t, c_concat, c_crossattn, control, options, **more)
        call, blocks = _Call(list(mine)), blocks_of(network)
        names = {id(block): name for name, block in blocks.items()}

        def around(block):
            name = names.get(id(block))
            return _installed({name: block} if name else {}, call)

        options = {**options, PLACES: call.placements, AROUND: [*options.get(AROUND, ()), around]}
        model.diffusion_model = network  # dynamo's guards leave out hooks, so what is compiled need not notice them
        try:
            with _installed(blocks, call):
                return executor(x, t, c_concat, c_crossattn, control, options, **more)
        finally:
            model.diffusion_model = given

    return apply


def modulating(placements: list[Placement]) -> Callable:
    """A change of ``transformer_options`` for ``Denoiser``: modulates the rows of that one call, differentiably."""

    def find(options, x, text):
        held = options[ROWS]
        here = [(tuple(held.index(row) for row in rows if row in held), place) for rows, place in placements]
        return [Placement(rows, place) for rows, place in here if rows]

    wrapper = _wrapper(find)
    more = {"wrappers": {comfy.patcher_extension.WrappersMP.APPLY_MODEL: {"concept-carriers": [wrapper]}}}
    return lambda options: comfy.patcher_extension.merge_nested_dicts(options, more)


@dataclass(eq=False)
class Prompt(Marked):
    """The words of one encoded prompt."""

    text: torch.Tensor
    """Its rows [1, n, width]."""
    places: list[Place]
    moved: dict = field(default_factory=dict)

    def here(self, device: torch.device) -> list[Place]:
        """The places with their directions on a device."""
        if device not in self.moved:
            self.moved[device] = [p._replace(directions=p.directions.to(device)) for p in self.places]
        return self.moved[device]

    def find(self, options: dict, x: torch.Tensor, text: torch.Tensor) -> list[Placement]:
        """What is modulated in a call of the model for latents [b, ...] and text rows [b, n, width].

        An entry that somebody made out of several prompts is in no prompt's name; its rows are told by their text.
        """
        rows = range(len(x)) if options.get(ALONE) else self.rows(options, len(x), text)
        if rows is None:
            length = self.text.shape[1]
            alike = text.shape[1] >= length and text.shape[2] == self.text.shape[2]
            same = (text[:, :length] == self.text.to(text)).flatten(1).all(1) if alike else torch.zeros(0)
            rows = same.nonzero().flatten().tolist()
        return [Placement(tuple(rows), place) for place in self.here(x.device)] if rows else []


def attach(entry: list, places: list[Place]) -> list:
    """A CONDITIONING entry whose words are modulated wherever the host samples with it."""
    prompt = Prompt(entry[0], places)
    return prompt.entry(entry[0], dict(entry[1]), _wrapper(prompt.find))

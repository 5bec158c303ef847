"""Contexts that change with noise level, layer and role: one mechanism for sampling and for learning.

A prompt with such concepts is encoded once per variant. A hook on its CONDITIONING (comfy/hooks.py) brings two things
to the model: an APPLY_MODEL wrapper that finds the rows of a batch which belong to the prompt and their noise level,
and an ``attn2_patch`` that hands K and V contexts to each cross-attention layer (ldm/modules/attention.py). The hook is
never registered as one that needs model calls of its own, so the host goes on batching the prompt with its negative.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import comfy.hooks
import comfy.patcher_extension
import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from .denoise import noise_time

CONTEXTS = "concept_contexts"
"""Key in ``transformer_options``: functions (layer name, K context, V context) -> (K context, V context)."""
PROMPTS = "concept_prompts"
"""Key in ``transformer_options``: marked prompt -> side and uuid of its entries. In an entry: its ``Marked``."""


def layers_of(network: torch.nn.Module) -> list[str]:
    """Names of a UNet's cross-attention layers in order of execution, such as ``input.1``; none for a DiT.

    One name per SpatialTransformer: 16 in SD1.5 and SD2 (the layers of P+, arXiv 2303.09522), 11 in SDXL.
    """
    if not hasattr(network, "input_blocks"):
        return []
    middle = [network.middle_block] if getattr(network, "middle_block", None) is not None else []
    return [
        f"{part}.{number}"
        for part, blocks in (("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks))
        for number, block in enumerate(blocks)
        if any(type(m).__name__ == "SpatialTransformer" for m in block.modules())
    ]


@dataclass(frozen=True)
class Grid:
    """Which variant of a prompt applies at a noise level, in a layer, and for K or V."""

    edges: tuple[float, ...]
    """Times in (0, 1), ascending, at which the stage changes; stage 0 is next to the clean picture."""
    layers: tuple[str, ...]
    """Layer names; empty when all layers are alike."""
    index: torch.Tensor
    """Variant number [stages, layers, 2], the last axis K then V."""
    cells: tuple[tuple[tuple[int, int, int], ...], ...]
    """Per variant and concept the (stage, layer, role) of its rows."""

    @classmethod
    def of(cls, concepts: Iterable[Concept]) -> "Grid":
        """The coarsest grid that tells all rows of these concepts apart.

        Raises: CarrierMismatch when two concepts name different layers.
        """
        shapes, layers = [], ()
        for concept in concepts:
            shape = [max(v.shape[axis] for v in concept.tensors.values()) for axis in range(3)]
            shapes.append(shape)
            names = tuple(concept.info.get("layers") or ()) if shape[1] > 1 else ()
            if layers and names and names != layers:
                raise CarrierMismatch(
                    f"Concept <{concept.name}> was learned for {len(names)} layers ({names[0]} to {names[-1]}), "
                    f"another one in this prompt for {len(layers)} ({layers[0]} to {layers[-1]}); use them in prompts "
                    "of their own, on the models they were learned on."
                )
            layers = layers or names
        edges = sorted({k / s for s, _, _ in shapes for k in range(1, s)})
        middles = [(a + b) / 2 for a, b in zip([0.0, *edges], [*edges, 1.0], strict=True)]
        cells: dict[tuple, int] = {}
        index = torch.zeros(len(middles), max(1, len(layers)), 2, dtype=torch.int64)
        for i, middle in enumerate(middles):
            for layer in range(index.shape[1]):
                for role in (0, 1):
                    cell = tuple((int(middle * s), min(layer, c - 1), min(role, r - 1)) for s, c, r in shapes)
                    index[i, layer, role] = cells.setdefault(cell, len(cells))
        return cls(tuple(edges), layers, index, tuple(cells))

    def stages(self, times: torch.Tensor) -> torch.Tensor:
        """Stage of each time [b] in 0..1."""
        return torch.bucketize(times.detach().float().cpu(), torch.tensor(self.edges), right=True)

    @property
    def needs_cross_attention(self) -> bool:
        """Whether layers, or K and V, differ."""
        return bool((self.index != self.index[:, :1, :1]).any())

    def fits(self, model) -> None:
        """Raises: CarrierMismatch when layers, or K and V, differ and the host's model has no cross-attention."""
        if self.needs_cross_attention and not layers_of(model.diffusion_model):
            raise CarrierMismatch(
                f"The prompt holds a concept with its own rows per layer or for K and V, and {type(model).__name__} "
                "has no cross-attention layers; use it on the kind of model it was learned on."
            )

    def layer(self, name: str) -> int:
        """Number of a layer. Raises: CarrierMismatch when the concept never learned it."""
        if not self.layers:
            return 0
        if name not in self.layers:
            raise CarrierMismatch(
                f"The prompt holds a concept learned for the layers {', '.join(self.layers)}, but this model has a "
                f"layer {name}; use the model it was learned on."
            )
        return self.layers.index(name)


def attn2_patch(n, key, value, options):
    """Gives a cross-attention layer the contexts that ``CONTEXTS`` names."""
    name = ".".join(str(part) for part in options["block"][:2])
    for pick in options.get(CONTEXTS, ()):
        key, value = pick(name, key, value)
    return n, key, value


def with_contexts(options: dict, *picks: Callable) -> dict:
    """``transformer_options`` in which ``picks`` apply, with the patch that asks them."""
    patches = dict(options.get("patches", {}))
    if attn2_patch not in patches.get("attn2_patch", []):
        patches["attn2_patch"] = [attn2_patch, *patches.get("attn2_patch", [])]  # others change what ours chose
    return {**options, "patches": patches, CONTEXTS: [*options.get(CONTEXTS, ()), *picks]}


class VariantHook(comfy.hooks.TransformerOptionsHook):
    """Adds its wrapper to the whole run and stays unregistered: the wrapper itself knows which rows are meant."""

    def add_hook_patches(self, model, model_options, target_dict, registered):
        """Called by the host once per sampling run (sampler_helpers.prepare_model_patcher)."""
        comfy.patcher_extension.merge_nested_dicts(
            model_options, {"transformer_options": self.transformers_dict}, copy_dict1=False
        )
        return False


class Marked:
    """A prompt by whose identity its entries are known again; equal texts stay apart."""

    def __deepcopy__(self, memo):
        return self

    def note(self, executor, model, conds, x_in, timestep, model_options):
        """A CALC_COND_BATCH wrapper (samplers.py): which entries of this call are the prompt's."""
        marked = [(i, c) for i, entries in enumerate(conds) for c in entries or () if self in c.get(PROMPTS, ())]
        if marked:
            options = model_options.get("transformer_options", {})
            mine = {**options.get(PROMPTS, {}), self: tuple((i, c["uuid"]) for i, c in marked if _own(c))}
            model_options = {**model_options, "transformer_options": {**options, PROMPTS: mine}}
        return executor(model, conds, x_in, timestep, model_options)

    def rows(self, options: dict, count: int, context: torch.Tensor | None) -> list[int] | None:
        """Its rows in a batch of ``count``; None where no entry of the call bears its mark.

        Those whose context is all zeros hold it no more: the host's ConditioningZeroOut leaves hooks and marks.
        """
        mine = options.get(PROMPTS, {}).get(self)
        if mine is None:
            return None
        parts = list(zip(options["cond_or_uncond"], options["uuids"], strict=True))
        each = count // len(parts)
        found = [r for i, part in enumerate(parts) if part in mine for r in range(i * each, (i + 1) * each)]
        empty = [] if context is None else (~context.flatten(1).any(1)).nonzero()[:, 0].tolist()
        return [row for row in found if row not in empty]

    def entry(self, cond: torch.Tensor, facts: dict, wrapper: Callable) -> list:
        """A CONDITIONING entry that bears the mark and brings ``wrapper`` (APPLY_MODEL) to whatever samples with it."""
        kinds = comfy.patcher_extension.WrappersMP
        own = {kinds.OUTER_SAMPLE: _without_empty_hooks, kinds.CALC_COND_BATCH: self.note, kinds.APPLY_MODEL: wrapper}
        hook = VariantHook({"wrappers": {kind: {"concept-carriers": [f]} for kind, f in own.items()}})
        group = facts["hooks"].clone() if facts.get("hooks") is not None else comfy.hooks.HookGroup()
        group.add(hook)
        return [cond, {**facts, "hooks": group, PROMPTS: (*facts.get(PROMPTS, ()), self)}]


def _without_empty_hooks(executor, *args, **kwargs):
    """An OUTER_SAMPLE wrapper. Where other prompts bring hooks that are registered, the host leaves None in the place
    of ``VariantHook``, and then asks it (samplers.py filter_registered_hooks_on_conds, process_conds)."""
    for entries in executor.class_obj.conds.values():
        for entry in entries:
            if entry.get("hooks", entry) is None:
                del entry["hooks"]
    return executor(*args, **kwargs)


def _own(entry: dict) -> bool:
    """False for the copy that the host makes of a prompt with an area for the other side, with the other's text and the
    prompt's marks (samplers.py create_cond_with_same_area_if_none)."""
    held = getattr(entry.get("model_conds", {}).get("c_crossattn"), "cond", None)
    text = entry.get("cross_attn")
    return held is None or text is None or held is text or (held.shape == text.shape and bool((held == text).all()))


class Variants(Marked):
    """One prompt: base [1, tokens, width], table [variants, tokens, width]."""

    def __init__(self, base: torch.Tensor, table: torch.Tensor, grid: Grid):
        self.base, self.table, self.grid, self.placed = base, table, grid, {}

    def on(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Base and table where a context is; the host moves it behind the wrapper."""
        where = (like.device, like.dtype)
        if where not in self.placed:
            self.placed[where] = (self.base.to(like), self.table.to(like))
        return self.placed[where]

    def spots(self, context: torch.Tensor | None) -> torch.Tensor:
        """Row and piece [n, 2] of the prompt in a context, which the host repeats to the length of a longer negative
        (comfy/conds.py CONDCrossAttn)."""
        if context is None or context.shape[2] != self.base.shape[2]:
            return torch.zeros(0, 2, dtype=torch.int64)
        return (self.pieces(context) == self.on(context)[0][:, None]).flatten(2).all(2).nonzero().cpu()

    def pieces(self, context: torch.Tensor) -> torch.Tensor:
        """A view [b, pieces, tokens, width] of as much as there are whole pieces."""
        tokens = self.base.shape[1]
        count = context.shape[1] // tokens
        return context[:, : count * tokens].unflatten(1, (count, tokens))

    def put(self, context: torch.Tensor, spots: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """The context with the variants [n] of these numbers in their spots, all on its device."""
        context = context.clone()
        self.pieces(context)[spots[:, 0], spots[:, 1]] = self.on(context)[1][numbers]
        return context

    def apply(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        """The APPLY_MODEL wrapper. Raises: CarrierMismatch when another node changed the prompt's rows."""
        options, context, grid = transformer_options or {}, c_crossattn, self.grid
        spots, mine = self.spots(context), set(self.rows(options, len(x), context) or ())
        marked = {row for other in options.get(PROMPTS, {}) for row in other.rows(options, len(x), None)}
        spots = spots[[row in mine or row not in marked for row in spots[:, 0].tolist()]]  # equal texts stay apart
        if not mine <= set(spots[:, 0].tolist()):
            raise CarrierMismatch(
                "The prompt holds a concept whose rows change with stage, layer or for K and V, and another node "
                "changed its conditioning (such as ConditioningAverage), so that they cannot be told any more; put "
                "Concept Prompt behind that node, or combine prompts with ConditioningCombine."
            )
        if len(spots):
            stages = grid.stages(noise_time(executor.class_obj.model_sampling, t))[spots[:, 0]]
            grid.fits(executor.class_obj)
            if grid.needs_cross_attention:
                moved, chosen = {}, {}

                def choice(context, layer, role):
                    if (layer, role) not in chosen or chosen[layer, role][0] is not context:
                        if context.device not in moved:
                            moved[context.device] = (spots.to(context.device), grid.index[stages].to(context.device))
                        where, numbers = moved[context.device]
                        own = self.put(context, where, numbers[:, layer, role])
                        chosen[layer, role] = (context, own)  # layers that are alike share it
                    return chosen[layer, role][1]

                def pick(name, key, value):
                    layer = grid.layer(name)
                    return choice(key, layer, 0), choice(value, layer, 1)

                options = with_contexts(options, pick)
            else:
                numbers = grid.index[stages, 0, 0].to(context.device)
                context = self.put(context, spots.to(context.device), numbers)
        return executor(x, t, c_concat, context, control, options, **more)


def attach(entries: list[list], grid: Grid) -> list:
    """One CONDITIONING entry out of one per variant.

    Its own tensor is the mean of the variants: what a ControlNet sees, and by which its rows are known again. A pooled
    vector stays the same over all noise levels: the mean over the stages.
    """
    conds = torch.cat([cond for cond, _ in entries])
    base = conds.mean(0, keepdim=True)
    facts = dict(entries[0][1])
    if facts.get("pooled_output") is not None:
        firsts = grid.index[:, 0, 0].unique().tolist()  # as in learning, where the first layer's K decides
        facts["pooled_output"] = torch.stack([entries[i][1]["pooled_output"] for i in firsts]).mean(0)
    prompt = Variants(base, conds, grid)
    return prompt.entry(base, facts, prompt.apply)

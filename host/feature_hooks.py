"""Forward hooks that pick features out of one pass and end it as soon as nothing more is needed.

Hooks lie on the user's modules only inside ``captured`` and are gone after it, whatever happened in it.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ..carriers.errors import CarrierMismatch
from .feature_places import (
    ATTENTION,
    ROLES,
    Want,
    attentions,
    blocks_of,
    layers_with_attention,
    massive_channels,
    network_of,
)


class _Enough(BaseException):
    """Ends a pass; no Exception, so that nothing on the way takes it for an error."""


class Captured:
    """What one pass gave: ``found`` maps a name to [b, c, h, w], fp32; with ``graph`` as it is, for gradients."""

    def __init__(self, names: set[str], graph: bool = False):
        self.pending, self.found, self.graph = set(names), {}, graph

    def put(self, name: str, value: torch.Tensor | None) -> None:
        """Keeps it; ends a pass without gradient after the last one. None marks a place that keeps nothing."""
        if name not in self.pending:
            return
        self.pending.remove(name)
        if value is not None:
            self.found[name] = value if self.graph else value.detach().to(torch.float32, copy=True)
        if not self.pending and not self.graph:  # recomputing a block that was left midway would fail
            raise _Enough


@contextlib.contextmanager
def captured(model, wants: list[Want], size: tuple[int, int], graph: bool = False) -> Iterator[Captured]:
    """Runs its body, one call of a loaded MODEL with latents of ``size`` (rows, columns), until all is seen.

    With ``graph`` the pass goes on to its end, and what was seen leads gradients back.
    Q, K, V are those before the split into heads; of DiTs the picture's, after the norm of Q and K, before RoPE. Maps
    of words are not kept here (attention.py), only waited for.
    Raises: CarrierMismatch when the pass ended without them.
    """
    names = {w.name if not w.name.startswith(ATTENTION) else ATTENTION for w in wants}
    seen, unet = Captured(names, graph), hasattr(network_of(model), "input_blocks")
    blocks, layers = blocks_of(model), layers_with_attention(model)
    zeroed = massive_channels(model)
    to_map = None if unet else _of_tokens(size, int(network_of(model).patch_size))
    with contextlib.ExitStack() as stack:

        def hook(part: torch.nn.Module, run: Callable, before: bool = False) -> None:
            add = part.register_forward_pre_hook if before else part.register_forward_hook
            stack.callback(add(run, with_kwargs=True).remove)

        for want in wants:
            if want.name == "dift" and unet:
                hook(blocks[want.place], lambda _m, _a, _k, out: seen.put("dift", out))
            elif want.name == "dift":
                hook(
                    blocks[want.place],
                    lambda block, args, kwargs: seen.put("dift", to_map(_modulated(block, args, kwargs, zeroed))),
                    before=True,
                )
            elif want.name in ROLES:
                part, read = _reader(layers[want.place], want.name)
                own = to_map
                if unet:
                    own, note = _of_layer()
                    hook(
                        network_of(model).get_submodule(want.place.split(".transformer_blocks.")[0]), note, before=True
                    )
                hook(part, lambda _m, args, _k, out, n=want.name, read=read, own=own: seen.put(n, own(read(args, out))))
        if ATTENTION in names:
            looks = attentions(network_of(model), "attn2") if unet else blocks
            last = list(looks.values())[-1]
            hook(last, lambda _m, _a, _k, _out: seen.put(ATTENTION, None))
        try:
            yield seen
        except _Enough:
            pass
    if seen.pending:
        raise CarrierMismatch(
            f"The model never came to {', '.join(sorted(n.strip() for n in seen.pending))}: another node replaces that "
            "part of it. Connect the model as it is before that node."
        )


def _of_layer() -> tuple[Callable, Callable]:
    """Tokens [b, n, c] of a UNet's layer -> [b, c, h, w], and the hook that notes what the transformer around it is
    given."""
    given = []

    def note(_module, args, kwargs):
        given[:] = (args[0] if args else kwargs["x"]).shape

    def to_map(tokens):
        count, _, height, width = given
        if tokens.shape[:2] != (count, height * width):
            raise CarrierMismatch(
                f"A self-attention has {tokens.shape[1]} cells in {tokens.shape[0]} rows, and its layer {height} x "
                f"{width} in {count}; another node changes its size. Connect the model as it is before that node."
            )
        return tokens.mT.unflatten(-1, (height, width))

    return to_map, note


def _of_tokens(size: tuple[int, int], patch: int) -> Callable:
    """Tokens [b, n, c] of a DiT, the picture's last -> [b, c, h, w]."""
    rows, columns = (-(-side // patch) for side in size)
    return lambda tokens: tokens[:, -rows * columns :].mT.unflatten(-1, (rows, columns))


def _reader(layer: torch.nn.Module, role: str) -> tuple[torch.nn.Module, Callable]:
    """The module that gives a layer's Q, K or V, and what of its (arguments, output) that is, as [b, n, c]."""
    number = ROLES.index(role)
    if hasattr(layer, "to_q"):  # UNet
        return getattr(layer, ("to_q", "to_k", "to_v")[number]), lambda args, out: out
    if hasattr(layer, "x_block"):  # SD3
        attention = layer.x_block.attn
        if role == "value":
            return attention.qkv, lambda args, out: out.chunk(3, -1)[2]
        return getattr(attention, f"ln_{role[0]}"), lambda args, out: out.flatten(2)
    norm = layer.img_attn.norm if hasattr(layer, "img_attn") else layer.norm  # Flux: [b, heads, n, d]
    return norm, lambda args, out: (*out, args[2])[number].transpose(1, 2).flatten(2)


def _modulated(block: torch.nn.Module, args: tuple, kwargs: dict, zeroed: tuple[int, ...]) -> torch.Tensor:
    """The picture's tokens [b, n, c] as they enter a DiT block: channels zeroed, normalised, scaled and shifted
    (DiTF, arXiv 2505.18584)."""
    if hasattr(block, "x_block"):
        x = args[1]
        shift, scale = block.x_block.adaLN_modulation(kwargs["c"])[:, None].split(x.shape[-1], -1)[:2]
    else:
        x = kwargs["img"] if "img" in kwargs else args[0]
        own = block.img_mod if hasattr(block, "img_mod") else block.modulation
        modulation, _ = own(kwargs["vec"])
        shift, scale = modulation.shift, modulation.scale
    x = x.to(torch.float32, copy=True)
    x[..., list(zeroed)] = 0
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.float()) + shift.float()

"""Where features are read: names of a model's blocks and self-attentions, and the places that papers recommend.

UNet: DIFT (arXiv 2306.03881) reads the output of a decoder block, PDM (Where's Waldo, arXiv 2405.18025) the last
self-attention. Flux: DiTF (arXiv 2505.18584) reads the input of a block, normalised and modulated as that block does.
"""

from typing import NamedTuple

import torch

from ..carriers.errors import CarrierMismatch

ROLES = ("query", "key", "value")
PRESETS = ("DIFT", "PDM", "DIFT + PDM", "custom")
ATTENTION = "attention "
"""How names of maps of words begin."""
DIT = {"Flux": ("double_blocks", "single_blocks"), "SD3": ("joint_blocks",)}
"""Model class -> lists of its blocks, in order of execution."""
DITF_BLOCK = 28
"""Of 57 (19 + 38), DiTF's block for Flux."""
MASSIVE = (154, 1446)
"""Channels of Flux (3,072 wide) that DiTF sets to zero: their huge values hide all others."""


class Want(NamedTuple):
    """One map to extract."""

    name: str
    """``dift``, ``query``, ``key``, ``value`` or ``attention <word>``."""
    place: str
    """A block, a self-attention, or for attention ``all``."""
    timestep: float
    """0 clean .. 999 (flow models: 1000 times sigma)."""
    noise: bool = True
    """Whether the picture gets the noise of the timestep; else it is fed clean, as if it had it."""
    ensemble: int = 1
    """Noises over which the map is averaged."""
    note: str = ""


def network_of(model) -> torch.nn.Module:
    """The denoiser of a MODEL. Raises: CarrierMismatch for a family whose blocks are not known."""
    network = model.model.diffusion_model
    if not hasattr(network, "input_blocks") and type(model.model).__name__ not in DIT:
        raise CarrierMismatch(
            f"Features of {type(model.model).__name__} cannot be read; connect a model of SD1.5, SD2, SDXL, SD3 or "
            "Flux."
        )
    return network


def blocks_of(model) -> dict[str, torch.nn.Module]:
    """Name -> module at which a block's features pass, in order of execution.

    UNet: the last child of each block, because the host calls children and never the block itself.
    """
    network = network_of(model)
    if not hasattr(network, "input_blocks"):
        return {
            f"{p}.{i}": block for p in DIT[type(model.model).__name__] for i, block in enumerate(getattr(network, p))
        }
    found = {f"input_blocks.{i}": block[-1] for i, block in enumerate(network.input_blocks)}
    if getattr(network, "middle_block", None) is not None:
        found["middle_block"] = network.middle_block[-1]
    return found | {f"output_blocks.{i}": block[-1] for i, block in enumerate(network.output_blocks)}


def layers_with_attention(model) -> dict[str, torch.nn.Module]:
    """Name -> module of a model's self-attentions, in order of execution; of a DiT its blocks."""
    network = network_of(model)
    return attentions(network, "attn1") if hasattr(network, "input_blocks") else blocks_of(model)


def attentions(network: torch.nn.Module, kind: str) -> dict[str, torch.nn.Module]:
    """Name -> module of a UNet's ``attn1`` (self) or ``attn2`` (cross), in order of execution."""
    order = ("input_blocks", "middle_block", "output_blocks")
    found = [(name, part) for name, part in network.named_modules() if name.endswith("." + kind)]
    return dict(sorted(found, key=lambda pair: order.index(pair[0].split(".")[0])))


def checked(model, wants: list[Want]) -> None:
    """Raises: ValueError for nothing to do, a doubled map, a name that the model lacks, or a number out of range;
    CarrierMismatch as ``network_of``."""
    network_of(model)
    if not wants:
        raise ValueError("There is nothing to extract; name a block, a layer, or words of the prompt.")
    if len({w.name for w in wants}) < len(wants):
        raise ValueError("A map is asked for twice; extract it at two timesteps in two nodes.")
    for want in wants:
        if want.name.startswith(ATTENTION):
            kind, known = "attention", ["all"]
        elif want.name == "dift":
            kind, known = "block", blocks_of(model)
        else:
            kind, known = "self-attention", layers_with_attention(model)
        if want.place not in known:
            raise ValueError(f"The model has no {kind} {want.place!r}; it has: {', '.join(known)}.")
        if not 0 <= want.timestep <= 1000 or want.ensemble < 1:
            raise ValueError(
                f"Timestep {want.timestep:g} and ensemble {want.ensemble} are out of range; timesteps are 0 to 1000, "
                "an ensemble has at least one member."
            )


def massive_channels(model) -> tuple[int, ...]:
    """Channels to be zeroed before normalising; none for models that they were not found in."""
    network = network_of(model)
    return MASSIVE if type(model.model).__name__ == "Flux" and network.hidden_size == 3072 else ()


def block_for(model) -> tuple[str, str]:
    """The block for DIFT, and why it is that one."""
    names = list(blocks_of(model))
    outputs = [n for n in names if n.startswith("output_blocks.")]
    if len(outputs) == 12:
        return "output_blocks.5", "DIFT's for SD1 and SD2"
    if len(outputs) == 9 and type(model.model).__name__.startswith("SDXL"):
        return "output_blocks.2", "ours for SDXL: the scale that DIFT uses in SD2"
    if outputs:
        return outputs[max(1, round(len(outputs) / 2)) - 1], "half of the decoder, as DIFT's in SD1"
    if type(model.model).__name__ == "SD3":
        return names[len(names) // 2], "ours for SD3: the middle, normalised and modulated as in DiTF"
    name = names[min(len(names) - 1, round(DITF_BLOCK / 57 * len(names)))]
    if massive_channels(model) and len(names) == 57:
        return name, "DiTF's for Flux"
    return (
        name,
        f"the share of the depth of DiTF's block in Flux; {'' if massive_channels(model) else 'no '}channels zeroed",
    )


def preset(
    model, name: str, words: list[str], timestep=None, noise=None, ensemble=None, block="", layer=""
) -> list[Want]:
    """What a preset of ``PRESETS`` extracts; what is given by hand stands before the preset's own value.

    DIFT: timestep 261 (Flux 260) with noise, 8 noises. PDM as Per-Query uses it: queries and keys of the last
    self-attention, timestep 999 (flow models 1000), no noise. custom: the block, queries, keys and values of the layer,
    and the words that are given, as DIFT where nothing else is. Words go with the last pass of a preset.
    Raises: ValueError for a place that the preset does not read, and as ``checked`` does.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; known: {', '.join(PRESETS)}.")
    for kind, place, reader in (("block", block, "DIFT"), ("layer", layer, "PDM")):
        if place and reader not in name and name != "custom":
            raise ValueError(
                f"{kind} is {place!r}, and preset {name} reads no {kind}; choose DIFT + PDM or custom, or empty it."
            )
    flow = not hasattr(network_of(model), "input_blocks")

    def made(kind, place, t, noisy, count, note):
        noisy = noisy if noise is None else noise
        count = count if ensemble is None else ensemble
        return Want(kind, place, t if timestep is None else timestep, noisy, count if noisy else 1, note)

    dift, pdm, wants = (260 if flow else 261, True, 8), (1000 if flow else 999, False, 1), []
    if "DIFT" in name or name == "custom" and block:
        place, note = (block, "chosen by hand") if block else block_for(model)
        wants.append(made("dift", place, *dift, note))
    if "PDM" in name:
        place, note = (layer, "chosen by hand") if layer else (list(layers_with_attention(model))[-1], "the last one")
        wants += [made(role, place, *pdm, note) for role in ROLES[:2]]
    elif name == "custom" and layer:
        wants += [made(role, layer, *dift, "chosen by hand") for role in ROLES]
    law = pdm if "PDM" in name else dift
    wants += [made(ATTENTION + word, "all", *law, "mean over all layers and heads") for word in words]
    checked(model, wants)
    return wants

"""Low-rank weight deltas on the host's linear layers: learned beside them, applied by the host's own patching.

W' x = W x + alpha / rank * up(down(x)) (LoRA, arXiv 2106.09685). While it is learned the second term is added by
forward hooks, so that no merged weight exists and the base weights may have any type and place.
"""

import contextlib
import re
from collections.abc import Callable, Mapping

import comfy.lora
import torch
import torch.nn.functional as F

from ..carriers import delta
from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator, slot_rows

CHOICES = {
    "attention": r"(attn\w*|attention)\.",
    "cross attention": r"(attn2|cross_attn)\.",
    "keys and values": r"(attn2|cross_attn)\.(to_)?[kv](_proj)?$",
    "all linear": r"(blocks?|layers)\.\d+\.",
}
"""What the path of a chosen layer contains."""
SINGLE = r"single_blocks\.\d+\.linear[12]$"


def layers(model, choice: str, single_blocks: bool = False) -> dict[str, str]:
    """LoRA name -> module path in ``diffusion_model`` of the linear layers that ``choice`` means.

    ``attention``: query, key, value and output projections wherever a module is called attention: attn1 and attn2 of
    UNets, both streams of the double blocks of Flux, of the joint blocks of SD3. ``cross attention``: attn2 only.
    ``keys and values``: attn2's to_k and to_v (Custom Diffusion, arXiv 2212.04488). ``all linear``: every linear layer
    inside the blocks. ``single_blocks``: also linear1 and linear2 of Flux's single blocks.
    Names are those the stock LoRA loader knows, in diffusers' spelling where the host has it (SD1.5, SD2, SDXL).
    Raises: CarrierMismatch when the model has no such layer.
    """
    known: dict[str, str] = {}
    comfy.lora.model_lora_keys_unet(model.model, known)
    names = {path: name for name, path in known.items() if name.startswith("lora_unet_")}  # diffusers' come last
    wanted = re.compile(f"{CHOICES[choice]}|{SINGLE}" if single_blocks else CHOICES[choice])
    found = {}
    for path, module in model.model.diffusion_model.named_modules():
        name = names.get(f"diffusion_model.{path}.weight")
        if name and hasattr(module, "in_features") and wanted.search(path):
            found[name] = path
    if not found:
        raise CarrierMismatch(
            f"{type(model.model).__name__} has no layers of the kind {choice!r}; choose attention or all linear."
        )
    return found


def size(model, chosen: Mapping[str, str], rank: int) -> int:
    """Numbers in both factors of all layers."""
    modules = dict(model.model.diffusion_model.named_modules())
    return rank * sum(modules[path].in_features + modules[path].out_features for path in chosen.values())


def narrowest(model, chosen: Mapping[str, str]) -> int:
    """Smallest number of inputs of the layers."""
    modules = dict(model.model.diffusion_model.named_modules())
    return min(modules[path].in_features for path in chosen.values())


def start(model, chosen: Mapping[str, str], rank: int, seed: int, slot: int = 0) -> dict[str, torch.Tensor]:
    """First values of both factors per layer, fp32 on the model's device.

    down [rank, in] is normal with deviation 1 / rank (the ``gaussian`` of peft, as diffusers' trainers use it), up
    [out, rank] zero, so that the model starts as it is. With a ``slot`` down has that one's directions
    (``kernels.draws.slot_rows``), as long as the others are on average.
    Raises: ValueError when the narrowest layer has no room for the rank in a slot.
    """
    values, modules = {}, dict(model.model.diffusion_model.named_modules())
    widths = {modules[path].in_features for path in chosen.values()} if slot else ()
    rows = {width: slot_rows(width, rank, slot) * width**0.5 for width in sorted(widths)}
    for name, path in chosen.items():
        module = modules[path]
        draw = generator(seed, 0, f"start {name}")
        down = rows[module.in_features] if slot else torch.randn(rank, module.in_features, generator=draw)
        values[name + delta.DOWN] = (down / rank).to(model.load_device)
        values[name + delta.UP] = torch.zeros(module.out_features, rank, device=model.load_device)
    return values


@contextlib.contextmanager
def beside(model, chosen: Mapping[str, str], factors: Callable[[], Mapping[str, torch.Tensor]]):
    """Adds up(down(x)) * alpha / rank to the output of each chosen layer while the context is open.

    ``factors`` is asked at every call; layers it does not hold stay as they are, and alpha is the rank where it is
    missing. Gradients flow into the factors, and through them into x; the product is taken in the type of x.
    """
    modules = dict(model.model.diffusion_model.named_modules())

    def added(name):
        def hook(module, args, out):
            now = factors()
            if name + delta.UP not in now:
                return None
            x, down = args[0], now[name + delta.DOWN]
            size = float(now[name + delta.ALPHA]) / len(down) if name + delta.ALPHA in now else 1.0
            low = F.linear(x, down.to(x))
            return out + size * F.linear(low, now[name + delta.UP].to(x)).to(out.dtype)

        return hook

    handles = []
    try:
        for name, path in chosen.items():
            handles.append(modules[path].register_forward_hook(added(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def places(model, concept: Concept) -> dict[str, str]:
    """LoRA name -> module path in ``diffusion_model`` of the layers that a delta changes.

    Raises: CarrierMismatch for a concept that is not a delta, or one of another model, naming the first layer.
    """
    if concept.kind != "delta":
        raise CarrierMismatch(
            f"Concept <{concept.name}> is made of {concept.kind} and changes no weights; connect it to Concept Prompt."
        )
    weights = delta.weights(concept.tensors)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    modules, found = dict(model.model.named_modules()), {}
    for layer in delta.layers(weights):
        path = str(known.get(layer)).removesuffix(".weight")
        module, found[layer] = modules.get(path), path.removeprefix("diffusion_model.")
        here = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        wanted = (len(weights[layer + delta.UP]), weights[layer + delta.DOWN].shape[1])
        if here != wanted:
            learned = concept.info.get("architecture", "an unknown model")
            raise CarrierMismatch(
                f"Concept <{concept.name}> was learned on {learned} and changes {layer} of {wanted[0]} x {wanted[1]}; "
                f"{type(model.model.model_config).__name__} has "
                + (f"{here[0]} x {here[1]} there" if here[0] else "no such layer")
                + "; connect the model it was learned on."
            )
    return found


def apply(model, concept: Concept, strength: float):
    """A clone of MODEL with the delta on it, through the host's weight patches; strength 0 is the model itself.

    Raises: CarrierMismatch as ``places`` does.
    """
    places(model, concept)
    clone = model.clone()
    if strength:
        known = comfy.lora.model_lora_keys_unet(model.model, {})
        clone.add_patches(comfy.lora.load_lora(delta.weights(concept.tensors), known), strength)
    return clone

"""Weights whole and ordinary on the device that learns, and the host's patchers as they were afterwards.

DynamicVRAM (ModelPatcherDynamic) computes with casts made in inference mode, in memory that it takes back at will; a
backward pass needs weights that stay.
"""

import contextlib

import comfy.model_management
import torch

STREAMED = (
    "Model and text encoder are not loaded whole, and this host streams the rest through memory that learning still "
    "needs. Use smaller ones (fp8 weights, another text encoder), leave --novram out, or start ComfyUI with "
    "--disable-async-offload."
)
ACTIVATIONS = 40
"""What a training step keeps for its backward pass, over the host's estimate of what a sampling step needs.

By ``bench full_size``: SDXL 22 (LoRA), 31 (tokens) and 24 (refinement), Flux 18, 40 and 28."""
RECOMPUTED = 0.1
"""Part of it that remains when blocks are recomputed; measured: 0.06 to 0.08."""


@contextlib.contextmanager
def static(patcher):
    """A plain ModelPatcher on the module of a dynamic one, from which the module's own weights are kept safe; any
    other patcher is given as it is.

    The host's delegate (get_non_dynamic_delegate) has a second module, read from the file again, so that nothing done
    to the first would count. Layers lose their place in the dynamic memory, and get it back without its contents.
    """
    if not getattr(patcher, "is_dynamic", bool)():
        yield patcher
        return
    management, model = comfy.model_management, patcher.model
    with torch.inference_mode():  # outside of it the host would put back copies
        for loaded in [patcher, *(x.model for x in management.current_loaded_models if patcher.is_clone(x.model))]:
            loaded.detach()
    plain = patcher.clone(disable_dynamic=True, model_override=patcher.get_clone_model_override())
    patched = model.current_weight_patches_uuid
    kept = [(m, dict(m._parameters), dict(m._buffers), m.__dict__.pop("_v", None)) for m in model.modules()]
    try:
        yield plain
    finally:
        management.current_loaded_models[:] = [x for x in management.current_loaded_models if x.model is not plain]
        plain.unpatch_model()
        plain.detach(unpatch_all=False)
        for module, parameters, buffers, place in kept:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            if place is not None:
                module._v, module._v_signature = place, None
        model.current_weight_patches_uuid = patched
        management.soft_empty_cache()


def copied(patcher, device: torch.device | None) -> None:
    """Gives a module ordinary copies of its weights, on ``device`` or where they are, in the types they are meant to
    have there (archive_model_dtypes)."""

    def copy(module, name, tensor):
        if tensor.is_meta:  # missing in the file; the host fills these late
            tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # quantised ones stay as they are
        dtype = getattr(module, f"{name}_comfy_model_dtype", None) if plain else None
        return tensor.clone().to(device=device, dtype=dtype)

    with torch.inference_mode(False), torch.no_grad():
        for module in patcher.model.modules():
            for name, tensor in list(module._parameters.items()):
                if tensor is not None:
                    module._parameters[name] = torch.nn.Parameter(copy(module, name, tensor), requires_grad=False)
            for name, tensor in list(module._buffers.items()):
                if tensor is not None:
                    module._buffers[name] = copy(module, name, tensor)


def missing(patchers, device: torch.device) -> float:
    """Bytes that are still to be loaded on a device."""
    return sum(p.model_size() - p.loaded_size() for p in patchers if p.load_device == device)


def room(*patchers) -> float:
    """Bytes that are free on the first one's device once all of these are loaded."""
    device = patchers[0].load_device
    return comfy.model_management.get_free_memory(device) - missing(patchers, device)


def make_room(patchers, memory: float) -> None:
    """Unloads other models while theirs can still be moved, which is in inference mode."""
    management = comfy.model_management
    ours = [x for x in management.current_loaded_models if any(p.is_clone(x.model) for p in patchers)]
    for device in {p.load_device for p in patchers} - {torch.device("cpu")}:
        with torch.inference_mode():
            needed = 1.1 * missing(patchers, device) + memory + management.minimum_inference_memory()
            management.free_memory(needed, device, keep_loaded=ours)


def fits(patchers) -> bool:
    """Whether the devices can hold the weights whole, now that ``make_room`` was there; other programs may hold a part.

    Raises: RuntimeError when they cannot and must.
    """
    management, short = comfy.model_management, []
    for device in {p.load_device for p in patchers if not management.is_device_cpu(p.load_device)}:
        lacking = missing(patchers, device)
        if lacking and lacking + management.minimum_inference_memory() > management.get_free_memory(device):
            short.append(device)
    if any(reuses(device) for device in short):
        raise RuntimeError(STREAMED)
    return not short


def reuses(device: torch.device) -> bool:
    """Whether the host streams weights through one buffer (ops.py, cast_bias_weight)."""
    management = comfy.model_management
    return not management.is_device_cpu(device) and management.NUM_STREAMS > 0 and not management.args.cuda_malloc


def memory_of(model, data, batch: int) -> float:
    """Rough bytes of activations of one training step on a ConceptSet without checkpointing."""
    largest = max((latent.shape for latent in data.latents), key=lambda s: s[-1] * s[-2])
    # the module's own estimate: a patcher under DynamicVRAM adds 1 GiB to it
    return ACTIVATIONS * model.model.memory_required(input_shape=[batch, *largest])


def planned(checkpointing: str, memory: float, *patchers) -> tuple[bool, float]:
    """Whether blocks are recomputed (``on``, ``off``, ``auto``), and the bytes to leave room for then.

    ``memory``: as ``memory_of`` gives it; ``patchers``: what will be loaded, the model first.
    """
    recompute = checkpointing == "on"
    if checkpointing == "auto" and not comfy.model_management.is_device_cpu(patchers[0].load_device):
        recompute = memory > 0.8 * room(*patchers)
    return recompute, memory * RECOMPUTED if recompute else memory


@contextlib.contextmanager
def advised(text: str):
    """Raises the host's OOM with ``text``, which says what to lower, in the place of what it says itself."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise type(error)(text) from error

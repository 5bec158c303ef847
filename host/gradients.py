"""Exact gradients through the host's models, inside its inference mode, and nothing left behind.

Nodes run under ``torch.inference_mode`` (execution.py), so every weight and latent handed over is an inference tensor;
CLIP, T5 and Flux add residuals in place on tensors that a norm has saved (clip_model.py, t5.py, flux/layers.py); and
``transformer_options`` is one dict that the forward rewrites (openaimodel.py), so a recompute would see the last block.
This module is the one place that deals with all three; how the weights get to the device is loading.py's.
"""

import contextlib

import comfy.model_management
import torch
from torch.utils.checkpoint import checkpoint

from ..carriers.errors import CarrierMismatch
from ..kernels.precision import fp32_products
from .loading import STREAMED, copied, fits, make_room, reuses, static

NORMS = ("LayerNorm", "T5LayerNorm", "RMSNorm")
OF_HEADS = ("query_norm", "key_norm", "q_norm", "k_norm", "norm_q", "norm_k", "ln_q", "ln_k")
"""What models call norms of queries and keys."""
UNSPOILT = ("BasicTransformerBlock",)
"""Blocks that add to new tensors (attention.py); SDXL has 210 norms in them, and every copy is a call."""
AROUND = "concept_around"
"""Key in ``transformer_options``: functions (block) -> context manager, open while a block is computed once more."""
BLOCKS = (
    *("BasicTransformerBlock", "ResBlock", "DoubleStreamBlock", "SingleStreamBlock", "JointBlock"),
    *("CLIPLayer", "T5Block"),  # encoders compute in fp32, so each layer would keep a copy of its weights
)


def needs_thaw(tensor: torch.Tensor) -> bool:
    """Whether autograd refuses this tensor: made in inference mode, or moved outside of it afterwards."""
    try:
        tensor._version  # noqa: B018
        return tensor.is_inference()
    except RuntimeError:
        return True


def thaw(patcher) -> None:
    """Replaces inference tensors in a ModelPatcher's module by ordinary ones of equal value, one at a time.

    The Parameter objects change, their values do not; ``.data`` is never touched because that would leave a tensor
    that not even sampling accepts.
    """
    if hasattr(patcher, "unpin_all_weights"):
        patcher.unpin_all_weights()  # pinned memory is registered by address
    with torch.inference_mode(False), torch.no_grad():
        for module in patcher.model.modules():
            for name, tensor in list(module._parameters.items()):
                if tensor is not None and needs_thaw(tensor):
                    module._parameters[name] = torch.nn.Parameter(tensor.clone(), tensor.requires_grad)
            for name, tensor in list(module._buffers.items()):
                if tensor is not None and needs_thaw(tensor):
                    module._buffers[name] = tensor.clone()
            hook = getattr(module.__dict__.get("forward"), "__self__", None)
            adapter = getattr(hook, "adapter", None)  # a LoRA beside the layer (weight_adapter/bypass.py)
            if isinstance(getattr(adapter, "weights", None), (tuple, list)):
                adapter.weights = tuple(
                    w.clone() if torch.is_tensor(w) and needs_thaw(w) else w for w in adapter.weights
                )


def as_made(patcher) -> None:
    """Makes quantised weights inference tensors again, as the host made them: within inference mode a tensor subclass
    that ``thaw`` left ordinary cannot be wrapped as a Parameter, so that no later patch or move would succeed."""
    with torch.inference_mode():
        for module in patcher.model.modules():
            for name, tensor in list(module._parameters.items()):
                if type(tensor) not in (torch.Tensor, torch.nn.Parameter, type(None)) and not tensor.is_inference():
                    module._parameters[name] = torch.nn.Parameter(tensor.clone(), tensor.requires_grad)


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that autograd accepts."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


@contextlib.contextmanager
def safe_residuals(*modules: torch.nn.Module):
    """Gives every norm its own copy of its input, so that a later in-place residual cannot spoil the gradient.

    Those of queries and keys stand in no residual stream, and some blocks leave theirs as it is.
    """

    def own_input(module, args):
        return (args[0].clone(), *args[1:]) if torch.is_grad_enabled() else None

    handles = [
        part.register_forward_pre_hook(own_input)
        for module in modules
        for block in module.modules()
        if type(block).__name__ not in UNSPOILT
        for name, part in block.named_children()
        if type(part).__name__ in NORMS and name not in OF_HEADS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_given(copy: torch.Tensor) -> bool:
    return not copy.requires_grad and copy._version == 0


def _recomputed(block):
    """A block's forward under checkpointing: frozen options and inputs of its own, so that a recompute sees what it
    saw, and within whatever ``AROUND`` asks for, because what was on the block for one call is gone by then."""
    forward = block.forward

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        options = {k: dict(v) for k, v in kwargs.items() if k == "transformer_options" and isinstance(v, dict)}
        names = [k for k, v in kwargs.items() if torch.is_tensor(v)]
        runs = []

        def inner(*originals):
            tensors = [t.clone() if torch.is_tensor(t) and t.is_floating_point() else t for t in originals]
            given = dict(zip(names, tensors[len(args) :], strict=True))
            fresh = {k: dict(v) for k, v in options.items()}
            with contextlib.ExitStack() as stack:
                for around in fresh.get("transformer_options", {}).get(AROUND, ()) if runs else ():
                    stack.enter_context(around(block))
                runs.append(True)
                out = forward(*tensors[: len(args)], **{**kwargs, **fresh, **given})
            if not isinstance(out, tuple):
                return out
            # T5 hands its bias from block to block: the one there is, or each block would keep a copy
            same = {id(a): b for a, b in zip(tensors, originals, strict=True) if a is not b and _as_given(a)}
            return tuple(same.get(id(part), part) for part in out)

        given = (*args, *(kwargs[k] for k in names))
        return checkpoint(inner, *given, use_reentrant=False, preserve_rng_state=False)  # no dropout in eval

    return run


@contextlib.contextmanager
def checkpointed(*modules: torch.nn.Module):
    """Recomputes the blocks of ``modules`` in the backward pass instead of keeping their activations.

    Needs ``safe_residuals`` around it. Gradients equal those without it.
    """
    blocks = [part for module in modules for part in module.modules() if type(part).__name__ in BLOCKS]
    kept = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = _recomputed(block)
    try:
        yield
    finally:
        for block, forward in zip(blocks, kept, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextlib.contextmanager
def quick_products(*modules: torch.nn.Module):
    """Lets CUDA multiply fp32 as TF32 if all matrices of ``modules`` have 16 bits or fewer, which that holds exactly.

    Text encoders compute in fp32 whatever their weights are (sd1_clip.py), and without tensor cores two prompts take T5
    as long as a pass takes Flux.
    """
    matrices = (part.weight for module in modules for part in module.modules() if isinstance(part, torch.nn.Linear))
    small = all(weight is None or weight.element_size() <= 2 for weight in matrices)
    with fp32_products("high") if small else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def training(*patchers, checkpointing: bool = False, memory: float = 0):
    """Autograd for the body of a node: ``with training(model, clip.patcher): ...``.

    Loads the patchers whole where the device holds them, makes their weights usable for autograd, and freezes them.
    ``memory``: bytes of activations to leave room for. Hooks, flags, dynamic patchers and the host's ``in_training``
    are put back on the way out, also after an interrupt (a BaseException in newer hosts).
    Raises: RuntimeError when weights would have to be streamed in through memory that the backward pass needs;
    CarrierMismatch where another node's patch writes over what the backward pass needs.
    """
    management = comfy.model_management
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        plain = [stack.enter_context(static(patcher)) for patcher in patchers]
        make_room(plain, memory)
        whole = fits(plain)
        for patcher, given in zip(plain, patchers, strict=True):
            if patcher is given:
                stack.callback(as_made, patcher)
                thaw(patcher)  # before any move: an inference tensor that was moved is lost
            else:
                copied(patcher, patcher.load_device if whole else None)
        management.load_models_gpu(plain, memory_required=memory, force_full_load=whole)
        if any(p.model.model_lowvram and reuses(p.load_device) for p in plain):
            raise RuntimeError(STREAMED)
        modules = [patcher.model for patcher in patchers]
        learned = [p for patcher in plain for p in _frozen(patcher)]
        stack.callback(lambda: [p.requires_grad_(True) for p in learned])
        stack.enter_context(safe_residuals(*modules))
        if all(patcher.load_device.type == "cuda" for patcher in plain):
            stack.enter_context(quick_products(*modules))
        if checkpointing:
            stack.enter_context(checkpointed(*modules))
        if hasattr(management, "in_training"):
            stack.callback(setattr, management, "in_training", management.in_training)
            management.in_training = True  # chooses rope and norm kernels that differentiate
        try:
            yield
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise CarrierMismatch(
                "A node between the loader and this one writes over values that the gradient needs, as FreeU_V2 does; "
                "connect the model as it is before that node."
            ) from error


def _frozen(patcher) -> list[torch.nn.Parameter]:
    """Freezes a loaded patcher's weights; returns those that were not frozen before."""
    thaw(patcher)  # loading writes LoRA-patched weights as inference tensors
    open_ = [p for p in patcher.model.parameters() if p.requires_grad]
    for parameter in open_:
        parameter.requires_grad_(False)
    return open_


def loss_scale(model) -> float:
    """``scale`` of ``fit`` for what a model computes in."""
    return 4096.0 if model.model.get_dtype_inference() == torch.float16 else 1.0

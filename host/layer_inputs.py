"""What linear layers read while a model samples, kept as X X^T, whose size does not depend on how much there is."""

import contextlib
from collections import deque
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.patcher_extension
import torch

from ..carriers.errors import CarrierMismatch

RECENT = 8
"""Inputs among which a layer's own is looked for; a UNet's text comes again after four others."""


class Inputs:
    """X X^T of what linear layers read from a prompt while a model samples; layers that read the same share one."""

    def __init__(self, paths: Sequence[str], shared: bool):
        """``paths``: in ``diffusion_model``; ``shared``: layers that once read the same tensor do so in every pass."""
        self.paths, self.shared = list(paths), shared
        self.first: dict[str, str] = {}
        self.held: dict[str, torch.Tensor] = {}
        self.recent: deque = deque(maxlen=RECENT)
        self.prompts: list[bool] = []

    def gram(self, path: str) -> torch.Tensor:
        """[k, k] of one layer, fp32 on the CPU once the context of ``of`` is closed.

        Raises: CarrierMismatch for a layer that was not seen.
        """
        if path not in self.first:
            raise CarrierMismatch(
                f"The model was sampled without its layer {path} being seen, as when it is compiled; connect the model "
                "as it is before Torch Compile and the like."
            )
        return self.held[self.first[path]]

    @contextlib.contextmanager
    def of(self, model):
        """A clone of MODEL that is watched while the context is open."""
        clone, modules = model.clone(), dict(model.model.diffusion_model.named_modules())
        kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
        clone.add_wrapper_with_key(kind, "concept-carriers", self._pass)
        handles = [modules[path].register_forward_pre_hook(self._seen(path)) for path in self.paths]
        try:
            yield clone
        finally:
            for handle in handles:
                handle.remove()
            self.held = {path: gram.cpu() for path, gram in self.held.items()}

    def _pass(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        """An APPLY_MODEL wrapper: which rows of the batch are of the prompt, not of the negative one."""
        options = transformer_options or {}
        each = len(x) // len(options["cond_or_uncond"])
        self.prompts = [part == 0 for part in options["cond_or_uncond"] for _ in range(each)]
        try:
            return executor(x, t, c_concat, c_crossattn, control, options, **more)
        finally:
            self.recent.clear()

    def _seen(self, path: str) -> Callable:
        def hook(module, args):
            x = args[0]
            if path not in self.first:
                same = (other for other, seen in self.recent if seen is x)
                self.first[path] = next(same, path) if self.shared else path
                self.recent.append((self.first[path], x))
            if self.first[path] != path:
                return
            rows = x[torch.tensor(self.prompts, device=x.device)] if len(x) == len(self.prompts) else x
            rows = rows.flatten(0, -2).float()
            own = rows.T @ rows
            if path not in self.held:
                self.held[path] = torch.zeros_like(own, device=_place(own.device))
            self.held[path] += own.to(self.held[path].device)

        return hook


def _place(device: torch.device) -> torch.device:
    """Where there is room beside what sampling needs; by count attention takes 1.7 GB for SDXL, 2.9 for Flux."""
    management = comfy.model_management
    full = management.get_free_memory(device) < management.minimum_inference_memory()
    return torch.device("cpu") if full else device

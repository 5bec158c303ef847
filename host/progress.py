"""What the user sees while a node works: bar, preview, interrupt (comfy/utils.py, latent_preview.py)."""

import sys

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from comfy_execution.utils import get_executing_context

from .matching import picture_of, side_by_side


class Progress:
    """A progress bar with live previews; stops the run when the user asks for it."""

    def __init__(self, total: int, patcher=None):
        self.total, self.bar = total, comfy.utils.ProgressBar(total)
        self.previewer = patcher and _previewer(patcher)

    def show(self, done: int, latent: torch.Tensor | None = None, beside: torch.Tensor | None = None) -> None:
        """Advances to ``done``, with a picture of a model-space latent [1, c, h, w] where previews are on, and another
        one [h, w, 3] at its right.

        Raises: the host's InterruptProcessingException.
        """
        picture = None
        if latent is not None and self.previewer is not None:
            picture = self.previewer.decode_latent_to_preview_image("JPEG", latent.detach())
            if beside is not None:
                kind, left, *rest = picture
                size = max(left.size, tuple(beside.shape[1::-1]))  # colour estimates have a pixel per latent
                sides = (left.convert("RGB").resize(size), picture_of(beside, size[::-1]))
                picture = (kind, side_by_side(*sides, gap=4)[0], *rest)
        self.bar.update_absolute(done, self.total, picture)
        comfy.model_management.throw_exception_if_processing_interrupted()


def say(text: str) -> None:
    """A line of text on the node that runs; nothing outside a running workflow. The page reads HTML, so a concept's
    <name> stands without its brackets."""
    context, server = get_executing_context(), getattr(sys.modules.get("server"), "PromptServer", None)
    server = getattr(server, "instance", None)
    if context is not None and server is not None:
        line = text.replace("<", "").replace(">", "")
        server.send_progress_text(line, context.node_id, server.client_id)  # others have nodes of this number too


def _previewer(patcher):
    """The user's choice of preview; the plain colour estimate where sampling previews are off, which is the default."""
    form = patcher.model.latent_format
    chosen = latent_preview.get_previewer(patcher.load_device, form)
    if chosen is None and form.latent_rgb_factors is not None:
        return latent_preview.Latent2RGBPreviewer(
            form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
        )
    return chosen

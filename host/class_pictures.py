"""Pictures of a concept's class, drawn by the model before it learns: what DreamBooth's prior term holds on to."""

import comfy.sample
import torch

from ..kernels.draws import generator
from .concept_set import ConceptSet
from .progress import Progress

STEPS, SAMPLER, SCHEDULER = 25, "dpmpp_2m", "simple"


def guidance(model) -> float:
    """Classifier-free guidance: 7.5, and none for Flux, which has it distilled."""
    return 1.0 if type(model.model.model_config).__name__.startswith("Flux") else 7.5


def draw_class(model, clip, text: str, count: int, like: torch.Tensor, seed: int, batch: int = 1) -> ConceptSet:
    """``count`` pictures of ``text`` with the host's own sampler, as latents [c, h, w] of the shape of ``like``.

    The same seed gives the same pictures. Shows progress; raises the host's interrupt.
    """
    with torch.inference_mode():
        said, nothing = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (text, ""))
        noises = [torch.randn(like.shape, generator=generator(seed, i, "class")) for i in range(count)]
        progress, latents = Progress(count * STEPS, model), []
        for first in range(0, count, batch):
            noise = torch.stack(noises[first : first + batch])
            steps = first * STEPS, len(noise)

            def show(step, x0, x, total, steps=steps):
                progress.show(steps[0] + (step + 1) * steps[1])

            made = comfy.sample.sample(
                model,
                noise,
                STEPS,
                guidance(model),
                SAMPLER,
                SCHEDULER,
                said,
                nothing,
                torch.zeros_like(noise),
                callback=show,
                disable_pbar=True,
                seed=seed,
            )
            latents += list(made.float().cpu())
    with torch.inference_mode(False):
        return ConceptSet(tuple(t.clone() for t in latents), (None,) * count, ((text,),) * count, (False,) * count)

"""LoRAs that were learned alone made one, which draws each of their concepts as its own did.

Gradient fusion (Mix-of-Show, arXiv 2305.18292): every LoRA draws its concept, and what each layer reads meanwhile
decides how the changes are weighed (kernels/fusion.py). With LoRAs of keys and values and prompts to keep it solves in
the least squares what the closed-form merge of Custom Diffusion (arXiv 2212.04488) does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..carriers import delta
from ..carriers.concept import Concept, check_name
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator
from ..kernels.fusion import change, fused
from . import lora
from .class_pictures import SAMPLER, SCHEDULER, guidance
from .layer_inputs import Inputs
from .loading import advised
from .progress import Progress, say
from .query import sampled
from .session import fingerprint
from .text import as_tokens, encoders, words_of


@dataclass(frozen=True)
class FusionSettings:
    """How LoRAs are fused. Raises: CarrierError for the name, ValueError for prompts without ``{}``."""

    name: str
    prompts: tuple[str, ...]
    """With ``{}`` for each concept's own words."""
    keep: tuple[str, ...] = ()
    """Prompts that are to be drawn as without any LoRA."""
    steps: int = 20
    seed: int = 0

    def __post_init__(self):
        check_name(self.name)
        if not self.prompts or any("{}" not in text for text in self.prompts):
            lost = next((text for text in self.prompts if "{}" not in text), "")
            raise ValueError(
                f"A line of prompts must hold {{}} for the concept's own words, and {lost!r} does not; for example: "
                "a photo of {}. Prompts without the concepts belong to keep."
            )


def named(concept: Concept) -> str:
    """What stands for a concept in the prompts it was learned with, ``<name>`` for its rows.

    Raises: CarrierMismatch when nobody can tell.
    """
    rows = as_tokens(concept)
    text = words_of(concept.info.get("token_text", ""), rows is not None)
    if not text or ("{}" in text and not rows):
        raise CarrierMismatch(
            f"Concept <{concept.name}> does not say by which words it was learned, so it cannot be drawn; connect what "
            "Learn Concept LoRA gave, or the file that Save Concept made of it."
        )
    return text.replace("{}", f"<{concept.name}>")


def fuse(
    model, clip, concepts: Sequence[Concept], latent: dict, settings: FusionSettings
) -> tuple[Concept, torch.Tensor, str]:
    """A delta that holds all of ``concepts``; what each LoRA drew, VAE latents [n, c, h, w]; a report.

    ``latent``: LATENT as large as the pictures. Shows progress. Raises: CarrierMismatch for concepts that are no deltas
    or of another model, ValueError for fewer than two or equal names, the host's interrupt and OOM with advice.
    """
    names = [c.name for c in concepts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"Fusing takes two or more concepts of different names, and got {', '.join(names) or 'none'}; connect "
            "more, or give one another name where it is loaded or learned."
        )
    places = [lora.places(model, c) for c in concepts]
    paths = {path: layer for found in reversed(places) for layer, path in found.items()}
    said = [[text.replace("{}", words) for text in settings.prompts] for words in map(named, concepts)]
    runs = [*zip(concepts, said, strict=True), *([(None, settings.keep)] if settings.keep else [])]
    progress = Progress(settings.steps * sum(len(texts) for _, texts in runs), model)
    advice = "Out of memory while the LoRAs draw: make latent_image smaller, or its batch 1."
    seen, drawn = [], []
    with advised(advice):
        for concept, texts in runs:
            inputs = Inputs(paths, _one_text(model, concept))
            say(f"drawing {f'<{concept.name}>' if concept else 'what is kept'}")
            with inputs.of(model) as watched:
                for number, text in enumerate(texts):
                    show = partial(_shown, progress, settings.steps * len(drawn))
                    seed = int(torch.randint(2**62, (), generator=generator(settings.seed, number, "fusion")))
                    drawn.append(_draw(watched, clip, concept, text, latent, seed, settings.steps, show))
                    if not bool(drawn[-1].isfinite().all()):
                        whose = f"the LoRA of <{concept.name}>" if concept else "the model"
                        raise ValueError(
                            f"What {whose} draws of {text!r} is not finite, so nothing can be fused by it; try that "
                            "LoRA alone with Apply Concept, or start ComfyUI with --force-fp32."
                        )
            seen.append(inputs)
    made, off, added = _solved(concepts, places, paths, seen)
    info = {
        "fused": names,
        "prompts": list(settings.prompts),
        "keep": list(settings.keep),
        "sampling_steps": settings.steps,
        "seed": settings.seed,
        "off": off,
        "off_if_added": added,
        "architecture": type(model.model.model_config).__name__,
        "base": fingerprint(model),
        "clip": [e.key for e in encoders(clip)],
    }
    whole = Concept(settings.name, "delta", made, info)
    lines = [f"<{settings.name}>: {', '.join(names)} fused"] + [
        f"<{name}>: what its LoRA does to its own pictures is off by {a:.0%}; by {b:.0%} if the LoRAs were only added"
        for name, a, b in zip(names, off, added, strict=True)
    ]
    return whole, torch.cat(drawn).cpu(), "\n".join(lines)


def _one_text(model, concept: Concept | None) -> bool:
    """Whether all layers read the same text: no rows per layer or role, and no other node that hands out texts."""
    rows = as_tokens(concept) if concept else None
    patches = model.model_options.get("transformer_options", {}).get("patches", {})
    return not patches.get("attn2_patch") and (not rows or all(v.shape[1:3] == (1, 1) for v in rows.tensors.values()))


def _shown(progress: Progress, before: int, done: int, estimate: torch.Tensor) -> None:
    progress.show(before + done, estimate)


def _draw(model, clip, concept, text: str, latent: dict, seed: int, steps: int, show: Callable) -> torch.Tensor:
    """What the host's sampler makes of a prompt with the concept's LoRA."""
    return sampled(
        model,
        clip,
        concept,
        text,
        None,
        latent,
        seed=seed,
        steps=steps,
        cfg=guidance(model),
        sampler=SAMPLER,
        scheduler=SCHEDULER,
        denoise=1.0,
        show=show,
    )


def _solved(
    concepts: Sequence[Concept], places: list[dict[str, str]], paths: dict[str, str], seen: list[Inputs]
) -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Factors of the fused delta; per concept how far its LoRA's effect on its own inputs is off then, and if the LoRAs
    were added, as a share of that effect's length."""
    made, own = {}, [{path: layer for layer, path in found.items()} for found in places]
    off, added, alone = ([0.0] * len(concepts) for _ in range(3))
    for path, layer in paths.items():
        there = [i for i, found in enumerate(own) if path in found]
        grams = [inputs.gram(path) for inputs in seen]
        downs = [concepts[i].tensors[own[i][path] + delta.DOWN] for i in there]
        ups = [_scaled_up(concepts[i].tensors, own[i][path]) for i in there]
        rest = [gram for i, gram in enumerate(grams) if i not in there]
        new = fused(downs, [*(grams[i] for i in there), *rest])
        for i, gram in enumerate(grams[: len(concepts)]):
            mine = there.index(i) if i in there else None
            minus = [] if mine is None else [-ups[mine]]
            before = [] if mine is None else [downs[mine]]
            off[i] += change([*ups, *minus], [*new, *before], gram)
            added[i] += change([*ups, *minus], [*downs, *before], gram)
            alone[i] += change([ups[mine]], before, gram) if minus else 0.0
        made[layer + delta.DOWN] = torch.cat(new)
        made[layer + delta.UP] = torch.cat(ups, 1)
        made[layer + delta.ALPHA] = torch.tensor(float(sum(map(len, new))))
    off, added = ([(a / max(b, 1e-30)) ** 0.5 for a, b in zip(v, alone, strict=True)] for v in (off, added))
    return made, off, added


def _scaled_up(tensors, layer: str) -> torch.Tensor:
    """The up factor that holds alpha / rank too."""
    return tensors[layer + delta.UP] * (tensors[layer + delta.ALPHA] / len(tensors[layer + delta.DOWN]))

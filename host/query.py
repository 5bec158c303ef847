"""A concept refined for one picture to be made: its prompt, seed and sampler settings in, pictures and a report out."""

from collections.abc import Callable
from dataclasses import replace

import comfy.sample
import torch

from ..carriers.concept import Concept
from ..carriers.features import Features
from . import lora
from .concept_set import ConceptSet, fitted, make_set
from .matching import Matches, joined, points
from .progress import Progress
from .prompt import encode_prompt
from .query_points import TooFew, read_before, same_pictures
from .refine import Refined, RefineSession, RefineSettings, check, refine

SHOWN = 40
"""Lines in the picture of the matches."""
NOT_REFINED = "Concept <{}> was not refined. {}"


def begun(model, latent: dict) -> torch.Tensor:
    """The latent that the host's KSampler begins with, as large as what it makes (nodes.py)."""
    ratios = {k: latent[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def sampled(
    model,
    clip,
    concept: Concept | None,
    text: str,
    negative,
    latent: dict,
    *,
    seed,
    steps,
    cfg,
    sampler,
    scheduler,
    denoise,
    show: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The VAE latents [b, c, h, w] that the host's KSampler makes of a prompt with the concept (nodes.py).

    ``negative``: CONDITIONING, or None for the empty prompt; ``show``: (steps done, estimate), by default a bar of its
    own. Raises: the host's interrupt.
    """
    positive = encode_prompt(clip, text, [(concept, 1.0)] if concept else [])
    image, show = begun(model, latent), show or Progress(steps, model).show
    if negative is None:
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    if concept and concept.kind == "delta":
        model = lora.apply(model, concept, 1.0)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive,
        negative,
        image,
        denoise=denoise,
        noise_mask=latent.get("noise_mask"),
        callback=lambda step, x0, x, total: show(step + 1, x0),
        disable_pbar=True,
        seed=seed,
    )


def single(latent: dict) -> None:
    """Raises: ValueError for a batch of several pictures."""
    if len(latent["samples"]) != 1:
        raise ValueError(
            f"The latent is a batch of {len(latent['samples'])}, and a concept is refined for one picture; set "
            "batch_size to 1, or take one with Latent From Batch."
        )


def references_of(vae, images: torch.Tensor, mask, size: tuple[int, int]) -> ConceptSet:
    """References [n, h, w, c] as large as a latent of ``size``, its height and width.

    mask: MASK per reference or None. Raises: TooFew for an empty mask; as ``make_set`` does.
    """
    if mask is not None and not bool((mask.reshape(-1, *mask.shape[-2:]).flatten(1) > 0).any(1).all()):
        raise TooFew("A reference's mask is empty; paint the concept, or disconnect mask.")
    side = round((size[0] * size[1]) ** 0.5 * vae.spacial_compression_encode())
    return make_set(vae, [images], [] if mask is None else [mask], ["{}"], resolution=side)


def data_of(references: ConceptSet, texts: tuple[str, str], made: torch.Tensor) -> ConceptSet:
    """References and behind them the picture ``made`` [1, c, h, w]; what RefineSession takes.

    texts: of the references and of the picture.
    """
    with torch.inference_mode(False):
        picture = made[0].detach().float().cpu().clone()
    captions = ((texts[0],),) * len(references.latents) + ((texts[1],),)
    return replace(
        references,
        latents=(*references.latents, picture),
        masks=(*references.masks, None),
        captions=captions,
        mirrored=(*references.mirrored, False),
    )


def refined(
    model,
    clip,
    vae,
    concept: Concept,
    text: str,
    images: torch.Tensor,
    latent: dict,
    settings: RefineSettings,
    sampling: dict,
    *,
    negative=None,
    mask=None,
    generated: dict | None = None,
    features: Features | None = None,
    reference_text: str = "",
    checkpointing: str = "auto",
    strict: bool = False,
) -> tuple[Concept, torch.Tensor, torch.Tensor, str]:
    """CONCEPT for this picture; IMAGE of the matches with a reference; IMAGE of the picture before; a report.

    ``sampling``: the keywords of ``sampled``; ``generated``: the picture as a LATENT, which is then not sampled;
    ``features``: DIFT's of the references, which are then not read.
    What is wrong with settings, concept, texts and references is told before anything is sampled.
    Raises: ValueError instead of handing back the concept as it is, when ``strict``; as ``check``, ``sampled``,
    ``refine``, ``read_before``, ``same_pictures`` and ``references_of`` do.
    """
    texts = (reference_text.strip() or f"a photo of <{concept.name}>", text)
    check(settings, concept, texts)
    single(latent if generated is None else generated)
    if features is not None:
        read_before(model, features, len(images), images.shape[1:3])
    made, lacking = None if generated is None else generated["samples"], ""
    size = (begun(model, latent) if made is None else made).shape[-2:]
    try:
        references = references_of(vae, images, mask, size)
    except TooFew as error:
        lacking = str(error)
        if strict:
            raise ValueError(NOT_REFINED.format(concept.name, error)) from error
    if features is not None and not lacking:
        same_pictures(features, references.latents)
    if made is None:
        made = sampled(model, clip, concept, text, negative, latent, **sampling)
    before = vae.decode(made)
    if lacking:
        done = Refined(concept, {}, {}, (), (), lacking)
    else:
        data = data_of(references, texts, made)
        done = refine(RefineSession(model, clip, data, settings, concept, features), checkpointing)
    if done.reason and strict:
        raise ValueError(NOT_REFINED.format(concept.name, done.reason))
    return done.concept, _matches(done, vae, images, before), before, report(done, text)


def _matches(done: Refined, vae, images: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The pairs of the first reference that has some, as lines; without any the picture alone."""
    number = next((n for n, pairs in enumerate(done.pairs) if len(pairs.first)), None)
    if number is None:
        return before
    multiple = int(vae.spacial_compression_encode())
    side = round((before.shape[1] * before.shape[2]) ** 0.5)
    first = fitted(images[number].movedim(-1, 0)[:3].float(), side, multiple).movedim(0, -1)
    ends = []
    for cells, grid, picture in (
        (done.pairs[number].first, done.grids[number], first),
        (done.pairs[number].second, done.grids[-1], before[0]),
    ):
        cells = cells.cpu()
        ends.append(points((cells // grid[1]).float(), (cells % grid[1]).float(), grid, tuple(picture.shape[:2])))
    sizes = (tuple(first.shape[:2]), tuple(before.shape[1:3]))
    return joined(Matches(*ends, done.pairs[number].score.cpu(), *sizes), first, before[0], SHOWN)


def report(done: Refined, text: str) -> str:
    """What moved, in a few lines."""
    if done.reason:
        return f"<{done.concept.name}> is as it was. {done.reason}"
    counts = ", ".join(str(len(p.first)) for p in done.pairs) or "no"
    lines = [f"<{done.concept.name}> for {text!r}: {counts} matched points"]
    for name, value in done.before.items():
        after = done.after[name]
        lines.append(
            f"{name} loss: {value:.5f} before, {after:.5f} after ({100 * (after / max(value, 1e-12) - 1):+.1f}%)"
        )
    return "\n".join(lines)

"""Which pixels a word looks at: maps of a noised picture under a prompt, without gradient."""

from dataclasses import dataclass

import comfy.model_management
import comfy.patcher_extension
import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator
from .attention import AttentionTap, JointTap, Layer, maps_of
from .denoise import Denoiser, noise_time, sigmas_at
from .modulation import ALONE
from .overlays import background, grid, mask_of
from .positions import columns_of
from .prompt import encode_prompt
from .text import named_rows, unhooked
from .variants import layers_of


@dataclass(frozen=True)
class Looks:
    """Maps of one noise level."""

    time: float
    """Of the training schedule, 0 to 1."""
    stage: str
    """``stage 2 of 5`` where the prompt's rows change with the noise level; else empty."""
    maps: dict[Layer, torch.Tensor]
    """Per layer [n, words]."""


def changed(entry: list) -> tuple[list, object]:
    """A conditioning entry without its hooks, and the change of ``transformer_options`` that stands for them.

    Raises: CarrierMismatch for hooks that change weights, such as those of LoRAs.
    """
    facts = dict(entry[1])
    hooks = getattr(facts.pop("hooks", None), "hooks", ())
    unhooked([hook for hook in hooks if not hasattr(hook, "transformers_dict")])
    options = [hook.transformers_dict for hook in hooks]

    def change(given: dict) -> dict:
        given = comfy.patcher_extension.copy_nested_dicts(given)
        for more in options:
            comfy.patcher_extension.merge_nested_dicts(given, more, copy_dict1=False)
        return {**given, ALONE: True} if options else given

    return [entry[0], facts], change


def prompted(clip, text: str, concepts: list[Concept], columns: torch.Tensor | None = None) -> tuple[list, object]:
    """The prompt as ``changed`` gives it. Raises: CarrierMismatch when ``columns`` [1, m, c] are not of its rows, and
    as ``changed`` does."""
    entry, change = changed(encode_prompt(clip, text, [(c, 1.0) for c in concepts])[0])
    if columns is not None and entry[0].shape[1] != columns.shape[1]:
        raise CarrierMismatch(
            f"The text encoder gave {entry[0].shape[1]} rows for {columns.shape[1]} tokens; connect the model's "
            "own CLIP."
        )
    return entry, change


def look(
    model,
    clip,
    latent: torch.Tensor,
    text: str,
    concepts: list[Concept],
    words: list[str],
    times: list[float],
    seed: int,
) -> list[Looks]:
    """Maps of ``words`` for a VAE latent [c, h, w] noised to each of ``times``.

    Raises: ValueError for a word that the prompt does not hold or a time outside 0..1; CarrierMismatch for a model
    whose text rows cannot be told.
    """
    if not times or not all(0 <= t <= 1 for t in times):
        raise ValueError(f"Noise levels are {', '.join(map(str, times)) or 'missing'}; write times from 0 to 1.")
    columns = columns_of(model, clip, text, concepts, words)
    entry, change = prompted(clip, text, concepts, columns)
    used = [named_rows(c) for c in concepts if c.kind != "modulation" and f"<{c.name}>" in text]
    stages = max([1, *(v.shape[0] for c in used if c for v in c.tensors.values())])
    comfy.model_management.load_models_gpu([model], memory_required=model.memory_required([1, *latent.shape]))
    found = []
    with torch.no_grad():
        d = Denoiser(model)
        clean = d.clean(latent[None])
        for number, time in enumerate(times):
            sigma = sigmas_at(d.sampling, torch.tensor([time])).to(d.device)
            noise = torch.randn(clean.shape, generator=generator(seed, number, "looks")).to(d.device)
            tap = tap_of(model, columns, clean)
            d(d.noised(clean, noise, sigma), sigma, [entry], lambda options, tap=tap: tap.change(change(options)))
            known = min(stages - 1, int(float(noise_time(d.sampling, sigma)) * stages))
            stage = f"stage {known + 1} of {stages}" if stages > 1 else ""
            found.append(Looks(time, stage, {k: v[0].float().cpu() for k, v in tap.take().items()}))
    return found


def looked_at(image, vae, latent: dict | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """VAE latents [n, c, h, w] of a node's IMAGE or LATENT, and the pictures [n, H, W, 3] as they were encoded.

    Raises: ValueError when none is connected, both are, or the VAE is missing.
    """
    if image is None and latent is None:
        raise ValueError("There is no picture to look at; connect image and vae, or latent.")
    if image is not None and latent is not None:
        raise ValueError("Both image and latent are connected, and one of them is looked at; disconnect the other.")
    if image is None:
        return latent["samples"], None
    if vae is None:
        raise ValueError("image needs the model's vae; connect it.")
    multiple = int(vae.spacial_compression_encode())
    height, width = (side // multiple * multiple for side in image.shape[1:3])
    pictures = image[:, :height, :width, :3]
    return vae.encode(pictures), pictures


def tap_of(model, columns: torch.Tensor, latent: torch.Tensor) -> AttentionTap | JointTap:
    """What records the maps of ``columns`` [1 or b, m, c] for latents [b, c, h, w] of this model, differentiably."""
    network, columns = model.model.diffusion_model, columns.to(latent.device)
    if layers_of(network):
        return AttentionTap(maps_of(columns, follow_queries=True))
    patch = int(network.patch_size)
    return JointTap(columns, tuple(-(-side // patch) for side in latent.shape[-2:]))


def shown(model, clip, text, concepts, words: str, levels: str, seed: int, image=None, vae=None, latent=None) -> tuple:
    """IMAGE of overlays, and MASK of the first word.

    ``words``, ``levels``: separated by commas. Raises: ValueError when a picture, a word or a number is missing; as
    ``look`` does.
    """
    names = list(dict.fromkeys(w.strip() for w in words.split(",") if w.strip()))
    if not names:
        raise ValueError("There is no word to show; write words of the prompt or <name>, separated by commas.")
    try:
        times = [float(t) for t in levels.split(",") if t.strip()]
    except ValueError as error:
        raise ValueError(f"Noise levels are numbers from 0 to 1 separated by commas, not {levels!r}.") from error
    latents, picture = looked_at(None if image is None else image[:1], vae, latent)
    found = latents[0]
    if picture is not None:
        picture = picture[0]
    elif vae is not None:
        picture = vae.decode(found[None])[0]
    looks = look(model, clip, found, text, concepts, names, times, seed)
    if picture is None:
        picture = background(model.model.latent_format, model.model.process_latent_in(found[None]))
    picture = picture.float().cpu()
    passes = [(" ".join([f"t {one.time:g}", one.stage]).strip(), one.maps) for one in looks]
    pixels = picture.shape[0] // found.shape[-2]
    mask = mask_of([one.maps for one in looks], 0, *picture.shape[:2], pixels)
    return grid(picture, names, passes, pixels), mask

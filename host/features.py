"""Features out of forward passes: all that is asked of one latent, timestep and noise comes out of one pass."""

import comfy.model_management
import torch
import torch.nn.functional as F

from ..carriers.concept import Concept
from ..carriers.features import Features
from ..kernels.draws import generator
from .attention import Layer
from .denoise import Denoiser, sigmas_at
from .feature_hooks import captured
from .feature_places import ATTENTION, Want, checked, preset
from .loading import room
from .positions import columns_of
from .progress import Progress
from .session import fingerprint
from .show import looked_at, prompted, tap_of

ROWS = 8
"""Most latents per pass."""


def thumbnails(latents: torch.Tensor) -> torch.Tensor:
    """VAE latents [n, c, h, w] in 4 x 4 cells [n, c, 4, 4], fp32 on the CPU: what tells pictures apart at any size."""
    return F.adaptive_avg_pool2d(latents.detach().float(), 4).cpu()


def sigma_at(denoiser: Denoiser, timestep: float) -> torch.Tensor:
    """Noise level [1] of a training timestep 0..999; of flow models timestep / 1000, whatever their shift."""
    if denoiser.space == "flow":
        return torch.tensor([min(timestep, 1000) / 1000], dtype=torch.float32)
    return sigmas_at(denoiser.sampling, torch.tensor([min((timestep + 0.5) / 1000, 1)], dtype=torch.float64))


def extract(
    model,
    clip,
    latents: torch.Tensor,
    wants: list[Want],
    text: str = "",
    concepts: list[Concept] = (),
    seed: int = 0,
    pixels: tuple[int, int] | None = None,
    conditioning: list | None = None,
) -> Features:
    """Features of VAE latents [pictures, c, h, w]; wants of one timestep, noise and ensemble share their passes.

    The n-th noise is the same for every picture, so a picture's features do not depend on its neighbours. A clean
    picture reaches the network unscaled. ``pixels``: height and width of the pictures, else those of the latent format;
    ``conditioning``: what earlier features of this prompt were read under, where no word's map is asked for.
    Raises: ValueError as ``checked`` and ``columns_of`` do; CarrierMismatch; the host's interrupt.
    """
    checked(model, wants)
    concepts, groups = list(concepts), {}
    for want in dict.fromkeys(wants):
        count = want.ensemble if want.noise else 1
        groups.setdefault((want.timestep, want.noise, count), []).append(want)
    words = [w.name.removeprefix(ATTENTION) for w in wants if w.name.startswith(ATTENTION)]
    columns = columns_of(model, clip, text, concepts, words) if words else None
    entry, change = (conditioning, dict) if conditioning else prompted(clip, text, concepts, columns)
    size = _rows_per_pass(model, latents.shape)
    comfy.model_management.load_models_gpu([model], memory_required=model.memory_required([size, *latents.shape[1:]]))
    work = [
        (key, part)
        for key in groups
        for part in torch.cartesian_prod(torch.arange(len(latents)), torch.arange(key[2])).view(-1, 2).split(size)
    ]
    maps, progress = {}, Progress(len(work))
    with torch.no_grad():
        d = Denoiser(model)
        clean = d.clean(latents)
        for done, ((timestep, noisy, count), part) in enumerate(work):
            wanted = groups[timestep, noisy, count]
            mine = [w.name for w in wanted if w.name.startswith(ATTENTION)]
            x, sigma = _input(d, clean, part, timestep, noisy, seed)
            tap = (
                tap_of(model, columns[..., [words.index(n.removeprefix(ATTENTION)) for n in mine]], x) if mine else None
            )
            with captured(model, wanted, x.shape[-2:]) as seen:
                d(x, sigma, [entry] * len(x), lambda o, tap=tap: tap.change(change(o)) if tap else change(o))
            found = dict(seen.found)
            if tap:
                found |= dict(zip(mine, mean_map(tap.take()).split(1, 1), strict=True))
            pictures = part[:, 0].unique()
            for name, value in found.items():
                # added up on the device, so that not every member of an ensemble has to leave it
                sums = torch.stack([value[part[:, 0] == p].float().sum(0) for p in pictures]) / count
                whole = maps.setdefault(name, torch.zeros(len(latents), *value.shape[1:]))
                whole.index_add_(0, pictures, sums.cpu())
            progress.show(done + 1)
    info = {
        "architecture": type(model.model.model_config).__name__,
        "base": fingerprint(model),
        "prompt": text,
        "seed": seed,
        "passes": len(work),
        "thumbnails": thumbnails(latents).tolist(),
        "sources": {
            w.name: {"layer": w.place, "timestep": w.timestep, "noise": w.noise, "ensemble": key[2], "note": w.note}
            for key, group in groups.items()
            for w in group
        },
    }
    scale = getattr(model.model.latent_format, "spacial_downscale_ratio", 8)
    height, width = pixels or [side * scale for side in latents.shape[-2:]]
    kept = None if concepts else entry
    return Features({w.name: maps[w.name] for w in wants}, int(height), int(width), info, kept)


def _rows_per_pass(model, shape: tuple[int, ...]) -> int:
    """Latents that fit into memory together, ``ROWS`` at most."""
    free = room(model)
    return next((n for n in range(ROWS, 1, -1) if model.memory_required([n, *shape[1:]]) < 0.8 * free), 1)


def _input(d: Denoiser, clean: torch.Tensor, part: torch.Tensor, timestep: float, noisy: bool, seed: int) -> tuple:
    """Latents [b, c, h, w] and noise levels [b] for rows (picture, number of the noise) [b, 2]."""
    x = clean[part[:, 0].to(clean.device)]
    sigma = sigma_at(d, timestep).expand(len(x)).to(d.device)
    if not noisy:
        return unscaled(d, x, sigma), sigma
    noise = {int(n): torch.randn(clean.shape[1:], generator=generator(seed, int(n), "features")) for n in part[:, 1]}
    return d.noised(x, torch.stack([noise[int(n)] for n in part[:, 1]]).to(d.device), sigma), sigma


def unscaled(d: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What reaches the network as x: the host scales its input by the noise level, which a clean picture has not."""
    return x / d.sampling.calculate_input(sigma, torch.ones_like(x))


def mean_map(records: dict[Layer, torch.Tensor]) -> torch.Tensor:
    """Maps per layer [b, n, c] -> their mean [b, c, h, w] on the largest grid, smaller ones interpolated, whose last
    cells may lie in part outside."""
    largest, parts = max(records, key=lambda layer: layer.height * layer.width), []
    for layer, seen in records.items():
        maps, times = seen.float().mT.unflatten(-1, (layer.height, layer.width)), layer.scale // largest.scale
        maps = F.interpolate(maps, (layer.height * times, layer.width * times), mode="bilinear")
        parts.append(maps[..., : largest.height, : largest.width])
    return torch.stack(parts).mean(0)


def extracted(
    model, clip, text, concepts, name: str, words: str, seed: int, image=None, vae=None, latent=None, **by_hand
) -> tuple[Features, str]:
    """Features and a report, for a node. ``words``: separated by commas; ``by_hand``: arguments of ``preset``.

    Raises: as ``looked_at`` and ``extract`` do.
    """
    wanted = list(dict.fromkeys(w.strip() for w in words.split(",") if w.strip()))
    wants = preset(model, name, wanted, **by_hand)
    latents, pictures = looked_at(image, vae, latent)
    pixels = None if pictures is None else pictures.shape[1:3]
    features = extract(model, clip, latents, wants, text, concepts, seed, pixels)
    return features, report(features)


def report(features: Features) -> str:
    """What was extracted from where, in a few lines."""
    info = features.info
    lines = [
        f"{len(next(iter(features.maps.values())))} pictures of {features.width} x {features.height}, {info['passes']} "
        f"passes of {info['architecture']}"
    ]
    for name, value in features.maps.items():
        source = info["sources"][name]
        how = f"mean of {source['ensemble']} noises" if source["noise"] else "no noise"
        lines.append(
            f"{name}: {value.shape[1]} channels on {value.shape[3]} x {value.shape[2]} cells, {source['layer']} "
            f"({source['note']}), timestep {source['timestep']:g}, {how}"
        )
    return "\n".join(lines)

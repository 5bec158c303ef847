"""Which cells of references a picture shows, as DIFT (arXiv 2306.03881) finds them, for a step on what is there."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..carriers.errors import CarrierMismatch
from ..carriers.features import Features
from ..kernels.match import Pairs, match
from .feature_places import Want, preset
from .features import extract, thumbnails
from .matching import covered
from .session import fingerprint
from .text import NAMED

FEWEST = 8
"""Pairs below which a step would follow chance."""
APART = 0.5
"""Distance of two thumbnails, as a share of the longer, above which they are of two pictures."""


class TooFew(ValueError):
    """There is too little to compare."""


def read_before(model, features: Features, references: int, size: tuple[int, int]) -> Want:
    """How DIFT's features of the references were read, so that the picture's are read alike.

    size: height and width of the references, in any unit.
    Raises: CarrierMismatch for another model; CarrierError without a map ``dift``; ValueError for features of other
    pictures, or read under a prompt with ``<name>``.
    """
    maps, info = features.map("dift"), features.info
    if info["base"] != (base := fingerprint(model)):
        raise CarrierMismatch(
            f"reference_features were read by model {info['base']}, this is {base}; extract them with the model that "
            "is connected here."
        )
    (height, width), (high, wide) = (features.height, features.width), size
    if len(maps) != references or abs(math.log(height * wide / (width * high))) > 0.1:
        raise ValueError(
            f"reference_features are of {len(maps)} pictures of {width} x {height}, image holds {references} of "
            f"{wide} x {high}; extract them from the same pictures."
        )
    if NAMED.search(info["prompt"]):
        raise ValueError(
            f"reference_features were read under {info['prompt']!r}; points are found without the concept, so extract "
            "them under plain words, such as a photo of a mug."
        )
    return Want("dift", *(info["sources"]["dift"][key] for key in ("layer", "timestep", "noise", "ensemble")))


def same_pictures(features: Features, latents: Sequence[torch.Tensor]) -> None:
    """Raises: ValueError naming the references, latents [c, h, w], that are not the pictures of the features."""
    own, theirs = thumbnails(torch.stack(tuple(latents))), torch.tensor(features.info["thumbnails"])
    own, theirs = own.flatten(1), theirs.flatten(1)
    longer = torch.maximum(own.norm(dim=1), theirs.norm(dim=1)).clamp_min(1e-6)
    others = ((own - theirs).norm(dim=1) > APART * longer).nonzero()[:, 0].tolist()
    if others:
        raise ValueError(
            f"reference_features are of other pictures than image (number {', '.join(str(n + 1) for n in others)}); "
            "extract them from the same pictures, in the same order."
        )


def dift_of(model, clip, latents, text: str, ensemble: int, seed: int, features: Features | None) -> list[torch.Tensor]:
    """Features [c, h, w] of references, all of one size, and of the picture behind them.

    latents: of each [c, h, w]; ``features``: those of the references, read before (``read_before``), whose prompt, seed
    and settings then hold for the picture too. Raises: ValueError for features of other pictures; as ``read_before``
    and ``extract`` do.
    """
    references, picture, entry = latents[:-1], latents[-1:], features.conditioning if features else None
    if features:
        same_pictures(features, references)
        wants = [read_before(model, features, len(references), references[0].shape[-2:])]
        text, seed = features.info["prompt"], features.info["seed"]
        found, parts = [*features.map("dift")], [picture]
    else:
        wants, found = preset(model, "DIFT", [], ensemble=ensemble), []
        parts = [latents] if references[0].shape == picture[0].shape else [references, picture]
    for part in parts:
        found += extract(model, clip, torch.stack(part), wants, text, seed=seed, conditioning=entry).map("dift")
    return found


def points_of(dift: list, maps: list[torch.Tensor], masks, *, mutual: bool, minimum: float) -> tuple[Pairs, ...]:
    """The cells of each reference that the picture shows, on the grids of ``maps``.

    dift: features [c, h, w] of the references and the picture; maps: of the word [layers, h, w] alike. Cells of the
    object count: inside the reference's mask, else where the word's mean map is above half of its maximum; so too in
    the picture. Raises: TooFew.
    """
    inside, flat, found = [], [], []
    for seen, features, mask in zip(maps, dift, masks, strict=True):
        mean = seen.detach().mean(0).flatten()
        try:
            own = covered(mask, seen, "reference")
        except ValueError as error:
            raise TooFew(str(error)) from error
        inside.append(mean > mean.max() / 2 if own is None else own.to(mean.device))
        grid = F.interpolate(features[None].to(mean.device), seen.shape[-2:], mode="bilinear")[0]
        flat.append(grid.flatten(1).T)
    for cells, object_cells in zip(flat[:-1], inside[:-1], strict=True):
        pairs = match(cells, flat[-1], mutual=mutual, minimum=minimum, first_mask=object_cells)
        found.append(Pairs(*(part[inside[-1][pairs.second]] for part in pairs)))
    if (count := sum(len(p.first) for p in found)) < FEWEST:
        raise TooFew(
            f"Only {count} points of the references were found in the picture, fewer than {FEWEST}; "
            + ("lower minimum_score, " if minimum > -1 else "")
            + ("turn mutual off, " if mutual else "")
            + "connect a mask that covers more, make the picture larger, or try another seed."
        )
    return tuple(found)

"""Features as pictures: three principal components as colours, the same ones for all pictures."""

import torch
import torch.nn.functional as F

from ..carriers.errors import CarrierMismatch
from ..carriers.features import Features
from ..kernels.pca import principal, spread
from .feature_places import ATTENTION, ROLES
from .matching import in_cells, reach

AUTO, WORDS = "auto", "attention"
KINDS = (AUTO, "dift", *ROLES, WORDS)
OUTSIDE = 0.1
"""Grey of cells outside of a mask."""


def chosen_map(features: Features, kind: str) -> torch.Tensor:
    """The map [pictures, c, h, w] of a kind: the first one, one by name, or all words' maps as channels.

    Raises: CarrierError listing what there is.
    """
    words = [name for name in features.maps if name.startswith(ATTENTION)]
    if kind == WORDS and words:
        return torch.cat([features.maps[name] for name in words], 1)
    return features.map(next(iter(features.maps)) if kind == AUTO else kind)


def cells_in(mask: torch.Tensor | None, maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Cells [pictures, h, w] at least half of which a MASK [1 or pictures, H, W] covers; all without a mask.

    ``size``: height and width of the pictures.
    Raises: CarrierMismatch when the numbers of masks and pictures differ.
    """
    if mask is None:
        return torch.ones(len(maps), *maps.shape[-2:], dtype=torch.bool)
    mask = mask.detach().float().cpu().reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, len(maps)):
        raise CarrierMismatch(
            f"There are {len(mask)} masks for {len(maps)} pictures; connect one each, or one for all."
        )
    cells = torch.stack([in_cells(one, maps.shape[-2:], size) for one in mask])
    return cells.expand(len(maps), -1, -1) >= 0.5


def coloured(
    features: Features, kind: str = AUTO, second: Features | None = None, mask=None, second_mask=None
) -> torch.Tensor:
    """IMAGE [pictures, height, width, 3], those of ``second`` behind and scaled to the same size.

    The three components of largest variance over all pictures' cells, inside their masks, are red, green and blue, so
    equal colours are equal features. Cells outside are dark. A map of fewer than three channels leaves colours grey.
    Raises: CarrierError for a map that is not there; CarrierMismatch when the two cannot have one basis; ValueError
    for masks that cover no cell.
    """
    size = (features.height, features.width)
    maps, sizes = [chosen_map(features, kind)], [size]
    masks = [cells_in(mask, maps[0], size)]
    if second is not None:
        name = next(iter(features.maps)) if kind == AUTO else kind
        maps.append(chosen_map(second, name if name in second.maps else kind))
        sizes.append((second.height, second.width))
        masks.append(cells_in(second_mask, maps[1], sizes[1]))
        if maps[0].shape[1] != maps[1].shape[1]:
            raise CarrierMismatch(
                f"The two features have {maps[0].shape[1]} and {maps[1].shape[1]} channels; extract both with the same "
                "model, block and layer."
            )
    rows = torch.cat([m.movedim(1, -1)[inside] for m, inside in zip(maps, masks, strict=True)])
    if len(rows) < 2:
        raise ValueError("The masks cover no cell of the features; connect the masks of these pictures, or none.")
    mean, basis = principal(rows, 3)
    colours, pictures = spread((rows - mean) @ basis), []
    parts = colours.split([int(i.sum()) for i in masks])
    for m, inside, part, own in zip(maps, masks, parts, sizes, strict=True):
        seen = torch.full((len(m), *m.shape[-2:], 3), OUTSIDE)
        seen[inside] = part
        far = [round(f * to / side) for f, to, side in zip(reach(m.shape[-2:], own), size, own, strict=True)]
        whole = F.interpolate(seen.movedim(-1, 1), far, mode="nearest-exact")
        pictures.append(whole[..., : size[0], : size[1]].movedim(1, -1))
    return torch.cat(pictures)

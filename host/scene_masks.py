"""The masks of one picture's things, at the resolution that losses count in, and how far attention is from them."""

import torch
import torch.nn.functional as F

from ..kernels.losses import map_loss
from .attention import Layer
from .concept_set import ConceptSet, at_latent, covering

MOST = 8
"""Things of a scene; the authors of Break-A-Scene (arXiv 2305.16311) find up to about four to work."""


def scene_masks(data: ConceptSet, masks: torch.Tensor, words: tuple[str, ...]) -> list[torch.Tensor]:
    """Masks [things, h, w] in 0..1 for the picture's latent, and mirrored for its mirrored copy.

    masks: MASK batch [n, H, W], [H, W] or [n, 1, H, W], one per word, of any size.
    Raises: ValueError for several pictures, too many things, another number of words than of masks, or a mask that is
    empty or covers less than one latent pixel.
    """
    covers = [covering(m, n + 1) for n, m in enumerate(masks if masks.ndim > 2 else masks[None])]
    originals = len(data.mirrored) - sum(data.mirrored)
    if originals != 1:
        raise ValueError(
            f"concept_set has {originals} pictures, and a scene is one picture; connect a single one in Make Concept "
            "Set, mirrored too if you like."
        )
    if len(covers) > MOST:
        raise ValueError(
            f"masks has {len(covers)} masks, and a scene has at most {MOST} things; leave out some, since more than "
            "about four are hardly kept apart."
        )
    if len(covers) != len(words):
        raise ValueError(
            f"masks has {len(covers)} masks and words has {len(words)} lines; write one line per mask in words, in the "
            "order of the masks."
        )
    found = []
    for number, (own, word) in enumerate(zip(covers, words, strict=True)):
        if not bool(own.any()):
            raise ValueError(f"Mask {number + 1} ({word}) is empty; paint the thing in it, or leave out mask and word.")
        small = at_latent(own, data.latents[0].shape[-2:])
        if float(small.sum()) < 1:
            height, width = small.shape
            raise ValueError(
                f"Mask {number + 1} ({word}) covers less than one of the latent's {height} x {width} pixels; paint it "
                "larger, or raise resolution in Make Concept Set."
            )
        found.append(small)
    with torch.inference_mode(False):
        whole = torch.stack([m.clone() for m in found])
        return [whole.flip(-1) if mirrored else whole for mirrored in data.mirrored]


def apart(maps: dict[Layer, torch.Tensor], covers: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """``map_loss`` of maps [b, n, things] and masks [b, things, h, w] of the latent's size, for the things that
    ``counted`` [b, things] has: layers of one size together as their mean, sizes alike. Returns: scalar."""
    sizes: dict[tuple[int, int], list[torch.Tensor]] = {}
    for layer, seen in maps.items():
        sizes.setdefault((layer.height, layer.width), []).append(seen)
    losses = []
    for size, own in sizes.items():
        mean = torch.stack(own).mean(0).transpose(1, 2).unflatten(2, size)
        losses.append(map_loss(mean, F.adaptive_avg_pool2d(covers, size), counted))
    return torch.stack(losses).mean()

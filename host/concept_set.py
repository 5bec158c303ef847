"""Pictures of one concept, encoded once: latents, masks and captions."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .progress import Progress
from .text import NAMED

OBJECT = (
    "a photo of {}",
    "a photo of a {}",
    "a close photo of {}",
    "a picture of {}",
    "{} in a scene",
    "a good photo of {}",
    "a photo of one {}",
    "an image of {}",
)
STYLE = ("a picture in the style of {}", "a scene in the style of {}", "a photo in {} style", "{} style picture")


@dataclass(frozen=True)
class ConceptSet:
    """What a learner learns from."""

    latents: tuple[torch.Tensor, ...]
    """One [c, h, w] per picture, as the VAE gives them, fp32 on the CPU."""
    masks: tuple[torch.Tensor | None, ...]
    """One [1, h, w] per picture in 0..1 at latent resolution, or None."""
    captions: tuple[tuple[str, ...], ...]
    """Per picture the sentences to draw from; ``{}`` stands for the concept."""
    mirrored: tuple[bool, ...]

    def buckets(self) -> list[list[int]]:
        """Picture indices grouped by latent size, in order of first appearance."""
        groups: dict[tuple, list[int]] = {}
        for index, latent in enumerate(self.latents):
            groups.setdefault(tuple(latent.shape), []).append(index)
        return list(groups.values())

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """``count`` pictures of one size and a caption number for each."""
        buckets = self.buckets()
        weights = torch.tensor([float(len(b)) for b in buckets])
        bucket = buckets[int(torch.multinomial(weights, 1, generator=generator))]
        order = torch.cat([torch.randperm(len(bucket), generator=generator) for _ in range(-(-count // len(bucket)))])
        pictures = [bucket[i] for i in order[:count].tolist()]
        return pictures, [int(torch.randint(len(self.captions[i]), (1,), generator=generator)) for i in pictures]


def _captions(texts: list[str], count: int, template: str) -> list[tuple[str, ...]]:
    """One tuple of sentences per picture, ``{}`` for the concept.

    Raises: ValueError when counts do not match or a caption does not say where the concept is.
    """
    if not texts:
        return [OBJECT if template == "object" else STYLE] * count
    texts = [NAMED.sub("{}", t) for t in texts]
    lost = [t for t in texts if "{}" not in t]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(texts)} captions do not say where the concept is, for example {lost[0]!r}; "
            "write <name> or {} in its place."
        )
    if len(texts) not in (1, count):
        raise ValueError(
            f"There are {count} pictures and {len(texts)} captions; give one caption for all, one line per "
            "picture, or none for template sentences."
        )
    return [(t,) for t in (texts if len(texts) == count else texts * count)]


def fitted(picture: torch.Tensor, resolution: int, multiple: int) -> torch.Tensor:
    """[c, h, w] resized to about resolution^2 pixels (0: as it is) and centre-cropped to a multiple."""
    height, width = picture.shape[1:]
    scale = resolution / (height * width) ** 0.5 if resolution else 1.0
    high, wide = (max(multiple, int(round(s * scale)) // multiple * multiple) for s in (height, width))
    scale = max(high / height, wide / width)
    if scale != 1.0:
        size = [max(high, round(height * scale)), max(wide, round(width * scale))]
        picture = F.interpolate(picture[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)
    top, left = (picture.shape[1] - high) // 2, (picture.shape[2] - wide) // 2
    return picture[:, top : top + high, left : left + wide]


def _coloured(picture: torch.Tensor, number: int) -> torch.Tensor:
    """A picture [h, w, c] as [3, h, w]."""
    channels = picture.shape[-1]
    if channels in (0, 2):
        raise ValueError(
            f"Picture {number} has {channels} channels; connect pictures in colour (3 or 4) or in grey (1)."
        )
    if not bool(torch.isfinite(picture).all()):
        raise ValueError(f"Picture {number} holds numbers that are not finite; look at the node that made it.")
    return picture.movedim(-1, 0)[:3].float().expand(3, -1, -1)


def covering(mask: torch.Tensor, number: int) -> torch.Tensor:
    """A mask [h, w] or [1, h, w] as [h, w] in 0..1."""
    if mask.ndim == 3 and len(mask) == 1:
        mask = mask[0]
    if mask.ndim != 2:
        raise ValueError(
            f"Mask {number} has shape {tuple(mask.shape)} and should have one channel; convert it to a mask first."
        )
    if not bool(torch.isfinite(mask).all()):
        raise ValueError(f"Mask {number} holds numbers that are not finite; look at the node that made it.")
    return mask.float().clamp(0, 1)


def at_latent(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A mask [h, w] at a latent's ``size``, cut at the rim as ``make_set`` cuts a picture of its shape."""
    scale = max(size[0] / mask.shape[0], size[1] / mask.shape[1])
    high, wide = (max(1, min(side, round(cells / scale))) for side, cells in zip(mask.shape, size, strict=True))
    top, left = (mask.shape[0] - high) // 2, (mask.shape[1] - wide) // 2
    return F.interpolate(mask[None, None, top : top + high, left : left + wide], size, mode="area")[0, 0].cpu()


def make_set(
    vae,
    images: list[torch.Tensor],
    masks: list[torch.Tensor],
    texts: list[str],
    *,
    template: str = "object",
    resolution: int = 0,
    mirror: bool = False,
) -> ConceptSet:
    """Encodes pictures once.

    images: IMAGE batches [n, h, w, c] of any sizes, c 1 or at least 3; masks: MASK batches [n, h, w], [h, w] or
    [n, 1, h, w], cut to 0..1, none or one per picture.
    ``resolution``: side of the square with the wanted area, 0 keeps sizes; sides are cropped to what the VAE takes.
    Raises: ValueError when pictures, masks and captions do not match or are not finite, a mask is empty, or the VAE
    gives nan; the host's interrupt.
    """
    pictures = [_coloured(p, n + 1) for n, p in enumerate(p for batch in images for p in batch)]
    covers = [covering(m, n + 1) for n, m in enumerate(m for b in masks for m in (b if b.ndim > 2 else b[None]))]
    if not pictures:
        raise ValueError("There are no pictures to learn from; connect at least one image.")
    if covers and len(covers) != len(pictures):
        raise ValueError(
            f"There are {len(pictures)} pictures and {len(covers)} masks; give one mask per picture or none."
        )
    captions = _captions(texts, len(pictures), template)
    multiple = int(vae.spacial_compression_encode())
    latents, weights, words, flips = [], [], [], []
    progress = Progress(len(pictures))
    for number, picture in enumerate(pictures):
        cover = covers[number] if covers else None
        if cover is not None and cover.shape != picture.shape[1:]:
            cover = F.interpolate(cover[None, None], picture.shape[1:], mode="bilinear")[0, 0]
        stack = picture if cover is None else torch.cat([picture, cover[None].to(picture)])
        stack = fitted(stack, resolution, multiple)
        if cover is not None and not bool(stack[3:].any()):
            raise ValueError(
                f"The mask of picture {number + 1} is empty, or lies in the rim that is cropped off; paint the concept "
                "or disconnect the masks."
            )
        for flip in (False, True) if mirror else (False,):
            view = stack.flip(-1) if flip else stack
            latent = vae.encode(view[:3].movedim(0, -1)[None].contiguous())[0].float().cpu()
            if not bool(torch.isfinite(latent).all()):
                raise ValueError(
                    f"The VAE gave numbers that are not finite for picture {number + 1}; start ComfyUI with --fp32-vae "
                    "or connect another VAE."
                )
            latents.append(latent)
            weights.append(
                None if cover is None else F.interpolate(view[None, 3:], latent.shape[-2:], mode="area")[0].cpu()
            )
            words.append(captions[number])
            flips.append(flip)
        progress.show(number + 1)
    with torch.inference_mode(False):
        return ConceptSet(
            tuple(t.clone() for t in latents),
            tuple(None if m is None else m.clone() for m in weights),
            tuple(words),
            tuple(flips),
        )

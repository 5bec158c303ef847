"""The toy world's judge: sees every factor of a picture and says how alike two objects are.

The likeness is an embedding of the masked object, learned (train_judge.py) by telling apart objects that differ in one
attribute, so it also orders objects that nobody named. Novel concepts of the world are never part of the training.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from . import world

FILE = Path(__file__).resolve().parent / "judge.safetensors"
SHAPES = [*world.SHAPES, "thing"]
CLASSES = {**world.FACTORS, "shape": SHAPES}
"""Factor -> names the judge can answer with; ``thing`` is any outline without a name."""
BADGES = ["dot", "bar", "square", "ring", *world.SHAPES]
PLACE = [len(world.POSITIONS), len(world.SIZES)]
WIDTH = 128
CROP = 64


def conv(a: int, b: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, size, stride, size // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = conv(width, width)

    def forward(self, x):
        return x + self.body(x)


class Judge(nn.Module):
    """Segmenter, object net on the masked crop, and a scene head on what surrounds the object.

    Pictures are [b, 128, 128, 3], uint8 or float 0..1, arrays or tensors; masks [b, 128, 128] likewise.
    """

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([conv(3, 16, 2, 5), conv(16, 32, 2), nn.Sequential(conv(32, 64, 2), Residual(64))])
        self.up = nn.ModuleList([conv(128, 32), conv(32, 16)])
        self.merge = nn.ModuleList([Residual(32), Residual(16)])
        self.cut = nn.Conv2d(16, 1, 3, 1, 1)
        self.object = nn.Sequential(
            conv(4, 32, 2, 5),
            conv(32, 64, 2),
            Residual(64),
            conv(64, 128, 2),
            Residual(128),
            conv(128, 96, 2),
            nn.Flatten(),
            nn.Linear(96 * 16, 192),
            nn.ReLU(),
        )
        self.likeness = nn.Linear(192, WIDTH)
        self.heads = nn.ModuleDict({n: nn.Linear(192, len(CLASSES[n])) for n in ("shape", "colour", "pattern")})
        self.ground = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(world.BACKGROUNDS)))
        self.place = nn.Sequential(nn.Linear(192 + 5, 64), nn.ReLU(), nn.Linear(64, sum(PLACE)))

    # x below: float [b, 3, 128, 128] in -1..1

    def segment(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits [b, 64, 64] and features [b, 64, 16, 16]."""
        a = self.down[0](x)
        b = self.down[1](a)
        c = self.down[2](b)
        whole = c.mean((2, 3), keepdim=True).expand_as(c)
        y = self.merge[0](F.interpolate(self.up[0](torch.cat([c, whole], 1)), scale_factor=2) + b)
        y = self.merge[1](F.interpolate(self.up[1](y), scale_factor=2) + a)
        return self.cut(y).float()[:, 0], c

    def hidden(self, x: torch.Tensor, mask: torch.Tensor, jitter: torch.Tensor | None = None, warp=None) -> tuple:
        """Object features [b, 192] inside the mask [b, 128, 128], and the object's box and area [b, 5].

        For learning: ``jitter`` [b, 3] in -1..1 moves and scales the box, ``warp`` [b, 64, 64, 2] bends what it holds.
        """
        box = extent(mask)
        centre, half = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]).amax(1) / 2 * 1.15
        if jitter is not None:
            centre, half = centre + 0.06 * half[:, None] * jitter[:, :2], half * (1 + 0.08 * jitter[:, 2])
        m = mask[:, None]
        straight = F.affine_grid(torch.eye(2, 3)[None], (1, 4, CROP, CROP), align_corners=False)
        grid = centre[:, None, None] + half[:, None, None, None] * (straight if warp is None else straight + warp)
        crop = F.grid_sample(torch.cat([x * m, m], 1), grid, align_corners=False)
        return self.object(crop), torch.cat([box, mask.mean((1, 2))[:, None] * 4], 1)

    def answers(self, features, h, shape, mask) -> dict[str, torch.Tensor]:
        """Factor -> logits."""
        outside = 1 - F.avg_pool2d(mask[:, None], 8)
        around = (features * outside).sum((2, 3)) / outside.sum((2, 3))
        position, size = self.place(torch.cat([h, shape.to(h.dtype)], 1)).split(PLACE, 1)
        out = {name: head(h) for name, head in self.heads.items()}
        out |= {"background": self.ground(around), "position": position, "size": size}
        return {name: v.float() for name, v in out.items()}

    @torch.no_grad()
    def mask(self, pictures) -> torch.Tensor:
        """Where the object is: float [b, 128, 128] in 0..1."""
        return torch.cat([enlarge(self.segment(x)[0].sigmoid()) for x in as_input(pictures).split(64)])

    @torch.no_grad()
    def logits(self, pictures) -> dict[str, torch.Tensor]:
        """Factor -> logits [b, names], in the order of CLASSES."""
        parts = []
        for x in as_input(pictures).split(64):
            cut, features = self.segment(x)
            mask = enlarge(cut.sigmoid())
            h, shape = self.hidden(x, mask)
            parts.append(self.answers(features, h, shape, mask))
        return {name: torch.cat([p[name] for p in parts]) for name in CLASSES}

    @torch.no_grad()
    def sides(self, pictures) -> list[dict[str, torch.Tensor]]:
        """For the left and the right half: shape, colour and pattern -> index [b] of the name seen in it."""
        x, found = as_input(pictures), []
        mask = self.mask(pictures)
        for half in (slice(0, world.SIZE // 2), slice(world.SIZE // 2, world.SIZE)):
            inside = torch.zeros_like(mask)
            inside[..., half] = mask[..., half]
            h = torch.cat([self.hidden(a, m)[0] for a, m in zip(x.split(64), inside.split(64), strict=True)])
            found.append({name: head(h).argmax(1) for name, head in self.heads.items()})
        return found

    def factors(self, pictures) -> dict[str, torch.Tensor]:
        """Factor -> index [b] of the name seen, in the order of CLASSES."""
        return {name: v.argmax(1) for name, v in self.logits(pictures).items()}

    @torch.no_grad()
    def embed(self, pictures, masks=None) -> torch.Tensor:
        """Unit embeddings [b, 128] of what lies inside ``masks``, or inside the predicted mask; see ``whole``."""
        x = as_input(pictures)
        m = self.mask(pictures) if masks is None else as_mask(masks)
        pairs = zip(x.split(64), m.split(64), strict=True)
        return torch.cat([F.normalize(self.likeness(self.hidden(a, b)[0]), dim=1) for a, b in pairs])


def whole(pictures) -> torch.Tensor:
    """Masks [b, 128, 128] that embed the whole picture, for a concept that is a style."""
    return torch.ones(len(pictures), world.SIZE, world.SIZE)


def as_input(pictures) -> torch.Tensor:
    """Pictures -> float [b, 3, 128, 128] in -1..1. Raises: ValueError for other shapes."""
    x = torch.as_tensor(pictures)
    if x.ndim != 4 or x.shape[1:] != (world.SIZE, world.SIZE, 3):
        raise ValueError(f"the judge needs pictures [b, {world.SIZE}, {world.SIZE}, 3], not {list(x.shape)}")
    x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float() * 2 - 1
    return x.permute(0, 3, 1, 2).contiguous()


def as_mask(masks) -> torch.Tensor:
    """Masks -> float [b, 128, 128] in 0..1."""
    m = torch.as_tensor(masks)
    return m.float() / 255 if m.dtype == torch.uint8 else m.float()


def enlarge(mask: torch.Tensor) -> torch.Tensor:
    return F.interpolate(mask[:, None], scale_factor=2, mode="bilinear")[:, 0]


def extent(mask: torch.Tensor) -> torch.Tensor:
    """Box (x0, y0, x1, y1) in -1..1 that holds the middle 98% of the mask's columns and rows; stray specks fall out."""
    m = mask * (mask > 0.5) + 1e-6
    n, ends = mask.shape[-1], []
    for axis in (1, 2):
        share = m.sum(axis).cumsum(1)
        share = share / share[:, -1:]
        low, high = (share < 0.01).sum(1), (share < 0.99).sum(1) + 1
        ends.append((low * 2 / n - 1, high * 2 / n - 1))
    return torch.stack([ends[0][0], ends[1][0], ends[0][1], ends[1][1]], 1)


def load(path: Path = FILE) -> Judge:
    """The packed judge, fp32, ready to ask."""
    judge = Judge()
    judge.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    return judge.eval().requires_grad_(False)


def rendered(some: list[world.Scene]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [n, 128, 128, 3] and masks uint8 [n, 128, 128]."""
    pictures = np.empty((len(some), world.SIZE, world.SIZE, 3), np.uint8)
    masks = np.empty(pictures.shape[:3], np.uint8)
    for i, scene in enumerate(some):
        pictures[i], masks[i] = (world.pixels(part) for part in world.render(scene))
    return pictures, masks


def plain_scene(novel: world.Novel, scene: world.Scene) -> world.Scene:
    """The scene that the concept's best plain words describe, at the place of ``scene``."""
    if novel.scene.style:
        return replace(scene, style="")
    colour, pattern, shape = novel.plain.split()
    return replace(scene, colour=colour, pattern=pattern, shape=shape, badge="", second="")

"""PCK: how often the place that features find for a point is the right one, where the right one is known.

Toy world: pairs of scenes of one shape and pattern, of other backgrounds, positions and colours, half of them of
another size. A point of the object has its counterpart in the other scene, because the renderer draws a silhouette
into a square that it tells (``world.box``). A place is right within 0.1 of the longer side of the other object's
bounding box, as in SPair-71k. All arms choose among 16 x 16 cells and go between them as Match Point does: DIFT by the
preset of Extract Features, DIFT at the best block and timestep of a sweep over other pairs, the latent, and pixels
(patches of 8 x 8).

One object on two grounds: overlap of moved masks with the true ones, and how often the second picture is found among
eight. The host's only example picture under known warps: right within 0.1 of the picture's side.

``nox -s bench -- pck [PAIRS]``
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from demo import measure, world

from . import toy
from .runner import RESULTS, machine

PAIRS, TUNING, POINTS, WARPS = 300, 40, 10, 12
SHARES = (0.05, 0.1, 0.2)
TIMESTEPS, NOISES = (1, 101, 261, 501, 801), 2
"""Of the sweep, which goes over the decoder's blocks."""
SIDE = world.SIZE


class Pair(NamedTuple):
    """Two scenes, points of the first one's object and where they are in the second."""

    scenes: tuple[world.Scene, world.Scene]
    points: np.ndarray
    """[k, 2] x and y in pixels."""
    truth: np.ndarray
    side: float
    """Longer side of the second object's bounding box in pixels."""
    masks: tuple[np.ndarray, np.ndarray]
    """Of the objects, bool [128, 128]."""


def moved(points: np.ndarray, a: world.Scene, b: world.Scene) -> np.ndarray:
    """Points [k, 2] of a's picture where b's picture shows the same of the object."""
    left, top, right, _ = world.box(a)
    x, y, end, _ = world.box(b)
    return (points - [left, top]) * (end - x) / (right - left) + [x, y]


def another(rng: random.Random, value: str, among: list[str]) -> str:
    return rng.choice([v for v in among if v != value])


def pair(rng: random.Random, recolour: bool = True) -> Pair:
    """A random pair and points that both objects' silhouettes hold."""
    a = world.named_scene(rng, hold=None)
    b = world.replace(
        a,
        colour=another(rng, a.colour, list(world.COLOURS)) if recolour else a.colour,
        background=another(rng, a.background, world.BACKGROUNDS),
        position=another(rng, a.position, world.POSITIONS),
        size=rng.choice(world.SIZES),
        seed=rng.randrange(2**31),
    )
    masks = [world.pixels(world.render(s)[1]) > 127 for s in (a, b)]
    y, x = masks[0].nonzero()
    points = np.stack([x, y], 1) + 0.5
    truth = moved(points, a, b)
    column, row = np.floor(truth).astype(int).clip(0, SIDE - 1).T
    both = masks[1][row, column].nonzero()[0]
    which = rng.sample(both.tolist(), POINTS)
    rows, columns = masks[1].any(1).nonzero()[0], masks[1].any(0).nonzero()[0]
    side = float(max(np.ptp(rows), np.ptp(columns)) + 1)
    return Pair((a, b), points[which], truth[which], side, tuple(masks))


def pictures(scenes: list[world.Scene]) -> torch.Tensor:
    """IMAGE [n, 128, 128, 3]."""
    return torch.from_numpy(np.stack([world.pixels(world.render(s)[0]) for s in scenes])).float() / 255


def raw(parts, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The arms without a denoiser, [n, c, h, w] on the latent's grid."""
    with torch.inference_mode():
        latent = parts[2].encode(x)
    patches = F.pixel_unshuffle(x.movedim(-1, 1) * 2 - 1, x.shape[1] // latent.shape[2])
    return {"latent": latent.clone(), "pixels": patches}


def dift(parts, latents: torch.Tensor, names: list[str], **by_hand) -> torch.Tensor:
    """Maps [n, c, h, w] under prompts that name each picture's class, as DIFT's authors do."""
    from concepts.host.feature_places import preset
    from concepts.host.features import extract

    found = None
    for name in sorted(set(names)):
        rows = [i for i, n in enumerate(names) if n == name]
        wants = preset(parts[0], "DIFT", [], **by_hand)
        maps = extract(parts[0], parts[1], latents[rows], wants, f"a photo of a {name}").maps["dift"]
        found = maps.new_zeros(len(names), *maps.shape[1:]) if found is None else found
        found[rows] = maps
    return found


def errors(maps: torch.Tensor, pairs: list) -> list[np.ndarray]:
    """Distances [k] in pixels of the found places from the true ones; maps: first, second, first, second, ..."""
    from concepts.carriers.features import Features
    from concepts.host.finding import places

    found = []
    for number, (points, truth) in enumerate(pairs):
        one, two = (Features({"map": maps[i : i + 1]}, SIDE, SIDE) for i in (2 * number, 2 * number + 1))
        seen = torch.cat([places(one, two, "map", x, y).best for x, y in points.tolist()])
        found.append(np.linalg.norm(seen.numpy() - truth, axis=1))
    return found


def right(found: list[np.ndarray], sides: list[float], share: float = 0.1) -> tuple:
    """PCK with its 95% interval over pairs."""
    return measure.bootstrap([np.mean(e <= share * side) for e, side in zip(found, sides, strict=True)])


def toy_world(parts, count: int, seed: int) -> tuple[list[Pair], torch.Tensor, list[str]]:
    """Pairs, pictures (first, second, first, ...) and the class of each picture."""
    rng = random.Random(seed)
    pairs = [pair(rng) for _ in range(count)]
    scenes = [s for p in pairs for s in p.scenes]
    return pairs, pictures(scenes), [s.shape for s in scenes]


def known(pairs: list[Pair]) -> list[tuple]:
    return [(p.points, p.truth) for p in pairs]


def sweep(parts, count: int) -> dict:
    """Block -> timestep -> PCK@0.1 on pairs of their own."""
    from concepts.host.feature_places import blocks_of

    pairs, x, names = toy_world(parts, count, seed=1)
    latents, table = raw(parts, x)["latent"], {}
    for block in [b for b in blocks_of(parts[0]) if b.startswith("output")]:
        for timestep in TIMESTEPS:
            maps = dift(parts, latents, names, block=block, timestep=timestep, ensemble=NOISES)
            score = right(errors(maps, known(pairs)), [p.side for p in pairs])
            table.setdefault(block, {})[timestep] = score
            print(f"{block} at {timestep}: {score[0]:.3f}", file=sys.stderr, flush=True)
    return table


def guesses(pairs: list[Pair]) -> list[np.ndarray]:
    """Errors of a random place of the second object, which an arm that finds objects but no parts would have."""
    rng, found = np.random.default_rng(0), []
    for p in pairs:
        y, x = p.masks[1].nonzero()
        which = rng.integers(len(x), size=len(p.truth))
        found.append(np.linalg.norm(np.stack([x[which], y[which]], 1) + 0.5 - p.truth, axis=1))
    return found


def propagated(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A mask [1, H, W] moved by label propagation alone (5 nearest cells, temperature 0.1), [H, W]."""
    labels = F.interpolate(mask[None], a.shape[-2:], mode="area").flatten()
    cosines, cells = (F.normalize(b.flatten(1), dim=0).T @ F.normalize(a.flatten(1), dim=0)).topk(5, 1)
    own = ((cosines / 0.1).softmax(1) * labels[cells]).sum(1).view(1, 1, *b.shape[-2:])
    return F.interpolate(own, mask.shape[-2:], mode="bilinear")[0, 0]


def same_object(parts, count: int, candidates: int = 8) -> dict:
    """One object on two grounds: overlap of moved masks at 0.5 with the true ones, and how often the second picture is
    found among ``candidates`` pictures of random objects; DIFT and PDM by their presets, prompt "a photo"."""
    from concepts.carriers.features import Features
    from concepts.host.feature_places import preset
    from concepts.host.features import extract
    from concepts.host.finding import ranked, transferred

    rng = random.Random(3)
    pairs = [pair(rng, recolour=False) for _ in range(count)]
    latents = raw(parts, pictures([s for p in pairs for s in p.scenes]))["latent"]
    maps = extract(parts[0], parts[1], latents, preset(parts[0], "DIFT + PDM", []), "a photo").maps
    table = {"mask": [], "mask, label propagation alone": [], "found, DIFT": [], "found, DIFT and PDM": []}
    for number, made in enumerate(pairs):
        mask = torch.from_numpy(made.masks[0]).float()[None]
        one, two = ({k: v[2 * number + i][None] for k, v in maps.items()} for i in (0, 1))
        moved = {
            "mask": transferred(Features(one, SIDE, SIDE), Features(two, SIDE, SIDE), "dift", mask)[0],
            "mask, label propagation alone": propagated(one["dift"][0], two["dift"][0], mask),
        }
        for key, value in moved.items():
            seen = value.numpy() > 0.5
            table[key].append((seen & made.masks[1]).sum() / (seen | made.masks[1]).sum())
        rows = [2 * ((number + i) % count) + 1 for i in range(candidates)]
        for key, kinds in (("found, DIFT", ["dift"]), ("found, DIFT and PDM", list(maps))):
            sides = [
                Features({k: m[k] for k in kinds}, SIDE, SIDE) for m in (one, {k: v[rows] for k, v in maps.items()})
            ]
            table[key].append(ranked(*sides, mask).order[0][0] == 0)
    return {key: measure.bootstrap(values) for key, values in table.items()}


def warped(picture: np.ndarray, rng: np.random.Generator, kind: str) -> tuple[np.ndarray, tuple]:
    """A picture [SIDE, SIDE, 3] in 0..1 flipped, cropped and jittered as ``kind`` says, and (offset, scale, flip)."""
    whole, offset, scale, flip = picture.shape[0], np.zeros(2), 1.0, "flip" in kind
    if "crop" in kind:
        scale = rng.uniform(0.6, 0.85)
        offset = rng.uniform(0, 1 - scale, 2)
    left, top = offset * whole
    box = (left, top, left + scale * whole, top + scale * whole)
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    image = image.resize((SIDE, SIDE), Image.BICUBIC, box=box)
    made = np.asarray(image).astype(np.float32) / 255
    made = made[:, ::-1] if flip else made
    if "jitter" in kind:
        made = (made ** rng.uniform(0.6, 1.6) * rng.uniform(0.6, 1.3, 3)).clip(0, 1)
    return made.astype(np.float32), (offset, scale, flip)


def landed(points: np.ndarray, warp: tuple) -> np.ndarray:
    """Where points [k, 2] of a picture of side 1 are after ``warped``."""
    offset, scale, flip = warp
    found = (points - offset) / scale
    found[:, 0] = 1 - found[:, 0] if flip else found[:, 0]
    return found


def example(parts) -> dict:
    """Warp -> arm -> PCK@0.1 of the picture's side, with intervals over warps of the host's one example picture."""
    file = Path(os.environ["COMFYUI_PATH"]) / "input" / "example.png"
    picture = np.asarray(Image.open(file).convert("RGB")).astype(np.float32) / 255
    first = warped(picture, None, "")[0]
    table = {}
    for kind in ("flip", "crop", "jitter", "flip, crop, jitter"):
        images, truth = [], []
        for seed in range(WARPS):
            rng = np.random.default_rng(seed)
            second, warp = warped(picture, rng, kind)
            points = rng.uniform(0, 1, (4 * POINTS, 2)) * warp[1] + warp[0]
            images += [first, second]
            truth.append((points * SIDE, landed(points, warp) * SIDE))
        x = torch.from_numpy(np.stack(images))
        maps = raw(parts, x)
        maps["DIFT"] = dift(parts, maps["latent"], ["girl"] * len(x))
        table[kind] = {arm: right(errors(m, truth), [float(SIDE)] * WARPS) for arm, m in maps.items()}
    return table


def main(options, rest) -> int:
    count = int(rest[0]) if rest else PAIRS
    toy.host()
    parts, begun = toy.load(), time.monotonic()
    swept = sweep(parts, TUNING)
    block, timestep = max(((b, t) for b in swept for t in swept[b]), key=lambda k: swept[k[0]][k[1]][0])
    pairs, x, names = toy_world(parts, count, seed=2)
    maps = raw(parts, x)
    maps = {"DIFT, preset": dift(parts, maps["latent"], names)} | maps
    maps[f"DIFT, {block} at {timestep}"] = dift(parts, maps["latent"], names, block=block, timestep=timestep)
    found = {arm: errors(m, known(pairs)) for arm, m in maps.items()} | {"place of the object": guesses(pairs)}
    sides = [p.side for p in pairs]
    table = {arm: {str(s): right(e, sides, s) for s in SHARES} for arm, e in found.items()}
    for arm, row in table.items():
        print(f"{arm:32s} " + "  ".join(f"@{s} {m:.3f} ({a:.3f}..{b:.3f})" for s, (m, a, b) in row.items()))
    warps = example(parts)
    for kind, row in warps.items():
        spans = [f"{arm} {m:.3f} ({a:.3f}..{b:.3f})" for arm, (m, a, b) in row.items()]
        print(f"example.png, {kind}: " + "  ".join(spans))
    same = same_object(parts, max(8, count // 3))
    for key, (m, a, b) in same.items():
        print(f"{key:32s} {m:.3f} ({a:.3f}..{b:.3f})")
    report = {
        "pairs": count,
        "points": POINTS,
        "seeds": {"sweep": 1, "pairs": 2, "same object": 3},
        "table": table,
        "same object": same,
        "sweep": swept,
        "example.png": warps,
        "seconds": time.monotonic() - begun,
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "pck.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

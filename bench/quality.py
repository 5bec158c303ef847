"""How well the toy world draws what a prompt says: held-out combinations, judged; and the VAE's PSNR.

Prompts name every factor of combinations (shape, colour, pattern) that never occurred in training; the transformer's
also two objects side by side. ``nox -s bench -- quality [unet|transformer] [COUNT]``
"""

import json
import math
import random
import time

import numpy as np
import torch

from demo import judge as judging
from demo import measure, world

from . import toy
from .runner import RESULTS, machine

GOALS = {"shape": 0.90, "pair shape": 0.90, "binding": 0.85, "psnr": 27.0}
OTHERS = 0.95


@torch.inference_mode()
def psnr(vae, count: int = 256, seed: int = 99) -> float:
    """Of fresh renders through the stock VAE nodes, in dB."""
    import nodes

    rng = random.Random(seed)
    scenes = [world.named_scene(rng) for _ in range(count)]
    x = torch.from_numpy(np.stack([world.pixels(world.render(s)[0]) for s in scenes])).float() / 255
    errors = []
    for part in x.split(32):
        (latent,) = nodes.VAEEncode().encode(vae, part)
        errors.append((nodes.VAEDecode().decode(vae, latent)[0] - part).square().mean())
    return -10 * math.log10(float(torch.stack(errors).mean()))


def pairs(parts, eyes, count: int, how: tuple) -> dict[str, float]:
    """Two objects side by side: shares of sides with the right shape, and with both the right colour and pattern."""
    rng = random.Random(4)
    scenes = [world.pair(rng, hold=True) for _ in range(count)]
    texts = [world.pair_caption(s, rng, full=True) for s in scenes]
    pictures = toy.draw(parts, [toy.prompt(parts, t) for t in texts], seed=1, how=how)
    shape, bound = [], []
    for number, side in enumerate(eyes.sides(pictures)):
        right = {
            f: side[f] == torch.tensor([judging.CLASSES[f].index(getattr(s[number], f)) for s in scenes]) for f in side
        }
        shape.append(right["shape"])
        bound.append(right["colour"] & right["pattern"])
    return {"pair shape": float(torch.cat(shape).double().mean()), "binding": float(torch.cat(bound).double().mean())}


def main(options, rest) -> int:
    kind = "transformer" if "transformer" in rest else "unet"
    count = next((int(word) for word in rest if word.isdigit()), 500)
    toy.host()
    how = toy.HOW if kind == "unet" else toy.FLOW
    parts, eyes, rng = toy.load(kind), judging.load(), random.Random(2)
    scenes = [world.named_scene(rng, hold=True) for _ in range(count)]
    begun = time.monotonic()
    pictures = toy.draw(parts, [toy.prompt(parts, world.caption(s, rng, full=True)) for s in scenes], seed=1, how=how)
    wanted = [{f: getattr(s, f) for f in world.FACTORS} for s in scenes]
    found = measure.accuracy(eyes, pictures, wanted)
    found |= {"psnr": psnr(parts[2])} if kind == "unet" else pairs(parts, eyes, count, how)
    for factor, value in found.items():
        goal = GOALS.get(factor, OTHERS)
        print(f"{factor:10s} {value:7.3f}  goal {goal:5.2f}  {'reached' if value >= goal else 'MISSED'}")
    RESULTS.mkdir(exist_ok=True)
    report = {
        "pictures": count,
        "settings": dict(zip(("steps", "cfg", "sampler", "scheduler"), how, strict=True)),
        "found": found,
        "seconds": time.monotonic() - begun,
        "machine": machine(),
    }
    name = "quality" if kind == "unet" else f"quality_{kind}"
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

"""How well the toy world draws what a prompt says: held-out combinations, judged; and the VAE's PSNR.

Prompts name every factor of combinations (shape, colour, pattern) that never occurred in training.
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

GOALS = {"shape": 0.90, "psnr": 27.0}
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


def main(options, rest) -> int:
    count = int(rest[0]) if rest else 500
    toy.host()
    parts, eyes, rng = toy.load(), judging.load(), random.Random(2)
    scenes = [world.named_scene(rng, hold=True) for _ in range(count)]
    begun = time.monotonic()
    pictures = toy.draw(parts, [toy.prompt(parts, world.caption(s, rng, full=True)) for s in scenes], seed=1)
    wanted = [{f: getattr(s, f) for f in world.FACTORS} for s in scenes]
    found = measure.accuracy(eyes, pictures, wanted) | {"psnr": psnr(parts[2])}
    for factor, value in found.items():
        goal = GOALS.get(factor, OTHERS)
        print(f"{factor:10s} {value:7.3f}  goal {goal:5.2f}  {'reached' if value >= goal else 'MISSED'}")
    RESULTS.mkdir(exist_ok=True)
    settings = {"steps": toy.STEPS, "cfg": toy.CFG, "sampler": toy.SAMPLER, "scheduler": toy.SCHEDULER}
    report = {
        "pictures": count,
        "settings": settings,
        "found": found,
        "seconds": time.monotonic() - begun,
        "machine": machine(),
    }
    (RESULTS / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

"""What rows per stage, layer and role cost while sampling, against the same prompt with plain tokens.

Toy world, stock KSampler, 20 steps with CFG, in pairs that take turns in one process. ``nox -s bench -- prompt_cost``
"""

import json
import os
import sys
import time

import torch

from . import toy
from .runner import RESULTS, machine, noisy, ratio, reference

PAIRS, GOAL = 9, 1.15
GRIDS = {"K/V split, 5 stages": (5, 1, 2), "6 layers": (1, 6, 1), "K/V split, 5 stages, 6 layers": (5, 6, 2)}
BATCHES = (1, 4)


def conditionings(parts) -> dict:
    """Name -> conditioning of one prompt."""
    from concepts.carriers.concept import Concept
    from concepts.host.variants import layers_of

    layers = layers_of(parts[0].model.diffusion_model)
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in {"plain": (1, 1, 1), **GRIDS}.items():
        rows = 0.1 * torch.randn(*shape, 1, 64, generator=g)
        info = {"layers": layers if shape[1] > 1 else []}
        found[name] = toy.prompt(parts, "a photo of a <mug> on grass", Concept("mug", "tokens", {"clip_l": rows}, info))
    return found


@torch.inference_mode()
def seconds(parts, positive, negative, batch: int) -> float:
    """Of one stock sampling."""
    import nodes

    (latent,) = nodes.EmptyLatentImage().generate(128, 128, batch)
    begun = time.perf_counter()
    nodes.common_ksampler(parts[0], 0, toy.STEPS, toy.CFG, toy.SAMPLER, toy.SCHEDULER, positive, negative, latent)
    return time.perf_counter() - begun


def main(options, rest) -> int:
    load, products = os.getloadavg()[0], [reference()]
    toy.host()
    parts = toy.load()
    found = conditionings(parts)
    negative, plain = toy.prompt(parts, ""), found.pop("plain")
    table = {}
    for batch in BATCHES:
        seconds(parts, plain, negative, batch)
        for name, varied in found.items():
            seconds(parts, varied, negative, batch)
            pairs = [[seconds(parts, c, negative, batch) for c in (plain, varied)] for _ in range(PAIRS)]
            products.append(reference())
            both, one = [b for _, b in pairs], [a for a, _ in pairs]
            table[f"{name}, batch {batch}"] = dict(zip(("varied / plain", "from", "to"), ratio(both, one), strict=True))
    why = noisy(products, load)
    if why and not options.accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    for name, row in table.items():
        middle, low, high = row.values()
        verdict = "reached" if middle <= GOAL else "MISSED"
        print(f"{name:40s} {middle:.2f} ({low:.2f}..{high:.2f}) of a plain prompt's time; goal {GOAL}: {verdict}")
    report = {"noise": why, "reference_gflops": products, "machine": machine(), "goal": GOAL, "table": table}
    (RESULTS / "prompt_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

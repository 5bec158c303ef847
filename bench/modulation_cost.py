"""What five modulated words cost while sampling, against the same prompt without directions.

Flux's own class with random weights, a text of 256 rows, the stock sampler, in pairs that take turns in one process:
all its blocks (19 double, 38 single) at an eighth of its width and 512 px, and three blocks at its full width and 256
px. Five words of one and of three rows each, with a direction for every block; without a negative, as Flux samples, and
with one. ``nox -s bench -- modulation_cost``
"""

import json
import os
import sys
import time

import torch

from . import toy
from .runner import RESULTS, machine, noisy, ratio, reference

PAIRS, GOAL, STEPS, SIDE, TEXT, WIDTH, ROWS, POOLED = 3, 1.10, 2, 64, 256, 384, 1024, 64
PIECES = (1, 3)
SIDES = {"no negative": 1.0, "with a negative": 3.0}
FEW = {"hidden_size": 3072, "num_heads": 24, "depth": 1, "depth_single_blocks": 2}
CASES = {"57 blocks of width 384": ({}, SIDE, SIDES), "3 blocks of width 3072": (FEW, SIDE // 2, {"no negative": 1.0})}
"""Name -> changes of the configuration, side of the latent, and what is sampled with."""


def fill(network: torch.nn.Module, draw: torch.Generator) -> None:
    """Gives every parameter a value: matrices drawn by their inputs, scales 1, biases 0."""
    for name, value in network.named_parameters():
        if value.dim() > 1:
            drawn = torch.randn(value.shape, generator=draw, device=draw.device, dtype=value.dtype)
            value.data.copy_(drawn / value[0].numel() ** 0.5)
        else:
            value.data.fill_(0.0 if name.endswith("bias") else 1.0)


def model(changes: dict | None = None, dtype: torch.dtype = torch.float32, device="cpu"):
    """MODEL with seeded weights. ``changes``: of its configuration."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    given = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": POOLED}
    given |= {"context_in_dim": ROWS, "hidden_size": WIDTH, "mlp_ratio": 4.0, "num_heads": 3, "depth": 19}
    given |= {"depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True}
    config = comfy.supported_models.Flux({**given, "guidance_embed": True, "txt_ids_dims": [], **(changes or {})})
    config.set_inference_dtype(dtype, None)
    device = torch.device(device)
    made = comfy.model_base.Flux(config, device=device)
    fill(made.diffusion_model, torch.Generator(device).manual_seed(0))
    return comfy.model_patcher.ModelPatcher(made, load_device=device, offload_device=device)


def conditionings(patcher, rows: int = ROWS, width: int = WIDTH, pooled: int = POOLED) -> dict:
    """Name -> conditioning: one plain text, and the same with words; ``rows``, ``width``, ``pooled``: their lengths."""
    from concepts.host import modulation

    draw = torch.Generator().manual_seed(1)
    text = torch.randn(1, TEXT, rows, generator=draw)
    plain = [text, {"pooled_output": torch.randn(1, pooled, generator=draw)}]
    blocks = modulation.chosen_blocks(patcher.model.diffusion_model, "all")
    found = {"plain": [plain]}
    for pieces in PIECES:
        places = [
            modulation.Place(
                tuple(range(8 * word + 2, 8 * word + 2 + pieces)),
                0.1 * torch.randn(pieces, len(blocks), width, generator=draw),
                blocks,
                "words",
            )
            for word in range(5)
        ]
        found[f"5 words of {pieces}"] = [modulation.attach(plain, places)]
    return found


@torch.inference_mode()
def seconds(
    patcher, positive, negative, cfg: float, shape=(16, SIDE, SIDE), steps: int = STEPS, how=("euler", "simple")
) -> float:
    """Of one stock sampling of a latent of ``shape``; ``how``: sampler and scheduler."""
    import comfy.sample

    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))
    begun = time.perf_counter()
    comfy.sample.sample(
        patcher, noise, steps, cfg, *how, positive, negative, torch.zeros_like(noise), seed=0, disable_pbar=True
    )
    return time.perf_counter() - begun


def compared(changes: dict, side: int, sides: dict, products: list[float]) -> dict:
    """Rows of one of ``CASES``: time with words over time without."""
    table = {}
    with torch.inference_mode():
        patcher = model(changes)
        found = conditionings(patcher, width=changes.get("hidden_size", WIDTH))
        negative = [[torch.randn(1, TEXT, ROWS), {"pooled_output": torch.randn(1, POOLED)}]]
    plain, shape = found.pop("plain"), (16, side, side)

    def taken(words, cfg) -> float:
        return seconds(patcher, words, negative, cfg, shape)

    for called, cfg in sides.items():
        taken(plain, cfg)
        for name, words in found.items():
            taken(words, cfg)
            pairs = []
            for number in range(PAIRS):
                order = (plain, words) if number % 2 == 0 else (words, plain)
                both = [taken(c, cfg) for c in order]
                pairs.append(both if number % 2 == 0 else both[::-1])
                products.append(reference())
            parts = ratio([b for _, b in pairs], [a for a, _ in pairs])
            table[f"{name}, {called}"] = dict(zip(("with / without", "from", "to"), parts, strict=True))
    return table


def main(options, rest) -> int:
    load, products = os.getloadavg()[0], [reference()]
    toy.host()
    table = {
        f"{case}: {name}": row for case, given in CASES.items() for name, row in compared(*given, products).items()
    }
    why = noisy(products, load)
    if why and not options.accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    for name, row in table.items():
        middle, low, high = row.values()
        verdict = "reached" if middle <= GOAL else "MISSED"
        print(f"{name:60s} {middle:.3f} ({low:.3f}..{high:.3f}) of the plain prompt's time; goal {GOAL}: {verdict}")
    report = {"noise": why, "reference_gflops": products, "machine": machine(), "goal": GOAL, "table": table}
    (RESULTS / "modulation_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

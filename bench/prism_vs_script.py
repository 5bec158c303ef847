"""A ConceptPrism step (stage 1) against the order of operations of the authors' script, on the same weights.

Half-width SD1.5 configuration, random weights, 256 px, fp32, batch 1, three anchors, five pictures. The peer does what
train_sd21_stage1.py of github.com/Minseo-Kimm/ConceptPrism does: four VAE encodes, seven calls of the text encoder
(three equal residual and three equal empty prompts), passes for reconstruction, residuals and null apart, AdamW over
the whole vocabulary. It is pinned to the mean of the VAE's posterior, to no weight decay, and to our start and draws,
so that both compute the same losses. ``bank``: ours with 16 kept null predictions per picture, whose making is spread
over a run of 200 steps; its draws are others, so its losses are not compared. ``nox -s bench -- prism_vs_script``;
``... count`` counts operations instead, here and at SD1.5's own width and 512 px.
"""

import json
import math
import time

import torch
import torch.nn.functional as F

from . import half, toy
from .runner import RESULTS, Peak, compare, same_losses, timed

STEPS, RUN, KEPT, RATE, LENGTH, ANCHORS, BETA = 8, 200, 16, 5e-4, 8, 3, 0.05


def settings(**more):
    """Ours; the residuals start at random, since the captions of this case describe nothing."""
    from concepts.host.learn_residual import ResidualSettings

    same = {"learning_rate": RATE, "residual_vectors": LENGTH, "anchors": ANCHORS, "beta": BETA, "seed": half.SEED}
    return ResidualSettings(
        "bench", steps=STEPS, init_text=half.WORD, residual_init="random", joined=False, decay=0.0, **same, **more
    )


def starts(parts) -> tuple[torch.Tensor, torch.Tensor]:
    """First rows of target [1, width] and residuals [pictures, n, width]."""
    from concepts.host.gradients import training
    from concepts.host.learn_residual import ResidualSession

    session = ResidualSession(*parts, settings())
    session.fingerprint = ""
    with torch.inference_mode(), training(parts[0], parts[1].patcher):
        session.begin()
        return session.start["clip_l"][0, 0, 0].clone(), session.start["residual.clip_l"].clone()


def peer() -> dict:
    """The script's loop."""
    import diffusers
    import transformers

    toy.host()
    unet, vae, text = half.peers()
    parts = half.parts(unet, vae, text)
    target, residuals = starts(parts)
    data = parts[2]
    del parts
    from comfy.sd1_clip import SD1Tokenizer

    from concepts.kernels.draws import generator, times

    noising, clip = half.scheduler(), SD1Tokenizer()
    empty = [int(t) for t, _ in clip.tokenize_with_weights("")["l"][0]]
    rows = torch.cat([target, residuals.flatten(0, 1)])
    text.resize_token_embeddings(49408 + len(rows))
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        table[49408:] = rows

    def prompt(*tokens: int) -> torch.Tensor:
        return torch.tensor([[empty[0], *tokens, *empty[1 : 77 - len(tokens)]]])

    def own(picture: int) -> list[int]:
        return [49408 + 1 + picture * LENGTH + i for i in range(LENGTH)]

    images = half.pictures().movedim(-1, 1) * 2 - 1

    def encoded(picture: int) -> torch.Tensor:
        with torch.no_grad():
            return vae.encode(images[picture][None]).latent_dist.mode() * 0.18215

    peak = Peak()
    table.requires_grad_(True)
    original, others = table.detach().clone(), torch.arange(len(table)) < 49408
    optimiser = torch.optim.AdamW([table], lr=RATE, weight_decay=0.0)
    losses, stamps = [], [time.perf_counter()]

    def noised(picture: int, draw) -> tuple:
        when = (times(1, "uniform", 0.0, 1.0, draw) * 1000).long().clamp(0, 999)
        return when, torch.randn((1, 4, half.SIZE // 8, half.SIZE // 8), generator=draw)

    for step in range(STEPS):
        draw = generator(half.SEED, step, "step")
        (picture,), _ = data.draw(1, draw)
        when, noise = noised(picture, draw)
        latent = encoded(picture)
        predicted = unet(noising.add_noise(latent, noise, when), when, text(prompt(49408, *own(picture)))[0]).sample
        loss = F.mse_loss(predicted, noise)
        order = torch.randperm(5, generator=draw).tolist()
        drawn = [(other, *noised(other, draw)) for other in [i for i in order if i != picture][:ANCHORS]]
        latents = torch.cat([noising.add_noise(encoded(i), n, t) for i, t, n in drawn])
        whens = torch.cat([t for _, t, _ in drawn])
        alone = torch.cat([text(prompt(*own(picture)))[0] for _ in drawn])
        with torch.no_grad():
            null = torch.cat([text(prompt())[0] for _ in drawn])
            nothing = unet(latents, whens, null).sample
        loss = loss + BETA * F.mse_loss(unet(latents, whens, alone).sample, nothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([table], 1.0)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            table[others] = original[others]
        losses.append(float(loss.detach()))
        stamps.append(time.perf_counter())
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return timed(losses, stamps, peak, versions)


def ours(bank: int = 0) -> dict:
    """The pack's loop; with a bank its predictions are made before the steps, and their time is added by shares."""
    modules = half.peers()
    toy.host()
    import comfyui_version

    from concepts.host.learn_residual import ResidualSession
    from concepts.kernels.draws import generator

    parts = half.parts(*modules)
    del modules
    session, making = ResidualSession(*parts, settings(null_bank=bank)), []
    if bank:
        prepare = session.prepare

        def prepared():
            found, begun = prepare(), time.perf_counter()
            draw, null = generator(0, 0, "fill"), session.exclusion.null
            while len(session.exclusion.bank) < bank * len(parts[2].latents):
                for picture in range(len(parts[2].latents)):
                    session.exclusion.anchor(picture, null, draw)
            making.append(time.perf_counter() - begun)
            return found

        session.prepare = prepared
    done, stamps, peak = half.clocked(session)
    assert all(map(math.isfinite, done.losses))
    found = timed(done.losses, stamps, peak, {"ComfyUI": comfyui_version.__version__})
    return found | {"seconds": found["seconds"] + sum(making) / RUN}


def check(ours: dict, peer: dict) -> float:
    """As ``same_losses``; the bank's noises are not the peer's, so there is nothing to compare."""
    return same_losses(ours, peer) if ours["compared"] else 0.0


def operations() -> dict[str, float]:
    """Products of a step, in passes of the UNet with one picture, and how many times less ours are."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(run) -> int:
        with FlopCounterMode(display=False) as counted:
            run()
        return counted.get_total_flops()

    with torch.device("meta"):
        unet, vae, text = half.peers()
        side, context = half.SIZE // 8, torch.randn(1, 77, 768, requires_grad=True)
        latent, ids = torch.randn(1, 4, side, side), torch.zeros(1, 77, dtype=torch.long)
        with torch.no_grad():
            one = count(lambda: unet(latent, 1, context))
            encoding = count(lambda: vae.encode(torch.randn(1, 3, half.SIZE, half.SIZE)))
            empty = count(lambda: text(ids))
        text.get_input_embeddings().weight.requires_grad_(True)
        learned = count(lambda: unet(latent, 1, context).sample.sum().backward())
        said = count(lambda: text(ids)[0].sum().backward())
    learning = (1 + ANCHORS) * learned  # the target's pass and the exclusion's
    found = {
        "peer": learning + ANCHORS * one + (1 + ANCHORS) * encoding + ANCHORS * empty + (1 + ANCHORS) * said,
        "ours": learning + ANCHORS * one + 2 * said,
        "bank": learning + 2 * said + KEPT * len(half.pictures()) * one / RUN,
    }
    return {k: v / one for k, v in found.items()} | {f"peer / {k}": found["peer"] / found[k] for k in ("ours", "bank")}


def main(options, rest) -> int:
    if "count" in rest:
        table = {"half the width, 256 px": operations()}
        half.whole()
        table["SD1.5 itself, 512 px"] = operations()
        (RESULTS / "prism_vs_script_count.json").write_text(json.dumps({"table": table}, indent=1) + "\n")
        print(json.dumps(table, indent=1))
        return 0
    if options.side:
        sides = {"peer": peer, "ours": ours, "bank": lambda: ours(KEPT)}
        print(json.dumps(sides[options.side]() | {"compared": options.side == "ours"}))
        return 0
    return compare("prism_vs_script", options.repeats, options.accept_noise, check, ("ours", "bank"))

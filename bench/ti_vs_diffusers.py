"""A Textual Inversion step through the host's UNet against diffusers' ``textual_inversion.py`` on the same weights.

Half-width SD1.5 configuration, random weights, 256 px, fp32, batch 1, twenty steps. The peer does what its script does:
encodes the picture with the VAE every step, keeps AdamW over the whole vocabulary and restores every row but one. So
that both see the same numbers it is pinned to the mean of the VAE's posterior, to no weight decay, and to our draws of
picture, time and noise.
"""

import json
import time

import torch
import torch.nn.functional as F

from . import toy
from .half import SEED, SIZE, WORD, clocked, parts, peers, pictures, scheduler
from .runner import Peak, compare, same_losses, timed

STEPS, RATE = 20, 5e-4


def draws(step: int, shape) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(picture, time index, noise) of our loop's step."""
    from concepts.host.concept_set import ConceptSet
    from concepts.kernels.draws import generator, times

    data = ConceptSet(
        tuple(torch.zeros(shape[1:]) for _ in range(5)), (None,) * 5, (("a photo of {}",),) * 5, (False,) * 5
    )
    draw = generator(SEED, step, "step")
    (picture,), _ = data.draw(1, draw)
    when = times(1, "uniform", 0.0, 1.0, draw)
    return picture, (when * 1000).long().clamp(0, 999), torch.randn(shape, generator=draw)


def peer() -> dict:
    """diffusers' loop."""
    import diffusers
    import transformers

    toy.host()
    unet, vae, text = peers()
    noising = scheduler()
    from comfy.sd1_clip import SD1Tokenizer

    plain = [int(t) for t, _ in SD1Tokenizer().tokenize_with_weights(f"a photo of {WORD}")["l"][0]]
    word = plain[4]
    text.resize_token_embeddings(49409)
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        table[49408] = table[word]
    ids = torch.tensor([plain[:4] + [49408] + plain[5:]])
    images = pictures().movedim(-1, 1) * 2 - 1
    peak = Peak()
    table.requires_grad_(True)
    original = table.detach().clone()
    others = torch.ones(len(table), dtype=torch.bool)
    others[49408] = False
    optimiser = torch.optim.AdamW([table], lr=RATE, weight_decay=0.0)
    losses, stamps = [], [time.perf_counter()]
    for step in range(STEPS):
        picture, when, noise = draws(step, (1, 4, SIZE // 8, SIZE // 8))
        with torch.no_grad():
            latent = vae.encode(images[picture][None]).latent_dist.mode() * 0.18215
        hidden = text(ids)[0]
        predicted = unet(noising.add_noise(latent, noise, when), when, hidden).sample
        loss = F.mse_loss(predicted.float(), noise, reduction="mean")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            table[others] = original[others]
        losses.append(float(loss.detach()))
        stamps.append(time.perf_counter())
    return timed(losses, stamps, peak, {"diffusers": diffusers.__version__, "transformers": transformers.__version__})


def ours() -> dict:
    """The pack's loop, as the node calls it, without previews and autosaves."""
    modules = peers()
    toy.host()
    import comfyui_version

    from concepts.host.learn_tokens import TokenSession, TokenSettings

    settings = TokenSettings("bench", steps=STEPS, init_text=WORD, learning_rate=RATE, seed=SEED)
    made = parts(*modules)
    del modules
    done, stamps, peak = clocked(TokenSession(*made, settings))
    return timed(done.losses, stamps, peak, {"ComfyUI": comfyui_version.__version__})


def main(options, rest) -> int:
    if options.side:
        print(json.dumps({"ours": ours, "peer": peer}[options.side]()))
        return 0
    return compare("ti_vs_diffusers", options.repeats, options.accept_noise, same_losses)

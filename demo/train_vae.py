"""The stages ``vae`` and ``decoder`` of train.py: the toy world's autoencoder, and what later stages take from it."""

import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from . import world
from .trainer import Trainer, half

PICTURES = 16000
THINGS = 0.25


def training_scenes(count: int, seed: int) -> list[world.Scene]:
    """Named scenes without the held-out combinations, and things."""
    rng = random.Random(seed)
    return [world.thing_scene(rng) if rng.random() < THINGS else world.named_scene(rng) for _ in range(count)]


def pictures(scenes: list[world.Scene], file: Path) -> torch.Tensor:
    """Renders once, then reads back: uint8 [n, 128, 128, 3]."""
    if not file.is_file():
        np.save(file, np.stack([world.pixels(world.render(s)[0]) for s in scenes]))
    return torch.from_numpy(np.load(file))


def to_input(batch: torch.Tensor) -> torch.Tensor:
    """uint8 [b, h, w, 3] -> float [b, 3, h, w] in -1..1."""
    return batch.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # channels-last is 3x slower here


def initialise(module: torch.nn.Module) -> None:
    """torch's default initialisation; the host's layers leave theirs out."""
    for part in module.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm):
            if isinstance(part, kind):
                kind.reset_parameters(part)


def sheet(batch: torch.Tensor, columns: int, file: Path) -> None:
    """Writes float pictures [n, 3, h, w] in -1..1 as one PNG."""
    rows = [torch.cat(list(batch[i : i + columns]), 2) for i in range(0, len(batch), columns)]
    grid = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu()
    Image.fromarray(grid.numpy()).save(file)


def train_vae(work: Path, steps: int) -> dict:
    """8x autoencoder; returns its averaged weights."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from host.toybox import VAE

    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE["params"])
    initialise(vae)
    for part in vae.modules():  # residual branches start at zero
        if type(part).__name__ == "ResnetBlock":
            torch.nn.init.zeros_(part.conv2.weight)
    data = pictures(training_scenes(PICTURES, 0), work / "pictures.npy")
    trainer = Trainer("vae", {"vae": vae}, work, steps, 2e-3)

    def loss_of(step, g):
        x = to_input(data[torch.randint(len(data), (8,), generator=g)])
        with half():
            mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
            logvar = logvar.clamp(-12, 4)
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=g)
            y = vae.decoder(vae.post_quant_conv(z))
        error = y.float() - x
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return (error.square() + 0.05 * error.abs()).mean() + 1e-4 * divergence

    def report():
        x = to_input(data[:8])
        y = vae.decode(vae.quant_conv(vae.encoder(x)).chunk(2, 1)[0])
        print("  PSNR", f"{10 * math.log10(4 / (y - x).square().mean()):.2f} dB", flush=True)
        sheet(torch.cat([x, y]), 8, work / "vae.png")

    trainer.run(loss_of, report)
    return {k.removeprefix("vae."): v for k, v in trainer.average.items()}


def normalised(state: dict, data: torch.Tensor) -> dict:
    """Rewrites the VAE's last and first layers so that every latent channel has mean 0 and deviation 1."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from host.toybox import VAE

    vae = AutoencoderKL(**VAE["params"])
    vae.load_state_dict(state)
    with torch.no_grad():
        means = vae.quant_conv(vae.encoder(to_input(data[:256]))).chunk(2, 1)[0]
        mu, sd = means.mean((0, 2, 3)), means.std((0, 2, 3))
        n = len(mu)
        weight, bias = state["quant_conv.weight"].clone(), state["quant_conv.bias"].clone()
        weight[:n] /= sd[:, None, None, None]
        bias[:n] = (bias[:n] - mu) / sd
        back = state["post_quant_conv.weight"]
        return {
            **state,
            "quant_conv.weight": weight,
            "quant_conv.bias": bias,
            "post_quant_conv.weight": back * sd[None, :, None, None],
            "post_quant_conv.bias": state["post_quant_conv.bias"] + (back[:, :, 0, 0] @ mu),
        }


def load_vae(work: Path, data: torch.Tensor, decoder: str = "decoder.pt"):
    """The trained VAE with normalised latents, with the longer trained decoder where there is one."""
    from comfy.ldm.models.autoencoder import AutoencoderKL

    from host.toybox import VAE

    state = torch.load(work / "vae.pt", weights_only=True)["average"]
    vae = AutoencoderKL(**VAE["params"])
    vae.load_state_dict(normalised({k.removeprefix("vae."): v for k, v in state.items()}, data))
    if decoder and (work / decoder).is_file():
        vae.load_state_dict(torch.load(work / decoder, weights_only=True)["average"], strict=False)
    return vae.requires_grad_(False)


def psnr(vae, batch: torch.Tensor) -> float:
    """Of reconstructions of uint8 pictures, in dB; clipped as the host's VAE node clips."""
    x = to_input(batch)
    errors = [
        (vae.decode(vae.quant_conv(vae.encoder(p)).chunk(2, 1)[0]).clamp(-1, 1) - p).square().mean()
        for p in x.split(32)
    ]
    return 10 * math.log10(4 / torch.stack(errors).mean())


def train_decoder(work: Path, steps: int) -> None:
    """The decoder goes on alone: latents, and with them the denoiser's task, stay what they are."""
    data = pictures(training_scenes(PICTURES, 0), work / "pictures.npy")
    vae = load_vae(work, data, decoder="")
    z = latents(vae, data, work)
    for part in ("decoder", "post_quant_conv"):
        getattr(vae, part).requires_grad_(True)
    fresh = torch.from_numpy(np.stack([world.pixels(world.render(s)[0]) for s in training_scenes(256, 99)]))
    trainer = Trainer("decoder", {"": vae}, work, steps, 1.5e-3, decay=0.0)

    def loss_of(step, g):
        pick = torch.randint(len(data), (8,), generator=g)
        with half():
            y = vae.decoder(vae.post_quant_conv(z[pick])).float()
        error = y - to_input(data[pick])
        return (error.square() + 0.02 * error.abs()).mean()

    trainer.run(loss_of, lambda: print(f"  PSNR {psnr(vae, fresh):.2f} dB", flush=True), every=100)


def encode(vae, batch: torch.Tensor) -> torch.Tensor:
    """Posterior means of uint8 pictures, fp32."""
    x = to_input(batch.to(vae.quant_conv.weight.device))
    with half():
        return vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)[0].cpu()


def latents(vae, data: torch.Tensor, work: Path) -> torch.Tensor:
    """Cached latents of all pictures."""
    file = work / "latents.pt"
    if not file.is_file():
        with torch.no_grad():
            torch.save(torch.cat([encode(vae, data[i : i + 64]) for i in range(0, len(data), 64)]), file)
    return torch.load(file, weights_only=True)

"""Trains the toy world's model and judge from nothing: ``nox -s train``.

Stages, each resumable after an interrupt: ``vae`` and ``decoder`` (train_vae.py; the second alone, on finished
latents), ``unet`` (denoiser and text encoder together), ``pack``, ``polish`` (the packed denoiser alone, on new
pictures with many small patterned objects). ``dit``, ``polish-dit`` and ``patterns-dit`` (train_dit.py) train a
diffusion transformer on the packed autoencoder; ``all`` leaves them out. Working files go to ``--work``; ``pack``,
``polish`` and these three write the bf16 files that the repository carries. On two cores of an AMD EPYC about four
hours: VAE 50 minutes, decoder 12, denoiser 100 (0.43 s a step on an otherwise idle machine), polish 50. The transformer
wants a GPU: ``dit --gpu``, then ``polish-dit --gpu --dit-steps 1600 --dit-pictures 12000``. Of the rounds of
``patterns-dit``, the first four are for the two cores, each with ``--dit-batch 64``: 2,800 steps on 16,000 pictures
take 100 minutes, ``--dit-round 1`` 2,000 on as many 30, and rounds 2 and 3 7,500 and 6,500 on 32,000 an hour each where
the processor has bf16 units. The last, ``--gpu --dit-batch 256 --dit-round 4 --dit-steps 3500 --dit-pictures 100000``,
takes four minutes on an H200, and three more for its pictures.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from . import world
from .train_vae import (
    PICTURES,
    initialise,
    latents,
    load_vae,
    pictures,
    sheet,
    to_input,
    train_decoder,
    train_vae,
    training_scenes,
)
from .trainer import Trainer, half

END = 49407
SCALE = 0.25
"""Of latents in the denoiser: at the highest noise of the host's schedule nothing of a picture may show through, or the
denoiser reads backgrounds and places from it and never learns the words for them."""

PLACES_FIRST = 6000
"""Steps that favour high noise, where ground and place are decided; outlines, decided below, have the rest."""


def start_host(path: Path, gpu: bool = False) -> None:
    """Imports ComfyUI from ``path`` with arguments of its own."""
    sys.path.insert(0, str(path))
    # torch's fused attention has a slow backward on a CPU
    kept, sys.argv = sys.argv, sys.argv[:1] + ([] if gpu else ["--cpu", "--use-split-cross-attention"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = kept


def small_scenes(count: int, seed: int) -> list[world.Scene]:
    """As ``training_scenes``, but every second object is small and has a texture: what a denoiser learns last."""
    rng, scenes = random.Random(seed), training_scenes(count, seed)
    for i in range(0, count, 2):
        pattern = rng.choice(world.PATTERNS[1:])
        if not world.held_out(scenes[i].shape, scenes[i].colour, pattern):
            scenes[i] = world.replace(scenes[i], size="small", pattern=pattern)
    return scenes


def caption_ids(scenes: list[world.Scene], tokenizer, work: Path, per_scene: int = 4) -> torch.Tensor:
    """Host token ids [scenes, per_scene, 77] of seeded captions."""
    file = work / "captions.pt"
    if not file.is_file():
        rng = random.Random(1)
        rows = [
            [
                [t for t, _ in tokenizer.tokenize_with_weights(world.caption(s, rng, full=i == 0))["l"][0]]
                for i in range(per_scene)
            ]
            for s in scenes
        ]
        torch.save(torch.tensor(rows, dtype=torch.int32), file)
    return torch.load(file, weights_only=True)


class Denoiser(torch.nn.Module):
    """Host UNet and host text encoder; the token table holds only the rows that captions use."""

    def __init__(self, clip, model, used: torch.Tensor):
        super().__init__()
        from host import toybox

        self.unet, self.sampling = model.model.diffusion_model, model.model.model_sampling
        self.text = clip.cond_stage_model.clip_l.transformer
        for p in [*self.unet.parameters(), *self.text.parameters()]:
            p.requires_grad_(True)
        self.text.get_input_embeddings().weight.requires_grad_(False)
        self.table = torch.nn.Parameter(toybox.initial_table()[used])
        self.heads = torch.nn.ModuleDict({f: torch.nn.Linear(toybox.WIDTH, len(v)) for f, v in world.FACTORS.items()})
        self.register_buffer("place", torch.full((49408,), -1))
        self.place[used] = torch.arange(len(used))

    def context(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [b, 77] -> encoder output [b, 77, width], as the host's SD1 path computes it."""
        return self.text(
            None,
            None,
            embeds=self.table[self.place[ids.long()]],
            num_tokens=[77] * len(ids),
            intermediate_output=None,
            final_layer_norm_intermediate=True,
            dtype=torch.float32,
        )[0]

    def confusion(self, context: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """How badly the padding behind a caption [b, 77, width] tells its factors (labels [b, 6], -1 for none).

        The role of CLIP's contrastive training: most of what the denoiser attends to is padding, and a text encoder
        that only hears from the denoiser forgets words before the denoiser has learned to use them.
        """
        padding = (ids == END).float()[..., None]
        told = (context.float() * padding).sum(1) / padding.sum(1)
        return sum(
            F.cross_entropy(head(told), labels[:, i], ignore_index=-1) for i, head in enumerate(self.heads.values())
        )

    def noise(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Predicted noise for variance-exploding x at discrete timesteps t."""
        sigma = self.sampling.sigma(t.float()).view(-1, 1, 1, 1)
        return self.unet(x / (sigma**2 + 1) ** 0.5, t.float(), context=context, transformer_options={})

    def error(self, z, u, context, region, g: torch.Generator) -> torch.Tensor:
        """Weighted noise error of latents z [b, ...] at times u [b] in 0..1; ``region`` [b, 1, h, w] weighs places."""
        sigmas = self.sampling.sigmas
        t = (1000 * u).long()
        noise = torch.randn(z.shape, generator=g)
        x = z + sigmas[t].view(-1, 1, 1, 1) * noise
        with half():
            predicted = self.noise(x, t, context)
        level = sigmas[t] / SCALE
        placed = (level < 10).view(-1, 1, 1, 1)  # above, the square would give the place away
        error = ((predicted.float() - noise).square() * torch.where(placed, region, 1.0)).mean((1, 2, 3))
        return (error * level.clamp(0.3, 60)).mean()  # without it, high noise hardly counts in an error of noise


def attention_to_objects(scenes: list[world.Scene], cells: int = 16) -> torch.Tensor:
    """Weights [n, 1, cells, cells] with mean 1: five times as much within the square around the object.

    The square tells nothing about the shape, so the denoiser's answer stays the same; it is learned sooner, since
    the texture of the ground, which nothing can predict, weighs less.
    """
    edges = (torch.arange(cells) + 0.5) * world.SIZE / cells
    left, top, right, bottom = torch.tensor([world.box(s) for s in scenes]).T[..., None]
    margin = world.SIZE / cells
    across = (edges > left - margin) & (edges < right + margin)
    down = (edges > top - margin) & (edges < bottom + margin)
    weight = 1 + 4.0 * (down[:, :, None] & across[:, None, :])[:, None]
    return weight / weight.mean((2, 3), keepdim=True)


def train_text(net, ids: torch.Tensor, labels: torch.Tensor, work: Path, steps: int = 1500, batch: int = 64) -> None:
    """A head start for the text encoder: to tell the factors that captions name."""
    from host.gradients import safe_residuals

    trainer = Trainer("text", {"text": net.text, "heads": net.heads}, work, steps, 1e-3, ema=0.99)

    def loss_of(step, g):
        pick = torch.randint(len(ids), (batch,), generator=g)
        words = ids[pick, torch.randint(ids.shape[1], (batch,), generator=g)].long()
        with half():
            context = net.context(words)
        return net.confusion(context, words, labels[pick])

    with safe_residuals(net.text):
        trainer.run(loss_of)


def train_unet(work: Path, steps: int, batch: int = 32) -> None:
    """Denoiser and text encoder: noise prediction, 10% empty captions, latents scaled as in arXiv 2301.10972."""
    from host import toybox
    from host.gradients import safe_residuals

    scenes = training_scenes(PICTURES, 0)
    data = pictures(scenes, work / "pictures.npy")
    vae = load_vae(work, data)
    z = SCALE * latents(vae, data, work)
    torch.manual_seed(1)
    model, clip = toybox.build_model(), toybox.build_clip()
    initialise(model.model.diffusion_model)
    initialise(clip.cond_stage_model)
    torch.nn.init.normal_(
        clip.cond_stage_model.clip_l.transformer.text_model.embeddings.position_embedding.weight, std=0.02
    )
    for module in model.model.diffusion_model.modules():  # the usual zero start of residual branches
        if type(module).__name__ == "ResBlock":
            torch.nn.init.zeros_(module.out_layers[-1].weight)
    torch.nn.init.zeros_(model.model.diffusion_model.out[-1].weight)
    ids = caption_ids(scenes, clip.tokenizer, work)
    empty = torch.tensor([t for t, _ in clip.tokenizer.tokenize_with_weights("")["l"][0]])
    used = torch.cat([ids.flatten().unique().long(), empty]).unique()
    net = Denoiser(clip, model, used)
    print("parameters", sum(p.numel() for p in net.unet.parameters()), "words", len(used), flush=True)
    labels = torch.tensor([list(s.labels().values()) for s in scenes])
    if not (work / "unet.pt").is_file():
        train_text(net, ids, labels, work)
    trainer = Trainer("unet", {"net": net}, work, steps, 1.5e-3, decay=0.01, ema=0.999)
    region = attention_to_objects(scenes)

    def loss_of(step, g):
        pick = torch.randint(len(z), (batch,), generator=g)
        words = ids[pick, torch.randint(ids.shape[1], (batch,), generator=g)].long()
        words[torch.rand(batch, generator=g) < 0.1] = empty
        u = torch.rand(batch, generator=g)
        with half():
            context = net.context(words)
        error = net.error(z[pick], u.sqrt() if step < PLACES_FIRST else u, context, region[pick], g)
        return error + 0.003 * net.confusion(context, words, labels[pick])

    rng = random.Random(5)
    shown = [world.named_scene(rng, hold=True) for _ in range(24)]
    prompt_ids = torch.tensor(
        [[t for t, _ in clip.tokenizer.tokenize_with_weights(world.caption(s, rng, full=True))["l"][0]] for s in shown]
    )

    def report():
        context = torch.cat([net.context(empty[None]).expand(len(shown), -1, -1), net.context(prompt_ids)])
        x = torch.randn(len(shown), *z.shape[1:], generator=torch.Generator().manual_seed(3))
        ladder = torch.linspace(999, 0, 21).long()
        sigmas = torch.cat([net.sampling.sigmas[ladder[:-1]], torch.zeros(1)])
        x = x * sigmas[0]
        for i in range(20):
            none, some = net.noise(torch.cat([x, x]), ladder[i].expand(2 * len(shown)), context).chunk(2)
            x = x + (sigmas[i + 1] - sigmas[i]) * (none + 3.0 * (some - none))
        sheet(vae.decode(x / SCALE), 8, work / f"unet-{trainer.step:05d}.png")

    with safe_residuals(net.text):
        trainer.run(loss_of, report, every=250)


def polish(work: Path, file: Path, number: int, steps: int, batch: int = 32) -> None:
    """Goes on with the denoiser of a packed file, and writes it there; text encoder and VAE stay as they are.

    Every round, by its ``number``, has pictures of its own.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from host import toybox

    kept = work / f"polish-{number}" / "before.safetensors"
    kept.parent.mkdir(exist_ok=True)
    if not kept.is_file():
        kept.write_bytes(file.read_bytes())
    model, clip, vae = toybox.load(kept)
    scenes = small_scenes(PICTURES, 7 + number)
    data = pictures(scenes, kept.parent / "pictures.npy")
    z = SCALE * latents(vae.first_stage_model, data, kept.parent)
    ids = caption_ids(scenes, clip.tokenizer, kept.parent)
    empty = torch.tensor([t for t, _ in clip.tokenizer.tokenize_with_weights("")["l"][0]])
    net = Denoiser(clip, model, torch.cat([ids.flatten().unique().long(), empty]).unique())
    net.table.data = net.text.get_input_embeddings().weight[net.place >= 0].clone()
    net.requires_grad_(False)
    trainer = Trainer("unet", {"unet": net.unet.requires_grad_(True)}, kept.parent, steps, 5e-4)
    region = attention_to_objects(scenes)

    def loss_of(step, g):
        pick = torch.randint(len(z), (batch,), generator=g)
        words = ids[pick, torch.randint(ids.shape[1], (batch,), generator=g)].long()
        words[torch.rand(batch, generator=g) < 0.1] = empty
        with torch.no_grad(), half():
            context = net.context(words)
        return net.error(z[pick], torch.rand(batch, generator=g), context, region[pick], g)

    trainer.run(loss_of)
    state = load_file(kept)
    for name, value in trainer.average.items():
        state["model.diffusion_model." + name.removeprefix("unet.")] = value.to(torch.bfloat16)
    with safe_open(kept, "pt") as before:
        save_file(state, file, metadata=before.metadata())


def pack(work: Path, file: Path) -> None:
    """Writes the trained parts as one bf16 checkpoint."""
    import json

    from safetensors.torch import save_file

    from host import toybox

    scenes = training_scenes(PICTURES, 0)
    data = pictures(scenes, work / "pictures.npy")
    vae = load_vae(work, data)
    z = SCALE * latents(vae, data, work)
    average = {k.removeprefix("net."): v for k, v in torch.load(work / "unet.pt", weights_only=True)["average"].items()}
    clip = toybox.build_clip()
    empty = [t for t, _ in clip.tokenizer.tokenize_with_weights("")["l"][0]]
    used = torch.cat(
        [caption_ids(scenes, clip.tokenizer, work).flatten().unique().long(), torch.tensor(empty)]
    ).unique()
    small = F.interpolate(to_input(data[:200]), scale_factor=1 / 8, mode="area").permute(0, 2, 3, 1).reshape(-1, 3)
    design = torch.cat([z[:200].permute(0, 2, 3, 1).reshape(-1, z.shape[1]), torch.ones(len(small), 1)], 1)
    rgb = torch.linalg.lstsq(design, small).solution
    state = {"model.diffusion_model." + k.removeprefix("unet."): v for k, v in average.items() if k.startswith("unet.")}
    state |= {
        "cond_stage_model.transformer." + k.removeprefix("text."): v
        for k, v in average.items()
        if k.startswith("text.")
    }
    state |= {"first_stage_model." + k: v for k, v in vae.state_dict().items()}
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}
    state["cond_stage_model." + toybox.TABLE] = average["table"].to(torch.bfloat16)
    state["cond_stage_model.token_ids"] = used.int()
    facts = {"scale_factor": SCALE, "rgb": rgb[:-1].tolist(), "rgb_bias": rgb[-1].tolist()}
    save_file(state, file, metadata={"toybox": json.dumps(facts), "modelspec.title": "Concept Carriers toy world"})
    print(file.name, f"{file.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stage", choices=["vae", "decoder", "unet", "pack", "polish", "dit", "polish-dit", "patterns-dit", "all"]
    )
    parser.add_argument("--host", type=Path, required=True, help="ComfyUI folder")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--vae-steps", type=int, default=2600)
    parser.add_argument("--decoder-steps", type=int, default=1600)
    parser.add_argument("--unet-steps", type=int, default=14000)
    parser.add_argument("--polish-steps", type=int, nargs="*", default=[4000, 2500], help="of every round")
    parser.add_argument("--dit-steps", type=int, default=4000)
    parser.add_argument("--dit-pictures", type=int, default=32000)
    parser.add_argument("--dit-batch", type=int, default=128)
    parser.add_argument("--dit-round", type=int, default=0, help="of patterns-dit")
    parser.add_argument("--gpu", action="store_true", help="for the transformer's stages")
    a = parser.parse_args()
    start_host(a.host.resolve(), a.gpu)
    a.work.mkdir(parents=True, exist_ok=True)
    packed = Path(__file__).with_name("toybox-unet.safetensors").resolve()
    if a.stage in ("vae", "all"):
        train_vae(a.work, a.vae_steps)
    if a.stage in ("decoder", "all"):
        train_decoder(a.work, a.decoder_steps)
    if a.stage in ("unet", "all"):
        train_unet(a.work, a.unet_steps)
    if a.stage in ("pack", "all"):
        pack(a.work, packed)
    if a.stage in ("polish", "all"):
        for number, steps in enumerate(a.polish_steps):
            polish(a.work, packed, number, steps)
    if a.stage.endswith("dit"):
        from . import train_dit

        transformer = packed.with_name("toybox-dit.safetensors")
        trained = train_dit.train_dit(
            a.work, a.stage, a.dit_steps, transformer, a.dit_pictures, a.dit_batch, a.dit_round
        )
        train_dit.pack(trained, transformer)


if __name__ == "__main__":
    main()

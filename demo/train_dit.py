"""The stage ``dit`` of train.py: the toy world's diffusion transformer and its T5, on pictures with one or two objects.

Flow matching (arXiv 2209.03003) on the latents of the packed autoencoder, a tenth of the captions empty.
"""

import random
from pathlib import Path

import numpy as np
import torch

from . import world

PAIRS = 0.5
"""Share of pictures with two objects."""
CAPTIONS = 4


def scenes_of(count: int, seed: int) -> list[tuple[world.Scene, ...]]:
    """Pairs, things and named scenes without the held-out combinations."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        kind = rng.random()
        one = world.thing_scene if kind > 0.9 else world.named_scene
        made.append(world.pair(rng) if kind < PAIRS else (one(rng),))
    return made


def said(scenes: tuple[world.Scene, ...], rng: random.Random, full: bool = False) -> str:
    """A caption of one or two objects."""
    return world.caption(scenes[0], rng, full) if len(scenes) == 1 else world.pair_caption(scenes, rng, full)


class Flow(torch.nn.Module):
    """The host's Flux and T5; the token table holds only the rows that captions use."""

    def __init__(self, clip, model, used: torch.Tensor):
        super().__init__()
        from host import toydit

        self.dit, self.t5 = model.model.diffusion_model, clip.cond_stage_model.t5xxl.transformer
        for p in [*self.dit.parameters(), *self.t5.parameters()]:
            p.requires_grad_(True)
        self.t5.get_input_embeddings().weight.requires_grad_(False)
        self.table = torch.nn.Parameter(toydit.initial_table()[used])
        self.register_buffer("place", torch.full((32128,), -1))
        self.place[used] = torch.arange(len(used))

    def context(self, ids: torch.Tensor) -> torch.Tensor:
        """T5 token ids [b, n] -> encoder output [b, n, width], as the host's Flux path computes it."""
        return self.t5(None, None, embeds=self.table[self.place[ids.long()]], dtype=torch.float32)[0]

    def velocity(self, x, level, context, pooled) -> torch.Tensor:
        """Noise minus picture for latents x [b, c, h, w] at noise levels [b] in 0..1."""
        return self.dit(x, level, context, pooled, None, transformer_options={})


def texts(scenes, clip, work: Path) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
    """T5 ids [n, CAPTIONS, TOKENS] and pooled vectors [n, CAPTIONS, width] of seeded captions, and of the empty one."""
    from host import toydit

    file = work / "dit-texts.pt"
    if not file.is_file():
        rng, ids, pooled = random.Random(1), [], []
        for scene in scenes:
            both = [clip.tokenize(said(scene, rng, full=i == 0)) for i in range(CAPTIONS)]
            rows = [[t for t, _ in b["t5xxl"][0]] for b in both]
            assert max(map(len, rows)) == toydit.TOKENS, "a caption is longer than TOKENS"
            ids.append(rows)
            with torch.no_grad():
                pooled.append(torch.cat([clip.cond_stage_model.clip_l.encode_token_weights(b["l"])[1] for b in both]))
        torch.save((torch.tensor(ids, dtype=torch.int32), torch.stack(pooled)), file)
    ids, pooled = torch.load(file, weights_only=True)
    nothing = clip.tokenize("")
    with torch.no_grad():
        empty = clip.cond_stage_model.clip_l.encode_token_weights(nothing["l"])[1][0]
    return ids, pooled, [t for t, _ in nothing["t5xxl"][0]], empty


def weights_around_objects(scenes, cells: int = 16) -> torch.Tensor:
    """Weights [n, 1, cells, cells] with mean 1, as ``train.attention_to_objects`` has them for one object."""
    from .train import attention_to_objects

    both = torch.stack([attention_to_objects([one[min(i, len(one) - 1)] for one in scenes], cells) for i in (0, 1)])
    weight = 1 + 4.0 * (both > 1).any(0)
    return weight / weight.mean((2, 3), keepdim=True)


def noise_levels(count: int, g: torch.Generator) -> torch.Tensor:
    """Levels [count] in 0..1, logit-normal and moved up: place and ground, decided first, need most of them."""
    return (torch.randn(count, generator=g) + 0.6).sigmoid()


def build():
    """MODEL and CLIP with fresh weights but for the packed CLIP-L, and the packed autoencoder."""
    from host import toybox, toydit

    from .train import initialise

    _, packed, vae = toybox.load()
    torch.manual_seed(2)
    model, clip = toydit.build_model(), toydit.build_clip()
    network = model.model.diffusion_model
    initialise(network)
    initialise(clip.cond_stage_model.t5xxl)
    for name, p in [*network.named_parameters(), *clip.cond_stage_model.t5xxl.named_parameters()]:
        if "norm" in name and p.ndim == 1:
            torch.nn.init.ones_(p)
        if "mod" in name.lower() and "lin" in name or "final_layer" in name:  # blocks start as the identity
            torch.nn.init.zeros_(p)
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(p, std=0.1)
    clip.cond_stage_model.clip_l.load_state_dict(packed.cond_stage_model.clip_l.state_dict())
    return model, clip, vae.first_stage_model


def train_dit(work: Path, steps: int, pictures: int = 16000, batch: int = 32) -> None:
    """Trains, resumably; a sheet of held-out prompts every thousand steps."""
    import comfy.model_management

    from host.gradients import safe_residuals

    from .train import Trainer, encode, sheet

    comfy.model_management.in_training = True  # chooses rope and norm kernels that differentiate
    scenes = scenes_of(pictures, 11)
    model, clip, vae = build()
    file = work / "dit-latents.pt"
    if not file.is_file():
        parts = []
        for start in range(0, len(scenes), 64):
            drawn = [world.pixels(world.render(*s)[0]) for s in scenes[start : start + 64]]
            with torch.no_grad():
                parts.append(encode(vae, torch.from_numpy(np.stack(drawn))))
        torch.save(torch.cat(parts), file)
    z = torch.load(file, weights_only=True)
    ids, pooled, nothing, empty = texts(scenes, clip, work)
    used = torch.cat([ids.flatten().unique().long(), torch.tensor(nothing)]).unique()
    net = Flow(clip, model, used)
    print("parameters", sum(p.numel() for p in net.dit.parameters()), "words", len(used), flush=True)
    trainer = Trainer("dit", {"net": net}, work, steps, 1e-3, decay=0.01, ema=0.999)
    region, nothing = weights_around_objects(scenes), torch.tensor(nothing, dtype=torch.int32)

    def loss_of(step, g):
        pick, which = torch.randint(len(z), (batch,), generator=g), torch.randint(CAPTIONS, (batch,), generator=g)
        words, vectors = ids[pick, which].clone(), pooled[pick, which].clone()
        none = torch.rand(batch, generator=g) < 0.1
        words[none], vectors[none] = nothing, empty
        clean, noise = z[pick], torch.randn(z[pick].shape, generator=g)
        level = noise_levels(batch, g)
        x = torch.lerp(clean, noise, level.view(-1, 1, 1, 1))
        error = (net.velocity(x, level, net.context(words), vectors) - (noise - clean)).square()
        return (error * region[pick]).mean()

    rng = random.Random(5)
    shown = [world.pair(rng, True) if i % 3 else (world.named_scene(rng, True),) for i in range(24)]
    tokens = [clip.tokenize(said(s, rng, full=True)) for s in shown]
    prompts = torch.tensor([[t for t, _ in b["t5xxl"][0]] for b in tokens])
    with torch.no_grad():
        vectors = torch.cat([clip.cond_stage_model.clip_l.encode_token_weights(b["l"])[1] for b in tokens])

    def report():
        count = len(shown)
        context = torch.cat([net.context(nothing[None].expand(count, -1)), net.context(prompts)])
        both = torch.cat([empty.expand(count, -1), vectors])
        x = torch.randn(count, *z.shape[1:], generator=torch.Generator().manual_seed(3))
        levels = torch.linspace(1, 0, 21)
        for now, then in zip(levels[:-1], levels[1:], strict=True):
            plain, some = net.velocity(torch.cat([x, x]), now.expand(2 * count), context, both).chunk(2)
            x = x + (then - now) * (plain + 3.0 * (some - plain))
        sheet(vae.decode(x), 8, work / f"dit-{trainer.step:05d}.png")

    with safe_residuals(net.t5, net.dit):
        trainer.run(loss_of, report, every=250)

"""The stages ``dit``, ``polish-dit`` and ``patterns-dit`` of train.py: the toy world's diffusion transformer and its
T5, on pictures with one or two objects; from nothing, from the packed weights on new pictures, and from those the
transformer alone on pictures of which every second has a single textured object.

Flow matching (arXiv 2209.03003) on the latents of the packed autoencoder, a tenth of the captions empty.
"""

import functools
import multiprocessing
import random
from pathlib import Path

import numpy as np
import torch

from . import judge, world

PAIRS = 0.5
"""Share of pictures with two objects."""
CAPTIONS = 4
TEXTURES = ("dotted", "checkered", "banded"), ("dotted", "checkered")
"""What the transformer draws badly, in the first round of ``patterns-dit`` and in later ones."""
POOLED_AWAY = 0.5
"""Share of the pooled vectors that are the empty caption's: it must not take the place of T5's rows."""


def scenes_of(count: int, seed: int) -> list[tuple[world.Scene, ...]]:
    """Pairs, things and named scenes without the held-out combinations."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        kind = rng.random()
        one = world.thing_scene if kind > 0.9 else world.named_scene
        made.append(world.pair(rng) if kind < PAIRS else (one(rng),))
    return made


def patterned_scenes(count: int, number: int) -> list[tuple[world.Scene, ...]]:
    """As ``scenes_of``, but every second picture has one object with a texture of round ``number``."""
    rng, scenes = random.Random(13 + number), scenes_of(count, 13 + number)
    for i in range(0, count, 2):
        scene = world.named_scene(rng)
        pattern = rng.choice(TEXTURES[min(number, 1)])
        if not world.held_out(scene.shape, scene.colour, pattern):
            scene = world.replace(scene, pattern=pattern)
        scenes[i] = (scene,)
    return scenes


def said(scenes: tuple[world.Scene, ...], rng: random.Random, **how: bool) -> str:
    """A caption of one or two objects; ``how`` as ``world.caption`` has it."""
    return world.caption(scenes[0], rng, **how) if len(scenes) == 1 else world.pair_caption(scenes, rng, **how)


class Flow(torch.nn.Module):
    """The host's Flux and T5; the token table holds only the rows that captions use."""

    def __init__(self, clip, model, used: torch.Tensor):
        super().__init__()
        self.dit, self.t5 = model.model.diffusion_model, clip.cond_stage_model.t5xxl.transformer
        for p in [*self.dit.parameters(), *self.t5.parameters()]:
            p.requires_grad_(True)
        table = self.t5.get_input_embeddings().weight.requires_grad_(False)
        self.table = torch.nn.Parameter(table[used.to(table.device)].clone())
        self.register_buffer("place", torch.full((32128,), -1))
        self.place[used] = torch.arange(len(used))

    def context(self, ids: torch.Tensor) -> torch.Tensor:
        """T5 token ids [b, n] -> encoder output [b, n, width], as the host's Flux path computes it."""
        places = self.place[ids.to(self.place.device).long()]
        return self.t5(None, None, embeds=self.table[places], dtype=torch.float32)[0]

    def velocity(self, x, level, context, pooled) -> torch.Tensor:
        """Noise minus picture for latents x [b, c, h, w] at noise levels [b] in 0..1."""
        return self.dit(x, level, context, pooled, None, transformer_options={})


def spread(call, items: list, size: int = 64) -> list:
    """``call`` of (number of the first, part of ``items``), in processes of their own."""
    work = [(start, items[start : start + size]) for start in range(0, len(items), size)]
    with multiprocessing.get_context("fork").Pool() as pool:  # spawned ones would have to import the host again
        return pool.map(call, work)


@functools.cache
def tokenizer():
    """Of both text encoders."""
    from host import toydit

    return toydit.ToyFluxTokenizer()


def tokens_of(work) -> list[list[tuple[list[int], list]]]:
    """Per scene CAPTIONS pairs of T5's and CLIP's ids; the first says everything, the second nothing of looks."""
    made, (first, scenes) = [], work
    for number, scene in enumerate(scenes, first):
        rng = random.Random(f"caption/{number}")
        texts = [said(scene, rng, full=i == 0, bare=i == 1) for i in range(CAPTIONS)]
        both = [tokenizer().tokenize_with_weights(text) for text in texts]
        made.append([([t for t, _ in b["t5xxl"][0]], [t for t, _ in b["l"][0]]) for b in both])
    return made


def texts(scenes, clip, file: Path) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
    """T5 ids [n, CAPTIONS, TOKENS] and pooled vectors [n, CAPTIONS, width] of seeded captions, and of the empty one."""
    from host import toydit

    encoder = clip.cond_stage_model.clip_l
    if not file.is_file():
        tokenizer()  # once, for all processes
        both = [one for part in spread(tokens_of, scenes) for one in part]
        ids = torch.tensor([[t5 for t5, _ in one] for one in both], dtype=torch.int32)
        assert ids.shape[2] == toydit.TOKENS, "a caption is longer than TOKENS"
        short = [clip_ids for one in both for _, clip_ids in one]
        with torch.no_grad():
            pooled = [encoder.encode(short[start : start + 256])[1].cpu() for start in range(0, len(short), 256)]
        torch.save((ids, torch.cat(pooled).view(len(ids), CAPTIONS, -1)), file)
    ids, pooled = torch.load(file, weights_only=True)
    nothing = clip.tokenize("")
    with torch.no_grad():
        empty = encoder.encode_token_weights(nothing["l"])[1][0].cpu()
    return ids, pooled, [t for t, _ in nothing["t5xxl"][0]], empty


class WordHeads(torch.nn.Module):
    """What a noun's row of the text says of its object: shape, colour, pattern, ground and place."""

    FACTORS = ("shape", "colour", "pattern", "background", "position")

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [len(world.FACTORS[name]) for name in self.FACTORS]
        self.read = torch.nn.Linear(width, sum(self.sizes))

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy, and the share of right answers per factor, for rows [n, width], labels [n, 5]."""
        said = self.read(rows).split(self.sizes, 1)
        parts = [torch.nn.functional.cross_entropy(a, b, ignore_index=-1) for a, b in zip(said, labels.T, strict=True)]
        right = torch.stack([(a.argmax(1) == b).float().mean() for a, b in zip(said, labels.T, strict=True)])
        return sum(parts), right


def nouns(scenes, clip, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where nouns end in captions, and of what: places [m, 3] (scene, caption, row), labels [m, 5].

    Named objects alone, and of pairs those whose nouns differ.
    """
    pieces = {}
    for shape in world.SHAPES:
        own = [t for t, _ in clip.tokenize(shape)["t5xxl"][0]]
        pieces[shape] = own[: own.index(1)]  # 1 ends a text
    places, labels = [], []
    for number, (objects, captions) in enumerate(zip(scenes, ids.tolist(), strict=True)):
        named = [s for s in objects if s.shape in pieces and sum(s.shape == other.shape for other in objects) == 1]
        for scene in named:
            own, known = pieces[scene.shape], scene.labels()
            for which, row in enumerate(captions):
                starts = [i for i in range(len(row) - len(own)) if row[i : i + len(own)] == own]
                if len(starts) == 1:
                    places.append((number, which, starts[0] + len(own) - 1))
                    labels.append([known[name] for name in WordHeads.FACTORS])
    return torch.tensor(places), torch.tensor(labels)


def head_start(net: Flow, scenes, clip, ids: torch.Tensor, work: Path, steps: int = 2000, batch: int = 64) -> None:
    """T5 alone: a noun's row must say what its object is like.

    Without it the denoiser takes what it can from the pooled vector, which cannot bind looks to objects, before T5 says
    anything, and shuts its rows out for good.
    """
    from host.gradients import safe_residuals

    from .trainer import Trainer

    places, labels = nouns(scenes, clip, ids)
    device = net.table.device
    heads, seen, labels = WordHeads(net.table.shape[1]).to(device), [], labels.to(device)
    parts = {"t5": net.t5, "heads": heads, "words": torch.nn.ParameterDict({"table": net.table})}
    trainer = Trainer("dit-words", parts, work, steps, 1e-3, ema=0.99)

    def loss_of(step, g):
        pick = torch.randint(len(places), (batch,), generator=g)
        scene, which, row = places[pick].T
        rows = net.context(ids[scene, which])[torch.arange(batch, device=device), row.to(device)]
        loss, right = heads(rows, labels[pick.to(device)])
        seen.append(right.detach())
        return loss

    def report():
        share = torch.stack(seen[-200:]).mean(0).tolist()
        print("words", {k: round(v, 3) for k, v in zip(WordHeads.FACTORS, share, strict=True)}, flush=True)

    with safe_residuals(net.t5):
        trainer.run(loss_of, report)


def weights_around_objects(scenes, cells: int = 16) -> torch.Tensor:
    """Weights [n, 1, cells, cells] with mean 1, as ``train.attention_to_objects`` has them for one object."""
    from .train import attention_to_objects

    both = torch.stack([attention_to_objects([one[min(i, len(one) - 1)] for one in scenes], cells) for i in (0, 1)])
    weight = 1 + 4.0 * (both > 1).any(0)
    return weight / weight.mean((2, 3), keepdim=True)


class CellHeads(torch.nn.Module):
    """What every picture row shows, read off the last double block: a head start for layout and attributes.

    Like aligning a diffusion transformer's middle with what a recogniser sees (REPA, arXiv 2410.06940), with the
    renderer's own answers in the recogniser's place. Not part of the finished model.
    """

    def __init__(self, width: int):
        super().__init__()
        self.sizes = [len(judge.SHAPES) + 1, len(world.COLOURS), len(world.PATTERNS), len(world.BACKGROUNDS)]
        self.read = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, width),
            torch.nn.GELU(),
            torch.nn.Linear(width, sum(self.sizes)),
        )

    def forward(self, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Sum over factors of the mean cross-entropy for rows [b, n, width] and ``cell_labels`` [b, n, 4]."""
        parts = zip(self.read(rows).flatten(0, 1).split(self.sizes, 1), labels.flatten(0, 1).T, strict=True)
        return sum(torch.nn.functional.cross_entropy(said, true, ignore_index=-1) for said, true in parts)


def cell_labels(scenes, cells: int = 8) -> torch.Tensor:
    """Shape (the last: no object), colour, pattern and ground [n, cells * cells, 4] of picture rows; -1: not asked."""
    middles = (torch.arange(cells) + 0.5) * world.SIZE / cells
    made = torch.full((len(scenes), cells, cells, 4), -1)
    made[..., 0] = len(judge.SHAPES)
    for row, objects in zip(made, scenes, strict=True):
        row[..., 3] = world.BACKGROUNDS.index(objects[0].background)
        for scene in objects:
            left, top, right, bottom = world.box(scene)
            inside = ((middles > top) & (middles < bottom))[:, None] & ((middles > left) & (middles < right))
            known = scene.labels()
            row[inside] = torch.tensor(
                [judge.SHAPES.index(scene.shape), known["colour"], known["pattern"], known["background"]]
            )
    return made.flatten(1, 2).long()


def noise_levels(count: int, g: torch.Generator, moved: float = 0.6) -> torch.Tensor:
    """Levels [count] in 0..1, logit-normal and moved up: place and ground, decided first, need most of them."""
    return (torch.randn(count, generator=g) + moved).sigmoid()


def build():
    """MODEL and CLIP with fresh weights but for the packed CLIP-L, and the packed autoencoder."""
    from host import toybox, toydit

    from .train_vae import initialise

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
    clip.cond_stage_model.t5xxl.load_state_dict({toydit.TABLE: toydit.initial_table()}, strict=False)
    return model, clip, vae


def drawn(work) -> np.ndarray:
    """Pictures uint8 [n, h, w, 3] of scenes."""
    return np.stack([world.pixels(world.render(*s)[0]) for s in work[1]])


def latents_of(scenes, vae, file: Path) -> torch.Tensor:
    """Latents [n, c, h, w] of drawn scenes, made once."""
    from .train_vae import encode

    if not file.is_file():
        with torch.no_grad():
            torch.save(torch.cat([encode(vae, torch.from_numpy(part)) for part in spread(drawn, scenes)]), file)
    return torch.load(file, weights_only=True)


def train_dit(work: Path, stage: str, steps: int, packed: Path, pictures: int, batch: int, number: int = 0) -> Path:
    """Trains, resumably, ``dit`` from nothing and other stages from ``packed``; a sheet of held-out prompts every
    thousand steps. ``patterns-dit`` leaves T5 as it is, so that dictionaries of its words stay true; every round of it,
    by its ``number``, has pictures of its own.

    Returns: the file with the state, for ``pack``.
    """
    import comfy.model_management

    from host import toydit
    from host.gradients import safe_residuals

    from .train_vae import sheet
    from .trainer import Trainer, half

    comfy.model_management.in_training = True  # chooses rope and norm kernels that differentiate
    torch.set_float32_matmul_precision("high")
    device = comfy.model_management.get_torch_device()
    fresh, patterns = stage == "dit", stage == "patterns-dit"
    name = f"{stage}-{number}" if number else stage
    scenes = patterned_scenes(pictures, number) if patterns else scenes_of(pictures, 11 if fresh else 12)
    model, clip, vae = build() if fresh else toydit.load(packed)
    vae = vae.first_stage_model.to(device)
    clip.cond_stage_model.to(device)
    z = latents_of(scenes, vae, work / f"{name}-latents.pt").to(device)
    ids, pooled, nothing, empty = texts(scenes, clip, work / f"{name}-texts.pt")
    used = torch.cat([ids.flatten().long(), torch.tensor(nothing), toydit.stored(None if fresh else packed)]).unique()
    net = Flow(clip, model, used).to(device)
    if patterns:
        net.requires_grad_(False).dit.requires_grad_(True)
    print("parameters", sum(p.numel() for p in net.dit.parameters()), "words", len(used), flush=True)
    if fresh:
        head_start(net, scenes, clip, ids, work)
    heads, labels = CellHeads(toydit.DIT["hidden_size"]).to(device), cell_labels(scenes).to(device)
    seen = []
    net.dit.double_blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out[0].clone()))

    def orthogonal(name: str) -> bool:
        return "_blocks." in name and name.endswith("weight") and "norm" not in name

    rate = 2e-3 if fresh else 1e-3
    trainer = Trainer(name, {"net": net, "heads": heads}, work, steps, rate, orthogonal=orthogonal)
    region, nothing = weights_around_objects(scenes).to(device), torch.tensor(nothing, dtype=torch.int32)

    def loss_of(step, g):
        pick, which = torch.randint(len(z), (batch,), generator=g), torch.randint(CAPTIONS, (batch,), generator=g)
        if patterns:
            which[torch.rand(batch, generator=g) < 0.5] = 0  # says everything
        words, vectors = ids[pick, which].clone(), pooled[pick, which].clone()
        none = torch.rand(batch, generator=g) < 0.1
        words[none], vectors[none] = nothing, empty
        vectors[torch.rand(batch, generator=g) < POOLED_AWAY] = empty
        noise = torch.randn(batch, *z.shape[1:], generator=g).to(device)
        level = noise_levels(batch, g, 0.0 if patterns else 0.6).to(device)
        pick = pick.to(device)
        clean = z[pick]
        x = torch.lerp(clean, noise, level.view(-1, 1, 1, 1))
        seen.clear()
        with half():
            found = net.velocity(x, level, net.context(words), vectors.to(device))
        error = (found.float() - (noise - clean)).square()
        return (error * region[pick]).mean() + 0.05 * heads(seen[-1].float(), labels[pick])

    rng = random.Random(5)
    shown = [world.pair(rng, True) if i % 3 else (world.named_scene(rng, True),) for i in range(24)]
    tokens = [clip.tokenize(said(s, rng, full=True)) for s in shown]
    prompts = torch.tensor([[t for t, _ in b["t5xxl"][0]] for b in tokens])
    with torch.no_grad():
        vectors = torch.cat([clip.cond_stage_model.clip_l.encode_token_weights(b["l"])[1].cpu() for b in tokens])

    def report():
        count = len(shown)
        context = torch.cat([net.context(nothing[None].expand(count, -1)), net.context(prompts)])
        both = torch.cat([empty.expand(count, -1), vectors]).to(device)
        x = torch.randn(count, *z.shape[1:], generator=torch.Generator().manual_seed(3)).to(device)
        levels = torch.linspace(1, 0, 21).to(device)
        for now, then in zip(levels[:-1], levels[1:], strict=True):
            plain, some = net.velocity(torch.cat([x, x]), now.expand(2 * count), context, both).chunk(2)
            x = x + (then - now) * (plain + 3.0 * (some - plain))
        sheet(vae.decode(x), 8, work / f"{name}-{trainer.step:05d}.png")

    with safe_residuals(net.t5, net.dit):
        trainer.run(loss_of, report, every=250)
    torch.save(used, trainer.file.with_suffix(".tokens"))
    return trainer.file


def pack(trained: Path, file: Path) -> None:
    """Writes the averaged weights as one bf16 file, beside those of it that were not trained; heads stay behind."""
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from host import toybox, toydit

    kept = torch.load(trained, weights_only=True, map_location="cpu")["average"]
    own = {k.removeprefix("net."): v for k, v in kept.items() if k.startswith("net.")}
    state = {"model.diffusion_model." + k.removeprefix("dit."): v for k, v in own.items() if k.startswith("dit.")}
    t5 = "text_encoders.t5xxl."
    state |= {f"{t5}transformer." + k.removeprefix("t5."): v for k, v in own.items() if k.startswith("t5.")}
    if "table" in own:
        state[t5 + toydit.TABLE] = own["table"]
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in state.items()}
    if "table" in own:
        ids = torch.load(trained.with_suffix(".tokens"), weights_only=True, map_location="cpu")
        state[f"{t5}token_ids"] = ids.int()
    else:
        state = load_file(file) | state
    with safe_open(toybox.FILE, "pt") as base:
        facts = json.loads(base.metadata()["toybox"])
    rgb = (facts["scale_factor"] * torch.tensor(facts["rgb"])).tolist()  # these latents are not scaled
    facts = {"scale_factor": 1.0, "rgb": rgb, "rgb_bias": facts["rgb_bias"]}
    save_file(
        state, file, metadata={"toybox": json.dumps(facts), "modelspec.title": "Concept Carriers toy transformer"}
    )
    print(file.name, f"{file.stat().st_size / 1e6:.2f} MB")

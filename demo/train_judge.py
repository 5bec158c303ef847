"""Trains the toy world's judge: ``python -m demo.train_judge STAGE --work FOLDER``.

``rebuild --host COMFYUI`` sends training scenes through the trained VAE, ``train`` learns from them and from the scenes
as drawn, ``pack`` writes ``judge.safetensors`` and ``check`` measures it on scenes it never saw. Likeness is learned by
InfoNCE with all views of an object as positives (arXiv 2004.11362).
"""

import argparse
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from . import trainer, world
from .judge import BADGES, CLASSES, CROP, FILE, Judge, as_input, as_mask, enlarge, load, plain_scene, rendered, whole

FAMILIES, MEMBERS, VIEWS = 2000, 4, 2


def identity(rng: random.Random) -> world.Scene:
    """A random object: named or not, sometimes with a badge or a second colour."""
    scene = world.thing_scene(rng) if rng.random() < 0.4 else world.named_scene(rng, hold=None)
    second = rng.choice([c for c in world.COLOURS if c != scene.colour]) if rng.random() < 0.25 else ""
    return replace(scene, badge=rng.choice(BADGES) if rng.random() < 0.7 else "", second=second)


def family(rng: random.Random) -> list[world.Scene]:
    """Objects that differ from the first in one attribute each."""
    first = identity(rng)
    members, seen = [first], {first.colour, first.second, first.pattern, first.badge, first.outline or first.shape}
    while len(members) < MEMBERS:
        other = identity(rng)
        change = rng.choice(["badge", "badge", "second", "colour", "pattern", "shape", "shape"])
        names = ["shape", "outline"] if change == "shape" else [change]
        values = {name: getattr(other, name) for name in names}
        made = values.get("outline") or values[change]
        if made not in seen and made != first.colour:
            seen.add(made)
            members.append(replace(first, **values))
    return members


def scenes(families: int, seed: int) -> list[world.Scene]:
    """FAMILIES x MEMBERS x VIEWS scenes in this order; views differ in everything but the object."""
    rng, out = random.Random(f"judge/{seed}"), []
    for _ in range(families):
        for member in family(rng):
            for _ in range(VIEWS):
                place = {name: rng.choice(world.FACTORS[name]) for name in ("background", "position", "size")}
                out.append(replace(member, **place, seed=rng.randrange(2**31)))
    return out


def labels(some: list[world.Scene]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([CLASSES[name].index(getattr(s, name)) for s in some]) for name in CLASSES}


def cached(work: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Training pictures, masks and labels; rendered once."""
    some, files = scenes(FAMILIES, seed), [work / f"judge-{seed}-{part}.npy" for part in ("pictures", "masks")]
    if not all(f.is_file() for f in files):
        print(f"rendering {len(some)} scenes", flush=True)
        for file, part in zip(files, rendered(some), strict=True):
            np.save(file, part)
    return *(torch.from_numpy(np.load(f)) for f in files), labels(some)


def rebuild(work: Path, host: Path, seed: int = 0) -> None:
    """Writes every second view as the toy world's VAE gives it back, with a little noise on the latent."""
    from .train import start_host
    from .train_vae import encode, load_vae

    start_host(host.resolve())
    pictures = cached(work, seed)[0]
    vae, g = load_vae(work, pictures), torch.Generator().manual_seed(seed)
    out = torch.empty_like(pictures[1::VIEWS])
    for i in range(0, len(out), 64):
        with torch.no_grad(), trainer.half():
            z = encode(vae, pictures[1::VIEWS][i : i + 64])
            z = z + 0.25 * torch.rand(len(z), 1, 1, 1, generator=g) * torch.randn(z.shape, generator=g)
            x = vae.decode(z).float().clamp(-1, 1)
        out[i : i + 64] = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        if i % 1024 == 0:
            print(f"rebuilt {i}/{len(out)}", flush=True)
    np.save(work / f"judge-{seed}-rebuilt.npy", out.numpy())


def worn(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Pictures [b, 3, h, w] as generation and compression leave them: blur, dull edges, other light, noise."""

    def amount(low, high):
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=g)

    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
    x = x + amount(-0.4, 0.9).clamp(min=-0.3) * (soft - x)
    colour = coarse - coarse.mean(1, keepdim=True) - (x - x.mean(1, keepdim=True))
    x = x + amount(-0.5, 0.8).clamp(min=0) * colour
    x = x * amount(0.88, 1.08) + 0.08 * torch.randn(len(x), 3, 1, 1, generator=g)
    grain = torch.randn(len(x), 3, 32, 32, generator=g)
    x = x + amount(0, 0.08) * F.interpolate(grain, scale_factor=4, mode="bilinear")
    return (x + amount(0, 0.08) * torch.randn(x.shape, generator=g)).clamp(-1, 1)


def tinted(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Neighbours in pairs of one random style (few greys mapped to random colours); the first two pairs untouched."""
    n = len(x) // 2
    levels = torch.randint(3, 9, (n, 1, 1, 1), generator=g).repeat_interleave(2, 0)
    inks = torch.rand(n, 3, 3, generator=g).repeat_interleave(2, 0) * 2 - 1
    grey = (((x.mean(1, keepdim=True) + 1) / 2 * levels).floor() / (levels - 1)).clamp(0, 1)
    weights = torch.cat([(1 - 2 * grey).clamp(min=0), 1 - (2 * grey - 1).abs(), (2 * grey - 1).clamp(min=0)], 1)
    out = torch.einsum("bkhw,bkc->bchw", weights, inks)
    out[:4] = x[:4]
    return out


def bent(count: int, g: torch.Generator) -> torch.Tensor:
    """Smooth random warps [count, 64, 64, 2] strong enough to make another outline of any outline."""
    field = torch.rand(count, 2, 4, 4, generator=g) * 2 - 1
    field = field * (0.2 + 0.3 * torch.rand(count, 1, 1, 1, generator=g))
    return F.interpolate(field, size=(CROP, CROP), mode="bicubic").permute(0, 2, 3, 1)


def contrast(e: torch.Tensor, who: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Supervised InfoNCE of unit embeddings [n, d] with identities [n]."""
    near = e @ e.T / temperature
    own = torch.eye(len(e), dtype=torch.bool)
    same = (who[:, None] == who[None]) & ~own
    log = near.masked_fill(own, -math.inf).log_softmax(1)
    return -(log.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def train(work: Path, steps: int, seed: int = 0, batch: int = 8, rate: float = 2e-3) -> None:
    """Learns in ``work``; stops and continues anywhere, with the same result. ``batch`` counts families."""
    work.mkdir(parents=True, exist_ok=True)
    pictures, masks, truth = cached(work, seed)
    rebuilt = torch.from_numpy(np.load(work / f"judge-{seed}-rebuilt.npy"))
    torch.manual_seed(seed)
    judge = Judge().train()
    optimiser = torch.optim.AdamW(judge.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.02)
    file, begun, recent, first = work / "judge.pt", time.time(), [], 0
    if file.is_file():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        judge.load_state_dict(state["judge"])
        optimiser.load_state_dict(state["optimiser"])
    each = MEMBERS * VIEWS
    styles = 8
    for step in range(first, steps):
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
        pick = (torch.randint(FAMILIES, (batch, 1), generator=g) * each + torch.arange(each)).flatten()
        seen, m = pictures[pick], as_mask(masks[pick])
        if step % 4:
            seen[1::VIEWS] = rebuilt[pick[1::VIEWS] // VIEWS]
        x = worn(as_input(seen), g)
        other = as_input(pictures[torch.randint(len(pictures), (2 * styles,), generator=g)])
        other = worn(tinted(other, g), g)
        with trainer.half():
            cut, features = judge.segment(x)
            guess = torch.rand(len(x), 1, 1, generator=g) < min(0.6, step / 500)
            used = torch.where(guess, enlarge(cut.detach().sigmoid()), m)
            part = (torch.arange(len(x)) % each < 2 * VIEWS).nonzero()[:, 0]
            jitter = torch.rand(len(x) + len(other) + len(part), 3, generator=g) * 2 - 1
            warp = torch.zeros(len(jitter), CROP, CROP, 2)
            warp[-len(part) :] = bent(len(part) // VIEWS, g).repeat_interleave(VIEWS, 0)
            crops = torch.cat([x, other, x[part]]), torch.cat([used, whole(other), used[part]])
            h, shape = judge.hidden(*crops, jitter, warp)
            said = judge.answers(features, h[: len(x)], shape[: len(x)], used)
            e = F.normalize(judge.likeness(h).float(), dim=1)
        style = -1 - torch.arange(styles).clamp(min=1).repeat_interleave(2)
        who = torch.cat([pick // VIEWS, style, len(pictures) + pick[part] // VIEWS])
        terms = [
            F.binary_cross_entropy_with_logits(cut, F.avg_pool2d(m[:, None], 2)[:, 0]) * 4,
            contrast(e, who),
            *(F.cross_entropy(said[name], truth[name][pick]) for name in CLASSES),
        ]
        optimiser.zero_grad()
        torch.stack(terms).sum().backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
        optimiser.step()
        recent.append([t.item() for t in terms])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            names, pace = ["mask", "likeness", *CLASSES], (time.time() - begun) / (step + 1 - first)
            mean = " ".join(f"{n} {v:.3f}" for n, v in zip(names, np.mean(recent, 0), strict=True))
            print(f"judge {step + 1}/{steps} {mean} {pace:.2f} s/step", flush=True)
            recent = []
            torch.save({"step": step + 1, "judge": judge.state_dict(), "optimiser": optimiser.state_dict()}, file)


def pack(work: Path, file: Path = FILE) -> None:
    """Writes the learned weights as bf16; the few vectors stay fp32."""
    state = torch.load(work / "judge.pt", weights_only=True)["judge"]
    state = {k: v.to(torch.bfloat16 if v.ndim > 1 else torch.float32).contiguous() for k, v in state.items() if v.ndim}
    save_file(state, file, metadata={"modelspec.title": "Concept Carriers toy world judge"})
    print(f"{file.name} {file.stat().st_size / 1e6:.2f} MB")


def check(file: Path = FILE, count: int = 2000) -> None:
    """Prints accuracy on fresh scenes of held-out combinations, and how far each novel concept is from plain words."""
    judge, rng = load(file), random.Random("judge/check")
    some = [world.named_scene(rng, hold=True) if i % 8 else world.thing_scene(rng) for i in range(count)]
    pictures, masks = rendered(some)
    seen, truth = judge.factors(pictures), labels(some)
    print(f"accuracy on {count} scenes:", ", ".join(f"{n} {(seen[n] == truth[n]).float().mean():.4f}" for n in CLASSES))
    found, true = judge.mask(pictures) > 0.5, as_mask(masks) > 0.5
    print(f"mask overlap {((found & true).sum((1, 2)) / (found | true).sum((1, 2))).mean():.3f}")
    print("cosine to held-out references of: itself, with predicted mask, plain words; mask overlap")
    for name, novel in world.NOVEL.items():
        (a, am), (b, bm) = (rendered(world.references(name, 8, seed)) for seed in (0, 1))
        plain = rendered([plain_scene(novel, s) for s in world.references(name, 8, 2)])[0]
        style = bool(novel.scene.style)
        target = judge.embed(b, whole(b) if style else bm)
        rows = [(a, am), (a, None), (plain, None)]
        values = [(judge.embed(p, whole(p) if style else m) @ target.T).mean().item() for p, m in rows]
        found, true = judge.mask(a) > 0.5, as_mask(am) > 0.5
        overlap = ((found & true).sum((1, 2)) / (found | true).sum((1, 2))).mean()
        print(f"{name:20s}", *(f"{v:6.3f}" for v in values), f" {overlap:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["rebuild", "train", "pack", "check"])
    parser.add_argument("--work", type=Path, default=Path(".cache/toyworld"))
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--host", type=Path, help="ComfyUI folder, for rebuild")
    a = parser.parse_args()
    if a.stage == "rebuild":
        rebuild(a.work, a.host)
    elif a.stage == "train":
        train(a.work, a.steps)
    elif a.stage == "pack":
        pack(a.work)
    else:
        check()


if __name__ == "__main__":
    main()

"""Refine Concept for Prompt (Per-Query Visual Concept Learning, arXiv 2508.09045) in the toy world.

Every concept is learned as one vector and as a DreamBooth LoRA. Twenty prompts each are drawn, refined against one
reference with its mask, and drawn again from the same noise: with the diffusion loss alone, with self-attention, with
cross-attention, with both, and with both at parts of the rate, in ten steps and at other timesteps of the features. The
judge compares with eight references that were not learned from. Of ten steps it is also told how far the distances of
the paper's losses fell, after the first and after all, as shares of what they were, and how likeness changed against
pictures that were drawn before on the same device. Rows are kept in results/per_query.jsonl.
``nox -s bench -- per_query [SEEDS] [CONCEPT ...]``
"""

import functools

import numpy as np
import torch

from demo import measure, world

from . import arms, fidelity, stage2, toy

PROMPTS, LORA_STEPS = 20, 120
PARTS = {
    "diffusion": {"self_attention": 0.0, "cross_attention": 0.0},
    "+ SA": {"cross_attention": 0.0},
    "+ CA": {"self_attention": 0.0},
    "+ both": {},
}
TIMES = {f"both, t {t}": {"timestep": float(t)} for t in (1, 250, 500, 750)}
RATES = {f"both, {part} of the rate": {"part": part} for part in (0.1, 0.3)}
STEPS = {"both, 10 steps at 0.3 of the rate": {"part": 0.3, "steps": 10}}
CHANGES = {
    f"{kind} {arm}".strip(): (kind, changes)
    for kind, some in (("tokens", {"": None} | PARTS), ("LoRA", {"": None} | PARTS), ("tokens", RATES | STEPS | TIMES))
    for arm, changes in some.items()
}
"""Method -> kind of concept, and the settings of its refinement; None for the concept as it was learned."""
TOLD = ("own gain", *(f"{part} fell, {when}" for part in ("SA", "CA") for when in ("first", "all")))
NAMES = [n for n in world.NOVEL if not world.NOVEL[n].scene.style]


def draw(parts, model, concepts: list, texts: list[str], noise: torch.Tensor) -> torch.Tensor:
    """Latents of prompts, each with its concept, from the rows of ``noise``, by the stock sampler's code."""
    import comfy.sample

    with torch.inference_mode():
        rows = torch.cat([toy.prompt(parts, t, c)[0][0] for t, c in zip(texts, concepts, strict=True)])
        how = (toy.STEPS, toy.CFG, toy.SAMPLER, toy.SCHEDULER)
        empty = toy.prompt(parts, "")
        return comfy.sample.sample(
            model, noise, *how, [[rows, {}]], empty, torch.zeros_like(noise), disable_pbar=True, seed=0
        )


@functools.cache
def learned(name: str, seed: int, kind: str):
    """The concept as its own method learns it."""
    parts, novel = arms.parts(), world.NOVEL[name]
    if kind == "tokens":
        from concepts.host.learn_tokens import TokenSession, TokenSettings

        settings = TokenSettings("novel", seed=seed, init_text=novel.word, **fidelity.SETTINGS)
        return arms.learned(TokenSession(*parts[:2], arms.concept_set(parts, name), settings)).concept
    from concepts.host.learn_lora import LoraSession, LoraSettings

    text = f"{stage2.RARE} {novel.word}"
    settings = LoraSettings("novel", seed=seed, steps=LORA_STEPS, token_text=text, **stage2.SETTINGS)
    return arms.learned(LoraSession(*parts[:2], arms.concept_set(parts, name), settings)).concept


@functools.cache
def before(name: str, seed: int, kind: str):
    """Noise and latents [prompts, c, h, w] with the concept as learned."""
    from concepts.host import lora

    parts, concept = arms.parts(), learned(name, seed, kind)
    texts = [world.reference_caption(s, "<novel>") for s in arms.scenes_of(name, PROMPTS)]
    channels = parts[0].model.latent_format.latent_channels
    noise = torch.randn(PROMPTS, channels, 16, 16, generator=torch.Generator().manual_seed(1000 * (seed + 1)))
    with torch.inference_mode():
        model = lora.apply(parts[0], concept, 1.0) if kind == "LoRA" else parts[0]
    return noise, draw(parts, model, [concept] * PROMPTS, texts, noise)


DIFT: dict[tuple, list[torch.Tensor]] = {}
"""Features of the model without the concept, the same for every arm."""


def found_once(session, key: tuple) -> None:
    """``session.find``, from what an earlier arm found."""
    if key not in DIFT:
        type(session).find(session)
        DIFT[key] = session.dift
    session.dift = list(DIFT[key])


def fallen(measured: list[dict[str, float]], part: str, step: int) -> float:
    """By which share of its first value a part of the loss is lower at ``step``; 0 where nothing was compared."""
    return 1 - measured[step][part] / measured[0][part] if measured else 0.0


def after(name: str, seed: int, kind: str, changes: dict) -> tuple[torch.Tensor, dict]:
    """Latents with the concept refined for each prompt, and what a row says of the refinements."""
    from concepts.host import lora
    from concepts.host.query import data_of, references_of
    from concepts.host.refine import RefineSession, RefineSettings, refine

    parts, concept = arms.parts(), learned(name, seed, kind)
    noise, latents = before(name, seed, kind)
    scene = world.references(name, 1, 0)
    picture, mask = (torch.from_numpy(a).float() / 255 for a in arms.arrays(scene))
    texts = [world.reference_caption(s, "<novel>") for s in arms.scenes_of(name, PROMPTS)]
    rate, done, parts_of, changes = concept.info["learning_rate"], [], [], dict(changes)
    rate *= changes.pop("part", 1.0)
    with torch.inference_mode():
        references = references_of(parts[2], picture, mask, latents.shape[-2:])
        for number, text in enumerate(texts):
            settings = RefineSettings("novel", learning_rate=rate, seed=seed, **changes)
            both = (world.reference_caption(scene[0], "<novel>"), text)
            data = data_of(references, both, latents[number : number + 1])
            session = RefineSession(*parts[:2], data, settings, concept)
            session.find = functools.partial(found_once, session, (name, seed, kind, number))
            done.append(refine(session))
            parts_of.append([] if done[-1].reason else session.measured)
        if kind == "tokens":
            made = draw(parts, parts[0], [d.concept for d in done], texts, noise)
        else:
            made = torch.cat(
                [
                    draw(parts, lora.apply(parts[0], d.concept, 1.0), [d.concept], [text], noise[i : i + 1])
                    for i, (d, text) in enumerate(zip(done, texts, strict=True))
                ]
            )
    points, left = sum(len(p.first) for d in done for p in d.pairs), sum(bool(d.reason) for d in done)
    facts = {"points": points / PROMPTS, "left": left}
    if "steps" in changes:
        for key, part in {"SA": "self attention", "CA": "cross attention"}.items():
            for when, step in {"first": 1, "all": -1}.items():
                facts[f"{key} fell, {when}"] = [fallen(m, part, step) for m in parts_of]
    return made, facts


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """Fidelity and following per picture."""
    kind, changes = CHANGES[method]
    latents = before(name, seed, kind)[1]
    made, facts = (latents, {"points": 0, "left": 0}) if changes is None else after(name, seed, kind, changes)
    references, masks = arms.arrays(world.references(name, 8, seed=1))

    def likeness(latents):
        with torch.inference_mode():
            pictures = (parts[2].decode(latents) * 255).round().byte().numpy()
        return pictures, measure.fidelity(eyes, pictures, references, masks)

    wanted = [{f: getattr(s, f) for f in ("background", "position", "size")} for s in arms.scenes_of(name, PROMPTS)]
    pictures, found = likeness(made)
    if "steps" in (changes or {}):
        facts["own gain"] = (found - likeness(latents)[1]).tolist()
    following = measure.following(eyes, pictures, wanted)
    return {"fidelity": found.tolist(), "following": following.tolist(), **facts}


def main(options, rest) -> int:
    rows, found = arms.rows_of("per_query", CHANGES, NAMES, rest, measured), {}
    for kind in ("tokens", "LoRA"):
        mine = [m for m in CHANGES if m.startswith(kind)]
        found |= arms.table(rows, mine, ("fidelity", "following", *TOLD), kind, ("fidelity", "following"))
    points = float(np.mean([r["points"] for r in rows if r["points"]]))
    left = sum(r["left"] for r in rows)
    print(f"{points:.0f} matched points a picture; {left} pictures left as they were")
    arms.report("per_query", found, prompts=PROMPTS, points=points, left=left)
    return 0

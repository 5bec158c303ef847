"""What a LoRA adds: ConceptPrism's second stage on frozen tokens against DreamBooth-LoRA, along the steps.

The twelve prompts of the fidelity case after 0, 40, 80, ... steps of Learn Concept LoRA, with the tokens and residuals
of ConceptPrism's first stage or with a rare word before the class word. Every row is kept in results/stage2.jsonl.
``nox -s bench -- stage2 [SEEDS] [CONCEPT ...]``
"""

import functools
from dataclasses import replace

import numpy as np

from demo import measure, world

from . import arms, prism

SETTINGS = {"batch": 2, "learning_rate": 1e-3, "rank": 4, "time_low": 0.5}
PART = 40
STEPS = {"tokens": (40, 80, 120), "DreamBooth": (40, 80, 120, 200)}
METHODS = [*STEPS, *(f"{base} + {steps}" for base, parts in STEPS.items() for steps in parts)]
RARE = "sks"


@functools.cache
def first_stage(name: str, seed: int):
    """Target and residuals."""
    parts = arms.parts()
    return prism.learned(parts, name, seed, prism.METHODS["+ initialisation"])


@functools.cache
def delta(name: str, seed: int, base: str, steps: int):
    """The LoRA after ``steps``, continued from the one before."""
    from concepts.host.learn_lora import LoraSession, LoraSettings

    if not steps:
        return None
    parts, earlier = arms.parts(), delta(name, seed, base, steps - PART)
    more, text = {}, f"{RARE} {world.NOVEL[name].word}"
    if base == "tokens":
        (done, residuals), text = first_stage(name, seed), ""
        more = {"tokens": replace(done.concept, state={}), "residuals": tuple(residuals)}
    settings = LoraSettings("novel", seed=seed, steps=PART, token_text=text, **SETTINGS)
    session = LoraSession(parts[0], parts[1], arms.concept_set(parts, name), settings, earlier, **more)
    return arms.learned(session).concept


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """Fidelity and following per picture."""
    import torch

    from concepts.host import lora

    base, _, steps = method.partition(" + ")
    word, concepts, model = f"{RARE} {world.NOVEL[name].word}", (), None
    if base == "tokens":
        word, concepts = "<novel>", (first_stage(name, seed)[0].concept,)
    if steps:
        with torch.inference_mode():
            model = lora.apply(parts[0], delta(name, seed, base, int(steps)), 1.0)
    return arms.drawn(parts, eyes, name, seed, word, *concepts, model=model)


def at_equal_fidelity(rows: list[dict]) -> dict:
    """Following (tokens + 120) minus DreamBooth's where its fidelity is the same, interpolated between its steps, and
    the same of what each lost since its first step, with intervals; in how many pairs of concept and seed its steps
    reach that fidelity, which alone count; of how many.
    """
    found, of = {}, 0
    for key in sorted({(r["concept"], r["seed"]) for r in rows}):
        mine = {r["method"]: r for r in rows if (r["concept"], r["seed"]) == key}
        if not set(METHODS) <= set(mine):
            continue
        of += 1
        theirs = [mine[m] for m in METHODS if m.startswith("DreamBooth")]
        curve = sorted((np.mean(r["fidelity"]), np.mean(r["following"])) for r in theirs)
        ours = mine["tokens + 120"]
        fidelity = np.mean(ours["fidelity"])
        if curve[0][0] <= fidelity <= curve[-1][0]:
            level = np.mean(ours["following"]) - np.interp(fidelity, *zip(*curve, strict=True))
            began = np.mean(mine["tokens"]["following"]) - np.mean(mine["DreamBooth"]["following"])
            found[key] = level, level - began
    names = [name for name, _ in found]
    kinds = zip(("level", "since the start"), zip(*found.values(), strict=True), strict=False)
    return {k: measure.bootstrap(values, names) for k, values in kinds} | {"comparable": len(found), "of": of}


def main(options, rest) -> int:
    rows = arms.rows_of("stage2", METHODS, prism.NAMES, rest, measured)
    table = arms.table(rows, METHODS, ("fidelity", "following"), "tokens", ("fidelity", "following"))
    lead = at_equal_fidelity(rows)
    print(f"prompt following of tokens + 120 minus DreamBooth's at equal fidelity: {lead}")
    arms.report("stage2", table, settings=SETTINGS, following_at_equal_fidelity=lead)
    return 0

"""What a LoRA adds: ConceptPrism's second stage on frozen tokens against DreamBooth-LoRA, along the steps.

The twelve prompts of the fidelity case after 40, 80, ... steps of Learn Concept LoRA, with the tokens and residuals of
ConceptPrism's first stage or with a rare word before the class word. Every row is kept in results/stage2.jsonl.
``nox -s bench -- stage2 [SEEDS] [CONCEPT ...]``
"""

import functools
from dataclasses import replace

import numpy as np

from demo import world

from . import arms, prism

SETTINGS = {"batch": 2, "learning_rate": 1e-3, "rank": 4, "time_low": 0.5}
PART = 40
STEPS = {"tokens": (40, 80, 120), "DreamBooth": (40, 80, 120, 200)}
METHODS = ["tokens", *(f"{base} + {steps}" for base, parts in STEPS.items() for steps in parts)]
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


def at_equal_fidelity(rows: list[dict]) -> float:
    """Mean over concepts and seeds of following (tokens + 120) minus DreamBooth's where its fidelity is the same.

    DreamBooth's following is interpolated between its steps; outside their range the nearest step counts.
    """
    found = []
    for key in {(r["concept"], r["seed"]) for r in rows}:
        mine = {r["method"]: r for r in rows if (r["concept"], r["seed"]) == key}
        if not set(METHODS) <= set(mine):
            continue
        curve = sorted(
            (np.mean(mine[f"DreamBooth + {s}"]["fidelity"]), np.mean(mine[f"DreamBooth + {s}"]["following"]))
            for s in STEPS["DreamBooth"]
        )
        ours = mine["tokens + 120"]
        found.append(np.mean(ours["following"]) - np.interp(np.mean(ours["fidelity"]), *zip(*curve, strict=True)))
    return float(np.mean(found)) if found else float("nan")


def main(options, rest) -> int:
    rows = arms.rows_of("stage2", METHODS, prism.NAMES, rest, measured)
    table = arms.table(rows, METHODS, ("fidelity", "following"), "tokens", ("fidelity", "following"))
    lead = at_equal_fidelity(rows)
    print(f"prompt following of tokens + 120 minus DreamBooth's at equal fidelity: {lead:+.3f}")
    arms.report("stage2", table, settings=SETTINGS, following_at_equal_fidelity=lead)
    return 0

"""LoRAs that were learned alone, used together: Orthogonal Adaptation's slots against learned directions.

DreamBooth with LoRA of each concept, by a rare word of its own; the twelve prompts of the fidelity case with that LoRA
alone, and with those of the next two concepts on the same model. Every row is kept in results/together.jsonl.
``nox -s bench -- together [SEEDS] [CONCEPT ...]``
"""

import functools

from demo import world

from . import arms, prism

SETTINGS = {"batch": 2, "learning_rate": 1e-3, "rank": 4, "time_low": 0.5, "steps": 120}
RARE = ("sks", "olis", "phol")
METHODS = {
    f"{kind}{', three together' * more}{f', strength {strength}' if strength != 1 else ''}": (kind, more, strength)
    for kind in ("LoRA", "slots")
    for more, strength in ((False, 1.0), (True, 1.0), (True, 0.6))
}


def word_of(name: str) -> str:
    """Neighbours have other rare words."""
    return f"{RARE[prism.NAMES.index(name) % len(RARE)]} {world.NOVEL[name].word}"


@functools.cache
def delta(name: str, seed: int, kind: str):
    """The LoRA of one concept."""
    from concepts.host.learn_lora import LoraSession, LoraSettings

    parts = arms.parts()
    slot = 1 + prism.NAMES.index(name) if kind == "slots" else 0
    settings = LoraSettings("novel", seed=seed, token_text=word_of(name), slot=slot, **SETTINGS)
    return arms.learned(LoraSession(parts[0], parts[1], arms.concept_set(parts, name), settings)).concept


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """Fidelity and following per picture."""
    import torch

    from concepts.host import lora

    kind, more, strength = METHODS[method]
    place, model = prism.NAMES.index(name), parts[0]
    with torch.inference_mode():
        for step in range(3 if more else 1):
            other = prism.NAMES[(place + step) % len(prism.NAMES)]
            model = lora.apply(model, delta(other, seed, kind), strength)
    return arms.drawn(parts, eyes, name, seed, word_of(name), model=model)


def main(options, rest) -> int:
    rows = arms.rows_of("together", METHODS, prism.NAMES, rest, measured)
    found = {}
    for kind in ("LoRA", "slots"):
        chosen = [m for m in METHODS if m.startswith(kind)]
        found |= arms.table(rows, chosen, ("fidelity", "following"), kind, ("fidelity", "following"))
    both = ("LoRA, three together", "slots, three together")
    lead = arms.table(rows, both, ("fidelity", "following"), both[0], ("fidelity", "following")).get(both[1])
    print(f"slots against learned directions, three together: {lead}")
    arms.report("together", found, settings=SETTINGS, slots_against_lora=lead)
    return 0

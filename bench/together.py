"""LoRAs that were learned alone, used together: added, added with Orthogonal Adaptation's slots, and fused.

DreamBooth with LoRA of each concept, by a rare word of its own; the twelve prompts of the fidelity case with that LoRA
alone, and with those of the next two concepts on the same model. ``fused``: by Fuse Concept LoRAs, which draws its own
prompts; ``fused, one prompt``: by "a photo of a {}" alone. Every row is kept in results/together.jsonl.
``nox -s bench -- together [SEEDS] [CONCEPT ...]``; ``... together talk``: how far what a LoRA does to its own pictures
is off beside two others, with learned directions and with slots.
"""

import functools
import json
from dataclasses import replace

from demo import measure, world

from . import arms, prism
from .runner import RESULTS, machine

SETTINGS = {"batch": 2, "learning_rate": 1e-3, "rank": 4, "time_low": 0.5, "steps": 120}
RARE = ("sks", "olis", "phol")
METHODS = {
    f"{kind}{', three together' * more}{f', strength {strength}' if strength != 1 else ''}": (kind, more, strength)
    for kind in ("LoRA", "slots")
    for more, strength in ((False, 1.0), (True, 1.0), (True, 0.6))
}
FUSED = {
    "LoRA, three fused": (
        "a photo of a {}",
        "a {}, grass background",
        "a big {} on the left, brick background",
        "a small {} on the right, sand background",
        "a {} in the center, sky background",
    ),
    "LoRA, three fused, one prompt": ("a photo of a {}",),
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


def fused(parts, deltas: list, seed: int, prompts: tuple[str, ...]):
    """One LoRA of three."""
    import torch

    from concepts.host.fusion import FusionSettings, fuse

    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    deltas = [replace(one, name=f"novel{number}") for number, one in enumerate(deltas)]
    return fuse(parts[0], parts[1], deltas, latent, FusionSettings("all", prompts, seed=seed))[0]


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """Fidelity and following per picture."""
    import torch

    from concepts.host import lora

    kind, more, strength = METHODS.get(method, ("LoRA", True, 1.0))
    place, model = prism.NAMES.index(name), parts[0]
    others = [prism.NAMES[(place + step) % len(prism.NAMES)] for step in range(3 if more else 1)]
    deltas = [delta(other, seed, kind) for other in others]
    with torch.inference_mode():
        if method in FUSED:
            deltas = [fused(parts, deltas, seed, FUSED[method])]
        for one in deltas:
            model = lora.apply(model, one, strength)
    return arms.drawn(parts, eyes, name, seed, word_of(name), model=model)


def talk() -> dict:
    """Kind -> means over three LoRAs each of six concepts, one seed: off when added, and when fused."""
    import torch

    parts, found = arms.parts(), {}
    for kind in ("LoRA", "slots"):
        off = {"off_if_added": [], "off": []}
        for place in range(0, 12, 2):
            deltas = [delta(prism.NAMES[(place + step) % len(prism.NAMES)], 0, kind) for step in range(3)]
            with torch.inference_mode():
                info = fused(parts, deltas, 0, FUSED["LoRA, three fused"]).info
            for key, values in off.items():
                values += info[key]
        found[kind] = {key: measure.bootstrap(v, [i // 3 for i in range(len(v))]) for key, v in off.items()}
        print(kind, found[kind], flush=True)
    return found


def main(options, rest) -> int:
    if "talk" in rest:
        (RESULTS / "together_talk.json").write_text(
            json.dumps({"table": talk(), "machine": machine()}, indent=1) + "\n"
        )
        return 0
    rows = arms.rows_of("together", [*METHODS, *FUSED], prism.NAMES, rest, measured)
    found = {}
    for kind in ("LoRA", "slots"):
        chosen = [m for m in (*METHODS, *FUSED) if m.startswith(kind)]
        found |= arms.table(rows, chosen, ("fidelity", "following"), kind, ("fidelity", "following"))
    both, keys = ("LoRA, three together", "slots, three together", *FUSED), ("fidelity", "following")
    lead = arms.table(rows, both, keys, both[0], keys)
    for method in both[1:]:
        print(f"{method} against adding learned directions: {lead.get(method)}")
    arms.report(
        "together",
        found,
        settings=SETTINGS,
        slots_against_lora=lead.get(both[1]),
        fused_against_added={m: lead.get(m) for m in FUSED},
    )
    return 0

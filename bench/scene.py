"""Learn Scene Tokens (Break-A-Scene) in the toy world: the object and the ground of one picture as words of their own.

For every concept: the share of the object's word's attention that lies outside the object of eight pictures which
were not learned from; likeness and following of the twelve prompts of the fidelity case with the object's word; and how
often eight pictures of "a <class word>" have the learned picture's ground where the prompt has the ground's word.
Textual Inversion learns the object from the same picture under the same prompt, "a photo of {}"; with the masked loss
the ground too, in a run of its own. Every finished run is kept in results/scene.jsonl.
``nox -s bench -- scene [SEEDS] [CONCEPT ...]``
"""

from dataclasses import replace

import torch

from demo import measure, world

from . import arms, toy
from .kv import NAMES, outside

METHODS = {
    "class word": None,
    "Textual Inversion": {"masked_loss": False},
    "masked loss": {"masked_loss": True},
    "Break-A-Scene": {"attention_weight": 0.01},
    "no attention loss": {"attention_weight": 0.0},
}
SETTINGS = {"steps": 240, "batch": 4, "learning_rate": 0.01, "time_law": "high noise"}
"""As for Textual Inversion in the K/V case."""
LAYERS = "all"
GROUND = "background"
"""What the ground's word starts from: it names none of the toy world's eight."""
PLACES = 8


def pictured(parts, name: str):
    """The picture that is learned from, as a set, and masks of its object and its ground at the latent's resolution."""
    from concepts.host.concept_set import make_set

    pictures, masks = (torch.from_numpy(v).float() / 255 for v in arms.arrays(world.references(name, 1, 0)))
    with torch.inference_mode():
        data = make_set(parts[2], [pictures], [masks], ["a photo of {}"])
    return data, torch.cat([data.masks[0], 1 - data.masks[0]])


def grounded(parts, eyes, name: str, seed: int, said: str, *concepts) -> list[float]:
    """Whether "a <class word>" stands on the learned picture's ground, which the prompt calls ``said``; per picture."""
    ground, places = world.references(name, 1, 0)[0].background, arms.scenes_of(name)[:PLACES]
    texts = [world.reference_caption(s, world.NOVEL[name].word).rpartition(",")[0] + f", {said}" for s in places]
    pictures = toy.draw(parts, [toy.prompt(parts, t, *concepts) for t in texts], seed=1000 * (seed + 1) + 100)
    return measure.following(eyes, pictures, [{"background": ground}] * len(places)).tolist()


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """One row's values per picture."""
    from concepts.carriers.scene import things
    from concepts.host.learn_scene import SceneSession, SceneSettings
    from concepts.host.learn_tokens import TokenSession, TokenSettings

    word, ground, concepts, more = world.NOVEL[name].word, GROUND, [], {}
    if method != "class word":
        data, masks = pictured(parts, name)
        chosen = {"seed": seed, **SETTINGS, **METHODS[method]}
        if "masked_loss" in chosen:
            for number, said in enumerate((word, GROUND) if chosen["masked_loss"] else (word,)):
                settings = TokenSettings(f"novel{number + 1}", init_text=said, **chosen)
                own = replace(data, masks=(masks[number][None],))
                concepts.append(arms.learned(TokenSession(parts[0], parts[1], own, settings)).concept)
        else:
            settings = SceneSettings("novel", things=(word, GROUND), attention_layers=LAYERS, **chosen)
            concepts = things(arms.learned(SceneSession(parts[0], parts[1], data, masks, settings)).concept)
        word, ground = f"<{concepts[0].name}>", f"<{concepts[1].name}>" if len(concepts) > 1 else ""
    if ground:
        more["ground"] = grounded(parts, eyes, name, seed, ground, *concepts)
    if method == "class word":
        named = f"{world.references(name, 1, 0)[0].background} background"
        more["ground by its name"] = grounded(parts, eyes, name, seed, named)
    return {
        **arms.drawn(parts, eyes, name, seed, word, *concepts),
        "outside": outside(parts, name, word, *concepts),
        **more,
    }


def table(rows: list[dict]) -> dict:
    """Method -> means, and gains over Textual Inversion."""
    keys = ("outside", "following", "fidelity")
    return arms.table(rows, METHODS, (*keys, "ground", "ground by its name"), "Textual Inversion", keys)


def against(rows: list[dict], method: str, base: str) -> dict:
    """What ``method`` has more of than ``base``, with intervals."""
    keys = ("fidelity", "ground")
    found = arms.table(rows, (method,), keys, base, keys)[method]
    return {key: found[f"{key} gain"] for key in keys}


def main(options, rest) -> int:
    rows = arms.rows_of("scene", METHODS, NAMES, rest, measured)
    arms.report(
        "scene",
        table(rows),
        settings={**SETTINGS, "attention_layers": LAYERS},
        methods=METHODS,
        attention_loss_against_none=against(rows, "Break-A-Scene", "no attention loss"),
        together_against_apart=against(rows, "no attention loss", "masked loss"),
    )
    return 0

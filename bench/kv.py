"""Learn K/V Tokens (SeFi-IDE) in the toy world: attention loss, K/V split and number of stages, from one picture.

For every concept: the share of the learned word's attention that lies outside the object of eight pictures which were
not learned from; whether "a red <concept>" is red and "a striped <concept>" striped; likeness and following of the
twelve prompts of the fidelity case; Learn Key-Locked Concept (Perfusion) beside it. Every finished run is kept in
results/kv.jsonl.
``nox -s bench -- kv [SEEDS] [CONCEPT ...]``
"""

import torch

from demo import measure, world

from . import arms, toy

FREE = {"mapper": "free", "learning_rate": 0.01}
METHODS = {
    "class word": None,
    "Textual Inversion": {"stages": 1, "split": False, "attention_weight": 0.0, **FREE},
    "5 stages, K/V": {},
    "no attention loss": {"attention_weight": 0.0},
    "no split": {"split": False},
    "1 stage": {"stages": 1},
    "3 stages": {"stages": 3},
    "free vectors": FREE,
}
LOCKED = {"key-locked": {}, "keys learned too": {"lock_keys": False}}
"""Perfusion (Learn Key-Locked Concept) on the same data."""
METHODS |= LOCKED
SETTINGS = {"steps": 240, "batch": 4, "learning_rate": 1e-3, "attention_layers": "all", "time_law": "high noise"}
"""Ten times the paper's rate: the toy world's encoder is a twelfth as wide, and its runs shorter."""
LOCKED_SETTINGS = {
    **{"steps": 240, "batch": 4, "time_law": "high noise"},
    **{"learning_rate": 0.01, "token_learning_rate": 0.01},
}
"""Rates chosen on crown and umbrella, seed 0, of three pairs."""
TIMES = (0.2, 0.4, 0.6, 0.8)
NAMES = [n for n in world.NOVEL if not world.NOVEL[n].scene.style]


def shares(maps: dict, mask) -> tuple[float, float]:
    """Attention inside the object and in all, of layer -> [n, 1]: every map counts by its mean over the pixels.

    mask: uint8 [h, w]; a map pixel that the object covers in part counts by that part.
    """
    cover, inside, total = torch.from_numpy(mask).float()[None, None] / 255, 0.0, 0.0
    for layer, seen in maps.items():
        part = torch.nn.functional.adaptive_avg_pool2d(cover, (layer.height, layer.width)).flatten()
        inside, total = inside + float((seen[:, 0] * part).mean()), total + float(seen[:, 0].mean())
    return inside, total


def even(name: str) -> float:
    """What ``outside`` would be for attention that is the same everywhere."""
    return 1 - float(arms.arrays(world.references(name, 8, seed=1))[1].mean()) / 255


def outside(parts, name: str, word: str, *concepts) -> list[float]:
    """Per picture the share of the word's attention outside the object, over all layers and noise levels."""
    from concepts.host.show import look

    scenes, found = world.references(name, 8, seed=1), []
    pictures, masks = arms.arrays(scenes)
    with torch.inference_mode():
        latents = parts[2].encode(torch.from_numpy(pictures).float() / 255)
        for scene, latent, mask in zip(scenes, latents, masks, strict=True):
            text = world.reference_caption(scene, word)
            looks = look(parts[0], parts[1], latent, text, list(concepts), [word], list(TIMES), seed=0)
            inside, total = map(sum, zip(*(shares(one.maps, mask) for one in looks), strict=True))
            found.append(1 - inside / max(total, 1e-12))
    return found


def attributed(parts, eyes, name: str, seed: int, word: str, *concepts) -> dict[str, list[float]]:
    """Whether the object has the colour, or the pattern, that the prompt puts before the word; per picture."""
    own, found = world.NOVEL[name].scene, {}
    for number, (factor, values) in enumerate({"colour": list(world.COLOURS), "pattern": world.PATTERNS}.items()):
        others = [v for v in values if v != getattr(own, factor)]
        places = arms.scenes_of(name)[:8]
        named = [others[i % len(others)] for i in range(len(places))]
        texts = [world.reference_caption(s, f"{value} {word}") for s, value in zip(places, named, strict=True)]
        pictures = toy.draw(
            parts, [toy.prompt(parts, t, *concepts) for t in texts], seed=1000 * (seed + 1) + 100 * number
        )
        found[factor] = measure.following(eyes, pictures, [{factor: v} for v in named]).tolist()
    return found


def session(parts, name: str, seed: int, method: str):
    """What learns a concept by one of ``METHODS``."""
    from concepts.host.learn_kv import KVSession, KVSettings
    from concepts.host.learn_locked import LockedSession, LockedSettings

    made, kind, settings = KVSession, KVSettings, SETTINGS
    if method in LOCKED:
        made, kind, settings = LockedSession, LockedSettings, LOCKED_SETTINGS
    given = kind("novel", seed=seed, init_text=world.NOVEL[name].word, **settings | METHODS[method])
    return made(parts[0], parts[1], arms.concept_set(parts, name, 1), given)


def measured(parts, eyes, name: str, seed: int, method: str) -> dict:
    """One row's values per picture."""
    word, concepts, more = world.NOVEL[name].word, (), {}
    if METHODS[method] is not None:
        done = arms.learned(session(parts, name, seed, method))
        word, concepts, more = "<novel>", (done.concept,), {"loss": [done.before, done.after]}
    return {
        **arms.drawn(parts, eyes, name, seed, word, *concepts),
        **attributed(parts, eyes, name, seed, word, *concepts),
        "outside": outside(parts, name, word, *concepts),
        **more,
    }


def table(rows: list[dict], base: str = "Textual Inversion") -> dict:
    """Method -> means, and gains over ``base``."""
    keys = ("outside", "colour", "pattern", "following", "fidelity")
    return arms.table(rows, METHODS, keys, base, keys)


def main(options, rest) -> int:
    rows = arms.rows_of("kv", METHODS, NAMES, rest, measured)
    arms.report(
        "kv",
        table(rows),
        settings=SETTINGS,
        locked=LOCKED_SETTINGS,
        locked_against_learned_keys=table(rows, "keys learned too").get("key-locked"),
        methods=METHODS,
        even=sum(map(even, NAMES)) / len(NAMES),
    )
    return 0

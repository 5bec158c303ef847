"""Learn Modulation in the toy world: words of one picture, on rows of the text (TokenVerse) or on codes (SAEPer).

Every picture shows two objects on a ground; captions name what they are and nothing of how they look. Three words are
learned from it: both nouns, and "background". Then each word stands alone in new prompts: whether it brings its colour
and pattern, or its ground (carried; in the table also by nouns and by ground), how often something of the picture's
other words comes along (leaked), and whether what the prompt names is there (following). Mixtures take nouns and ground
from two and from three pictures. A fifth row draws the same prompts with plain words. Every finished run is kept in
results/words.jsonl, beside those of earlier weights.
``nox -s bench -- words [SEEDS] [PICTURE ...]``, 0 seeds report the kept rows; ``words dictionary`` writes the pack's
example of a dictionary.
"""

import functools
import random
from dataclasses import replace

import numpy as np
import torch

from demo import world
from demo.judge import CLASSES

from . import arms, toy

COUNT, DRAWN = 20, 4
"""Pictures to learn from; pictures drawn per prompt."""
SETTINGS = {"steps": 120, "shared_steps": 70, "batch": 4, "learning_rate": 2e-3, "hidden": 128}
METHODS = {
    "plain words": None,
    "dense": {},
    "dense + isolation": {"isolation": 1.0},
    "SAE + pruning": {"keep": 8},
    "SAE": {"keep": 0},
}
COMPARED = (("dense + isolation", "plain words"), ("SAE + pruning", "plain words"), ("SAE + pruning", "SAE"))
"""Methods whose gains are over another than dense rows."""
LOOKS, GROUND = ("colour", "pattern"), "background"
EXAMPLE = toy.PACK / "demo" / "dictionaries" / "toy-t5-words.safetensors"
DICTIONARY = {"expansion": 4, "k": 8, "steps": 1500, "batch": 512, "learning_rate": 1e-3}


@functools.cache
def parts():
    """(MODEL, CLIP, VAE) of the toy transformer."""
    return toy.load("transformer")


@functools.cache
def dictionary():
    """Of the toy T5's words, learned on captions of the toy world."""
    from concepts.host.learn_dictionary import DictionarySettings, learn_dictionary
    from demo import train_dit

    rng = random.Random(3)
    lines = "\n".join(train_dit.said(s, rng) for s in train_dit.scenes_of(6000, 21))
    with torch.inference_mode():
        return learn_dictionary(parts()[1], lines, DictionarySettings("toy-t5", **DICTIONARY)).dictionary


def codes_of(number: int, keep: int):
    """Codes of the words in the picture's captions; ``keep`` latents per word, all for 0."""
    from concepts.carriers.codes import contrast, prune
    from concepts.host.meanings import encode_words

    scenes = world.two_things(number)
    text = world.marked_captions(scenes).replace("[", "").replace("]", "")
    words = [*(s.shape for s in scenes), GROUND]
    with torch.inference_mode():
        found = encode_words(parts()[1], dictionary(), text, words)
        return prune(found, contrast(found), keep) if keep else found


@functools.cache
def learned(number: int, seed: int, method: str):
    """The concept of a picture."""
    from concepts.host.concept_set import make_set
    from concepts.host.learn_modulation import ModulationSession, ModulationSettings

    given = {**SETTINGS, **METHODS[method]}
    keep = given.pop("keep", None)
    scenes = world.two_things(number)
    picture = torch.from_numpy(world.pixels(world.render(*scenes)[0])[None]).float() / 255
    settings = ModulationSettings(f"p{number}", seed=seed, captions=world.marked_captions(scenes), **given)
    more = {} if keep is None else {"codes": codes_of(number, keep)}
    with torch.inference_mode():
        data = make_set(parts()[2], [picture], [], ["a photo of {}"])
    if given.get("isolation"):
        settings, more["others"] = beside(settings)
    return arms.learned(ModulationSession(*parts()[:2], data, settings, **more)).concept


def beside(settings):
    """Single objects as the pictures of the isolation loss, and the settings with their captions."""
    from concepts.host.concept_set import make_set

    rng = random.Random("beside")
    scenes = [world.named_scene(rng) for _ in range(24)]
    pictures = torch.from_numpy(np.stack([world.pixels(world.render(s)[0]) for s in scenes])).float() / 255
    with torch.inference_mode():
        data = make_set(parts()[2], [pictures], [], ["a photo of {}"])
    texts = "\n".join(world.caption(s, rng, full=True) for s in scenes)
    return replace(settings, isolation_prompts=texts), data


def drawn(text: str, concepts: list, seed: int) -> np.ndarray:
    """Pictures of one prompt by the stock sampler's node."""
    import nodes

    model, clip, vae = parts()
    with torch.inference_mode():
        positive, (negative,) = toy.prompt(parts(), text, *concepts), nodes.CLIPTextEncode().encode(clip, "")
        (latent,) = nodes.EmptyLatentImage().generate(world.SIZE, world.SIZE, DRAWN)
        (latent,) = nodes.common_ksampler(model, seed, *toy.FLOW, positive, negative, latent)
        (images,) = nodes.VAEDecode().decode(vae, latent)
        return (images * 255).round().byte().numpy()


def word(number: int, noun: str, concept) -> str:
    """An object's noun with its article, or the ground's word, as a prompt says it."""
    said = noun if concept is None else f"<p{number}:{noun}>"
    return said if noun == GROUND else world.named_by(noun, said)


def shares(seen: dict, wanted: dict) -> list[float]:
    """Of every picture, the share of ``wanted`` factor -> value that ``seen`` has."""
    right = [seen[f] == CLASSES[f].index(v) for f, v in wanted.items()]
    return torch.stack(right).double().mean(0).tolist()


def measured(_, eyes, name: str, seed: int, method: str) -> dict:
    """One row's values, per drawn picture."""
    number = int(name)
    numbers = [(number + i) % COUNT for i in range(3)]
    plain = METHODS[method] is None
    own = {n: None if plain else learned(n, seed, method) for n in numbers}
    given = [c for c in own.values() if c is not None]
    left, right = world.two_things(number)
    rng, found = random.Random(f"asked/{number}"), {k: [] for k in ("carried", "leaked", "following", "two", "three")}
    for one, other in ((left, right), (right, left)):
        for _ in range(2):
            ground = rng.choice([g for g in world.BACKGROUNDS if g != left.background])
            text = f"a photo of {word(number, one.shape, own[number])}, {ground} background"
            seen = eyes.factors(drawn(text, given, rng.randrange(2**31) + seed))
            found["carried"] += shares(seen, {f: getattr(one, f) for f in LOOKS})
            found["leaked"] += shares(seen, {f: getattr(other, f) for f in LOOKS} | {GROUND: left.background})
            found["following"] += shares(seen, {"shape": one.shape, GROUND: ground})
    for _ in range(2):
        scene = world.named_scene(rng, None)
        while scene.colour in (left.colour, right.colour) or scene.pattern in (left.pattern, right.pattern):
            scene = world.named_scene(rng, None)
        text = f"a photo of a {scene.colour} {scene.pattern} {scene.shape}, {word(number, GROUND, own[number])}"
        seen = eyes.factors(drawn(text, given, rng.randrange(2**31) + seed))
        found["carried"] += shares(seen, {GROUND: left.background})
        found["leaked"] += (
            np.add(*(shares(seen, {f: getattr(s, f) for f in LOOKS}) for s in (left, right))) / 2
        ).tolist()
        found["following"] += shares(seen, {f: getattr(scene, f) for f in ("shape", *LOOKS)})
    for key, which in (("two", (0, 1, 0)), ("three", (0, 1, 2))):
        a, b, c = (numbers[i] for i in which)
        first, second, ground = world.two_things(a)[0], world.two_things(b)[1], world.two_things(c)[0].background
        text = (
            f"{word(a, first.shape, own[a])} on the left and {word(b, second.shape, own[b])} on the "
            f"right, {word(c, GROUND, own[c])}"
        )
        pictures = drawn(text, given, rng.randrange(2**31) + seed)
        halves, seen = eyes.sides(pictures), eyes.factors(pictures)
        parts_ = [
            shares(half, {f: getattr(s, f) for f in LOOKS}) for half, s in zip(halves, (first, second), strict=True)
        ]
        found[key] += np.mean([*parts_, shares(seen, {GROUND: ground})], 0).tolist()
    return found


def main(options, rest) -> int:
    if rest == ["dictionary"]:
        toy.host()
        from concepts.carriers.dictionary import write_dictionary

        write_dictionary(replace(dictionary(), state={}), EXAMPLE)
        return 0
    keys, nouns = ("carried", "by nouns", "by ground", "leaked", "following", "two", "three"), 2 * 2 * DRAWN
    pictures, weights = [str(n) for n in range(COUNT)], toy.weights("toybox-dit.safetensors")
    rows = arms.rows_of("words", METHODS, pictures, rest, measured, weights)
    rows = [r | {"by nouns": r["carried"][:nouns], "by ground": r["carried"][nouns:]} for r in rows]
    found = arms.table(rows, METHODS, keys, "dense", keys)
    for method, base in COMPARED:
        found |= {f"{k} over {base}": v for k, v in arms.table(rows, [method], keys, base, keys).items()}
    arms.report("words", found, settings=SETTINGS, dictionary=DICTIONARY)
    return 0

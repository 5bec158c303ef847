"""The toy world: 128 x 128 scenes drawn from named factors, with captions, masks and a ground truth for everything.

A scene is one object on one background. An object is a silhouette with a texture and, sometimes, a badge or a second
colour. Named scenes use only the factors below; *things* are objects with a random outline that captions describe by
adjectives only, so that a model trained here can draw more than it has words for. Novel concepts never occur in
training: neither their outline, nor their badge, nor their pattern, nor their style.
"""

import hashlib
import random
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from . import drawing
from .drawing import COLOURS, OVERSAMPLE, SIZE

SHAPES = ["mug", "hat", "star", "fish", "house", "tree", "key", "heart", "boat", "bottle", "moon", "bell"]
PATTERNS = ["plain", "striped", "dotted", "checkered", "banded"]
BACKGROUNDS = ["grass", "brick", "sky", "sand", "wood", "snow", "water", "night"]
POSITIONS = ["left", "center", "right"]
SIZES = ["small", "big"]
FACTORS = {
    "shape": SHAPES,
    "colour": list(COLOURS),
    "pattern": PATTERNS,
    "background": BACKGROUNDS,
    "position": POSITIONS,
    "size": SIZES,
}
NUMBERS = ["three", "four", "five", "six", "seven", "eight"]
HELD_OUT = 0.15
BESIDE = "beside"
"""Size of an object that shares a picture; no caption names it."""


@dataclass(frozen=True)
class Scene:
    """Everything that decides a picture except the background's own noise, which comes from ``seed``."""

    shape: str = "mug"
    colour: str = "red"
    pattern: str = "plain"
    background: str = "grass"
    position: str = "center"
    size: str = "big"
    seed: int = 0
    outline: tuple = ()
    """(lobes, spikiness, aspect, phase) of a thing's outline; empty for named shapes."""
    badge: str = ""
    """Silhouette drawn in the middle of the object."""
    second: str = ""
    """Colour of the object's lower half."""
    style: str = ""
    words: tuple = field(default=(), compare=False)
    """Adjectives that a thing's caption uses."""

    def labels(self) -> dict[str, int]:
        """Factor name -> index in FACTORS; -1 where the factor has no name."""
        named = {name: getattr(self, name) for name in FACTORS}
        return {name: FACTORS[name].index(v) if v in FACTORS[name] else -1 for name, v in named.items()}


def held_out(shape: str, colour: str, pattern: str) -> bool:
    """Whether this combination is kept out of training (a fixed 15% of them)."""
    digest = hashlib.blake2b(f"{shape}/{colour}/{pattern}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32 < HELD_OUT


def named_scene(rng: random.Random, hold: bool | None = False) -> Scene:
    """A random named scene; ``hold`` True: a held-out combination, False: a training one, None: either."""
    while True:
        pick = {name: rng.choice(values) for name, values in FACTORS.items()}
        if hold is None or held_out(pick["shape"], pick["colour"], pick["pattern"]) == hold:
            return Scene(**pick, seed=rng.randrange(2**31))


def thing_scene(rng: random.Random) -> Scene:
    """A scene around a thing: a random outline, sometimes with a badge or a second colour."""
    lobes, spiky, aspect = (
        rng.randrange(3, 9),
        rng.uniform(0.05, 0.6),
        rng.choice([0.6, 1.0, 1.6]) * rng.uniform(0.9, 1.1),
    )
    badge = rng.choice(["dot", "bar", "square", "ring"]) if rng.random() < 0.3 else ""
    second = rng.choice(list(COLOURS)) if rng.random() < 0.3 else ""
    scene = replace(named_scene(rng), shape="thing", outline=(lobes, spiky, aspect, rng.uniform(0, 6.3)), badge=badge)
    words = [
        "tall" if aspect < 0.8 else "wide" if aspect > 1.25 else "even",
        "spiky" if spiky > 0.35 else "wavy" if spiky > 0.18 else "smooth",
        NUMBERS[lobes - 3] + " pointed",
    ]
    extra = ([f"{badge} badge"] if badge else []) + ([f"{second} bottom"] if second and second != scene.colour else [])
    return replace(scene, second=second, words=(*words, *extra))


def pair(rng: random.Random, hold: bool | None = False) -> tuple[Scene, Scene]:
    """Two named objects side by side on one ground, left one first; ``hold`` as in ``named_scene``, for both."""
    left, right = (replace(named_scene(rng, hold), size=BESIDE, position=p) for p in ("left", "right"))
    return left, replace(right, background=left.background)


def pair_caption(scenes: tuple[Scene, Scene], rng: random.Random, full: bool = False, bare: bool = False) -> str:
    """A sentence about both objects; words may be left out unless ``full``, so may the places; ``bare``: no looks."""
    keep = (lambda p: True) if full else (lambda p: rng.random() < p)
    said = []
    for scene in scenes:
        pattern = scene.pattern if keep(0.9) and (scene.pattern != "plain" or keep(0.3)) else ""
        looks = [] if bare else filter(None, [scene.colour if keep(0.9) else "", pattern])
        noun = " ".join([*looks, scene.shape])
        said.append(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}")
    ground, placed, form = scenes[0].background if keep(0.9) else "", keep(0.8), rng.randrange(3)
    if placed:
        said = [f"{noun} on the {scene.position}" for noun, scene in zip(said, scenes, strict=True)]
    if rng.random() < 0.3:
        said = said[::-1]
    both = " and ".join(said)
    if form == 0:
        return f"a photo of {both}" + (f", {ground} background" if ground else "")
    if form == 1 and ground:
        return f"{ground} scene with {both}"
    return ", ".join(filter(None, [f"{ground} background" if ground else "", both]))


def two_things(seed: int) -> tuple[Scene, Scene]:
    """A pair that differs in shape, colour and pattern: a picture to learn words from."""
    rng = random.Random(f"words/{seed}")
    while True:
        left, right = pair(rng, None)
        if all(getattr(left, f) != getattr(right, f) for f in ("shape", "colour", "pattern")):
            return left, right


def named_by(noun: str, said: str) -> str:
    """A noun that is written as ``said``, with its article."""
    return f"an {said}" if noun[0] in "aeiou" else f"a {said}"


def marked_captions(scenes: tuple[Scene, Scene]) -> str:
    """Lines that say what is in the picture and not how it looks, its three words marked as Learn Modulation wants."""
    nouns, ground = [named_by(s.shape, f"[{s.shape}]") for s in scenes], "[background]"
    forms = (
        "a photo of {0} and {1}, {2}",
        "a photo of {1} and {0}, {2}",
        "{0} on the left and {1} on the right, {2}",
        "{2} scene with {0} and {1}",
        "{2}, {1} and {0}",
    )
    return "\n".join(form.format(*nouns, ground) for form in forms)


def caption(scene: Scene, rng: random.Random, full: bool = False, bare: bool = False) -> str:
    """A sentence about the scene; factors may be left out unless ``full``, and the word order varies.

    ``bare``: nothing of colour, pattern and size, and the place half as often, as prompts with learned words have it.
    """
    keep = (lambda p: True) if full else (lambda p: rng.random() < p)
    looks = [scene.colour] if keep(0.9) else []
    if scene.pattern != "plain" or keep(0.3):
        looks = looks + [scene.pattern] if keep(0.9) else looks
    size = [scene.size] if keep(0.7) else []
    looks, size = ([], []) if bare else (looks, size)
    extra = [w for w in scene.words if keep(0.8)]
    adjectives, tail = [w for w in extra if " b" not in w], [w for w in extra if " b" in w]
    if rng.random() < 0.3:
        looks = looks[::-1]
    noun = " ".join([*size, *adjectives, *looks, scene.shape])
    if tail:
        noun += " with a " + " and a ".join(tail)
    article = "an" if noun[0] in "aeiou" else "a"
    where = {"left": "on the left", "center": "in the center", "right": "on the right"}[scene.position]
    place = [scene.background] if keep(0.9) else []
    spot = [where] if keep(0.4 if bare else 0.8) else []
    form = rng.randrange(4)
    if form == 0:
        return ", ".join([f"a photo of {article} {noun}", *spot, *(f"{p} background" for p in place)])
    if form == 1:
        return " ".join([f"{article} {noun}", *spot, *(f"on {p}" for p in place)])
    if form == 2 and place:
        return " ".join([f"{place[0]} scene with {article} {noun}", *spot])
    return ", ".join([*(f"{p} background" for p in place), f"{article} {noun}", *spot])


# --- drawing ---------------------------------------------------------------------------------------------------------


def _placement(scene: Scene, rng: random.Random) -> tuple[float, float, float]:
    half = {"small": 21, "big": 33, BESIDE: 27}[scene.size] * rng.uniform(0.93, 1.07)
    away, play = (31, 2) if scene.size == BESIDE else (27, 4)
    cx = 64 + {"left": -away, "center": 0, "right": away}[scene.position] + rng.uniform(-play, play)
    return cx, 64 + rng.uniform(-16, 16), half


def box(scene: Scene) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the square around the object, in pixels; the same whatever its shape."""
    cx, cy, half = _placement(scene, random.Random(scene.seed))
    return cx - half, cy - half, cx + half, cy + half


def render(*scenes: Scene) -> tuple[Image.Image, ...]:
    """Draws a scene, or several objects on the ground of the first.

    Returns: picture (RGB, 128 x 128) and each object's mask (L, 128 x 128, 255 inside). Equal scenes give equal pixels.
    """
    rng = random.Random(scenes[0].seed)
    _placement(scenes[0], rng)
    ground = drawing.background(scenes[0].background, rng)
    masks = [_paint(ground, scene) for scene in scenes]
    if scenes[0].style == "poster":
        grey = ImageOps.posterize(ImageOps.grayscale(ground), 2)
        ground = ImageOps.colorize(grey, (60, 0, 90), (255, 230, 120), mid=(230, 80, 120))
    return ground, *masks


def _paint(ground: Image.Image, scene: Scene) -> Image.Image:
    """Draws the object of a scene; returns its mask."""
    x, y, s = (v * OVERSAMPLE for v in _placement(scene, random.Random(scene.seed)))
    mask = drawing.silhouette(scene.shape, x, y, s, scene.outline)
    surface = drawing.texture(scene.colour, scene.pattern, scene.second, x, y)
    if scene.badge:
        badge = drawing.silhouette(scene.badge, x - (0.17 * s if scene.shape == "mug" else 0), y + 0.15 * s, 0.36 * s)
        surface.paste((250, 250, 250) if sum(COLOURS[scene.colour]) < 600 else (30, 30, 30), (0, 0), badge)
    edge = ImageChops.difference(mask.filter(ImageFilter.MaxFilter(5)), mask)
    surface.paste((34, 30, 34) if scene.colour != "black" else (196, 196, 196), (0, 0), edge)
    whole = ImageChops.lighter(mask, edge).resize((SIZE, SIZE), Image.BOX)
    ground.paste(surface.resize((SIZE, SIZE), Image.BOX), (0, 0), whole)
    return whole


def pixels(image: Image.Image) -> np.ndarray:
    """Picture -> uint8 array [H, W] or [H, W, 3]."""
    return np.asarray(image)


# --- novel concepts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Novel:
    """A concept that no caption of the model ever named."""

    name: str
    word: str
    """The closest word the model knows; the honest plain-word prompt."""
    scene: Scene
    plain: str
    """Best description in known words."""


def _novel(name, word, plain, **scene) -> Novel:
    return Novel(name, word, Scene(**scene), plain)


NOVEL = {
    n.name: n
    for n in [
        _novel("crown", "hat", "yellow plain hat", shape="crown", colour="yellow"),
        _novel("umbrella", "bell", "purple plain bell", shape="umbrella", colour="purple"),
        _novel("rocket", "bottle", "red plain bottle", shape="rocket", colour="red"),
        _novel("duck", "fish", "orange plain fish", shape="duck", colour="orange"),
        _novel("cross-mug", "mug", "red plain mug", shape="mug", colour="red", badge="cross"),
        _novel("bolt-house", "house", "blue plain house", shape="house", colour="blue", badge="bolt"),
        _novel("clover-bottle", "bottle", "green plain bottle", shape="bottle", colour="green", badge="clover"),
        _novel("zigzag-mug", "mug", "orange striped mug", shape="mug", colour="orange", pattern="zigzag"),
        _novel("ring-heart", "heart", "red banded heart", shape="heart", colour="red", pattern="rings"),
        _novel("quartered-bell", "bell", "yellow checkered bell", shape="bell", colour="yellow", pattern="quartered"),
        _novel("red-blue-hat", "hat", "red plain hat", shape="hat", colour="red", second="blue"),
        _novel("white-green-star", "star", "white plain star", shape="star", colour="white", second="green"),
        _novel("purple-orange-fish", "fish", "purple plain fish", shape="fish", colour="purple", second="orange"),
        _novel("poster-style", "photo", "photo", shape="", colour="", style="poster"),
    ]
}


def references(name: str, count: int = 5, seed: int = 0) -> list[Scene]:
    """Reference scenes of a novel concept with differing backgrounds and positions.

    Other seeds give disjoint pictures, so seed 0 can be learned from and seed 1 judged against.
    Raises: KeyError naming the known concepts.
    """
    if name not in NOVEL:
        raise KeyError(f"unknown novel concept {name!r}; known: {', '.join(NOVEL)}")
    novel, rng = NOVEL[name], random.Random(f"{name}/{seed}")
    grounds = rng.sample(BACKGROUNDS, len(BACKGROUNDS))
    scenes = []
    for i in range(count):
        place = {
            "background": grounds[i % len(grounds)],
            "position": POSITIONS[(i + rng.randrange(2)) % 3],
            "size": SIZES[i % 2],
            "seed": rng.randrange(2**31),
        }
        if novel.scene.style:
            scenes.append(replace(named_scene(rng), **place, style=novel.scene.style))
        else:
            scenes.append(replace(novel.scene, **place))
    return scenes


def reference_caption(scene: Scene, word: str) -> str:
    """What a user would write under a reference picture, with ``word`` for the concept."""
    where = {"left": "on the left", "center": "in the center", "right": "on the right"}[scene.position]
    if scene.style:
        return (
            f"a photo of a {scene.colour} {scene.pattern} {scene.shape}, {where}, {scene.background} background, {word}"
        )
    return f"a photo of a {scene.size} {word}, {where}, {scene.background} background"

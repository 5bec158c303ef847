"""The toy world tells the truth about its pictures."""

import random
from dataclasses import replace

import numpy as np
import pytest

from concepts.demo import world


def test_equal_scenes_give_equal_pixels():
    scene = world.named_scene(random.Random(3))
    first, second = world.render(scene), world.render(replace(scene))
    assert all(np.array_equal(world.pixels(a), world.pixels(b)) for a, b in zip(first, second, strict=True))
    other = world.render(replace(scene, seed=scene.seed + 1))[0]
    assert not np.array_equal(world.pixels(first[0]), world.pixels(other))


@pytest.mark.parametrize("make", [world.named_scene, world.thing_scene])
def test_captions_mention_only_true_facts(make):
    known = {value for values in world.FACTORS.values() for value in values} | {"tall", "wide", "spiky", *world.NUMBERS}
    rng = random.Random(5)
    for _ in range(400):
        scene = make(rng)
        true = {getattr(scene, name) for name in world.FACTORS} | {*" ".join(scene.words).split()}
        said = set(world.caption(scene, rng).replace(",", "").split())
        assert not (said & known - true), (said, scene)


def test_full_caption_names_every_factor():
    rng = random.Random(6)
    for _ in range(100):
        scene = world.named_scene(rng)
        said = world.caption(scene, rng, full=True)
        assert all(getattr(scene, name) in said for name in world.FACTORS), said


def test_bare_captions_name_objects_and_nothing_of_their_looks():
    looks, rng = {*world.COLOURS, *world.PATTERNS, *world.SIZES}, random.Random(7)
    for _ in range(100):
        both = world.pair(rng)
        alone = world.caption(both[0], rng, bare=True)
        for text, scenes in ((alone, both[:1]), (world.pair_caption(both, rng, bare=True), both)):
            said = set(text.replace(",", "").split())
            assert {s.shape for s in scenes} <= said and not said & looks, text


def test_captions_vary():
    scene = world.named_scene(random.Random(1))
    assert len({world.caption(scene, random.Random(i)) for i in range(200)}) > 50


def test_held_out_share_and_never_in_training():
    combinations = [(s, c, p) for s in world.SHAPES for c in world.COLOURS for p in world.PATTERNS]
    share = sum(world.held_out(*c) for c in combinations) / len(combinations)
    assert share == pytest.approx(world.HELD_OUT, abs=0.03)
    rng = random.Random(0)
    trained = [world.named_scene(rng) for _ in range(3000)]
    assert not any(world.held_out(s.shape, s.colour, s.pattern) for s in trained)
    tested = [world.named_scene(rng, hold=True) for _ in range(200)]
    assert all(world.held_out(s.shape, s.colour, s.pattern) for s in tested)


@pytest.mark.parametrize("shape", [*world.SHAPES, "crown", "umbrella", "rocket", "duck"])
def test_mask_covers_the_object_and_nothing_else(shape):
    """Repainting the object changes pixels only inside the mask, and nearly all of those."""
    scene = world.Scene(shape=shape, colour="blue", background="sand", position="left", seed=8)
    (blue, mask), (red, _) = world.render(scene), world.render(replace(scene, colour="yellow"))
    changed = np.abs(world.pixels(blue).astype(int) - world.pixels(red)).sum(-1) > 0
    mask = world.pixels(mask)
    assert not changed[mask == 0].any()
    assert changed[mask == 255].mean() > 0.5
    assert 0.02 < (mask > 127).mean() < 0.3
    ground, _ = world.render(replace(scene, shape="dot", size="small", position="right"))
    far = np.s_[:, :16]
    assert np.array_equal(world.pixels(ground)[far][mask[far] == 0], world.pixels(blue)[far][mask[far] == 0])


def test_two_objects_stand_side_by_side():
    """Each on its half, on the left one's ground, as it would stand there alone."""
    rng = random.Random(12)
    for _ in range(60):
        left, right = world.pair(rng)
        picture, *masks = (world.pixels(part) for part in world.render(left, right))
        assert left.background == right.background
        assert not masks[0][:, world.SIZE // 2 + 1 :].any() and not masks[1][:, : world.SIZE // 2 - 1].any()
        alone, mask = (world.pixels(part) for part in world.render(left))
        assert np.array_equal(mask, masks[0])
        assert np.array_equal(alone[masks[1] == 0], picture[masks[1] == 0])
        assert (alone[masks[1] == 255] != picture[masks[1] == 255]).any()


def test_captions_of_two_objects_bind_their_words():
    rng = random.Random(13)
    for _ in range(300):
        scenes = world.pair(rng)
        full = world.pair_caption(scenes, rng, full=True)
        assert all(f"{s.colour} {s.pattern} {s.shape} on the {s.position}" in full for s in scenes), full
        assert scenes[0].background in full
        some = world.pair_caption(scenes, rng)
        assert all(s.shape in some for s in scenes) and world.BESIDE not in some


def test_pictures_to_learn_words_from():
    """Seeded, different in all looks, and captioned without any of them."""
    for seed in range(30):
        left, right = both = world.two_things(seed)
        assert both == world.two_things(seed) and left.background == right.background
        assert all(getattr(left, f) != getattr(right, f) for f in ("shape", "colour", "pattern"))
        lines = world.marked_captions(both).splitlines()
        assert len(set(lines)) == len(lines) == 5
        for line in lines:
            said = line.replace("[", "").replace("]", "").replace(",", "").split()
            assert sorted(w for w in said if f"[{w}]" in line) == sorted([left.shape, right.shape, "background"])
            assert not {left.colour, right.colour, left.pattern, right.pattern, left.background} & set(said)


@pytest.mark.parametrize("make", [world.named_scene, world.thing_scene])
def test_box_holds_the_object_and_says_nothing_of_its_shape(make):
    rng = random.Random(9)
    for _ in range(60):
        scene = make(rng)
        left, top, right, bottom = world.box(scene)
        assert right - left == pytest.approx(bottom - top)
        assert world.box(replace(scene, shape="dot", outline=(), badge="", second="")) == world.box(scene)
        rows, columns = np.nonzero(world.pixels(world.render(scene)[1]))
        edge = 3
        assert columns.min() >= left - edge and columns.max() <= right + edge
        assert rows.min() >= top - edge and rows.max() <= bottom + edge


def test_labels_are_the_factors():
    rng = random.Random(2)
    scene = world.named_scene(rng)
    assert {n: world.FACTORS[n][i] for n, i in scene.labels().items()} == {n: getattr(scene, n) for n in world.FACTORS}
    assert world.thing_scene(rng).labels()["shape"] == -1


def test_novel_concepts_are_many_and_not_in_training():
    assert len(world.NOVEL) >= 12
    rng = random.Random(4)
    seen = [world.thing_scene(rng) if i % 3 else world.named_scene(rng) for i in range(3000)]
    for name, novel in world.NOVEL.items():
        new = novel.scene
        unheard = new.style or new.shape not in world.SHAPES or new.pattern not in world.PATTERNS
        drawn = [s for s in seen if (s.shape, s.badge, s.second) == (new.shape, new.badge, new.second)]
        assert unheard or not drawn, name


@pytest.mark.parametrize("name", world.NOVEL)
def test_references_differ_between_seeds(name):
    first, second = world.references(name, 5, 0), world.references(name, 5, 1)
    assert world.references(name, 5, 0) == first
    shots = [world.pixels(world.render(s)[0]).tobytes() for s in first + second]
    assert len(set(shots)) == len(shots)
    assert len({s.background for s in first}) == 5 and len({s.position for s in first}) > 1


def test_unknown_concept_is_named_with_the_known_ones():
    with pytest.raises(KeyError, match="umbrella"):
        world.references("umbrela")

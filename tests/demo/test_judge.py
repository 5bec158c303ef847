"""The judge sees what is there, and the measures count it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from concepts.demo import judge as judging
from concepts.demo import measure, world


@pytest.fixture(scope="module")
def judge():
    return judging.load()


@pytest.fixture(scope="module")
def fresh():
    """300 held-out scenes with their pictures and masks."""
    rng = random.Random("tests")
    scenes = [world.named_scene(rng, hold=True) if i % 8 else world.thing_scene(rng) for i in range(300)]
    return scenes, *judging.rendered(scenes)


def described(scenes):
    return [{name: getattr(s, name) for name in world.FACTORS} for s in scenes]


def test_file_is_small():
    assert judging.FILE.stat().st_size <= 2_000_000


def test_every_factor_is_seen(judge, fresh):
    scenes, pictures, _ = fresh
    table = measure.accuracy(judge, pictures, described(scenes))
    assert set(table) == set(world.FACTORS)
    assert min(table.values()) >= 0.97, table


def test_two_objects_are_told_apart(judge):
    rng = random.Random("sides")
    pairs = [world.pair(rng, hold=True) for _ in range(100)]
    pictures = np.stack([world.pixels(world.render(*p)[0]) for p in pairs])
    for side, seen in enumerate(judge.sides(pictures)):
        for factor, found in seen.items():
            right = [judging.CLASSES[factor][i] == getattr(p[side], factor) for i, p in zip(found, pairs, strict=True)]
            assert np.mean(right) >= 0.97, (side, factor)


def test_floats_and_bytes_are_judged_alike(judge, fresh):
    pictures = fresh[1][:16]
    bytes_, floats = judge.embed(pictures), judge.embed(torch.from_numpy(pictures).float() / 255)
    assert torch.allclose(bytes_, floats, atol=1e-4)
    assert torch.allclose(bytes_.norm(dim=1), torch.ones(16), atol=1e-5)


def test_mask_finds_the_object(judge, fresh):
    _, pictures, masks = fresh
    found, true = judge.mask(pictures).numpy() > 0.5, masks > 127
    overlap = (found & true).sum((1, 2)) / (found | true).sum((1, 2))
    assert overlap.mean() > 0.9


def test_a_wrong_description_scores_low(judge, fresh):
    scenes, pictures, _ = fresh
    scenes = scenes[:60]
    right = measure.following(judge, pictures[:60], described(scenes))
    lies = [{n: v[(v.index(d[n]) + 1) % len(v)] for n, v in judging.CLASSES.items()} for d in described(scenes)]
    wrong = measure.following(judge, pictures[:60], lies)
    assert right.mean() > 0.97 and wrong.mean() < 0.05
    half = [
        {**d, "colour": w["colour"], "pattern": w["pattern"], "size": w["size"]}
        for d, w in zip(described(scenes), lies, strict=True)
    ]
    assert measure.following(judge, pictures[:60], half).mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("name", world.NOVEL)
def test_embedding_tells_a_novel_concept_from_plain_words(judge, name):
    novel = world.NOVEL[name]
    held, held_masks = judging.rendered(world.references(name, 5, 1))
    masks = None if novel.scene.style else held_masks
    own = measure.fidelity(judge, judging.rendered(world.references(name, 5, 0))[0], held, masks).mean()
    scenes = [judging.plain_scene(novel, s) for s in world.references(name, 5, 2)]
    plain = measure.fidelity(judge, judging.rendered(scenes)[0], held, masks).mean()
    assert own > 0.75 and own - plain > 0.12, (float(own), float(plain))


def test_background_does_not_count_for_fidelity(judge):
    scene = replace(world.NOVEL["crown"].scene, position="left", seed=1)
    pictures = judging.rendered([replace(scene, background=b) for b in world.BACKGROUNDS])[0]
    e = judge.embed(pictures)
    assert (e @ e.T).min() > 0.8


def test_interval_covers_the_mean_and_knows_clusters():
    rng = np.random.default_rng(0)
    effect = np.repeat(rng.normal(size=10), 50)
    values = effect + 0.1 * rng.normal(size=500)
    mean, low, high = measure.bootstrap(values)
    assert low < mean < high and mean == pytest.approx(values.mean())
    _, wide_low, wide_high = measure.bootstrap(values, clusters=np.repeat(np.arange(10), 50))
    assert wide_high - wide_low > 3 * (high - low)
    assert measure.bootstrap(values) == (mean, low, high)
    assert measure.bootstrap([2.0, 2.0], clusters=["a", "b"]) == (2.0, 2.0, 2.0)


def test_interval_holds_its_level():
    rng = np.random.default_rng(1)
    inside = 0
    for i in range(200):
        _, low, high = measure.bootstrap(rng.normal(size=40), seed=i, level=0.9, draws=400)
        inside += low <= 0 <= high
    assert 0.82 <= inside / 200 <= 0.96


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda j: j.factors(torch.zeros(1, 64, 64, 3)), "128"),
        (lambda j: measure.following(j, torch.zeros(1, 128, 128, 3), [{"shape": "cup"}]), "mug"),
        (lambda j: measure.following(j, torch.zeros(2, 128, 128, 3), [{}]), "2 pictures"),
        (lambda j: measure.bootstrap([]), "at least one"),
        (lambda j: measure.bootstrap([1.0, 2.0], clusters=["a"]), "1 cluster"),
    ],
)
def test_mistakes_are_explained(judge, call, words):
    with pytest.raises(ValueError, match=words):
        call(judge)

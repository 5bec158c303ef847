"""The benchmark's own honesty: it refuses noise, and its ratios are those of the pairs."""

import pytest

from concepts.bench import arms, fidelity, prism, runner


@pytest.mark.parametrize(
    "products, load, refused",
    [([100, 99, 98], 0.2, False), ([100, 60], 0.2, True), ([100, 71], 0.2, False), ([100, 100], 1.5, True)],
)
def test_noise_is_refused(products, load, refused):
    assert bool(runner.noisy(products, load)) == refused


def test_ratios_are_of_pairs():
    assert runner.ratio([4.0, 6.0, 9.0], [2.0, 2.0, 3.0]) == (3.0, 2.0, 3.0)
    with pytest.raises(ValueError):
        runner.ratio([1.0], [])


def test_a_failing_side_says_why(monkeypatch):
    monkeypatch.chdir(runner.RESULTS.parents[1])
    with pytest.raises(RuntimeError, match="invalid choice"):
        runner.side("no-such-case", "ours")


def row(method, concept, fidelity, following, seed=0):
    return {
        "concept": concept,
        "seed": seed,
        "method": method,
        "fidelity": [fidelity],
        "following": [following],
        "seconds": 1.0,
    }


def test_the_table_compares_with_plain_words_of_the_same_concept():
    rows = [row("plain words", "a", 0.2, 1.0), row("plain words", "b", 0.6, 0.5), row("TI, 1 vector", "a", 0.8, 0.6)]
    found = fidelity.table(rows)["TI, 1 vector"]
    assert found["runs"] == 1
    assert found["fidelity gain"][0] == pytest.approx(0.6) and found["following kept"] == pytest.approx(0.6)


def test_prompts_name_every_position_and_size():
    from concepts.demo import world

    for name in world.NOVEL:
        places = arms.scenes_of(name)
        assert {s.position for s in places} == set(world.POSITIONS) and {s.size for s in places} == set(world.SIZES)
        assert len({s.background for s in places}) == len(world.BACKGROUNDS)


def test_the_ablation_compares_with_the_target_alone():
    rows = [row("target only", "a", 0.5, 1.0), row("target only", "b", 0.5, 1.0)]
    rows += [row("+ exclusion", "a", 0.8, 0.9) | {"in residuals": [0.9, 0.1], "grounds": [1.0, 1.0]}]
    found = prism.table(rows)["+ exclusion"]
    assert found["fidelity gain"][0] == pytest.approx(0.3) and found["following gain"][0] == pytest.approx(-0.1)
    assert found["found"][0] == 0.5 and found["grounds"][0] == 1.0

"""The benchmark's own honesty: it refuses noise, and its ratios are those of the pairs."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

from concepts.bench import arms, fidelity, kv, match_vs_kornia, prism, runner, stage2


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


class Layer(NamedTuple):
    """As host.attention's, which needs the host."""

    name: str
    block: int
    scale: int
    height: int
    width: int


def row(method, concept, fidelity, following, seed=0):
    return {
        "concept": concept,
        "seed": seed,
        "method": method,
        "fidelity": [fidelity],
        "following": [following],
        "device": "CPU",
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


def test_only_missing_runs_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(arms, "RESULTS", tmp_path)
    monkeypatch.setattr(arms, "parts", lambda: None)
    monkeypatch.setattr(arms.judging, "load", lambda: None)
    (tmp_path / "case.jsonl").write_text(json.dumps(row("a", "crown", 0.1, 1.0)) + "\n")
    seen = []

    def measured(parts, eyes, name, seed, method):
        seen.append((name, seed, method))
        return {"fidelity": [0.5]}

    for _ in range(2):
        rows = arms.rows_of("case", ["a", "b"], ["crown", "duck"], ["1"], measured)
    assert seen == [("duck", 0, "a"), ("crown", 0, "b"), ("duck", 0, "b")] and len(rows) == 4
    for _ in range(2):
        rows = arms.rows_of("case", ["a"], ["crown", "duck"], ["1"], measured, weights="new")
    assert seen[3:] == [("crown", 0, "a"), ("duck", 0, "a")] and len(rows) == 2, "those of other weights do not count"


def test_following_is_compared_where_fidelity_is_equal():
    rows = [row("tokens", "a", 0.4, 1.0), row("DreamBooth", "a", 0.2, 0.98)]
    rows += [row(f"tokens + {s}", "a", f, 0.9) for s, f in ((40, 0.5), (80, 0.55), (120, 0.6))]
    rows += [
        row(f"DreamBooth + {s}", "a", f, k)
        for s, f, k in ((40, 0.3, 1.0), (80, 0.5, 0.8), (120, 0.7, 0.6), (200, 0.8, 0.5))
    ]
    found = stage2.at_equal_fidelity(rows)
    assert found["level"] == pytest.approx((0.9 - 0.7,) * 3) and (found["comparable"], found["of"]) == (1, 1)
    assert found["since the start"] == pytest.approx((0.9 - 0.7 - (1.0 - 0.98),) * 3)
    assert stage2.at_equal_fidelity(rows[:-1]) == {"comparable": 0, "of": 0}, "a row is missing"
    far = [r | {"fidelity": [0.9]} if r["method"] == "tokens + 120" else r for r in rows]
    assert stage2.at_equal_fidelity(far) == {"comparable": 0, "of": 1}, "no step comes there"


def test_attention_is_counted_where_the_object_is():
    layers = [Layer("input.1", 0, 1, 4, 4), Layer("middle.1", 0, 2, 2, 2)]
    mask = np.zeros((128, 128), np.uint8)
    mask[:, :32] = 255
    inside, total = kv.shares({layer: torch.full((layer.height * layer.width, 1), 0.1) for layer in layers}, mask)
    assert inside / total == pytest.approx(0.25)
    left = torch.zeros(4, 4)
    left[:, 0] = 1
    inside, total = kv.shares({layers[0]: left.view(16, 1)}, mask)
    assert inside == pytest.approx(total) == pytest.approx(0.25)


@pytest.mark.slow
def test_matchers_must_agree(monkeypatch):
    monkeypatch.setattr(match_vs_kornia, "CHANNELS", 64)
    products = []
    case = match_vs_kornia.measured(9, 2, products)
    assert set(case["sides"]) == {"kornia", "plain", "ours"} and case["pairs"] > 70 and len(products) == 3
    found = match_vs_kornia.summary(case)
    assert found["ours"]["times ours"] == (1.0, 1.0, 1.0) and found["ours"]["best"] <= found["ours"]["median"]
    monkeypatch.setattr(match_vs_kornia, "MOST", 0)
    assert "kornia" not in match_vs_kornia.measured(9, 1, products)["sides"]
    monkeypatch.setattr(match_vs_kornia, "ours", lambda a, b: match_vs_kornia.plain(a, b)[1:])
    with pytest.raises(AssertionError, match="found other pairs at 9x9"):
        match_vs_kornia.measured(9, 1, products)


def test_memory_is_sampled_above_the_start():
    with match_vs_kornia.Sampled() as memory:
        held = torch.ones(16 << 20)
        match_vs_kornia.time.sleep(0.05)
    assert 60 < memory.megabytes < 80
    del held

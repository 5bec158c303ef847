"""The learning loop against torch.optim, exact continuation, and how it stops."""

import pytest
import torch

from concepts.kernels.draws import generator
from concepts.kernels.fit import Adam, Diverged, Sphere, UnitRows, fit

TARGET = torch.arange(12, dtype=torch.float32).view(2, 6) / 6


def noisy(parameters, step, micro):
    noise = torch.randn(TARGET.shape, generator=generator(3, step * 10 + micro, "test"))
    return sum((p - TARGET + 0.1 * noise).square().mean() for p in parameters.values())


def start():
    return {"a": torch.ones(2, 6), "b": torch.full((2, 6), -1.0)}


def run(optimiser, *lengths, accumulate=1):
    parameters, state, losses = start(), None, []
    for length in lengths:
        for step in fit(parameters, noisy, optimiser, length, accumulate=accumulate, state=state):
            losses.append(step.loss)
        parameters = {k: v.detach().clone() for k, v in parameters.items()}
        state = {k: v.clone() for k, v in step.state.items()}
    return parameters, losses


def test_late_parameters_wait_and_then_learn_as_if_they_began_then():
    def apart(parameters, step, micro):
        return sum((p - TARGET).square().mean() for p in parameters.values())

    def after(optimiser, names, steps):
        parameters = {k: v for k, v in start().items() if k in names}
        for _ in fit(parameters, apart, optimiser, steps):
            pass
        return {k: v.detach() for k, v in parameters.items()}

    waited = after(Adam(0.03, late={"b": 4}), "ab", 4)
    assert torch.equal(waited["b"], start()["b"]) and torch.equal(waited["a"], after(Adam(0.03), "a", 4)["a"])
    both, alone = after(Adam(0.03, late={"b": 4}), "ab", 10), after(Adam(0.03), "b", 6)
    assert torch.equal(both["b"], alone["b"])
    clipped = after(Adam(0.03, clip=0.1, late={"a": 2, "b": 2}), "ab", 2)
    assert all(torch.equal(clipped[k], start()[k]) for k in "ab")


def test_a_parameter_may_have_a_rate_of_its_own():
    def after(optimiser):
        parameters = start()
        for _ in fit(parameters, noisy, optimiser, 1):
            pass
        return parameters

    both = after(Adam(0.03, rates={"b": 0.3}, decay=0.1))
    for rate, key in ((0.03, "a"), (0.3, "b")):
        assert torch.equal(both[key], after(Adam(rate, decay=0.1))[key])


def test_adam_equals_torch():
    ours, _ = run(Adam(0.03), 25)
    theirs = {k: v.requires_grad_() for k, v in start().items()}
    optimiser = torch.optim.Adam(theirs.values(), lr=0.03)
    for step in range(25):
        optimiser.zero_grad()
        noisy(theirs, step, 0).backward()
        optimiser.step()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key].detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay, clip", [(0.1, 0.0), (0.0, 0.3), (0.1, 1.0), (0.1, 1e6)])
def test_decay_and_clipping_equal_torch(decay, clip):
    """At 1 the limit is crossed on the way."""
    ours, _ = run(Adam(0.03, decay=decay, clip=clip), 25)
    theirs = {k: v.requires_grad_() for k, v in start().items()}
    optimiser = torch.optim.AdamW(theirs.values(), lr=0.03, weight_decay=decay)
    for step in range(25):
        optimiser.zero_grad()
        noisy(theirs, step, 0).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        optimiser.step()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key].detach(), rtol=1e-5, atol=1e-6)


def test_plain_parameters_go_against_their_gradient():
    parameters, before = start(), start()
    next(fit(parameters, lambda p, s, m: (p["a"] ** 2).sum() + p["b"].sum(), Adam(0.03, plain={"a": 0.1}), 1))
    torch.testing.assert_close(parameters["a"].detach(), 0.8 * before["a"])
    torch.testing.assert_close(parameters["b"].detach(), before["b"] - 0.03)


def test_vectors_without_a_gradient_do_not_decay():
    parameters = {"a": torch.ones(3, 4)}
    next(fit(parameters, lambda p, s, m: p["a"][1].sum(), Adam(0.01, decay=0.5), 1))
    assert bool((parameters["a"][[0, 2]] == 1).all()) and bool((parameters["a"][1] < 0.99).all())


@pytest.mark.parametrize(
    "optimiser",
    [
        Adam(0.03),
        Adam(0.03, decay=0.1, clip=0.3),
        Adam(0.03, plain={"a": 0.01}),
        Sphere({}, 0.05),
        UnitRows(0.03, rows="a", warmup=9),
    ],
    ids=["adam", "adamw", "plain", "sphere", "unit rows"],
)
def test_continuing_equals_one_run_bit_for_bit(optimiser):
    whole, losses = run(optimiser, 17, accumulate=2)
    parts, again = run(optimiser, 5, 1, 11, accumulate=2)
    assert losses == again
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_accumulating_is_the_mean_of_the_batches():
    parameters = start()
    first = next(fit(parameters, lambda p, s, m: noisy(p, s, m), Adam(0.01), 1, accumulate=3))
    assert first.loss == pytest.approx(sum(float(noisy(start(), 0, m)) for m in range(3)) / 3, rel=1e-6)


def test_sphere_steps_are_the_formula_row_by_row():
    """Rows of different lengths, and a prior for one parameter alone."""
    g = torch.Generator().manual_seed(0)
    word = torch.nn.functional.normalize(torch.randn(2, 6, generator=g), dim=-1)
    parameters = {k: torch.randn(2, 6, generator=g) * torch.tensor([[0.5], [3.0]]) for k in "ab"}
    expected = {k: v.clone() for k, v in parameters.items()}
    for _ in fit(parameters, noisy, Sphere({"a": word}, 0.05, kappa=0.7), 5):
        pass
    for step in range(5):
        leaves = {k: v.clone().requires_grad_() for k, v in expected.items()}
        noisy(leaves, step, 0).backward()
        for key, rows in expected.items():
            for n, (row, grad) in enumerate(zip(rows.clone(), leaves[key].grad, strict=True)):
                radius, unit = row.norm(), row / row.norm()
                slope = grad * radius - (0.7 * word[n] if key == "a" else 0)
                tangent = slope - (slope @ unit) * unit
                moved = unit - 0.05 * tangent / tangent.norm()
                rows[n] = radius * moved / moved.norm()
    for key, value in expected.items():
        torch.testing.assert_close(parameters[key].detach(), value)


def test_sphere_stays_where_the_gradient_points_along_the_vector():
    parameters = {"a": torch.tensor([[2.0, 0.0]])}
    next(fit(parameters, lambda p, s, m: p["a"][0, 0], Sphere(), 1))
    assert parameters["a"].tolist() == [[2, 0]]


@pytest.mark.parametrize("clip", [0.3, 1.0])
def test_unit_rows_against_torch(clip):
    """Gradient without its radial part, torch's Adam with a rising rate, rows back to length one."""
    parameters = {"a": torch.nn.functional.normalize(start()["a"] + torch.arange(6.0)), "b": start()["b"]}
    theirs = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    optimiser = torch.optim.Adam(theirs.values(), lr=1.0)
    for step in range(12):
        optimiser.zero_grad()
        noisy(theirs, step, 0).backward()
        row = theirs["a"].detach()
        theirs["a"].grad -= (theirs["a"].grad * row).sum(-1, keepdim=True) * row
        torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        optimiser.param_groups[0]["lr"] = 0.03 * min(1, (step + 1) / 5)
        optimiser.step()
        with torch.no_grad():
            theirs["a"] /= theirs["a"].norm(dim=-1, keepdim=True)
    for _ in fit(parameters, noisy, UnitRows(0.03, clip=clip, rows="a", warmup=5), 12):
        pass
    for key, value in parameters.items():
        torch.testing.assert_close(value.detach(), theirs[key].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parameters["a"].detach().norm(dim=-1), torch.ones(2))


def test_sphere_prior_pulls_towards_the_word():
    word = torch.nn.functional.normalize(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    parameters = {"a": torch.ones(2, 6)}
    for _ in fit(parameters, lambda p, s, m: 1e-6 * p["a"].sum(), Sphere({"a": word}, 0.02, kappa=1.0), 200):
        pass
    assert (torch.cosine_similarity(parameters["a"].detach(), word, -1) > 0.99).all()


def test_sphere_leaves_vectors_that_a_step_did_not_use():
    """As those of other stages: the prior alone, divided by its own length, would be as long as a step that learns."""
    before = torch.nn.functional.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    word, parameters = before.flip(0), {"a": before.clone()}
    for _ in fit(parameters, lambda p, s, m: p["a"][1, 0], Sphere({"a": word}, 0.02), 5):
        pass
    assert torch.equal(parameters["a"].detach()[::2], before[::2])
    assert not torch.equal(parameters["a"].detach()[1], before[1])


@pytest.mark.parametrize("loss", [lambda p, *_: p["a"].detach().sum(), lambda p, *_: torch.ones(1, requires_grad=True)])
def test_a_loss_that_nothing_leads_to_is_named(loss):
    with pytest.raises(RuntimeError, match="No gradient reaches what is learned") as error:
        next(fit(start(), lambda *given: loss(*given).sum(), Adam(0.1), 1))
    assert not isinstance(error.value, Diverged)


def test_a_parameter_that_a_step_does_not_use_stays():
    parameters = start()
    for done in fit(parameters, lambda p, step, micro: p["a"].square().sum(), Adam(0.1, decay=0.1), 3):
        assert not done.state["first.b"].any()
    assert torch.equal(parameters["b"].detach(), start()["b"]) and not torch.equal(parameters["a"], start()["a"])


BAD = {
    "nan": lambda a: a.square().sum() * float("nan"),
    "infinity": lambda a: a.square().sum() * float("inf"),
    "loss alone": lambda a: a.sum() + float("nan"),
    "gradient alone": lambda a: (a - a.detach()).sqrt().sum(),
}


@pytest.mark.parametrize("scale", [1.0, 2.0, 4096.0])
@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_keeps_the_last_good_state(bad, scale):
    parameters, seen, calls = {"a": torch.ones(3)}, [], []

    def loss(p, step, micro):
        calls.append(step)
        assert len(calls) < 99, "it is tried for ever"
        return BAD[bad](p["a"]) if step == 4 else p["a"].square().sum()

    with pytest.raises(Diverged, match="step 5"):
        for done in fit(parameters, loss, Adam(0.1), 10, scale=scale):
            number = done.number
            seen.append(parameters["a"].detach().clone())
    assert number == 4
    assert torch.equal(parameters["a"].detach(), seen[-1])
    assert parameters["a"].grad is None


def test_an_error_inside_the_loss_leaves_the_last_finished_step():
    parameters = {"a": torch.ones(3)}

    def loss(p, step, micro):
        if step == 3:
            raise KeyboardInterrupt
        return p["a"].square().sum()

    steps = fit(parameters, loss, Adam(0.1), 10)
    with pytest.raises(KeyboardInterrupt):
        for done in steps:
            last = done
            kept = parameters["a"].detach().clone()
    assert last.number == 3 and int(last.state["step"]) == 3
    assert torch.equal(parameters["a"].detach(), kept)


def test_state_of_another_optimiser_is_refused():
    step = next(fit(start(), noisy, Adam(0.1), 1))
    with pytest.raises(ValueError, match="does not belong"):
        next(fit(start(), noisy, Sphere({}, 0.1), 1, state=step.state))
    with pytest.raises(ValueError, match="does not belong"):
        next(fit({k: v[:1] for k, v in start().items()}, noisy, Adam(0.1), 1, state=step.state))


def test_continuing_leaves_the_given_state_as_it_was():
    state = next(fit(start(), noisy, Adam(0.1), 1)).state
    kept = {k: v.clone() for k, v in state.items()}
    next(fit(start(), noisy, Adam(0.1), 1, state=state))
    assert all(torch.equal(kept[k], v) for k, v in state.items())


def test_a_scaled_loss_gives_the_same_steps_bit_for_bit():
    whole, losses = run(Adam(0.03, clip=0.3), 9, accumulate=2)
    parameters = start()
    again = [s.loss for s in fit(parameters, noisy, Adam(0.03, clip=0.3), 9, accumulate=2, scale=4096.0)]
    assert losses == again and all(torch.equal(whole[k], parameters[k]) for k in whole)


def test_small_gradients_pass_half_precision_when_scaled():
    def halved(parameters, step, micro):
        return (parameters["a"].half().float() * 2e-8).sum()

    lost, kept = {"a": torch.ones(2, 6)}, {"a": torch.ones(2, 6)}
    next(fit(lost, halved, Adam(0.03), 1))
    next(fit(kept, halved, Adam(0.03), 1, scale=4096.0))
    assert bool((lost["a"] == 1).all()) and bool((kept["a"] < 0.985).all())


def test_a_gradient_that_scaling_made_infinite_is_taken_again_with_less():
    def steep(parameters, step, micro):
        return (parameters["a"].half().float() * 30.0).sum()  # times 4096 is beyond fp16

    plain, scaled = {"a": torch.ones(2, 6)}, {"a": torch.ones(2, 6)}
    expected = [s.loss for s in fit(plain, steep, Adam(0.03), 3)]
    assert [s.loss for s in fit(scaled, steep, Adam(0.03), 3, scale=4096.0)] == expected
    assert torch.equal(plain["a"], scaled["a"])
    with pytest.raises(Diverged):
        next(fit(start(), lambda p, s, m: (p["a"] * float("inf")).sum() + noisy(p, s, m), Adam(0.03), 1, scale=4096.0))

"""Directions of words: as a naive form that modulates every row, in the prompt's rows alone, and gone with the call."""

import contextlib

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierMismatch
from concepts.kernels import controller

from .test_variants import sample as sampled
from .tiny import fill, tiny

pytestmark = pytest.mark.usefixtures("host")
WIDTH = {"flux": 64, "sd3": 128}
ENCODERS = {"flux": ["t5xxl"], "sd3": ["clip_l"]}
ROWS = {"flux": 64, "sd3": 4096}


@pytest.fixture(scope="module", params=["flux", "sd3"])
def made(request, host):
    found = tiny(request.param)
    found.family = request.param
    return found


@pytest.fixture(scope="module")
def flux(host):
    found = tiny("flux")
    found.family = "flux"
    return found


def taught(made, words=("hat", "coat"), name="p", seed=0, blocks="all", size=1.0, each=True) -> Concept:
    """A concept with random directions and a random network."""
    from concepts.host.modulation import chosen_blocks

    g = torch.Generator().manual_seed(seed)
    names = chosen_blocks(made.model.model.diffusion_model, blocks)
    width, count = WIDTH[made.family], len(names)
    network = controller.start(ROWS[made.family], width, count, 16, g)
    for part in ("shared", "block"):
        if each or part == "shared":
            network[f"{part}.out.weight"] = size * torch.randn(width, 16, generator=g)
    tensors = {f"controller.{k}": v for k, v in network.items()}
    for number in range(len(words)):
        tensors[f"word.{number}"] = size * torch.randn(count if each else 1, 1, width, generator=g)
    info = {"words": list(words), "blocks": list(names), "encoders": ENCODERS[made.family], "input": "dense"}
    return Concept(name, "modulation", tensors, info)


def prompt(made, text, *concepts, strength=1.0, cached=False):
    from concepts.host.prompt import encode_prompt

    with torch.inference_mode():
        return encode_prompt(made.clip, text, [(c, strength) for c in concepts], cached)


def sample(made, positive, negative=None, cfg=1.0, steps=3, **more):
    return sampled(made, positive, negative, cfg, steps, **more)


def near(a, b) -> bool:
    """Equal but for the order of fp32 sums."""
    return float((a - b).norm() / b.norm()) < 1e-5


def hooks(made) -> int:
    """Hooks and methods that are on the model's modules."""
    own = ("pre_attention", "post_attention", "forward")
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + sum(k in m.__dict__ for k in own)
        for m in made.model.model.modules()
    )


def outputs(made, positive, negative, cfg=3.0, **more):
    """Per call of the model the denoised estimates of each side, as (index, [b, c, h, w]), out of the stock sampler."""
    seen, model = [], made.model.clone()

    def watch(apply, given):
        out = apply(given["input"], given["timestep"], **given["c"])
        sides = given["cond_or_uncond"]
        seen.append(list(zip(sides, out.clone().chunk(len(sides)), strict=True)))
        return out

    model.set_model_unet_function_wrapper(watch)
    sample(made, positive, negative, cfg, model=model, **more)
    return seen


@contextlib.contextmanager
def naive(made, places):
    """Every row of every block modulated by itself, in the whole batch, for as long as the context is open."""
    from concepts.host.modulation import blocks_of

    handles, undo = [], []
    for name, block in blocks_of(made.model.model.diffusion_model).items():
        used = [place for place in places if name in place.blocks]
        offsets = {p: d for place in used for p, d in zip(place.positions, place.at(name), strict=True)}
        if name.startswith("joint"):
            undo.append(_naive_joint(block.context_block, offsets))
            continue
        double, lengths = name.startswith("double"), {}

        def note(module, args, kwargs, double=double, lengths=lengths):
            lengths["n"] = (kwargs["txt"] if double else args[0]).shape[1]

        def every(module, args, offsets=offsets, lengths=lengths):
            vector = args[0][:, None].repeat(1, lengths["n"], 1)
            for position, direction in offsets.items():
                vector[:, position] += direction
            return (vector,)

        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
        handles.append((block.txt_mod if double else block.modulation).register_forward_pre_hook(every))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for back in undo:
            back()


def _naive_joint(block, offsets):
    """The stock methods of a text block, one row at a time."""
    before, after = block.pre_attention, block.post_attention

    def pre_attention(x, c):
        each = [before(x[:, i : i + 1], c + offsets[i] if i in offsets else c) for i in range(x.shape[1])]
        qkv = tuple(torch.cat([own[0][part] for own in each], 1) for part in range(3))
        return qkv, (None if block.pre_only else (each,))

    def post_attention(attention, each):
        return torch.cat([after(attention[:, i : i + 1], *own[1]) for i, own in enumerate(each)], 1)

    block.pre_attention, block.post_attention = pre_attention, post_attention

    def back():
        del block.pre_attention, block.post_attention

    return back


def places_of(conditioning):
    from concepts.host.variants import PROMPTS

    return conditioning[0][1][PROMPTS][-1].places


@pytest.mark.parametrize("blocks", ["all", "double blocks"])
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
def test_it_equals_modulating_every_row(made, blocks, cached):
    concept = taught(made, blocks=blocks)
    conditioning = prompt(made, "a girl with a <p:hat> and a <p:coat>", concept, cached=cached)
    plain = prompt(made, "a girl with a hat and a coat")
    assert torch.equal(conditioning[0][0], plain[0][0]), "what is encoded does not change"
    with naive(made, places_of(conditioning)):
        expected = sample(made, plain, batch=2)
    got = sample(made, conditioning, batch=2)
    assert near(got, expected) and not near(got, sample(made, plain, batch=2))
    assert hooks(made) == 0


def test_no_direction_changes_nothing(made):
    plain = sample(made, prompt(made, "a hat and a coat"), cfg=3.0)
    zero = sample(made, prompt(made, "a <p:hat> and a <p:coat>", taught(made, size=0.0)), cfg=3.0)
    assert near(zero, plain)
    for off in (
        prompt(made, "a <p:hat> and a <p:coat>", taught(made), strength=0.0),
        prompt(made, "a <p:hat:0> and a <p:coat:0.0>", taught(made)),
    ):
        assert "hooks" not in off[0][1] and torch.equal(sample(made, off, cfg=3.0), plain)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_negative_is_untouched_and_shares_the_call(made, batch):
    """Even one with the same text."""
    concept, plain = taught(made), prompt(made, "a hat and a coat")
    with_words = outputs(made, prompt(made, "a <p:hat> and a <p:coat>", concept), plain, steps=1, batch=batch)
    without = outputs(made, plain, plain, steps=1, batch=batch)
    for changed, same in zip(with_words, without, strict=True):
        assert len(changed) == 2, "positive and negative share one call"
        for (side, got), (_, expected) in zip(changed, same, strict=True):
            assert torch.equal(got, expected) if side else not near(got, expected)


def test_a_zeroed_prompt_holds_no_words(made):
    """The host's ConditioningZeroOut keeps hooks and marks."""
    import nodes

    words, plain = prompt(made, "a <p:hat>", taught(made)), prompt(made, "a hat")
    with torch.inference_mode():
        (zeroed,), (empty,) = (nodes.ConditioningZeroOut().zero_out(c) for c in (words, plain))
    for positive in (words, plain):
        assert torch.equal(sample(made, positive, zeroed, cfg=3.0), sample(made, positive, empty, cfg=3.0))


def test_equal_texts_of_two_pictures_stay_apart(made):
    """Both in one call: the second picture's hat in the negative."""
    one, two = taught(made, name="one"), taught(made, name="two", seed=1)
    a, b = prompt(made, "a <one:hat>", one), prompt(made, "a <two:hat>", two)
    both = outputs(made, a, b, steps=1)[0]
    for (_, got), expected in zip(sorted(both, key=lambda p: p[0]), (a, b), strict=True):
        assert near(got, outputs(made, expected, prompt(made, ""), cfg=1.0, steps=1)[0][0][1])
    text = "a <one:hat> and a <two:hat>"
    together = prompt(made, text, one, two)
    first, second = places_of(together)
    assert not set(first.positions) & set(second.positions) and not torch.equal(first.directions, second.directions)
    swapped = prompt(made, "a <two:hat> and a <one:hat>", one, two)
    assert not near(sample(made, together), sample(made, swapped))


def test_prompts_that_somebody_laid_into_one_entry_are_told_by_their_text(made):
    """As a batch of pictures with a text each: hooks of all of them, and nobody's name."""
    import comfy.hooks

    a, b = (prompt(made, t, taught(made)) for t in ("a <p:hat>", "one <p:coat>"))
    hooks_of_all = comfy.hooks.HookGroup.combine_all_hooks([c[0][1]["hooks"] for c in (a, b)])
    facts = {"pooled_output": a[0][1]["pooled_output"].expand(2, -1), "hooks": hooks_of_all}
    together = [[torch.cat([a[0][0], b[0][0]]), facts]]
    drawn = outputs(made, together, prompt(made, ""), cfg=1.0, steps=1, batch=2)[0][0][1]
    for number, own in enumerate((a, b)):
        own = [[own[0][0], own[0][1] | {"pooled_output": a[0][1]["pooled_output"]}]]
        alone = outputs(made, own, prompt(made, ""), cfg=1.0, steps=1, batch=2)[0][0][1]
        assert near(drawn[number], alone[number])


def test_strengths_multiply(made):
    concept = taught(made)
    strong = places_of(prompt(made, "a <p:hat:0.5> and a <p:coat>", concept, strength=0.5, cached=True))
    whole = places_of(prompt(made, "a <p:hat> and a <p:coat>", concept, cached=True))
    torch.testing.assert_close(strong[0].directions, 0.25 * whole[0].directions)
    torch.testing.assert_close(strong[1].directions, 0.5 * whole[1].directions)


def test_areas_ranges_and_combined_prompts(made):
    """The host's own nodes around the conditioning: each entry keeps its words, the negative's copies have none."""
    import nodes

    conditioning, plain = prompt(made, "a <p:hat>", taught(made)), prompt(made, "a hat")
    with torch.inference_mode():
        (area,) = nodes.ConditioningSetArea().append(conditioning, 32, 64, 0, 0, 1.0)
        (plain_area,) = nodes.ConditioningSetArea().append(plain, 32, 64, 0, 0, 1.0)
        (ranged,) = nodes.ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.5)
        (late,) = nodes.ConditioningSetTimestepRange().set_range(plain, 0.5, 1.0)
        (both,) = nodes.ConditioningCombine().combine(conditioning, plain)
        (joined,) = nodes.ConditioningConcat().concat(conditioning, prompt(made, "grass"))
        (joined_plain,) = nodes.ConditioningConcat().concat(plain, prompt(made, "grass"))
    negative = prompt(made, "grass")
    for changed, same in zip(
        outputs(made, area, negative, steps=1), outputs(made, plain_area, negative, steps=1), strict=True
    ):
        for (side, got), (_, expected) in zip(changed, same, strict=True):
            assert torch.equal(got, expected) if side else not near(got, expected)
    parts = outputs(made, both, negative, cfg=1.0, steps=1)[0]
    alone = [outputs(made, c, negative, cfg=1.0, steps=1)[0][0][1] for c in (conditioning, plain)]
    assert {i for i, (_, got) in enumerate(parts) for a in alone if near(got, a)} == {0, 1}
    assert not near(sample(made, joined), sample(made, joined_plain))
    assert not near(sample(made, ranged + late), sample(made, plain))
    assert not near(sample(made, ranged + late), sample(made, conditioning))


def test_only_the_words_rows_are_computed_and_picture_rows_never_see_them(flux):
    from concepts.host.modulation import blocks_of

    conditioning = prompt(flux, "a <p:hat> and a <p:coat>", taught(flux))
    rows = sorted(p for place in places_of(conditioning) for p in place.positions)
    calls, given, handles = {}, {}, []
    for name, block in blocks_of(flux.model.model.diffusion_model).items():
        target = block.txt_mod if name.startswith("double") else block.modulation
        handles.append(
            target.lin.register_forward_hook(
                lambda m, a, out, name=name: calls.setdefault(name, []).append(
                    (tuple(a[0].shape), out.detach().clone())
                )
            )
        )
        if name.startswith("double"):
            handles.append(
                block.img_mod.register_forward_hook(lambda m, a, out, name=name: given.setdefault(name, []).append(out))
            )
    try:
        sample(flux, conditioning, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    for shapes in calls.values():
        assert [shape[:2] for shape, _ in shapes] == [(1, 1), (1, len(rows))]
    assert all(out[0].shift.shape[1] == 1 for (out,) in given.values())


def test_rows_of_the_picture_keep_the_base_modulation(flux):
    """In single blocks, which modulate text and picture at once."""
    from concepts.host.modulation import Place, Placement, _Call, _on_flux

    block = flux.model.model.diffusion_model.single_blocks[0]
    g = torch.Generator().manual_seed(0)
    place = Place((1, 3), torch.randn(2, 1, 64, generator=g), ("single.0",), "p")
    with torch.inference_mode():
        x, vector = torch.randn(2, 10, 64, generator=g), torch.randn(2, 64, generator=g)
        base, _ = block.modulation(vector)
        call = _Call([Placement((1,), place)])
        call.lengths |= {"single.0": 10, "text": 4}
        undo = _on_flux("single.0", block, call)
        try:
            got, rest = block.modulation(vector)
        finally:
            for back in undo:
                back()
    assert rest is None and x.shape[1] == got.shift.shape[1] == 10
    for part in ("shift", "scale", "gate"):
        own, plain = getattr(got, part), getattr(base, part).expand(-1, 10, -1)
        changed = [[bool((own[b, i] != plain[b, i]).any()) for i in range(10)] for b in range(2)]
        assert changed == [[False] * 10, [i in (1, 3) for i in range(10)]]


def differentiable(made, directions, rows=((0, (2, 3)), (1, (4,))), around=contextlib.nullcontext, checkpointing=False):
    """A weighted sum of denoised estimates as a function of directions; every sample with rows of its own."""
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.gradients import ordinary, training
    from concepts.host.modulation import Place, Placement, chosen_blocks, modulating

    with training(made.model, made.clip.patcher, checkpointing=checkpointing), around():
        blocks = chosen_blocks(made.model.model.diffusion_model, "all")
        entry = prompt(made, "a hat and a coat on sand")[0]
        entry = [ordinary(entry[0]), {"pooled_output": ordinary(entry[1]["pooled_output"])}]
        d = Denoiser(made.model)
        draw = torch.Generator().manual_seed(1)
        clean = d.clean(ordinary(made.latent)[None]).repeat(2, 1, 1, 1)
        sigma = sigmas_at(d.sampling, torch.tensor([0.4, 0.8], dtype=torch.float64))
        x = d.noised(clean, torch.randn(clean.shape, generator=draw), sigma)
        weights = torch.randn(clean.shape, generator=draw)
        placements = [
            Placement((row,), Place(positions, directions[: len(positions)], blocks, "p")) for row, positions in rows
        ]
        out = d(x, sigma, [entry, entry], modulating(placements))
        loss = (out * weights).sum()
        if directions.requires_grad and torch.is_grad_enabled():
            loss.backward()
        return loss.detach()


@pytest.fixture(scope="module")
def leaf(made):
    from concepts.host.modulation import blocks_of

    count = len(blocks_of(made.model.model.diffusion_model))
    return torch.randn(2, count, WIDTH[made.family], generator=torch.Generator().manual_seed(4))


def test_gradients_equal_finite_differences_with_and_without_checkpoints(made, leaf):
    grads = []
    for checkpointing in (False, True):
        own = leaf.clone().requires_grad_()
        differentiable(made, own, checkpointing=checkpointing)
        grads.append(own.grad)
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-5
    assert all(float(g.norm()) > 0 for g in grads[0].flatten(0, 1)), "every block of every row takes part"
    way = grads[0] / grads[0].norm()
    step = 0.05
    high, low = (differentiable(made, leaf + s * step * way) for s in (1, -1))
    assert float((high - low) / (2 * step)) == pytest.approx(float(grads[0].norm()), rel=1e-2)
    assert hooks(made) == 0


def test_words_of_texts_of_several_lengths_are_as_each_alone(made, leaf):
    """Which have passes of their own, so that a sample's number in them is another."""
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.modulation import Place, Placement, chosen_blocks, modulating

    blocks = chosen_blocks(made.model.model.diffusion_model, "all")
    short, long = (prompt(made, text)[0] for text in ("a hat", "a very " * 200 + "red hat"))
    places = [Place((n + 1, n + 3), (n + 1) * leaf, blocks, "p") for n in range(3)]
    with torch.no_grad():
        d, draw = Denoiser(made.model), torch.Generator().manual_seed(1)
        x = torch.randn(3, *made.latent.shape, generator=draw)
        sigma, entries = sigmas_at(d.sampling, torch.tensor([0.3, 0.6, 0.9])), [short, long, short]
        placements = [Placement((n,), place) for n, place in enumerate(places)]
        together = d(x, sigma, entries, modulating(placements))
        for n, entry in enumerate(entries):
            alone = d(x[[n]], sigma[[n]], [entry], modulating([Placement((0,), places[n])]))
            torch.testing.assert_close(together[[n]], alone, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(alone, d(x[[n]], sigma[[n]], [entry]), rtol=1e-3, atol=1e-4)


def test_gradients_equal_the_naive_form(made, leaf):
    """Same rows in both samples, so that the naive form, which knows no samples, can say the same."""
    from concepts.host.modulation import Place, chosen_blocks

    ours, theirs = leaf.clone().requires_grad_(), leaf.clone().requires_grad_()
    got = differentiable(made, ours, rows=((0, (2, 3)), (1, (2, 3))))
    place = Place((2, 3), theirs, chosen_blocks(made.model.model.diffusion_model, "all"), "p")
    expected = differentiable(made, theirs, rows=(), around=lambda: naive(made, [place]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < 1e-4


def test_nothing_stays_on_the_model_after_an_error(made):
    conditioning, before = prompt(made, "a <p:hat>", taught(made)), sample(made, prompt(made, "a hat"))
    model = made.model.clone()

    def broken(args, extra):
        raise RuntimeError("broken")

    model.set_model_patch_replace(broken, "dit", "double_block", 1)
    with pytest.raises(RuntimeError, match="broken"):
        sample(made, conditioning, model=model)
    assert hooks(made) == 0 and torch.equal(sample(made, prompt(made, "a hat")), before)


def test_with_a_lora_and_learned_tokens(made):
    """All three in one prompt; the LoRA also changes the modulation layers themselves."""
    from concepts.host import lora
    from concepts.host.text import encoders

    g = torch.Generator().manual_seed(2)
    rows = {e.key: torch.randn(1, 1, 1, 2, e.width, generator=g) for e in encoders(made.clip)}
    mug = Concept("mug", "tokens", rows, {"init_text": "mug"})
    names = lora.layers(made.model, "all linear", made.family == "flux")
    factors = lora.start(made.model, names, 2, 0)
    factors |= {k: 0.2 * torch.randn(v.shape, generator=g) for k, v in factors.items() if k.endswith("lora_up.weight")}
    factors |= {f"{n}.alpha": torch.tensor(2.0) for n in names}
    with torch.inference_mode():
        patched = lora.apply(made.model, Concept("l", "delta", factors, {}), 1.0)
    conditioning = prompt(made, "a <mug>, a <p:hat> and a <p:coat>", taught(made), mug)
    plain = prompt(made, "a <mug>, a hat and a coat", mug)
    assert torch.equal(conditioning[0][0], plain[0][0])
    with naive(made, places_of(conditioning)):
        expected = sample(made, plain, model=patched)
    assert near(sample(made, conditioning, model=patched), expected)
    assert not near(expected, sample(made, conditioning))


@pytest.mark.parametrize("dtype, cast", [("bfloat16", None), ("float8_e4m3fn", torch.float32)])
def test_weights_of_other_types(dtype, cast):
    small = tiny("flux", dtype=getattr(torch, dtype), cast=cast)
    small.family = "flux"
    conditioning = prompt(small, "a <p:hat> and a <p:coat>", taught(small, size=8.0))
    plain = prompt(small, "a hat and a coat")
    with naive(small, places_of(conditioning)):
        expected = sample(small, plain)
    got, without = sample(small, conditioning), sample(small, plain)
    assert float((got - expected).norm()) < 0.1 * float((without - expected).norm())


def test_stages_of_tokens_beside_words(made):
    """Rows that change with the noise level and directions in one prompt."""
    from concepts.host.text import encoders

    g = torch.Generator().manual_seed(2)
    rows = {e.key: torch.randn(2, 1, 1, 1, e.width, generator=g) for e in encoders(made.clip)}
    mug = Concept("mug", "tokens", rows, {"init_text": "mug"})
    conditioning = prompt(made, "a <mug> and a <p:hat>", taught(made), mug)
    plain = prompt(made, "a <mug> and a hat", mug)
    with naive(made, places_of(conditioning)):
        expected = sample(made, plain)
    assert near(sample(made, conditioning), expected) and not near(expected, sample(made, plain))


def test_other_models_are_refused(made):
    from concepts.host.modulation import blocks_of, chosen_blocks

    unet = tiny("sd15").model.model.diffusion_model
    with pytest.raises(CarrierMismatch, match="does not modulate text tokens"):
        blocks_of(unet)
    concept = taught(made)
    names = concept.info["blocks"]
    assert chosen_blocks(made.model.model.diffusion_model, "all") == tuple(names)
    fewer = Concept(
        "p",
        "modulation",
        {f"word.{i}": v[:-1] for i, v in enumerate(concept.tensors[f"word.{i}"] for i in (0, 1))},
        concept.info | {"blocks": names[:-1]},
    )
    wide = {f"word.{i}": torch.ones(1, 1, 24) for i in (0, 1)}
    for other, message in ((fewer, "Connect the model"), (Concept("p", "modulation", wide, concept.info), "width 24")):
        with pytest.raises(CarrierMismatch, match=message):
            sample(made, prompt(made, "a <p:hat>", other))
    assert hooks(made) == 0


def test_one_modulation_for_all_blocks_is_refused(flux):
    """Flux.2's kind: the blocks get their shifts and scales from outside."""
    import comfy.ldm.flux.model
    import comfy.ops

    from concepts.host.modulation import blocks_of

    given = dict(flux.model.model.model_config.unet_config)
    given = {k: v for k, v in given.items() if k not in ("image_model", "disable_unet_model_creation", "dtype")}
    network = comfy.ldm.flux.model.Flux(
        **given | {"global_modulation": True}, dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    fill(network)
    with pytest.raises(CarrierMismatch, match="Flux.2, Chroma"):
        blocks_of(network)


def test_a_text_cut_shorter_is_refused(made):
    ((cond, facts),) = prompt(made, "a long way from any <p:hat>", taught(made))
    with pytest.raises(CarrierMismatch, match="made the conditioning shorter"):
        sample(made, [[cond[:, :4], facts]])
    assert hooks(made) == 0


def test_another_clip_is_refused(made):
    other = tiny("sd15" if made.family == "flux" else "flux")
    if made.family == "flux":
        with pytest.raises(CarrierMismatch, match="their rows of t5xxl"):
            prompt(other, "a <p:hat>", taught(made))
        return
    with pytest.raises(CarrierMismatch, match="reads dense rows of 4096 numbers, this CLIP gives 64"):
        prompt(other, "a <p:hat>", Concept("p", "modulation", taught(made).tensors, taught(made).info))


def test_maps_see_what_sampling_sees(made):
    """Show Attention goes through the model by itself, with the same words modulated in every row."""
    from concepts.host.show import look

    concept = taught(made)
    with torch.inference_mode():
        modulated, plain = (
            look(made.model, made.clip, made.latent, text, [concept], ["hat"], [0.5], 0)[0].maps
            for text in ("a girl with a <p:hat>", "a girl with a hat")
        )
        marked = look(made.model, made.clip, made.latent, "a girl with a <p:hat>", [concept], ["<p:hat>"], [0.5], 0)[
            0
        ].maps
    assert modulated.keys() == plain.keys()
    assert any(not torch.allclose(v, plain[k]) for k, v in modulated.items())
    assert all(torch.equal(v, marked[k]) for k, v in modulated.items())


def test_a_model_behind_torch_compile_is_modulated(made):
    """By the module that was compiled: its graph need not notice hooks. Other calls are compiled as before."""
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    positive, plain = prompt(made, "a <p:hat> on a table", taught(made)), prompt(made, "a hat on a table")
    expected, without = sample(made, positive), sample(made, plain)
    model, calls = made.model.clone(), []

    def backend(graph, inputs):
        return lambda *given: calls.append(0) or graph(*given)

    torch._dynamo.reset()
    set_torch_compile_wrapper(model, backend=backend)
    for asked, wanted, compiled in ((plain, without, True), (positive, expected, False), (plain, without, True)):
        calls.clear()
        assert near(sample(made, asked, model=model), wanted) and bool(calls) == compiled
    assert not near(expected, without) and hooks(made) == 0
    torch._dynamo.reset()

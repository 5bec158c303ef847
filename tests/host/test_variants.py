"""Rows per stage, layer and role: the stock sampler sees the contexts that are meant, and nothing else."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierError, CarrierMismatch

from .tiny import fill, tiny

pytestmark = pytest.mark.usefixtures("host")
UNETS = ("sd15", "sd2", "sdxl")


def concept(made, stages=1, layers=1, roles=1, name="mug", seed=0, same=False) -> Concept:
    """A concept with random rows; ``same``: every variant holds the same rows."""
    from concepts.host.text import encoders
    from concepts.host.variants import layers_of

    g = torch.Generator().manual_seed(seed)
    names = layers_of(made.model.model.diffusion_model) if layers > 1 else []
    shape = (stages, len(names) or 1, roles)
    rows = {
        e.key: torch.randn(*((1, 1, 1) if same else shape), 2, e.width, generator=g).expand(*shape, 2, e.width)
        for e in encoders(made.clip)
    }
    return Concept(name, "tokens", rows, {"init_text": "mug", "layers": names})


def part(whole: Concept, stage=0, layer=0, role=0) -> Concept:
    """One variant as a plain concept."""
    rows = {k: v[stage, layer, role][None, None, None] for k, v in whole.tensors.items()}
    return Concept(whole.name, "tokens", rows, {"init_text": "mug"})


def prompt(made, text, *concepts):
    from concepts.host.prompt import encode_prompt

    with torch.inference_mode():
        return encode_prompt(made.clip, text, [(c, 1.0) for c in concepts])


def sample(made, positive, negative=None, cfg=3.0, steps=4, model=None, batch=1):
    import comfy.sample

    with torch.inference_mode():
        negative = prompt(made, "") if negative is None else negative
        noise = torch.randn(batch, *made.latent.shape, generator=torch.Generator().manual_seed(7))
        return comfy.sample.sample(
            model or made.model,
            noise,
            steps,
            cfg,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros_like(noise),
            seed=0,
            disable_pbar=True,
        )


def near(a, b) -> bool:
    """Equal but for the order of fp32 sums."""
    return float((a - b).norm() / b.norm()) < 1e-4


def recorded(made):
    """A clone of the model that keeps (layer, K context, V context, sigma) of every cross-attention call."""
    calls, model = [], made.model.clone()

    def note(n, key, value, options):
        calls.append((options["block"], key.clone(), value.clone(), float(options["sigmas"][0]), len(key)))
        return n, key, value

    model.set_model_attn2_patch(note)
    return model, calls


@pytest.fixture(scope="module", params=UNETS)
def unet(request, host):
    return tiny(request.param)


def test_every_layer_and_role_gets_its_own_context(unet):
    from concepts.host.denoise import noise_time

    whole = concept(unet, stages=3, layers=9, roles=2)
    names = whole.info["layers"]
    expected = {
        (s, i, r): prompt(unet, "a photo of <mug>", part(whole, s, i, r))[0][0]
        for s in range(3)
        for i in range(len(names))
        for r in (0, 1)
    }
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a photo of <mug>", whole), cfg=1.0, model=model, steps=6)
    seen = set()
    for block, key, value, sigma, _ in calls:
        stage = int(noise_time(unet.model.model.model_sampling, torch.tensor([sigma]))[0] * 3)
        layer = names.index(f"{block[0]}.{block[1]}")
        torch.testing.assert_close(key, expected[stage, layer, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(value, expected[stage, layer, 1], rtol=0, atol=1e-6)
        seen.add(stage)
    assert seen == {0, 1, 2}


def test_the_negative_is_untouched_and_shares_the_call(unet):
    whole, negative = concept(unet, layers=9, roles=2), prompt(unet, "an ugly photo")
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a photo of <mug>", whole), negative, model=model)
    assert all(rows == 2 for *_, rows in calls), "positive and negative must share one call"
    for _, key, value, _, _ in calls:
        assert sum(torch.equal(k, negative[0][0][0]) for k in key) == 1
        assert sum(torch.equal(v, negative[0][0][0]) for v in value) == 1


def test_layers_that_are_alike_share_their_contexts(unet):
    whole, places, kept, model = concept(unet, stages=2, roles=2), set(), [], unet.model.clone()

    def note(n, key, value, options):
        places.update((float(options["sigmas"][0]), role, x.data_ptr()) for role, x in enumerate((key, value)))
        kept.append((key, value))
        return n, key, value

    model.set_model_attn2_patch(note)
    sample(unet, prompt(unet, "a photo of <mug>", whole), model=model)
    assert len(places) == 2 * len({sigma for sigma, *_ in places}) < 2 * len(kept)


def test_equal_variants_draw_what_the_plain_concept_draws(unet):
    whole = concept(unet, stages=2, layers=9, roles=2, same=True)
    plain = sample(unet, prompt(unet, "a photo of <mug>", part(whole)))
    assert near(sample(unet, prompt(unet, "a photo of <mug>", whole)), plain)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_stage_and_no_split_is_the_plain_form_bit_for_bit(unet, cfg):
    plain = concept(unet)
    conditioning = prompt(unet, "a photo of <mug>", plain)
    assert "hooks" not in conditioning[0][1]
    assert torch.equal(
        sample(unet, conditioning, cfg=cfg), sample(unet, prompt(unet, "a photo of <mug>", plain), cfg=cfg)
    )


def test_strength_0_is_the_plain_word_bit_for_bit(unet):
    from concepts.host.prompt import encode_prompt

    whole = concept(unet, stages=3, layers=9, roles=2)
    with torch.inference_mode():
        off = encode_prompt(unet.clip, "a photo of <mug>", [(whole, 0.0)])
    assert torch.equal(sample(unet, off), sample(unet, prompt(unet, "a photo of mug")))


@pytest.mark.parametrize("negative", ["", "ugly, " * 60])
@pytest.mark.parametrize("roles", [1, 2])
def test_negatives_of_any_length(unet, negative, roles):
    """The host repeats the shorter of two prompts; every repetition holds the rows that are meant."""
    from concepts.host.denoise import noise_time

    whole, other = concept(unet, stages=2, roles=roles), prompt(unet, negative)
    length = other[0][0].shape[1]
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a photo of <mug>", whole), other, model=model)
    expected = {
        (s, r): prompt(unet, "a photo of <mug>", part(whole, s, role=min(r, roles - 1)))[0][0].repeat(
            1, length // 77, 1
        )[0]
        for s in (0, 1)
        for r in (0, 1)
    }
    for _, key, value, sigma, _ in calls:
        stage = int(noise_time(unet.model.model.model_sampling, torch.tensor([sigma]))[0] * 2)
        for role, context in enumerate((key, value)):
            assert context.shape[1] == length
            assert sum(torch.allclose(row, expected[stage, role], rtol=0, atol=1e-6) for row in context) == 1


def test_rows_that_another_node_changed_are_refused(unet):
    import nodes

    whole = concept(unet, stages=2, roles=2)
    with torch.inference_mode():
        (mixed,) = nodes.ConditioningAverage().addWeighted(
            prompt(unet, "a photo of <mug>", whole), prompt(unet, "grass"), 0.5
        )
        (same,) = nodes.ConditioningAverage().addWeighted(
            prompt(unet, "a photo of <mug>", whole), prompt(unet, "grass"), 1.0
        )
    with pytest.raises(CarrierMismatch, match="ConditioningAverage"):
        sample(unet, mixed)
    assert torch.equal(sample(unet, same), sample(unet, prompt(unet, "a photo of <mug>", whole)))


@pytest.mark.parametrize("roles", [1, 2])
def test_a_zeroed_prompt_is_left_as_it_is(unet, roles):
    """The host's ConditioningZeroOut keeps hooks and marks."""
    import nodes

    ours, plain = prompt(unet, "a photo of <mug>", concept(unet, stages=2, roles=roles)), prompt(unet, "a photo")
    with torch.inference_mode():
        (zeroed,), (empty,) = (nodes.ConditioningZeroOut().zero_out(c) for c in (ours, plain))
    for positive in (ours, plain):
        assert torch.equal(sample(unet, positive, zeroed), sample(unet, positive, empty))


@pytest.mark.parametrize("side", ["negative", "beside", "both"])
def test_hooks_of_other_prompts(unet, side):
    """The host leaves None in the place of hooks that it does not register, and asks it."""
    import comfy.hooks
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(unet.model.model, {})
    name = next(n for n, key in keys.items() if n.startswith("lora_unet_") and key.endswith("attn2.to_k.weight"))
    high, wide = unet.model.model.get_parameter(keys[name]).shape
    factors = {"lora_down": torch.randn(2, wide), "lora_up": torch.randn(high, 2)}
    lora = {f"{name}.{k}.weight": v for k, v in factors.items()}

    def hooked(entries):
        group = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
        return comfy.hooks.set_hooks_for_conditioning(entries, group)

    found = []
    for given in (concept(unet, stages=2, same=True), concept(unet, seed=0)):
        own, plain = prompt(unet, "a photo of <mug>", given), prompt(unet, "a photo")
        if side == "beside":
            found.append(sample(unet, own + hooked(plain)))
        else:
            found.append(sample(unet, own, hooked(own if side == "both" else plain)))
    assert near(*found)


def test_prompts_of_equal_rows_stay_apart(unet):
    """Two nodes may encode one text, and two concepts may have one mean."""
    whole = concept(unet, stages=2)
    turned = replace(whole, tensors={k: v.flip(0) for k, v in whole.tensors.items()})
    one, two, other = (prompt(unet, "a photo of <mug>", c) for c in (whole, whole, turned))
    assert torch.equal(sample(unet, one, two), sample(unet, one, one))
    assert torch.equal(sample(unet, one + two, cfg=1.0), sample(unet, one + one, cfg=1.0))
    both = sample(unet, one, other, cfg=2.0, steps=1)
    assert near(both, 2 * sample(unet, one, cfg=1.0, steps=1) - sample(unet, other, cfg=1.0, steps=1))


def test_areas_ranges_and_combined_prompts(unet):
    """The host's own nodes around the conditioning; each part keeps its contexts."""
    import nodes

    whole = concept(unet, roles=2)
    conditioning = prompt(unet, "a photo of <mug>", whole)
    with torch.inference_mode():
        (ranged,) = nodes.ConditioningSetTimestepRange().set_range(conditioning, 0.0, 0.5)
        (late,) = nodes.ConditioningSetTimestepRange().set_range(prompt(unet, "a photo"), 0.5, 1.0)
        (area,) = nodes.ConditioningSetArea().append(conditioning, 32, 64, 0, 0, 1.0)
        (mask,) = nodes.ConditioningSetMask().append(conditioning, torch.ones(1, 8, 8), "default", 1.0)
        (both,) = nodes.ConditioningCombine().combine(conditioning, prompt(unet, "grass"))
        (joined,) = nodes.ConditioningConcat().concat(conditioning, prompt(unet, "grass"))
    k, v = (prompt(unet, "a photo of <mug>", part(whole, role=r))[0][0] for r in (0, 1))
    for changed in (ranged + late, area, mask, both, joined):
        model, calls = recorded(unet)
        assert torch.isfinite(sample(unet, changed, cfg=1.0, model=model)).all()
        found = [
            (a, b)
            for _, key, value, _, _ in calls
            for a, b in zip(key[:, :77], value[:, :77], strict=True)
            if torch.allclose(a, k[0], atol=1e-6)
        ]
        assert found and all(torch.allclose(b, v[0], atol=1e-6) for _, b in found)
    assert any(k.shape[1] == 154 for _, k, *_ in calls), "the joined prompt keeps its second half"


@pytest.mark.parametrize("negative", ["", "ugly, " * 60])
def test_a_controlnet_steers_and_the_contexts_stay(host, negative):
    import comfy.controlnet
    import nodes
    from comfy.cldm.cldm import ControlNet

    made = tiny("sd15")
    config = {k: v for k, v in made.model.model.model_config.unet_config.items() if k != "out_channels"}
    whole = concept(made, stages=2, roles=2)
    with torch.inference_mode():
        network = fill(ControlNet(hint_channels=3, **config), 9)
        control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
        hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
        conditioning = prompt(made, "a photo of <mug>", whole)
        (steered,) = nodes.ControlNetApply().apply_controlnet(conditioning, control, hint, 1.0)
    found = []
    for given in (conditioning, steered):
        model, calls = recorded(made)
        drawn = sample(made, given, prompt(made, negative), model=model)
        found.append((drawn, [(key, value) for _, key, value, *_ in calls]))
    (plain, before), (other, after) = found
    assert torch.isfinite(other).all() and not near(other, plain)
    assert len(before) == len(after)
    for pair, again in zip(before, after, strict=True):
        assert all(torch.equal(a.sort(0).values, b.sort(0).values) for a, b in zip(pair, again, strict=True))


def test_batches_and_several_concepts(unet):
    one, two = concept(unet, roles=2), concept(unet, stages=2, layers=9, name="hat", seed=1)
    drawn = sample(unet, prompt(unet, "<mug> and <hat>", one, two), batch=3)
    alone = sample(unet, prompt(unet, "<mug> and <hat>", one, two), batch=1)
    assert near(drawn[:1], alone)


def test_two_prompts_of_one_run_keep_their_own_concepts(unet):
    """Concepts in the positive and in the negative."""
    one, two = concept(unet, roles=2), concept(unet, roles=2, name="hat", seed=1)
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a <mug>", one), prompt(unet, "a <hat>", two), model=model)
    wanted = [[prompt(unet, f"a <{c.name}>", part(c, role=r))[0][0][0] for r in (0, 1)] for c in (one, two)]
    for _, key, value, _, rows in calls:
        assert rows == 2
        for k, v in wanted:
            assert (
                sum(
                    torch.allclose(a, k, atol=1e-6) and torch.allclose(b, v, atol=1e-6)
                    for a, b in zip(key, value, strict=True)
                )
                == 1
            )


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_stages_work_on_joint_attention_models(family):
    made = tiny(family)
    whole = concept(made, stages=2)
    halves = [sample(made, prompt(made, "a <mug>", part(whole, s)), cfg=1.0) for s in (0, 1)]
    drawn = sample(made, prompt(made, "a <mug>", whole), cfg=1.0)
    assert torch.isfinite(drawn).all() and all(not torch.equal(drawn, half) for half in halves)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_split_is_refused_without_cross_attention(family):
    made = tiny(family)
    with pytest.raises(CarrierMismatch, match="no cross-attention"):
        sample(made, prompt(made, "a <mug>", concept(made, roles=2)), cfg=1.0)


def test_layers_of_another_model_are_refused():
    made = tiny("sd15")
    whole = concept(made, layers=9)
    names = [f"{n}0" for n in whole.info["layers"]]
    other = Concept("mug", "tokens", whole.tensors, {**whole.info, "layers": names})
    with pytest.raises(CarrierMismatch, match="has a layer input.1"):
        sample(made, prompt(made, "a <mug>", other), cfg=1.0)
    with pytest.raises(CarrierMismatch, match="prompts of their own"):
        prompt(made, "<mug> <hat>", other, concept(made, layers=9, name="hat"))
    with pytest.raises(CarrierError, match="names 0 layers"):
        Concept("mug", "tokens", whole.tensors, {})


def test_layers_are_those_that_sampling_visits(unet):
    from concepts.host.variants import layers_of

    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a mug"), cfg=1.0, steps=1, model=model)
    visited = list(dict.fromkeys(f"{block[0]}.{block[1]}" for block, *_ in calls))
    assert layers_of(unet.model.model.diffusion_model) == visited


@pytest.mark.parametrize(("family", "count"), [(f, 2) for f in UNETS] + [("sdxl", 75)])
def test_variants_are_encoded_as_each_alone(family, count):
    """The many vectors of SDXL's first encoder make it two chunks, and leave the second one at one."""
    from concepts.host.captions import Prompts
    from concepts.host.gradients import training
    from concepts.host.text import encoders

    made = tiny(family)
    with training(made.model, made.clip.patcher):
        learned = [e for e in encoders(made.clip) if count == 2 or e.key == "clip_l"]
        rows = [{"": {e.key: torch.randn(count, e.width) for e in learned}} for _ in range(3)]
        prompts = Prompts(made.clip, ["a (photo:1.2) of {}"], "thing", {"": dict.fromkeys(rows[0][""], count)})
        prompts.ready()
        contexts, entry = prompts.encode_all(0, rows)
        for context, one in zip(contexts, rows, strict=True):
            torch.testing.assert_close(context[None], prompts.encode(0, one)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entry[1]["pooled_output"], prompts.encode(0, rows[0])[1]["pooled_output"])


def test_a_prompt_is_encoded_once_per_stage(unet, monkeypatch):
    """With the pooled vector of each stage's first layer."""
    whole, passes = concept(unet, stages=3, layers=9, roles=2), []
    pooled = [prompt(unet, "a (photo:1.2) of <mug>", part(whole, s))[0][1]["pooled_output"] for s in range(3)]
    encode = unet.clip.cond_stage_model.encode_token_weights
    monkeypatch.setattr(
        unet.clip.cond_stage_model, "encode_token_weights", lambda tokens: passes.append(tokens) or encode(tokens)
    )
    found = prompt(unet, "a (photo:1.2) of <mug>", whole)[0][1]["pooled_output"]
    assert len(passes) == 3
    torch.testing.assert_close(found, torch.stack(pooled).mean(0), rtol=1e-4, atol=1e-5)

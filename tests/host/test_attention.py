"""Maps of a forward pass: what the modules' own q and k give, with gradient, and nothing else changes."""

import pytest
import torch

from concepts.carriers.errors import CarrierMismatch

from .test_variants import concept, prompt, sample
from .tiny import embedding, tiny

pytestmark = pytest.mark.usefixtures("host")
UNETS = ("sd15", "sd2", "sdxl")


@pytest.fixture(scope="module", params=UNETS)
def unet(request, host):
    return tiny(request.param)


def conditioned(made, text="a photo of a mug"):
    """An entry that autograd accepts, and its context with gradient."""
    from concepts.host.gradients import training

    with training(made.model, made.clip.patcher):
        (entry,) = prompt(made, text)
        context = entry[0].clone().requires_grad_()
        pooled = entry[1].get("pooled_output")
        return [context, {"pooled_output": None if pooled is None else pooled.clone()}], context


def run(made, entry, change=None, checkpointing=False, backward=None):
    """One forward pass at a fixed noise level; ``backward`` makes a scalar out of its result."""
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.gradients import training

    with training(made.model, made.clip.patcher, checkpointing=checkpointing):
        d = Denoiser(made.model)
        x = torch.randn(1, *made.latent.shape, generator=torch.Generator().manual_seed(1))
        sigma = sigmas_at(d.sampling, torch.tensor([0.5]))
        out = d(d.noised(x, torch.ones_like(x), sigma), sigma, [entry], change)
        if backward is not None:
            backward(out).backward()
        return out.detach()


def apart(a, b) -> float:
    """Distance relative to the norm; only the order of fp32 sums differs."""
    return float((a - b).norm() / b.norm())


def eye(tokens=77, count=5):
    return torch.eye(tokens)[None, :, :count]


def by_hand(made, entry):
    """Head-mean maps per (layer, block) out of hooks on the modules themselves."""
    network, found, handles = made.model.model.diffusion_model, {}, []
    for name, module in network.named_modules():
        if type(module).__name__ == "CrossAttention" and name.endswith("attn2"):
            kept = found.setdefault(name, {"heads": module.heads})
            for part in ("to_q", "to_k"):
                handles.append(
                    getattr(module, part).register_forward_hook(
                        lambda m, a, out, kept=kept, part=part: kept.__setitem__(part, out)
                    )
                )
    run(made, entry)
    for handle in handles:
        handle.remove()
    maps = {}
    for name, kept in found.items():
        parts = name.split(".")
        part = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}[parts[0]]
        number = 0 if part == "middle" else int(parts[1])
        q, k = (kept[n].detach().unflatten(-1, (kept["heads"], -1)).transpose(1, 2) for n in ("to_q", "to_k"))
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        maps[f"{part}.{number}", int(parts[parts.index("transformer_blocks") + 1])] = p
    return maps


def test_maps_are_those_of_the_modules(unet):
    from concepts.host.attention import AttentionTap, maps_of
    from concepts.host.variants import layers_of

    entry, _ = conditioned(unet)
    tap = AttentionTap(maps_of(eye()))
    plain = run(unet, entry)
    assert apart(run(unet, entry, tap.change), plain) < 1e-6
    maps, wanted = tap.take(), by_hand(unet, entry)
    assert {(layer.name, layer.block) for layer in maps} == set(wanted)
    assert list(dict.fromkeys(layer.name for layer in maps)) == layers_of(unet.model.model.diffusion_model)
    for layer, seen in maps.items():
        assert seen.shape == (1, layer.height * layer.width, 5)
        torch.testing.assert_close(seen, wanted[layer.name, layer.block][..., :5], rtol=1e-4, atol=1e-6)
    assert torch.equal(run(unet, entry), plain), "nothing stays"


@pytest.mark.parametrize("layers", ["half", ("middle.0",)], ids=str)
def test_only_chosen_layers_are_looked_at(unet, layers):
    from concepts.host.attention import AttentionTap, maps_of

    tap = AttentionTap(maps_of(eye()), layers)
    run(unet, conditioned(unet)[0], tap.change)
    for layer in tap.take():
        assert layer.scale == 2 if layers == "half" else layer.name == "middle.0"


def reference_tap(made, reference, kind="probabilities", layers="half"):
    from concepts.host.attention import AttentionTap
    from concepts.kernels.attention import attention_loss

    columns = eye(count=8)

    def look(q, k, v, heads, keys):
        return None, attention_loss(q.detach(), k, keys, heads, columns, columns, kind)

    return AttentionTap(look, layers, reference)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_against_a_reference_prompt(unet, checkpointing):
    """Value and gradient equal those of keys and queries taken from the modules by hand."""
    entry, context = conditioned(unet)
    other, reference = conditioned(unet, "a photo of a red cat")
    reference = reference.detach()
    tap = reference_tap(unet, reference)
    plain = run(unet, entry, checkpointing=checkpointing)
    found = {}

    def loss(out):
        found.update(tap.take())
        return torch.stack(list(found.values())).mean()

    out = run(unet, entry, tap.change, checkpointing, loss)
    assert apart(out, plain) < 1e-6
    assert not tap.records and found
    gradient = context.grad.clone()
    network, total, count = unet.model.model.diffusion_model, [], 0
    queries, handles = {}, []
    for name, m in network.named_modules():
        if type(m).__name__ == "CrossAttention" and name.endswith("attn2"):
            handles.append(
                m.to_q.register_forward_hook(lambda _, a, out, m=m: queries.__setitem__(m, out.detach().clone()))
            )
    run(unet, entry)
    for handle in handles:
        handle.remove()
    free, side = context.detach().clone().requires_grad_(), [made // 2 for made in unet.latent.shape[1:]]
    for m, q in queries.items():
        if q.shape[1] == side[0] * side[1]:
            split = [x.unflatten(-1, (m.heads, -1)).transpose(1, 2) for x in (q, m.to_k(free), m.to_k(reference))]
            ours, theirs = (
                (split[0] @ k.mT / q.shape[2] ** 0.5 * m.heads**0.5).softmax(-1)[..., :8] for k in split[1:]
            )
            total.append((ours - theirs).square().sum((2, 3)).mean() * 1024 / q.shape[1])
            count += 1
    wanted = torch.stack(total).mean()
    torch.testing.assert_close(torch.stack(list(found.values())).mean(), wanted, rtol=1e-4, atol=1e-6)
    assert count == len(found)
    # Q depends on the rows through earlier layers only by way of the real output, which has no part in this loss
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, free)[0], rtol=1e-3, atol=1e-6)


def test_a_loss_and_the_output_have_their_own_gradients(unet):
    entry, context = conditioned(unet)
    reference = conditioned(unet, "a photo of a red cat")[1].detach()
    grads = []
    for weights in ((1, 0), (0, 1), (1, 1)):
        tap = reference_tap(unet, reference)
        context.grad = None
        run(
            unet,
            entry,
            tap.change,
            backward=lambda out, w=weights, t=tap: w[0] * out.square().mean() + w[1] * sum(t.take().values()),
        )
        grads.append(context.grad)
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=1e-4, atol=1e-6)


def test_it_goes_with_contexts_per_layer_and_role(unet):
    """The tap sees the keys that a concept with rows of its own gave, and the output stays."""
    from concepts.host.attention import AttentionTap, maps_of
    from concepts.host.show import changed

    (entry,) = prompt(unet, "a photo of <mug>", concept(unet, stages=2, layers=9, roles=2))
    entry, change = changed(entry)
    plain, tap = run(unet, entry, change), AttentionTap(maps_of(eye()))
    seen = run(unet, entry, lambda options: tap.change(change(options)))
    assert apart(seen, plain) < 1e-6
    assert all(bool((m.sum(-1) > 0).all()) for m in tap.take().values())


def test_what_cannot_be_seen_is_refused(unet):
    from concepts.host.attention import AttentionTap, maps_of

    entry, tap = conditioned(unet)[0], AttentionTap(maps_of(eye()), ("none",))
    run(unet, entry, tap.change)
    with pytest.raises(CarrierMismatch, match="1/2"):
        tap.take()
    model = unet.model.clone()
    model.set_model_attn2_replace(lambda q, k, v, options: q, "middle", 0)
    with pytest.raises(CarrierMismatch, match="replaces"):
        tap.change(model.model_options["transformer_options"])
    with pytest.raises(ValueError, match="half, quarter, all"):
        AttentionTap(maps_of(eye()), "third")


def test_columns_of_zero_length_prompts_and_padding():
    """Two prompts are compared from start to end; pads, and only they, are left out."""
    from concepts.host.captions import Prompts
    from concepts.host.positions import aligned
    from concepts.host.text import encoders

    made = tiny("sd15")
    (encoder,) = encoders(made.clip)
    pieces = len(encoder.ids("xylophone"))
    assert pieces > 1
    target = Prompts(made.clip, ["a photo of {} on grass"], "xylophone", {"": {"clip_l": 1}})
    other = Prompts(made.clip, ["a photo of {} on grass"], "xylophone", {"": {}})
    own, reference, concept = aligned(encoder, target.tokens[0], other.tokens[0])
    assert own.shape == (77, 8) and reference.shape == (77, 8) and sum(concept) == 1
    assert own.sum(1)[:8].tolist() == [1.0] * 8 and not own[8:].any()
    column = concept.index(True)
    assert own[4, column] == 1
    torch.testing.assert_close(reference[4 : 4 + pieces, column], torch.full((pieces,), 1 / pieces))
    assert torch.equal(reference.sum(0), torch.ones(8)) and not reference[7 + pieces :].any()


def test_rows_of_embedding_files_are_compared_one_by_one(tmp_path):
    """They stand in both prompts, and beside the concept they are no part of it."""
    from concepts.host.captions import Prompts
    from concepts.host.positions import aligned
    from concepts.host.text import encoders

    made = tiny("sd15")
    (encoder,), texts = encoders(made.clip), [f"a {{}} {embedding(made.clip, tmp_path)} on grass"]
    sides = [Prompts(made.clip, texts, "mug", {"": count}).tokens[0] for count in ({"clip_l": 3}, {})]
    own, reference, concept = aligned(encoder, *sides)
    assert concept == [False, True, False, False, False, False, False, False]
    assert own[:, 1].nonzero().flatten().tolist() == [2, 3, 4] and own.count_nonzero(0).tolist() == [1, 3] + [1] * 6
    assert reference.count_nonzero(0).tolist() == [1] * 8


def test_sampling_is_unchanged_afterwards(unet):
    from concepts.host.attention import AttentionTap, maps_of

    before = sample(unet, prompt(unet, "a mug"))
    run(unet, conditioned(unet)[0], AttentionTap(maps_of(eye())).change)
    assert torch.equal(sample(unet, prompt(unet, "a mug")), before)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_joint_maps_are_the_same_out_of_the_attention_and_beside_it(family, checkpointing, monkeypatch):
    """Where torch has no such kernel, maps have a product of their own."""
    import concepts.host.attention as host

    made = tiny(family)
    entry, context = conditioned(made)
    columns = eye(context.shape[1], 3)
    weights = torch.randn(3, generator=torch.Generator().manual_seed(3))

    def gradient():
        tap = host.JointTap(columns, tuple(side // 2 for side in made.latent.shape[-2:]))

        def both(out):
            return out.square().mean() + sum((seen.mean((0, 1)) * weights).sum() for seen in tap.take().values())

        context.grad = None
        out = run(made, entry, tap.change, checkpointing, both)
        return out, context.grad.clone()

    found = gradient()
    monkeypatch.setattr(host, "usable", lambda *x: False)
    assert all(apart(a, b) < 1e-4 for a, b in zip(found, gradient(), strict=True))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_maps_leave_the_attention_that_the_user_chose(family):
    """Only learning has torch's own instead, and looks at that."""
    import comfy.ldm.modules.attention as stock

    from concepts.host.attention import JointTap
    from concepts.host.denoise import Denoiser

    made, own = tiny(family), []
    (entry,) = prompt(made, "a photo of a mug")
    with torch.inference_mode():
        plain = made.model.clone()
        options = made.model.model_options.setdefault("transformer_options", {})

        def override(func, *args, **kwargs):
            own.append(func)
            return stock.attention_basic(*args, **kwargs)

        options["optimized_attention_override"] = override
        columns, size = eye(entry[0].shape[1], 3), tuple(side // 2 for side in made.latent.shape[-2:])
        maps = []
        for model in (plain, made.model):
            d, tap = Denoiser(model), JointTap(columns, size)
            d(made.latent[None], torch.tensor([0.5]), [entry], tap.change)
            maps.append(tap.take())
            assert bool(own) == (model is made.model)
    for layer, seen in maps[0].items():
        torch.testing.assert_close(maps[1][layer], seen, rtol=1e-4, atol=1e-6)

"""Gradients through the real host classes equal those of an independent out-of-place autograd mode."""

import contextlib
from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierMismatch

from .tiny import FAMILIES, quantised, stock, tiny

pytestmark = pytest.mark.usefixtures("host")


def loss_and_gradient(made, context, patched=False):
    """Loss of one caption with a learned row, and its gradient per encoder."""
    from concepts.host.captions import Prompts
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.gradients import ordinary
    from concepts.host.text import encoders
    from concepts.kernels.losses import residual

    with context:
        model = made.model
        if patched:
            model = model.clone()
            model.set_model_attn2_patch(lambda n, k, v, extra: (n, k, v * (1 + 0.1 * (extra["block"][1] + 1))))
        d = Denoiser(model)
        draw = torch.Generator().manual_seed(1)
        rows = {e.key: (torch.randn(2, e.width, generator=draw) * 0.3).requires_grad_() for e in encoders(made.clip)}
        prompts = Prompts(made.clip, ["a photo of {}", "(a {}:1.3) on grass"], "thing", {"": dict.fromkeys(rows, 2)})
        prompts.ready()
        clean = d.clean(ordinary(made.latent)[None]).repeat(2, 1, 1, 1)
        sigma = sigmas_at(d.sampling, torch.tensor([0.4, 0.8], dtype=torch.float64))
        noise = torch.randn(clean.shape, generator=draw)
        out = d(d.noised(clean, noise, sigma), sigma, [prompts.encode(i, {"": rows}) for i in (0, 1)])
        loss = residual(d.space, sigma, out, clean, d.sigma_data).square().mean()
        loss.backward()
        return loss.item(), {k: v.grad for k, v in rows.items()}


@contextlib.contextmanager
def out_of_place(model, clip):
    """Autograd that keeps a copy of all it saves: no hook and no checkpoint of ours takes part."""
    import comfy.model_management as management

    from concepts.host.gradients import thaw

    copies = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda copy: copy)
    with torch.inference_mode(False), torch.enable_grad(), copies:
        for patcher in (model, clip.patcher):
            thaw(patcher)
        management.load_models_gpu([model, clip.patcher])
        for patcher in (model, clip.patcher):
            patcher.model.requires_grad_(False)
        kept = getattr(management, "in_training", None)
        management.in_training = True
        try:
            yield
        finally:
            management.in_training = kept


def relative(a, b):
    return max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_exact(family, checkpointing):
    from concepts.host.gradients import training

    made = tiny(family)
    patched = family in ("sd15", "sdxl")
    loss, grad = loss_and_gradient(made, training(made.model, made.clip.patcher, checkpointing=checkpointing), patched)
    reference_loss, reference = loss_and_gradient(made, out_of_place(made.model, made.clip), patched)
    assert all(float(v.norm()) > 0 for v in reference.values())
    assert loss == pytest.approx(reference_loss, rel=1e-6)
    assert relative(grad, reference) < 1e-4


@pytest.mark.parametrize("chosen", ["by the host", "by a node"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_attention_without_a_backward_pass_is_for_other_passes(family, checkpointing, chosen, monkeypatch):
    """As SageAttention is: what is learned, in every encoder, is what torch's own attention gives."""
    import comfy.ldm.flux.math as flux
    import comfy.ldm.modules.attention as unet
    import comfy.ldm.modules.diffusionmodules.mmdit as sd3

    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training

    made, asked = tiny(family), []
    parts = made.model, made.clip.patcher
    loss, grad = loss_and_gradient(made, training(*parts, checkpointing=checkpointing))

    def rough(*args, **kwargs):
        asked.append(torch.is_inference_mode_enabled())
        return unet.attention_pytorch(*args, **kwargs).detach() * 1.01

    if chosen == "by the host":
        for module in (unet, sd3, flux):
            monkeypatch.setattr(module, "optimized_attention", unet.wrap_attn(rough))
        monkeypatch.setattr("concepts.host.denoise.comfy.model_management.is_device_cpu", lambda device: False)
    else:
        options = made.model.model_options.setdefault("transformer_options", {})
        options["optimized_attention_override"] = lambda func, *args, **kwargs: rough(*args, **kwargs)
    again = loss_and_gradient(made, training(*parts, checkpointing=checkpointing))
    assert again[0] == pytest.approx(loss, rel=1e-6) and relative(again[1], grad) < 1e-4 and not asked
    assert all(float(v.norm()) > 0 for v in grad.values())
    with torch.inference_mode():
        entry = stock(made.clip, "a mug")[0]
        Denoiser(made.model)(made.latent[None], torch.tensor([0.5]), [entry])
    assert asked and all(asked)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_samples_bit_equally_afterwards(family):
    import comfy.sample

    from concepts.host.gradients import training

    made = tiny(family)

    def sample():
        with torch.inference_mode():
            cond = made.clip.encode_from_tokens_scheduled(made.clip.tokenize("a photo of a mug"))
            latent = torch.zeros(1, *made.latent.shape)
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(7))
            return comfy.sample.sample(
                made.model, noise, 3, 2.0, "euler", "simple", cond, cond, latent, seed=0, disable_pbar=True
            )

    before = sample()
    flags = [p.requires_grad for p in made.model.model.parameters()]
    loss_and_gradient(made, training(made.model, made.clip.patcher, checkpointing=True))
    assert torch.equal(sample(), before)
    modules = [*made.model.model.modules(), *made.clip.cond_stage_model.modules()]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) == 0
    assert not any("forward" in m.__dict__ for m in modules)
    assert len(flags) == len(list(made.model.model.parameters()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_small_weight_types_give_the_same_direction(dtype):
    from concepts.host.gradients import training

    exact = tiny("sd15")
    small = tiny("sd15", dtype=getattr(torch, dtype), cast=torch.float32)
    _, a = loss_and_gradient(exact, training(exact.model, exact.clip.patcher))
    _, b = loss_and_gradient(small, training(small.model, small.clip.patcher))
    cosine = torch.cosine_similarity(a["clip_l"].flatten(), b["clip_l"].flatten(), 0)
    assert cosine > (0.9 if dtype.startswith("float8") else 0.999)
    assert b["clip_l"].dtype == torch.float32


def test_quantised_weights_give_the_same_direction_and_can_be_patched_afterwards():
    """In inference mode the host wraps them as Parameters anew, which torch refuses of those made outside of it."""
    import comfy.model_management as management

    from concepts.host.gradients import training

    exact, small = tiny("sd15"), tiny("sd15")
    quantised(small.model)
    modules = small.model.model.named_modules()
    name = next(n for n, m in modules if hasattr(m, "layout_type") and "attn2.to_k" in n)
    weight = small.model.model.get_submodule(name).weight.dequantize().clone()
    _, a = loss_and_gradient(exact, training(exact.model, exact.clip.patcher))
    _, b = loss_and_gradient(small, training(small.model, small.clip.patcher))
    assert torch.cosine_similarity(a["clip_l"].flatten(), b["clip_l"].flatten(), 0) > 0.9
    with torch.inference_mode():
        clone = small.model.clone()
        clone.add_patches({f"{name}.weight": ("diff", (torch.ones_like(weight),))})
        management.load_models_gpu([clone])
        assert (small.model.model.get_submodule(name).weight.dequantize() - weight).mean() > 0.9
        management.load_models_gpu([small.model])
    assert torch.equal(small.model.model.get_submodule(name).weight.dequantize(), weight)


def test_finite_differences_agree():
    from concepts.host.captions import Prompts
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.gradients import training

    made = tiny("sd15")
    with training(made.model, made.clip.patcher):
        d = Denoiser(made.model)
        prompts = Prompts(made.clip, ["a photo of {}"], "thing", {"": {"clip_l": 1}})
        prompts.ready()
        x, sigma = torch.randn(1, *made.latent.shape), sigmas_at(d.sampling, torch.tensor([0.5]))
        weight = torch.randn(1, *made.latent.shape)

        def value(row):
            return (d(x, sigma, [prompts.encode(0, {"": {"clip_l": row}})]) * weight).sum()

        row = torch.randn(1, 64, requires_grad=True)
        value(row).backward()
        direction = row.grad / row.grad.norm()
        with torch.no_grad():
            slope = (value(row + 1e-2 * direction) - value(row - 1e-2 * direction)) / 2e-2
    assert float(slope) == pytest.approx(float(row.grad.norm()), rel=2e-2)


@pytest.mark.parametrize("family, passes", [("sd15", 1), ("sd3", 2), ("flux", 2)])
def test_texts_of_several_lengths_are_as_each_alone(family, passes):
    """In one pass only where the host repeats the shorter ones."""
    from concepts.host.denoise import Denoiser, sigmas_at

    made, calls = tiny(family), []
    short, long = (stock(made.clip, text)[0] for text in ("a mug", "a very " * 200 + "red mug"))
    draw, entries = torch.Generator().manual_seed(1), [short, long, short]
    with torch.no_grad():
        d = Denoiser(made.model)
        x = torch.randn(3, *made.latent.shape, generator=draw)
        sigma = sigmas_at(d.sampling, torch.tensor([0.3, 0.6, 0.9]))
        together = d(x, sigma, entries, lambda options: calls.append(options["sigmas"]) or options)
        alone = [d(x[n : n + 1], sigma[n : n + 1], [entry]) for n, entry in enumerate(entries)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=1e-4)
    assert len(calls) == passes and torch.equal(torch.cat(calls).sort()[0], sigma)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
def test_encoders_are_recomputed(family):
    """Their gradient is that without checkpointing, and the blocks keep neither weights nor activations."""
    from concepts.host.captions import Prompts
    from concepts.host.gradients import training
    from concepts.host.text import encoders

    found = []
    for checkpointing in (False, True):
        made, kept = tiny(family), []
        with training(made.model, made.clip.patcher, checkpointing=checkpointing):
            draw = torch.Generator().manual_seed(1)
            rows = {e.key: torch.randn(2, e.width, generator=draw).requires_grad_() for e in encoders(made.clip)}
            prompts = Prompts(made.clip, ["a photo of {}"], "thing", {"": dict.fromkeys(rows, 2)})
            prompts.ready()
            with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
                cond, extra = prompts.encode(0, {"": rows})
            (cond.sin().sum() + extra["pooled_output"].sin().sum()).backward()
        found.append((sum(kept), {k: v.grad for k, v in rows.items()}))
    (whole, plain), (less, recomputed) = found
    assert relative(recomputed, plain) < 1e-5 and less < 0.5 * whole


def test_a_patch_that_writes_over_what_the_gradient_needs_is_named():
    from comfy_extras.nodes_freelunch import FreeU_V2

    from concepts.host.gradients import training

    made = tiny("sd15")
    made = replace(made, model=FreeU_V2.execute(made.model, 1.3, 1.4, 0.9, 0.2)[0])
    with pytest.raises(CarrierMismatch, match="connect the model as it is before that node"):
        loss_and_gradient(made, training(made.model, made.clip.patcher))


def test_a_lora_in_bypass_mode_learns_as_an_applied_one():
    """Its factors are inference tensors outside the module."""
    import comfy.lora
    import comfy.sd

    from concepts.host.gradients import training

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this host has no bypass")
    made, draw, found = tiny("sd15"), torch.Generator().manual_seed(1), {}
    with torch.inference_mode():
        keys = comfy.lora.model_lora_keys_unet(made.model.model, {})
        factors = {}
        for name, key in keys.items():
            if name.startswith("lora_unet_") and key.endswith("attn2.to_k.weight"):
                high, wide = made.model.model.get_parameter(key).shape
                factors[f"{name}.lora_down.weight"] = torch.randn(2, wide, generator=draw)
                factors[f"{name}.lora_up.weight"] = torch.randn(high, 2, generator=draw) * 0.1
        for load in (comfy.sd.load_lora_for_models, comfy.sd.load_bypass_lora_for_models):
            found[load] = replace(made, model=load(made.model, None, factors, 1.0, 0.0)[0])
    assert len(factors) > 4
    (expected, theirs), (loss, ours) = (
        loss_and_gradient(one, training(one.model, one.clip.patcher)) for one in found.values()
    )
    assert loss == pytest.approx(expected, rel=1e-4) and relative(ours, theirs) < 1e-3
    assert loss != loss_and_gradient(made, training(made.model, made.clip.patcher))[0]


def test_products_are_quick_where_all_matrices_have_16_bits():
    from concepts.host.gradients import quick_products

    def quick(*modules):
        with quick_products(*modules):
            return torch.get_float32_matmul_precision() == "high"

    one, two = torch.nn.Linear(2, 2).bfloat16(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    assert quick(one) and not quick(one, two)
    assert quick(one, two.half(), torch.nn.LayerNorm(2)), "what is not multiplied with does not count"
    with pytest.raises(KeyboardInterrupt), quick_products(one):
        raise KeyboardInterrupt
    assert torch.get_float32_matmul_precision() == "highest"


def test_weights_that_were_open_are_so_again(host):
    """Weights made in inference mode are replaced by ordinary ones that may have gradients when those could."""
    from concepts.host.gradients import training

    made = tiny("sd15")
    parts = (made.model, made.clip.patcher)

    def flags():
        return [p.requires_grad for part in parts for p in part.model.parameters()]

    before = flags()
    assert any(before)
    with torch.inference_mode(), training(*parts):
        assert not any(flags())
    assert flags() == before


def test_memory_is_unpinned_before_a_weight_leaves_it():
    """The host pins it by address (ModelPatcher.unpin_all_weights)."""
    from concepts.host.gradients import needs_thaw, thaw

    model, seen = tiny("sd15").model, []
    before = list(model.model.parameters())
    model.unpin_all_weights = lambda: seen.append(
        [a is b for a, b in zip(model.model.parameters(), before, strict=True)]
    )
    thaw(model)
    assert len(seen) == 1 and all(seen[0])
    assert not any(a is b or needs_thaw(a) for a, b in zip(model.model.parameters(), before, strict=True))

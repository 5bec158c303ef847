"""Low-rank deltas: beside the layers and in them the same, exact gradients, and the stock loader reads them."""

import contextlib
import logging

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.delta import ALPHA, DOWN, UP
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept

from .test_gradients import out_of_place
from .tiny import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("host")


def random_delta(model, choice="attention", rank=3, single_blocks=False) -> Concept:
    """A delta that changes what the model says, without learning."""
    from concepts.host import lora

    chosen = lora.layers(model, choice, single_blocks)
    g = torch.Generator().manual_seed(2)
    made = lora.start(model, chosen, rank, 0)
    made |= {k: torch.randn(v.shape, generator=g) * 0.3 for k, v in made.items() if k.endswith(UP)}
    return Concept("mug", "delta", made | {name + ALPHA: torch.tensor(float(rank)) for name in chosen})


def output(made, model=None, context=None, around=contextlib.nullcontext, leaves=()):
    """Denoised estimates of a fixed input, and the gradients of their weighted sum."""
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.gradients import ordinary, training

    model = model or made.model
    with context or training(model, made.clip.patcher):
        text = made.clip.tokenize("a red mug on sand")
        cond, pooled = made.clip.encode_from_tokens(text, return_pooled=True)
        entry = [cond.detach(), {"pooled_output": pooled.detach() if pooled is not None else None}]
        d = Denoiser(model)
        draw = torch.Generator().manual_seed(1)
        clean = d.clean(ordinary(made.latent)[None]).repeat(2, 1, 1, 1)
        sigma = sigmas_at(d.sampling, torch.tensor([0.4, 0.8], dtype=torch.float64))
        noised = d.noised(clean, torch.randn(clean.shape, generator=draw), sigma)
        with around():
            out = d(noised, sigma, [entry, entry])
            if leaves:
                (out * torch.randn(out.shape, generator=draw)).sum().backward()
        return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_loader_gives_what_learning_saw(family, tmp_path, caplog):
    """Written, read by the stock loader's own function without one unknown key, and the same output."""
    import comfy.sd
    import comfy.utils

    from concepts.host import lora

    made = tiny(family)
    concept = random_delta(made.model, single_blocks=True)
    chosen = lora.layers(made.model, "attention", True)
    beside, _ = output(made, around=lambda: lora.beside(made.model, chosen, lambda: concept.tensors))
    plain, _ = output(made)
    write_concept(concept, tmp_path / "mug.safetensors")
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        file = comfy.utils.load_torch_file(str(tmp_path / "mug.safetensors"), safe_load=True)
        stock, _ = comfy.sd.load_lora_for_models(made.model, None, file, 1.0, 0.0)
        ours = lora.apply(made.model, concept, 1.0)
    assert not [r for r in caplog.records if "not loaded" in r.getMessage().lower()]
    assert len(stock.patches) == len(ours.patches) == len(chosen)
    for model in (stock, ours):
        patched, _ = output(made, model)
        torch.testing.assert_close(patched, beside, rtol=1e-4, atol=1e-4)
        assert float((patched - plain).norm() / plain.norm()) > 1e-2
    assert torch.equal(output(made)[0], plain), "the model itself is as it was"


def test_a_base_has_one_fingerprint_whatever_is_loaded(host):
    """The host writes patches into the weights that all clones share, and leaves them there."""
    import comfy.model_management

    from concepts.host import lora
    from concepts.host.session import fingerprint

    model = tiny("sd15").model
    base = fingerprint(model)
    with torch.inference_mode():
        patched = lora.apply(model, random_delta(model), 1.0)
        comfy.model_management.load_models_gpu([patched])
        assert patched.backup and fingerprint(model) == fingerprint(patched) == base
        comfy.model_management.load_models_gpu([model])
    assert fingerprint(model) == fingerprint(patched) == base


@contextlib.contextmanager
def merged(model, chosen, leaves, scale):
    """Plain autograd through W + scale up down, set in the place of each weight."""
    modules = dict(model.model.diffusion_model.named_modules())
    kept = {}
    for name, path in chosen.items():
        module = modules[path]
        kept[path] = module._parameters.pop("weight")
        module.weight = kept[path] + scale * leaves[name + UP] @ leaves[name + DOWN]
    try:
        yield
    finally:
        for path, weight in kept.items():
            del modules[path].weight
            modules[path]._parameters["weight"] = weight


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_merged_weights(family, checkpointing):
    from concepts.host import lora
    from concepts.host.gradients import training

    made = tiny(family)
    concept = random_delta(made.model, "all linear", single_blocks=True)
    chosen = lora.layers(made.model, "all linear", True)
    assert len(chosen) > 10

    def leaves():
        return {k: v.clone().requires_grad_() for k, v in concept.tensors.items() if not k.endswith(ALPHA)}

    mine, theirs = leaves(), leaves()
    with_hooks, got = output(
        made,
        context=training(made.model, made.clip.patcher, checkpointing=checkpointing),
        around=lambda: lora.beside(made.model, chosen, lambda: mine),
        leaves=tuple(mine.values()),
    )
    in_weights, expected = output(
        made,
        context=out_of_place(made.model, made.clip),
        around=lambda: merged(made.model, chosen, theirs, 1.0),
        leaves=tuple(theirs.values()),
    )
    torch.testing.assert_close(with_hooks, in_weights, rtol=1e-3, atol=1e-3)
    floor = 1e-3 * max(float(g.norm()) for g in expected)  # with one channel per group the time embedding has none
    worst = max(float((a - b).norm() / b.norm().clamp_min(floor)) for a, b in zip(got, expected, strict=True))
    assert worst < (1e-4 if family in ("sd3", "flux") else 1e-3) and all(float(g.norm()) > 0 for g in expected)


@pytest.mark.parametrize("family, cross", [("sd15", 7), ("sd2", 7), ("sdxl", 8), ("sd3", 0), ("flux", 0)])
def test_choices_of_layers(family, cross):
    from concepts.host import lora

    model = tiny(family).model
    every = lora.layers(model, "attention")
    kinds = {path.rsplit(".", 1)[-1] for path in every.values()}
    assert set(every.values()) < set(lora.layers(model, "all linear").values())
    if cross:
        assert kinds == {"to_q", "to_k", "to_v", "0"} and len(every) == 8 * cross
        assert len(lora.layers(model, "cross attention")) == 4 * cross
        assert len(lora.layers(model, "keys and values")) == 2 * cross
        assert all(n.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for n in every)
    else:
        assert kinds == {"qkv", "proj"}
        with pytest.raises(CarrierMismatch, match="choose attention"):
            lora.layers(model, "keys and values")
    if family == "flux":
        assert len(every) == 12 and len(lora.layers(model, "attention", True)) == 18

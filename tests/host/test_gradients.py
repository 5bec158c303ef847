"""Gradients through the real host classes equal those of an independent out-of-place autograd mode."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from .tiny import FAMILIES, tiny

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
    """torch's copy-on-write of mutated saved tensors: no hook and no checkpoint of ours takes part."""
    import comfy.model_management as management

    from concepts.host.gradients import thaw

    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.allow_mutation_on_saved_tensors():
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


@pytest.fixture
def little(monkeypatch, host):
    """The host has memory for a part of the model only."""
    import comfy.model_management as management

    load = management.load_models_gpu

    def loaded(models, *args, **kwargs):
        load(models, *args, **kwargs)
        models[0].unpatch_model()
        models[0].load(models[0].load_device, lowvram_model_memory=1000)
        assert models[0].lowvram_patch_counter() == 0 and models[0].model.model_lowvram

    return lambda: monkeypatch.setattr(management, "load_models_gpu", loaded)


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_weights_give_the_same_gradient(family, little):
    """Weights that the host streams in on every use, as it does when memory is short."""
    from concepts.host.gradients import training

    made = tiny(family)
    whole = loss_and_gradient(made, training(made.model, made.clip.patcher))
    made.model.unpatch_model()
    little()
    part = loss_and_gradient(made, training(made.model, made.clip.patcher))
    assert part[0] == pytest.approx(whole[0], rel=1e-6) and relative(part[1], whole[1]) < 1e-4


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


@pytest.fixture
def dynamic(monkeypatch, host):
    """The host's patcher for DynamicVRAM, without the driver underneath: no layer has a place in its memory until
    ``places`` gives it one, and nothing can be computed from there."""
    import comfy.model_patcher as patchers

    if not hasattr(patchers, "ModelPatcherDynamic"):
        pytest.skip("a host without DynamicVRAM")

    class Dynamic(patchers.ModelPatcherDynamic):
        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)

        def register_load_device(self, device):
            self.model.dynamic_pins[device] = {k: (SimpleNamespace(size=0), [], [-1], [0], [0], {}) for k in PINS}
            self.model.dynamic_pins[device] |= {"hostbufs_initialized": True}

        def _vbar_get(self, create=False):
            return None

    def made(family, dtype=torch.float32):
        built = tiny(family, dtype=dtype, cast=torch.float32)
        device = torch.device("cpu", 0)  # not equal to what the host takes for its CPU
        with torch.inference_mode():
            built.model = Dynamic(built.model.model, device, torch.device("cpu"))
            built.clip.patcher = Dynamic(built.clip.cond_stage_model, device, torch.device("cpu"))
        return built

    return made


PINS = ("weights", "patches", "weights-loaded", "patches-loaded")


def parts(made):
    return [*made.model.model.modules(), *made.clip.cond_stage_model.modules()]


def weights(made):
    return [
        (t, t.clone()) for m in parts(made) for t in [*m._parameters.values(), *m._buffers.values()] if t is not None
    ]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("fits", [True, False], ids=["whole", "streamed"])
def test_a_dynamic_patcher_learns_on_copies(dynamic, monkeypatch, fits, checkpointing):
    """Its weights, its places in dynamic memory and the host's list of models are as they were."""
    import comfy.model_management as management

    from concepts.host import gradients

    made, plain = dynamic("sdxl"), tiny("sdxl")
    places = {}
    with torch.inference_mode():
        before = weights(made)
        management.load_models_gpu([made.model, made.clip.patcher])
        for number, module in enumerate(parts(made)):
            if hasattr(module, "comfy_cast_weights"):
                places[module] = module._v = (SimpleNamespace(unpin=lambda *_: None), number, 1)
                module._v_signature, module._v_weight = "resident", module.weight.clone()
    monkeypatch.setattr(gradients, "_fits", lambda patchers: fits)
    loss, grad = loss_and_gradient(made, gradients.training(made.model, made.clip.patcher, checkpointing=checkpointing))
    expected = loss_and_gradient(plain, gradients.training(plain.model, plain.clip.patcher))
    assert loss == pytest.approx(expected[0], rel=1e-6) and relative(grad, expected[1]) < 1e-4
    assert all(m._v == place and m._v_signature is None for m, place in places.items())
    after = [t for t, _ in weights(made)]
    for now, (then, value) in zip(after, before, strict=True):
        assert now.data_ptr() == then.data_ptr() and torch.equal(now, value) and now.is_inference()
    assert not any(made.model.is_clone(x.model) for x in management.current_loaded_models)
    assert made.model.is_dynamic() and not made.model.backup and made.model.loaded_size() == 0
    with torch.inference_mode():
        management.load_models_gpu([made.model, made.clip.patcher])  # and the host can use it again


def test_a_dynamic_patcher_learns_with_its_lora(dynamic):
    from concepts.host import lora
    from concepts.host.gradients import training

    from .test_lora import random_delta

    made, plain = dynamic("sd15"), tiny("sd15")
    what = random_delta(plain.model)
    found = []
    for one in (made, plain):
        with torch.inference_mode():
            one.model = lora.apply(one.model, what, 1.0)
        found.append(loss_and_gradient(one, training(one.model, one.clip.patcher)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6) and relative(found[0][1], found[1][1]) < 1e-4
    assert not made.model.backup


def test_streamed_weights_are_refused_where_their_memory_is_used_again(monkeypatch, little):
    from concepts.host import gradients

    made = tiny("sd15")
    little()
    monkeypatch.setattr(gradients, "_reuses", lambda device: True)
    with pytest.raises(RuntimeError, match="--disable-async-offload"), gradients.training(made.model):
        pass


def test_weights_are_counted_against_the_device(monkeypatch):
    import comfy.model_management as management

    from concepts.host import gradients

    made = tiny("sd15")
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "NUM_STREAMS", 0)
    size = made.model.model_size() + made.clip.patcher.model_size() + management.minimum_inference_memory()
    for total, fits in ((size + 1, True), (size - 1, False)):
        monkeypatch.setattr(management, "get_total_memory", lambda device, total=total: total)
        assert gradients._fits([made.model, made.clip.patcher]) is fits
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    monkeypatch.setattr(management.args, "cuda_malloc", False)
    with pytest.raises(RuntimeError, match="not loaded whole"):
        gradients._fits([made.model, made.clip.patcher])

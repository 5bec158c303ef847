"""Weights on the device: offloaded, streamed, under DynamicVRAM; gradients and the host afterwards."""

from types import SimpleNamespace

import pytest
import torch

from .test_gradients import loss_and_gradient, relative
from .tiny import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("host")


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


@pytest.mark.slow
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
    monkeypatch.setattr(gradients, "fits", lambda patchers: fits)
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


@pytest.mark.slow
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
    from concepts.host import gradients, loading

    made = tiny("sd15")
    little()
    for module in (gradients, loading):
        monkeypatch.setattr(module, "reuses", lambda device: True)
    with pytest.raises(RuntimeError, match="--disable-async-offload"), gradients.training(made.model):
        pass


def test_weights_are_counted_against_what_is_free(monkeypatch):
    import comfy.model_management as management

    from concepts.host import loading

    made = tiny("sd15")
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "NUM_STREAMS", 0)
    both = [made.model, made.clip.patcher]
    size = sum(p.model_size() - p.loaded_size() for p in both) + management.minimum_inference_memory()
    for free, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr(management, "get_free_memory", lambda *_, free=free, **__: free)
        assert loading.fits(both) is fits
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    monkeypatch.setattr(management.args, "cuda_malloc", False)
    with pytest.raises(RuntimeError, match="not loaded whole"):
        loading.fits(both)
    monkeypatch.setattr(loading, "missing", lambda patchers, device: 0)
    assert loading.fits(both), "they are there already"


def test_others_are_unloaded_while_they_can_be_moved(monkeypatch):
    """In inference mode; what learns stays, and room is made on its devices besides the CPU."""
    import comfy.model_management as management

    from concepts.host.loading import make_room

    made, other, gpu, asked = tiny("sd15"), tiny("sd15"), torch.device("cuda", 0), []
    made.model.load_device = gpu
    loaded = [
        SimpleNamespace(model=m, real_model=lambda: 0) for m in (made.model.clone(), other.model, made.clip.patcher)
    ]
    monkeypatch.setattr(management, "current_loaded_models", loaded)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 7)
    monkeypatch.setattr(
        management, "free_memory", lambda *given, **more: asked.append((torch.is_inference_mode_enabled(), given, more))
    )
    with torch.inference_mode(False):
        make_room([made.model, made.clip.patcher], 1000.0)
    ((inside, (needed, device), more),) = asked
    assert inside and device == gpu and more == {"keep_loaded": [loaded[0], loaded[2]]}
    assert needed == pytest.approx(1.1 * (made.model.model_size() - made.model.loaded_size()) + 1007)

"""LoRAs fused by what they draw: inputs against a naive record, what the result is, what is refused, nothing left."""

import logging
from dataclasses import replace

import pytest
import torch

from concepts.carriers.delta import ALPHA, DOWN, UP, layers
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept

from .test_learn import same
from .test_lora import output, random_delta
from .test_variants import concept as tokens
from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")


def two(made, choices=("attention", "attention")):
    """LoRAs of different values, and of different layers if asked."""
    first, second = (random_delta(made.model, choice, 2 + i) for i, choice in enumerate(choices))
    second = replace(second, tensors={k: v.flip(0) if k.endswith(UP) else v for k, v in second.tensors.items()})
    return [
        replace(first, name="cat", info={"token_text": "sks cat"}),
        replace(second, name="hat", info={"token_text": "a hat"}),
    ]


def latent(made, count=1):
    return {"samples": torch.zeros_like(made.latent)[None].repeat(count, *[1] * made.latent.ndim)}


def fuse(made, concepts, prompts=("a photo of {}",), count=1, **settings):
    from concepts.host.fusion import FusionSettings
    from concepts.host.fusion import fuse as fusing

    settings = FusionSettings("both", prompts, **{"steps": 2, **settings})
    with torch.inference_mode():
        return fusing(made.model, made.clip, concepts, latent(made, count), settings)


def hooks(made) -> int:
    return sum(len(m._forward_pre_hooks) for m in made.model.model.diffusion_model.modules())


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_inputs_are_those_of_the_prompt_alone(family):
    """Against a naive record of every layer's input; of a guided pass the half of the negative prompt is left out."""
    from concepts.host import class_pictures, fusion, lora
    from concepts.host.layer_inputs import Inputs

    made = tiny(family)
    chosen = list(lora.layers(made.model, "attention").values())
    modules = dict(made.model.model.diffusion_model.named_modules())
    seen = {path: [] for path in chosen}
    handles = [
        modules[p].register_forward_pre_hook(lambda m, args, p=p: seen[p].append(args[0].clone())) for p in chosen
    ]

    def pictures(inputs):
        with torch.inference_mode(), inputs.of(made.model) as watched:
            fusion._draw(watched, made.clip, None, "a red mug", latent(made, 2), 3, 2, lambda *_: None)
        return inputs

    try:
        apart = pictures(Inputs(chosen, shared=False))
    finally:
        for handle in handles:
            handle.remove()
    guided = class_pictures.guidance(made.model) > 1
    for path in chosen:
        rows = [x[len(x) // 2 :] if guided else x for x in seen[path]]  # the host has the negative prompt first
        assert len(rows) == 2 and len(rows[0]) == 2
        flat = torch.cat([x.flatten(0, -2) for x in rows]).double()
        torch.testing.assert_close(apart.gram(path).double(), flat.T @ flat, rtol=1e-4, atol=1e-4)
    together = pictures(Inputs(chosen, shared=True))
    assert all(torch.equal(apart.gram(path), together.gram(path)) for path in chosen)
    assert (len(together.held) < len(apart.held)) == (family in ("sd15", "sdxl")), "layers that read the same share it"


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_the_stock_loader_takes_one_lora_for_all(family, tmp_path, caplog):
    import comfy.sd
    import comfy.utils

    from concepts.host import lora

    made = tiny(family)
    before, _ = output(made)
    both, drawn, report = fuse(made, two(made), count=2)
    assert torch.equal(output(made)[0], before) and not hooks(made) and not made.model.patches
    assert drawn.shape == (4, *made.latent.shape) and drawn.isfinite().all()
    assert both.info["fused"] == ["cat", "hat"] and report.startswith("<both>: cat, hat fused\n<cat>: ")
    assert all(len(both.tensors[name + DOWN]) == 5 for name in layers(both.tensors)), "ranks add up"
    write_concept(both, tmp_path / "both.safetensors")
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        file = comfy.utils.load_torch_file(str(tmp_path / "both.safetensors"), safe_load=True)
        stock, _ = comfy.sd.load_lora_for_models(made.model, None, file, 1.0, 0.0)
        assert len(stock.patches) == len(lora.apply(made.model, both, 1.0).patches) == len(layers(both.tensors))
    assert not [r for r in caplog.records if "not loaded" in r.getMessage().lower()]


def parts(concept, name):
    """The change of one layer's weight, fp64."""
    up, down, alpha = (concept.tensors[name + part].double() for part in (UP, DOWN, ALPHA))
    return up @ down * alpha / len(down)


def test_each_lora_does_what_it_did_alone():
    """By inputs of its own pictures, recorded anew: much nearer than the sum is."""
    from concepts.host import fusion
    from concepts.host.layer_inputs import Inputs

    made = tiny("sd15")
    concepts = two(made)
    both, _, report = fuse(made, concepts, steps=4)
    names = layers(both.tensors)
    paths = list(fusion.lora.places(made.model, both).values())
    for concept, line in zip(concepts, report.splitlines()[1:], strict=True):
        inputs = Inputs(paths, True)
        text = f"a photo of {concept.info['token_text']}"
        with torch.inference_mode(), inputs.of(made.model) as watched:
            fusion._draw(watched, made.clip, concept, text, latent(made), 5, 4, lambda *_: None)
        off, added, alone = 0.0, 0.0, 0.0
        for name, path in zip(names, paths, strict=True):
            gram, own = inputs.gram(path).double(), parts(concept, name)
            whole = sum(parts(c, name) for c in concepts)
            for total, change in ((0, parts(both, name) - own), (1, whole - own), (2, own)):
                value = float(((change @ gram) * change).sum())
                off, added, alone = (
                    off + value * (total == 0),
                    added + value * (total == 1),
                    alone + value * (total == 2),
                )
        assert off < 0.7 * added, "another noise, the same kind of inputs"
        number = both.info["fused"].index(concept.name)
        assert both.info["off_if_added"][number] == pytest.approx((added / alone) ** 0.5, rel=0.15)
        assert f"<{concept.name}>: " in line and f"off by {both.info['off'][number]:.0%};" in line


def test_what_is_kept_changes_less():
    from concepts.host import fusion
    from concepts.host.layer_inputs import Inputs

    made = tiny("sd15")
    concepts, changes = two(made), []
    for keep in ((), ("a dog on sand",)):
        both, drawn, _ = fuse(made, concepts, keep=keep)
        assert len(drawn) == 2 + len(keep)
        paths = fusion.lora.places(made.model, both)
        inputs = Inputs(list(paths.values()), True)
        with torch.inference_mode(), inputs.of(made.model) as watched:
            fusion._draw(watched, made.clip, None, "a dog on sand", latent(made), 9, 2, lambda *_: None)
        changes.append(
            sum(float(((parts(both, n) @ inputs.gram(p).double()) * parts(both, n)).sum()) for n, p in paths.items())
        )
    assert changes[1] < 0.8 * changes[0]


def watched(monkeypatch) -> list:
    """What each concept's layers read, in order, once something was fused."""
    from concepts.host import fusion

    used = []

    class Kept(fusion.Inputs):
        def __init__(self, *args):
            super().__init__(*args)
            used.append(self)

    monkeypatch.setattr(fusion, "Inputs", Kept)
    return used


def test_layers_of_one_lora_count_the_inputs_of_all(monkeypatch):
    """Where only one LoRA has a layer, it is to do less to what the other one's pictures bring there."""
    from concepts.host import lora

    made, used = tiny("sd15"), watched(monkeypatch)
    wide, narrow = two(made, ("attention", "keys and values"))
    both, *_ = fuse(made, [narrow, wide])
    assert set(layers(both.tensors)) == set(layers(wide.tensors)) > set(layers(narrow.tensors))
    alone = set(layers(wide.tensors)) - set(layers(narrow.tensors))
    changes = [0.0, 0.0]
    for name, path in lora.places(made.model, both).items():
        if name in alone:
            assert torch.equal(both.tensors[name + UP], wide.tensors[name + UP])
            for number, concept in enumerate((both, wide)):
                own = parts(concept, name)
                changes[number] += float(((own @ used[0].gram(path).double()) * own).sum())
    assert changes[0] < 0.5 * changes[1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_lora():
    made = tiny("sd15")
    first, second, other = (fuse(made, two(made), seed=s)[0] for s in (1, 1, 2))
    assert same(first.tensors, second.tensors) and not same(first.tensors, other.tensors)


def test_rows_of_keys_and_values_are_read_apart(monkeypatch):
    """A concept whose K and V have rows of their own gives the layers of one block different texts."""
    made, used = tiny("sd15"), watched(monkeypatch)
    rows = tokens(made, roles=2, name="cat")
    cat, hat = two(made)
    bundle = {f"bundle_emb.cat.{key}": value for key, value in rows.tensors.items()}
    cat = replace(cat, tensors={**cat.tensors, **bundle}, info={**rows.info, "token_text": "{}"})
    both, *_ = fuse(made, [cat, hat])
    key, value = (next(p for p in used[0].paths if p.endswith(f"attn2.to_{role}")) for role in "kv")
    assert not torch.equal(used[0].gram(key), used[0].gram(value)) and torch.equal(
        used[1].gram(key), used[1].gram(value)
    )
    assert not any(k.startswith("bundle_emb") for k in both.tensors), "rows stay with their own concepts"


def test_what_cannot_be_fused_is_refused_before_anything_is_drawn(monkeypatch):
    from concepts.host import fusion

    def draw(*args):
        raise AssertionError("nothing is drawn")

    monkeypatch.setattr(fusion, "_draw", draw)
    made = tiny("sd15")
    cat, hat = two(made)
    for concepts, error, text in (
        ([cat], ValueError, "two or more"),
        ([], ValueError, "got none"),
        ([cat, replace(hat, name="cat")], ValueError, "different names"),
        ([cat, tokens(made, name="hat")], CarrierMismatch, "changes no weights"),
        ([cat, replace(hat, info={})], CarrierMismatch, "by which words"),
        ([cat, replace(hat, info={"token_text": "{} hat"})], CarrierMismatch, "by which words"),
        ([cat, replace(two(tiny("sdxl"))[1], name="wide")], CarrierMismatch, "connect the model it was learned on"),
    ):
        with pytest.raises(error, match=text):
            fuse(made, concepts)
    for prompts in ((), ("a photo of {}", "a mug")):
        with pytest.raises(ValueError, match="must hold {}"):
            fuse(made, [cat, hat], prompts=prompts)


def test_pictures_that_are_not_finite_are_refused_and_nothing_stays():
    made = tiny("sd15")
    cat, hat = two(made)
    broken = {k: v * 1e30 if k.endswith(UP) else v for k, v in hat.tensors.items()}
    with pytest.raises(ValueError, match="LoRA of <hat> draws of 'a photo of a hat' is not finite"):
        fuse(made, [cat, replace(hat, tensors=broken)])
    assert not hooks(made)


def test_texts_of_another_node_are_read_apart(monkeypatch):
    made, used = tiny("sd15"), watched(monkeypatch)
    made.model.set_model_attn2_patch(lambda n, key, value, options: (n, key, value * 2))
    try:
        fuse(made, two(made))
    finally:
        del made.model.model_options["transformer_options"]["patches"]
    key, value = (next(p for p in used[0].paths if p.endswith(f"attn2.to_{role}")) for role in "kv")
    torch.testing.assert_close(used[0].gram(value), 4 * used[0].gram(key))


def test_a_layer_that_was_not_seen_is_named():
    from concepts.host.layer_inputs import Inputs

    with pytest.raises(CarrierMismatch, match="without its layer a[.]b being seen.*before Torch Compile"):
        Inputs(["a.b"], True).gram("a.b")


def test_sums_go_to_the_cpu_where_a_device_is_full(host, monkeypatch):
    import comfy.model_management as management

    from concepts.host.layer_inputs import _place

    device = torch.device("meta")
    for free, place in ((management.minimum_inference_memory() + 1, device), (0, torch.device("cpu"))):
        monkeypatch.setattr(management, "get_free_memory", lambda device, free=free: free)
        assert _place(device) == place


def test_an_interrupt_leaves_nothing_on_the_model(monkeypatch):
    import comfy.model_management as management

    from concepts.host import fusion

    made = tiny("sd15")

    def stop(self, *args):
        raise management.InterruptProcessingException

    monkeypatch.setattr(fusion.Progress, "show", stop)
    with pytest.raises(management.InterruptProcessingException):
        fuse(made, two(made))
    assert not hooks(made)

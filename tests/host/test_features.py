"""Features of every family: equal to those of a plain full pass, out of as little of the model as they need."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from concepts.carriers.errors import CarrierMismatch
from concepts.kernels.draws import generator

from .test_variants import concept
from .tiny import KINDS, tiny

pytestmark = pytest.mark.usefixtures("host")
TEXT = "a photo of <mug> and grass"
UNETS = ("sd15", "sd2", "sdxl")


@pytest.fixture(scope="module", params=KINDS)
def made(request, host):
    return tiny(request.param)


def wanted(made, *names, timestep=400, noise=True, ensemble=1, block=None, layer=None):
    from concepts.host.feature_places import Want, block_for, layers_with_attention

    with_words = {True: "all", False: layer or list(layers_with_attention(made.model))[-1]}
    return [
        Want(
            name,
            block or block_for(made.model)[0] if name == "dift" else with_words[name.startswith("attention")],
            timestep,
            noise,
            ensemble,
        )
        for name in names
    ]


def extract(made, wants, latents=None, text=TEXT, seed=5):
    from concepts.host.features import extract

    latents = made.latent[None] if latents is None else latents
    with torch.inference_mode():
        return extract(made.model, made.clip, latents, wants, text, [concept(made)], seed)


def states(made):
    return {k: v.clone() for k, v in made.model.model.diffusion_model.state_dict().items()}


def hooks(made) -> int:
    parts = made.model.model.modules()
    return sum(len(p._forward_hooks) + len(p._forward_pre_hooks) for p in parts)


@contextlib.contextmanager
def listening(part, run, before=False):
    add = part.register_forward_pre_hook if before else part.register_forward_hook
    handle = add(run, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def full_pass(made, timestep, number, listen, seed=5):
    """An ordinary call of the host's model under the same prompt; ``listen``: (module, hook, whether before it)."""
    import comfy.model_management

    from concepts.host.denoise import Denoiser
    from concepts.host.show import prompted

    with torch.inference_mode(), contextlib.ExitStack() as stack:
        comfy.model_management.load_models_gpu([made.model])
        d = Denoiser(made.model)
        clean = made.model.model.process_latent_in(made.latent[None].clone())
        if d.space == "flow":
            sigma = torch.tensor([timestep / 1000])
        else:
            sigma = d.sampling.sigma(torch.tensor([float(timestep)]))
        noise = torch.randn(clean.shape[1:], generator=generator(seed, number, "features"))[None]
        entry, change = prompted(made.clip, TEXT, [concept(made)])
        for part, run, before in listen:
            stack.enter_context(listening(part, run, before))
        d(d.sampling.noise_scaling(sigma, noise, clean), sigma, [entry], change)


def references(made, timestep=400, number=0):
    """DIFT, Q, K and V by hooks of the test's own, the pass running to its end."""
    from concepts.host.feature_places import block_for

    network, kept = made.model.model.diffusion_model, {}
    place = block_for(made.model)[0]

    def keep(name, read):
        def run(module, args, kwargs, out=None):
            kept[name] = read(args, kwargs, out).float().clone()

        return run

    if hasattr(network, "input_blocks"):
        block = network.output_blocks[int(place.split(".")[1])][-1]
        last = network.get_submodule([n for n, _ in network.named_modules() if n.endswith("attn1")][-1])
        listen = [(block, keep("dift", lambda a, k, o: o), False)]
        listen += [
            (getattr(last, part), keep(name, lambda a, k, o: square(o)), False)
            for part, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
        ]
    elif hasattr(network, "joint_blocks"):
        block = network.get_submodule(place)
        attention = network.joint_blocks[-1].x_block.attn

        def modulated(args, kwargs, _):
            parts = block.x_block.adaLN_modulation(kwargs["c"]).chunk(6, 1)
            return square(block.x_block.norm1(args[1]) * (1 + parts[1])[:, None] + parts[0][:, None])

        def part_of_qkv(number):
            return lambda a, k, o: square(o.chunk(3, -1)[number])

        listen = [(block, keep("dift", modulated), True)]
        listen += [(attention.qkv, keep(n, part_of_qkv(i)), False) for i, n in enumerate(("query", "key", "value"))]
    else:
        block, last = network.get_submodule(place), network.single_blocks[-1]

        def modulated(args, kwargs, _):
            modulation, _ = block.modulation(kwargs["vec"])
            return square(block.pre_norm(args[0]) * (1 + modulation.scale) + modulation.shift)

        def normed(number):
            return lambda a, k, o: square((*o, a[2])[number].transpose(1, 2).flatten(2))

        listen = [(block, keep("dift", modulated), True)]
        listen += [(last.norm, keep(n, normed(i)), False) for i, n in enumerate(("query", "key", "value"))]
    full_pass(made, timestep, number, listen)
    return kept


def square(tokens):
    """The picture's tokens, last in a row, as [b, c, side, side]."""
    count = 64 if tokens.shape[1] == 64 else 16
    return tokens[:, -count:].mT.unflatten(-1, (int(count**0.5),) * 2)


KINDS = ("dift", "query", "key", "value")


def test_values_are_those_of_a_full_pass(made):
    found = extract(made, wanted(made, *KINDS))
    expected = references(made)
    assert list(found.maps) == list(KINDS) and (found.height, found.width) == (64, 64)
    for name in KINDS:
        assert float(expected[name].std()) > 0
        torch.testing.assert_close(found.map(name), expected[name], rtol=1e-4, atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_members(made):
    found = extract(made, wanted(made, "dift", "key", ensemble=3)).maps
    single = [references(made, number=n) for n in range(3)]
    for name in found:
        torch.testing.assert_close(found[name], torch.stack([s[name] for s in single]).mean(0), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[name], single[0][name], rtol=1e-2, atol=1e-3)


def test_pictures_do_not_depend_on_their_neighbours(made):
    """Twelve rows are two passes; the last picture is in both."""
    pictures = torch.stack([made.latent, -made.latent, made.latent.flip(-1)])
    wants = wanted(made, "dift", "attention grass", ensemble=4)
    found = extract(made, wants, pictures)
    assert found.info["passes"] == 2
    for number in range(3):
        alone = extract(made, wants, pictures[number : number + 1])
        for name in found.maps:
            torch.testing.assert_close(found.map(name)[number], alone.map(name)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [True, False])
def test_words_are_those_that_show_attention_shows(made, noise, monkeypatch):
    """With the noise that it draws; the mean over its layers on the largest grid. Without noise they differ."""
    import concepts.host.features as features
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.show import look

    monkeypatch.setattr(features, "generator", lambda seed, number, purpose: generator(seed, number, "looks"))
    d = Denoiser(made.model)
    timestep = 500 if d.space != "flow" else 1000 * float(sigmas_at(d.sampling, torch.tensor([0.5])))
    wants = wanted(made, "attention <mug>", "attention grass", timestep=timestep, noise=noise)
    found = extract(made, wants, seed=1)
    with torch.inference_mode():
        (one,) = look(made.model, made.clip, made.latent, TEXT, [concept(made)], ["<mug>", "grass"], [0.5], 1)
    side = max(layer.height for layer in one.maps)
    expected = torch.zeros(2, side, side)
    for layer, seen in one.maps.items():
        grid = seen.T.reshape(1, 2, layer.height, layer.width)
        expected += F.interpolate(grid, (side, side), mode="bilinear")[0] / len(one.maps)
    ours = torch.cat([found.map("attention <mug>"), found.map("attention grass")])[:, 0]
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6) == noise


def test_a_clean_picture_reaches_the_network_unscaled(made):
    network, kept = made.model.model.diffusion_model, {}

    def keep(module, args, kwargs):
        kept["x"], kept["t"] = args[0].clone(), args[1].clone()

    with listening(network, keep, True):
        extract(made, wanted(made, "query", timestep=999, noise=False))
    torch.testing.assert_close(kept["x"], made.model.model.process_latent_in(made.latent[None].clone()))
    flow = kept["t"].max() <= 1
    assert float(kept["t"]) == pytest.approx(0.999 if flow else 999)


def calls(made, wants) -> list[str]:
    """Names of blocks that a pass ran."""
    from concepts.host.feature_places import blocks_of

    ran, handles = [], []
    for name, part in blocks_of(made.model).items():
        handles.append(part.register_forward_hook(lambda *_, name=name: ran.append(name)))
    try:
        extract(made, wants)
    finally:
        for handle in handles:
            handle.remove()
    return ran


def test_one_pass_gives_all_and_ends_after_the_last_place(made):
    from concepts.host.feature_places import blocks_of

    names = list(blocks_of(made.model))
    early = names[len(names) // 2]
    ran = calls(made, wanted(made, "dift", block=early))
    unet = "input_blocks.0" in names
    assert ran == names[: names.index(early) + (1 if unet else 0)]
    everything = calls(made, wanted(made, *KINDS, "attention grass", "attention photo"))
    assert len(everything) == len(set(everything)) and everything == names[: len(everything)]
    two = extract(made, wanted(made, "dift") + wanted(made, "query", timestep=999, noise=False, ensemble=8))
    assert two.info["passes"] == 2, "a clean picture has no ensemble"


def test_nothing_is_left_on_the_model(made):
    from .test_variants import prompt, sample

    before, drawn = states(made), sample(made, prompt(made, "a mug"), cfg=1.0, steps=2)
    extract(made, wanted(made, *KINDS, "attention grass"))
    assert hooks(made) == 0
    after = states(made)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(sample(made, prompt(made, "a mug"), cfg=1.0, steps=2), drawn)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error_inside_the_pass(made, error):
    from concepts.host.feature_places import blocks_of

    def fail(*_):
        raise error("stop")

    handle = next(iter(blocks_of(made.model).values())).register_forward_hook(fail)
    with pytest.raises(error, match="stop"):
        extract(made, wanted(made, *KINDS, "attention grass"))
    assert hooks(made) == 1
    handle.remove()


def test_the_hosts_interrupt_ends_it_in_the_middle(made):
    """Asked for in the first of two passes, the second never runs."""
    import comfy.model_management as management

    from concepts.host.feature_places import blocks_of

    ran = []

    def ask(*_):
        ran.append(1)
        management.interrupt_current_processing(True)

    handle = next(iter(blocks_of(made.model).values())).register_forward_hook(ask)
    try:
        with pytest.raises(management.InterruptProcessingException):
            extract(made, wanted(made, "dift", ensemble=9))
    finally:
        management.interrupt_current_processing(False)
        handle.remove()
    assert len(ran) == 1 and hooks(made) == 0


def test_the_bar_counts_passes(made, monkeypatch):
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *_, **__: seen.append((value, total)))
    extract(made, wanted(made, "dift", ensemble=9))
    assert seen == [(1, 2), (2, 2)]


def test_presets_say_what_they_chose(made):
    from concepts.host.feature_places import preset

    wants = preset(made.model, "DIFT + PDM", ["grass"])
    assert [w.name for w in wants] == ["dift", "query", "key", "attention grass"]
    flow = made.latent.shape[0] == 16
    assert [(w.timestep, w.noise, w.ensemble) for w in wants[:2]] == (
        [(260, True, 8), (1000, False, 1)] if flow else [(261, True, 8), (999, False, 1)]
    )
    assert wants[3].timestep == wants[2].timestep and all(w.note for w in wants)
    found = extract(made, preset(made.model, "DIFT", [], ensemble=2, noise=True, timestep=10))
    assert found.info["sources"]["dift"]["ensemble"] == 2 and found.info["sources"]["dift"]["timestep"] == 10
    assert found.info["passes"] == 1 and found.info["prompt"] == TEXT and found.info["seed"] == 5


def test_wrong_names_list_those_there_are(made):
    from concepts.host.feature_places import blocks_of, layers_with_attention, preset

    for kind, known in (("block", blocks_of), ("layer", layers_with_attention)):
        with pytest.raises(ValueError, match="'output_blocks.99'; it has: ") as raised:
            preset(made.model, "custom", [], **{kind: "output_blocks.99"})
        assert all(name in str(raised.value) for name in known(made.model))
    with pytest.raises(ValueError, match="nothing to extract"):
        preset(made.model, "custom", [])
    with pytest.raises(ValueError, match="out of range"):
        preset(made.model, "PDM", [], timestep=1001)
    for name, place in (("PDM", "block"), ("DIFT", "layer")):
        with pytest.raises(ValueError, match=f"preset {name} reads no {place}"):
            preset(made.model, name, [], **{place: "output_blocks.1"})
    with pytest.raises(ValueError, match="asked for twice"):
        extract(made, wanted(made, "dift", "dift"))
    with pytest.raises(ValueError, match="does not hold cat"):
        extract(made, wanted(made, "attention cat"))


def test_places_of_full_size_models(host, monkeypatch):
    """Blocks by the papers' names, from module lists of the real lengths."""
    import concepts.host.feature_places as places

    class Model:
        def __init__(self, kind, **lists):
            network = torch.nn.Module()
            for name, value in lists.items():
                setattr(network, name, value)
            self.model = type(kind, (), {"diffusion_model": network})()

    def blocks(count):
        return torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Identity()) for _ in range(count))

    def unet(kind, count):
        return Model(kind, input_blocks=blocks(count), output_blocks=blocks(count))

    assert places.block_for(unet("BaseModel", 12))[0] == "output_blocks.5"
    assert places.block_for(unet("SDXL", 9))[0] == "output_blocks.2"
    flux = Model("Flux", double_blocks=blocks(19), single_blocks=blocks(38), hidden_size=3072)
    assert places.block_for(flux) == ("single_blocks.9", "DiTF's for Flux")
    assert places.massive_channels(flux) == (154, 1446)
    assert places.block_for(Model("SD3", joint_blocks=blocks(24)))[0] == "joint_blocks.12"


def test_massive_channels_are_zeroed_before_the_norm(monkeypatch):
    import concepts.host.feature_hooks as feature_hooks

    made, kept = tiny("flux"), {}
    monkeypatch.setattr(feature_hooks, "massive_channels", lambda model: (3, 7))
    found = extract(made, wanted(made, "dift"))
    block = made.model.model.diffusion_model.single_blocks[0]

    def keep(module, args, kwargs):
        x = args[0].clone()
        x[..., [3, 7]] = 0
        modulation, _ = block.modulation(kwargs["vec"])
        kept["dift"] = square(block.pre_norm(x) * (1 + modulation.scale) + modulation.shift)

    full_pass(made, 400, 0, [(block, keep, True)])
    torch.testing.assert_close(found.map("dift"), kept["dift"], rtol=1e-4, atol=1e-5)


def test_stages_of_a_concept_follow_the_timestep():
    """Concepts that are alike in the first of two stages part in the second."""
    from concepts.host.features import extract

    made = tiny("sd15")
    for timestep, alike in ((300, True), (700, False)):
        with torch.inference_mode():
            staged, plain = (
                extract(made.model, made.clip, made.latent[None], wanted(made, "dift", timestep=timestep), TEXT, [c], 0)
                for c in (concept(made, stages=2), concept(made, stages=2, same=True))
            )
        assert torch.equal(staged.map("dift"), plain.map("dift")) == alike


def test_unread_models_are_refused():
    made = tiny("flux")
    made.model.model.__class__ = type("Other", (type(made.model.model),), {})
    with pytest.raises(CarrierMismatch, match="Features of Other cannot be read"):
        extract(made, [])


def test_the_last_timestep_is_the_noisiest_level(made):
    from concepts.host.denoise import Denoiser
    from concepts.host.features import sigma_at

    d = Denoiser(made.model)
    last, most = (1000, 1.0) if d.space == "flow" else (999, float(d.sampling.sigma_max))
    assert float(sigma_at(d, last)) == pytest.approx(most, rel=1e-6)


def test_maps_of_all_layers_lie_over_each_other():
    """A latent of 9 x 9 has cells of twice the size at 5 x 5, the last of which lie half outside."""
    from concepts.host.attention import Layer
    from concepts.host.features import mean_map

    ramp = torch.arange(5.0).add(0.5).mul(2).expand(5, 5).reshape(1, 25, 1)  # where its centres are, in smaller cells
    found = mean_map({Layer("a", 0, 1, 9, 9): torch.zeros(1, 81, 1), Layer("b", 0, 2, 5, 5): ramp})[0, 0, 4]
    torch.testing.assert_close(2 * found[1:8], torch.arange(1.0, 8).add(0.5))


@pytest.mark.parametrize("node", ["HyperTile", "ToMe"])
def test_layers_that_another_node_makes_smaller_are_refused(node):
    """Tiles of 32 x 32 and a quarter of the tokens are as many cells as a layer of half the side has."""
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_tomesd import TomePatchModel

    made = tiny("sd15")
    with torch.inference_mode():
        made.model = (
            HyperTile.execute(made.model, 256, 1, 0, False)[0]
            if node == "HyperTile"
            else TomePatchModel.execute(made.model, 0.75)[0]
        )
        made.latent = torch.randn(4, 64, 64)
    with pytest.raises(CarrierMismatch, match="another node changes its size"):
        extract(made, wanted(made, "query", "key"))
    assert hooks(made) == 0

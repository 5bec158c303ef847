"""The learning loop on the toy world: exact continuation, interrupts, errors, and a host left as it was."""

import random
from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.foreign import read_any
from concepts.kernels.fit import Diverged

from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")


def settings(**changes):
    from concepts.host.learn_tokens import TokenSettings

    return replace(TokenSettings("mug", steps=4, vectors=2, init_text="mug", batch=2), **changes)


def learn(toy, data, earlier=None, checkpointing="off", save_every=2, **changes):
    """One run as a node does it, in inference mode."""
    from concepts.host import learn as learning
    from concepts.host.learn_tokens import TokenSession

    with torch.inference_mode():
        return learning.learn(
            TokenSession(toy[0], toy[1], data, settings(**changes), earlier),
            preview_every=2,
            save_every=save_every,
            checkpointing=checkpointing,
        )


def weights(toy) -> dict[str, torch.Tensor]:
    """Every weight and buffer of model and text encoder, copied."""
    parts = {"model": toy[0].model, "clip": toy[1].cond_stage_model}
    return {
        f"{n}.{k}": v.detach().clone()
        for n, part in parts.items()
        for k, v in [*part.named_parameters(), *part.named_buffers()]
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def sampled(toy) -> torch.Tensor:
    """What the stock sampler draws for a fixed prompt and seed."""
    import comfy.sample

    with torch.inference_mode():
        cond = toy[1].encode_from_tokens_scheduled(toy[1].tokenize("a red mug on sand"))
        noise = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(7))
        return comfy.sample.sample(
            toy[0], noise, 4, 2.0, "euler", "normal", cond, cond, torch.zeros_like(noise), seed=0, disable_pbar=True
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"geometry": "free"},
        {"geometry": "fixed norm"},
        {"accumulate": 2},
        {"geometry": "fixed norm", "accumulate": 2},
        {"layers": "each"},
        {"stages": 3},
        {"layers": "each", "stages": 2},
    ],
    ids=str,
)
def test_continued_equals_one_run(toy, mug_set, changes, tmp_path):
    from concepts.carriers.files import write_concept

    whole = learn(toy, mug_set, steps=5, **changes)
    first = learn(toy, mug_set, steps=3, **changes)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(toy, mug_set, earlier=read_any(tmp_path / "first.safetensors"), steps=2, **changes)
    assert same(whole.concept.tensors, rest.concept.tensors)
    assert same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses and len(whole.losses) == 5
    assert whole.concept.info["steps"] == rest.concept.info["steps"] == 5


@pytest.mark.slow
def test_the_seed_decides_everything(toy, mug_set):
    a, b, c = (learn(toy, mug_set, seed=s).concept for s in (3, 3, 4))
    assert same(a.tensors, b.tensors) and not same(a.tensors, c.tensors)


@pytest.mark.slow
def test_checkpointing_changes_nothing(toy, mug_set):
    plain, recomputed = learn(toy, mug_set), learn(toy, mug_set, checkpointing="on")
    for key, value in plain.concept.tensors.items():
        torch.testing.assert_close(value, recomputed.concept.tensors[key], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_interrupts_keep_the_concept_and_the_host(toy, mug_set, monkeypatch):
    """At ten random steps: the file holds the steps done, the model is what it was, the next run equals a fresh one."""
    import comfy.model_management as management

    from concepts.host import learn as learning

    before, picture, fresh = weights(toy), sampled(toy), learn(toy, mug_set, steps=12)
    flags = [p.requires_grad for p in toy[0].model.parameters()]
    show = learning.Progress.show
    for stop in sorted(random.Random(5).sample(range(1, 12), 10)):

        def pressed(self, done, *pictures, stop=stop):
            if done == stop:
                management.interrupt_current_processing()  # what the Cancel button does
            show(self, done, *pictures)

        there = set(fresh.saved.parent.iterdir())
        monkeypatch.setattr(learning.Progress, "show", pressed)
        with pytest.raises(management.InterruptProcessingException):
            learn(toy, mug_set, steps=12)
        monkeypatch.setattr(learning.Progress, "show", show)
        (file,) = set(fresh.saved.parent.iterdir()) - there
        kept = read_any(file)
        assert kept.info["steps"] == stop
        assert kept.state["losses"].tolist() == fresh.losses[:stop]
        assert same(weights(toy), before) and torch.equal(sampled(toy), picture)
        assert [p.requires_grad for p in toy[0].model.parameters()] == flags
        assert not management.in_training
    rest = learn(toy, mug_set, earlier=kept, steps=12 - stop)
    again = learn(toy, mug_set, steps=12)
    assert same(again.concept.tensors, fresh.concept.tensors) and same(rest.concept.tensors, fresh.concept.tensors)


@pytest.mark.slow
def test_a_live_preview_shows_where_the_model_looks(toy, mug_set, monkeypatch):
    """Beside the estimate: the first picture under the concept's map; the node says step and loss."""
    from concepts.host import learn as learning

    shown, said = [], []
    show = learning.Progress.show
    monkeypatch.setattr(learning.Progress, "show", lambda self, *given: (shown.append(given), show(self, *given)))
    monkeypatch.setattr(learning, "say", said.append)
    done = learn(toy, mug_set, steps=4)
    pictures = [given[2] for given in shown if len(given) > 1]
    assert len(pictures) == 2 and all(
        p.ndim == 3 and p.shape[-1] == 3 and bool(torch.isfinite(p).all()) for p in pictures
    )
    assert not torch.equal(*pictures) and len(said) == 4
    assert said[-1] == f"step 4 of 4; loss {done.losses[-1]:.4f}"


@pytest.mark.slow
def test_learning_lowers_the_loss(toy, mug_set):
    done = learn(toy, mug_set, steps=60, batch=4, learning_rate=0.02)
    assert done.after < done.before
    assert done.concept.info["loss_before"] == done.before
    assert done.previews.shape[0] > 2 and torch.isfinite(done.previews).all()


def test_an_interrupt_behind_the_last_step_keeps_the_run(toy, mug_set, monkeypatch):
    import comfy.model_management as management

    from concepts.host import folders
    from concepts.host.session import Session

    there, fixed, calls = set(folders.output("autosave").glob("*")), Session.fixed_loss, []

    def pressed(self):
        calls.append(self)
        if len(calls) == 2:
            raise management.InterruptProcessingException()
        return fixed(self)

    monkeypatch.setattr(Session, "fixed_loss", pressed)
    with pytest.raises(management.InterruptProcessingException):
        learn(toy, mug_set, steps=1)
    (file,) = set(folders.output("autosave").glob("*")) - there
    assert read_any(file).info["steps"] == 1


def broken_at(monkeypatch, *numbers):
    """Steps (from 1) whose loss is not a number, as the same parameters and draws give it every time."""
    from concepts.host.session import Session

    step_loss = Session.step_loss

    def broken(self, parameters, step, micro):
        return step_loss(self, parameters, step, micro) * (float("nan") if step + 1 in numbers else 1)

    monkeypatch.setattr(Session, "step_loss", broken)


def left_by(run) -> tuple[str, list]:
    """What a run says that breaks, and the files it leaves."""
    from concepts.host import folders

    there = set(folders.output("autosave").glob("*"))
    with pytest.raises(Diverged) as error:
        run()
    return str(error.value), sorted(set(folders.output("autosave").glob("*")) - there)


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_diverging_run_keeps_a_state_that_gave_a_finite_loss(toy, mug_set, monkeypatch, save_every):
    """That of step 2: on what step 3 left the loss of step 4 broke, and would again."""
    whole = learn(toy, mug_set, steps=2)
    broken_at(monkeypatch, 4)
    said, (file,) = left_by(lambda: learn(toy, mug_set, steps=9, save_every=save_every))
    assert f"at step 4 (loss nan). Step 2 is the last one known to be good. It is in {file.name} " in said
    assert said.endswith("Continue from it with a lower learning rate.")
    kept = read_any(file)
    assert kept.info["steps"] == 2 and same(kept.tensors, whole.concept.tensors)
    assert same(kept.state, whole.concept.state)
    monkeypatch.undo()
    assert learn(toy, mug_set, earlier=kept, steps=1, learning_rate=1e-5).concept.info["steps"] == 3


def test_a_large_module_is_copied_now_and_then(toy, mug_set, monkeypatch):
    from concepts.host import learn as learning

    monkeypatch.setattr(learning, "COPIED", 12 * 128 // 2)  # two vectors and their moments: every third step
    broken_at(monkeypatch, 6)
    said, (file,) = left_by(lambda: learn(toy, mug_set, steps=9, save_every=0))
    assert "Step 3 is the last" in said and read_any(file).info["steps"] == 3


@pytest.mark.parametrize("number, advice", [(1, "check the pictures and the model"), (2, "Start again with a lower")])
def test_a_run_without_a_good_state_leaves_no_file(toy, mug_set, monkeypatch, number, advice):
    broken_at(monkeypatch, number)
    said, files = left_by(lambda: learn(toy, mug_set, steps=4, save_every=1))
    assert advice in said and not files


@pytest.mark.parametrize("number, advice", [(3, "continue from an earlier state"), (4, "Continue from <mug> again")])
def test_a_continued_run_that_breaks_at_once_says_what_to_do(toy, mug_set, monkeypatch, number, advice):
    earlier = learn(toy, mug_set, steps=2).concept
    broken_at(monkeypatch, number)
    said, files = left_by(lambda: learn(toy, mug_set, earlier=earlier, steps=4, save_every=1))
    assert advice in said and "with a lower learning rate" in said and not files


@pytest.mark.parametrize("steps, number", [(3, 2), (1, 0)])
def test_a_last_step_that_breaks_the_model_keeps_the_one_before(toy, mug_set, monkeypatch, steps, number):
    from concepts.host.session import Session

    fixed, calls = Session.fixed_loss, []
    monkeypatch.setattr(
        Session, "fixed_loss", lambda self: calls.append(1) or (fixed(self) if len(calls) < 2 else 1e400)
    )
    said, files = left_by(lambda: learn(toy, mug_set, steps=steps))
    assert f"The loss on fixed noise is not finite after step {steps}" in said and "lower learning rate" in said
    assert [read_any(f).info["steps"] for f in files] == [number] * bool(number)


def test_a_model_that_gives_no_finite_loss_is_named_before_learning(toy, mug_set, monkeypatch):
    from concepts.host.session import Session

    monkeypatch.setattr(Session, "fixed_loss", lambda self: float("nan"))
    said, files = left_by(lambda: learn(toy, mug_set))
    assert "not finite before learning" in said and "--force-fp32" in said and not files


def test_a_full_disk_does_not_end_the_learning(toy, mug_set, monkeypatch, tmp_path):
    from concepts.host import learn as learning
    from concepts.host.report import learned_text

    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(learning.folders, "output", lambda *inner: tmp_path / "file")
    done = learn(toy, mug_set)
    assert len(done.losses) == 4 and done.trouble and done.saved is None
    assert "NOT SAVED" in learned_text(done)


def test_an_autosave_has_a_name_that_the_host_reads_it_by(tmp_path, monkeypatch):
    """A file of that name in a folder of the user's comes before those in output."""
    import folder_paths

    from concepts.carriers.concept import Concept
    from concepts.carriers.files import write_concept
    from concepts.host import folders
    from concepts.host.learn import Kept

    mine, output = tmp_path / "mine", tmp_path / "concepts"
    known = ([str(mine), str(output)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.KIND, known)
    what = Concept("mug", "tokens", {"clip_l": torch.ones(1, 1, 1, 1, 64)})
    (mine / "autosave").mkdir(parents=True)
    write_concept(what, mine / "autosave" / "mug.safetensors")
    kept = Kept(output / "autosave", "mug", write_concept)
    assert not kept.put(what) and folders.find(f"concepts/autosave/{kept.file.name}") == kept.file


def test_a_file_that_cannot_be_written_leaves_no_empty_one(tmp_path):
    from concepts.carriers.errors import CarrierFileError
    from concepts.host.learn import Kept

    def full(what, path):
        raise CarrierFileError("No space left on device")

    kept = Kept(tmp_path, "mug", full)
    assert "No space" in kept.put(None) and kept.file is None and not list(tmp_path.iterdir())
    kept.write = lambda what, path: path.write_text(what)
    assert not kept.put("first") and not kept.put("second") and kept.file.read_text() == "second"
    kept.write = full
    assert kept.put("third") and kept.file.read_text() == "second"
    other = Kept(tmp_path, "mug", lambda what, path: path.write_text(what))
    assert not other.put("other") and other.file != kept.file and kept.file.read_text() == "second"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoders": ("clip_g",)}, "clip_l"),
        ({"time_low": 0.6, "time_high": 0.4}, "timestep range"),
        ({"name": "a mug"}, "letters, digits"),
        ({"init_text": ""}, "class word"),
    ],
)
def test_wrong_settings_say_what_to_do(toy, mug_set, changes, message):
    with pytest.raises(ValueError, match=message):
        learn(toy, mug_set, **changes)


def test_continuing_leaves_the_earlier_concept_as_it_was(toy, mug_set):
    """The host keeps it, and may continue from it again."""
    earlier = learn(toy, mug_set, steps=1).concept
    parts = {**earlier.tensors, **earlier.state}
    before = {k: v.clone() for k, v in parts.items()}
    learn(toy, mug_set, earlier=earlier, steps=1)
    assert "step" in parts and same(parts, before)


def test_continuing_another_shape_is_refused(toy, mug_set):
    earlier = learn(toy, mug_set).concept
    with pytest.raises(CarrierMismatch, match="widgets, such as vectors"):
        learn(toy, mug_set, earlier=earlier, vectors=3)
    with pytest.raises(ValueError, match="geometry"):
        learn(toy, mug_set, earlier=earlier, geometry="fixed norm")


@pytest.mark.slow
def test_what_is_learned_is_what_the_prompt_uses(toy, mug_set):
    """Rows per layer and stage: the loss of learning equals the one through the stock path of Concept Prompt."""
    from concepts.host.denoise import Denoiser
    from concepts.host.prompt import encode_prompt

    done = learn(toy, mug_set, steps=6, layers="each", stages=2, learning_rate=0.05, vectors=1)
    assert done.concept.tensors["clip_l"].shape[:3] == (2, 6, 1)
    assert len(done.concept.tensors["clip_l"].reshape(12, -1).unique(dim=0)) == 12, "every row was learned"
    with torch.inference_mode():
        (cond,) = encode_prompt(toy[1], mug_set.captions[0][0].replace("{}", "<mug>"), [(done.concept, 1.0)])
    from concepts.host.gradients import training
    from concepts.host.learn_tokens import TokenSession

    with training(toy[0], toy[1].patcher):
        session = TokenSession(toy[0], toy[1], mug_set, settings(layers="each", stages=2, vectors=1), done.concept)
        session.begin()
        d = Denoiser(toy[0])
        (hook,) = cond[1]["hooks"].hooks
        for level in (0.5, 20.0):
            sigma, x = torch.tensor([level]), torch.randn(session.clean[0].shape)
            with torch.no_grad():
                learned = d(x, sigma, *session.condition(session.parameters, [0], [0], sigma))
                plain = [ordinary_entry(cond)]
                used = d(x, sigma, plain, lambda options: {**options, "wrappers": hook.transformers_dict["wrappers"]})
            torch.testing.assert_close(used, learned, rtol=1e-4, atol=1e-5)


def ordinary_entry(entry):
    """A conditioning entry without its hooks, as tensors that autograd accepts."""
    return [entry[0].clone(), {"pooled_output": entry[1]["pooled_output"].clone()}]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_layers_are_refused_without_cross_attention(mug_set, family):
    from concepts.host.learn_tokens import TokenSession

    made = tiny(family)
    with pytest.raises(CarrierMismatch, match="layers to shared"):
        TokenSession(made.model, made.clip, mug_set, settings(layers="each"))


@pytest.mark.slow
def test_fixed_norm_keeps_the_norm(toy, mug_set):
    done = learn(toy, mug_set, steps=6, geometry="fixed norm", learning_rate=0.05)
    start = learn(toy, mug_set, steps=1, geometry="fixed norm", learning_rate=1e-7)
    for key, value in done.concept.tensors.items():
        torch.testing.assert_close(value.norm(dim=-1), start.concept.tensors[key].norm(dim=-1), rtol=1e-5, atol=0)
        assert not torch.allclose(value, start.concept.tensors[key], atol=1e-3)


@pytest.mark.slow
def test_masked_loss_counts_the_masked_area_only(toy, mug_set):
    whole, masked = learn(toy, mug_set), learn(toy, mug_set, masked_loss=True)
    assert whole.before != masked.before
    full = replace(mug_set, masks=tuple(torch.ones_like(m) for m in mug_set.masks))
    everywhere = learn(toy, full, masked_loss=True)
    assert everywhere.before == pytest.approx(whole.before, rel=1e-6)
    some = replace(full, masks=(full.masks[0], *(None,) * 4))
    assert learn(toy, some, masked_loss=True).losses == everywhere.losses, "all of a picture without a mask counts"


def growth(cycle, warm: int, end: int) -> float:
    """Resident memory after ``end`` cycles over that after ``warm``."""
    import gc

    import psutil

    found = []
    for seed in range(end):
        cycle(seed)
        if seed + 1 in (warm, end):
            gc.collect()
            found.append(psutil.Process().memory_info().rss)
    return found[1] / found[0]


@pytest.mark.slow
def test_memory_stays_flat_over_200_cycles(toy, mug_set):
    """Learn, use, drop: resident memory after 200 cycles within 3% of that after 20."""
    from concepts.host.prompt import encode_prompt

    def cycle(seed):
        done = learn(toy, mug_set, steps=2, batch=1, seed=seed, name=f"mug{seed}", vectors=1)
        with torch.inference_mode():
            encode_prompt(toy[1], f"a photo of <mug{seed}> on grass", [(done.concept, 1.0)])
            sampled(toy)

    assert growth(cycle, 20, 200) <= 1.03


def test_running_out_of_memory_before_the_first_step_says_what_to_lower(toy, mug_set, monkeypatch):
    import comfy.model_management as management

    from concepts.host import gradients

    def full(*args, **kwargs):
        raise management.OOM_EXCEPTION("CUDA out of memory")

    monkeypatch.setattr(gradients, "make_room", full)
    with pytest.raises(management.OOM_EXCEPTION, match="lower the batch.*smaller.*checkpointing"):
        learn(toy, mug_set, steps=4)


@pytest.mark.slow
def test_running_out_of_memory_says_what_to_lower_and_keeps_the_concept(toy, mug_set, monkeypatch):
    import comfy.model_management as management

    from concepts.host import learn as learning

    fresh, step_loss = learn(toy, mug_set, steps=4), learning.Session.step_loss

    def full(self, parameters, step, micro):
        if step == 3:
            raise management.OOM_EXCEPTION("CUDA out of memory")
        return step_loss(self, parameters, step, micro)

    there = set(fresh.saved.parent.iterdir())
    monkeypatch.setattr(learning.Session, "step_loss", full)
    with pytest.raises(management.OOM_EXCEPTION, match="lower the batch.*smaller.*checkpointing"):
        learn(toy, mug_set, steps=4)
    monkeypatch.undo()
    (file,) = set(fresh.saved.parent.iterdir()) - there
    kept = read_any(file)
    assert kept.info["steps"] == 3 and kept.state["losses"].tolist() == fresh.losses[:3]
    assert same(learn(toy, mug_set, earlier=kept, steps=1).concept.tensors, fresh.concept.tensors)


def test_room_counts_what_is_still_to_be_loaded(toy, monkeypatch):
    """Checkpointing is chosen by what is free once model and text encoders are there."""
    import comfy.model_management as management

    from concepts.host.features import ROWS, _rows_per_pass
    from concepts.host.loading import RECOMPUTED, planned, room

    model, clip = toy[0], toy[1].patcher
    for patcher, loaded in ((model, 10), (clip, 0)):
        monkeypatch.setattr(patcher, "loaded_size", lambda loaded=loaded: loaded)
    missing = model.model_size() - 10 + clip.model_size()
    monkeypatch.setattr(management, "get_free_memory", lambda device: missing + 1000)
    assert room(model, clip) == 1000
    assert planned("on", 900, model, clip) == (True, 900 * RECOMPUTED) and planned("off", 900, model) == (False, 900)
    assert planned("auto", 900, model, clip) == (False, 900), "a CPU swaps"
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    assert planned("auto", 900, model, clip) == (True, 900 * RECOMPUTED)
    assert planned("auto", 700, model, clip) == (False, 700)
    for rows in (ROWS, 3):
        free = model.model_size() - 10 + 1.26 * model.memory_required([rows, 4, 16, 16])
        monkeypatch.setattr(management, "get_free_memory", lambda device, free=free: free)
        assert _rows_per_pass(model, (1, 4, 16, 16)) == rows


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_model_in_fp16_learns_as_one_in_fp32(family, mug_set):
    """A loss as small as of pictures of full size: unscaled its gradients vanish in fp16."""
    from concepts.host import learn as learning
    from concepts.host.gradients import training
    from concepts.host.learn_tokens import TokenSession
    from concepts.kernels.fit import Adam, fit

    def gradient(dtype, scale=None):
        made, found = tiny(family, dtype=dtype), {}
        with torch.inference_mode():
            data = replace(
                mug_set, latents=(made.latent,), masks=(None,), captions=(("a {} on sand",),), mirrored=(False,)
            )
            session = TokenSession(made.model, made.clip, data, settings(batch=1))

        class Noted(Adam):
            def update(self, parameters, state):
                found.update({k: p.grad.clone() for k, p in parameters.items()})

        with torch.inference_mode(), training(made.model, made.clip.patcher):
            session.begin()

            def small(*given):
                return session.step_loss(*given) * 1e-4

            scale = learning.loss_scale(made.model) if scale is None else scale
            next(fit(session.parameters, small, Noted(), 1, scale=scale))
        return torch.cat([g.flatten() for g in found.values()])

    def alike(a, b):
        return float(torch.cosine_similarity(a, b, dim=0))

    expected = gradient(torch.float32)
    assert alike(gradient(torch.float16), expected) > 0.99
    assert alike(gradient(torch.float16, scale=1.0), expected) < 0.9

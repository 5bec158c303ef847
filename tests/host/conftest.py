"""The toy world in this process, loaded the way a node loads it."""

import pytest
import torch

from .tiny import CORPUS, FAMILIES, clip


@pytest.fixture(scope="session")
def toy(host, tmp_path_factory):
    """(MODEL, CLIP, VAE) as inference tensors; outputs and embeddings go to a folder of the run."""
    import folder_paths

    from concepts.host import folders, toybox

    base = tmp_path_factory.mktemp("toy")
    folder_paths.set_output_directory(str(base / "output"))
    (base / "embeddings").mkdir()
    folder_paths.folder_names_and_paths["embeddings"] = ([str(base / "embeddings")], {".safetensors", ".pt", ".bin"})
    folders.register()
    with torch.inference_mode():
        return toybox.load()


@pytest.fixture(autouse=True)
def moved_whole(request, monkeypatch):
    """On a GPU, weights made in inference mode and moved outside of it can be used no more; here nothing moves."""
    if "host" not in request.fixturenames:
        return
    import comfy.model_management as management

    load = management.load_models_gpu

    def loaded(models, *args, **kwargs):
        lost = [p for m in models for p in m.model.parameters() if p.is_inference()]
        assert torch.is_inference_mode_enabled() or not lost, "weights made in inference mode are moved outside of it"
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", loaded)


@pytest.fixture(autouse=True)
def brief(request, monkeypatch):
    """One look before and after instead of eight, and previews of one step: they are most of a short learning."""
    if "host" not in request.fixturenames:
        return
    from concepts.host.session import Session

    fixed, preview = Session.fixed_loss, Session.preview
    monkeypatch.setattr(Session, "fixed_loss", lambda self, count=1: fixed(self, count))
    monkeypatch.setattr(Session, "preview", lambda self: preview(self, 1))


@pytest.fixture(scope="session")
def mug_set(toy):
    """Five pictures of a mug that no caption named, with masks and captions."""
    from concepts.demo import world
    from concepts.host.concept_set import make_set
    from concepts.host.pictures import batch

    scenes = world.references("cross-mug", 5, 0)
    drawn = [world.render(s) for s in scenes]
    with torch.inference_mode():
        return make_set(
            toy[2],
            [batch([p for p, _ in drawn])],
            [batch([m for _, m in drawn])],
            [world.reference_caption(s, "{}") for s in scenes],
        )


@pytest.fixture(scope="session")
def words(toy):
    """A Dictionary of the toy world's words, learned for so long that latents mean something."""
    from concepts.host import meanings
    from concepts.host.learn_dictionary import DictionarySettings, learn_dictionary

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(meanings, "NAMED_BY", 150)
        patch.setattr(meanings, "MEASURED_BY", 40)
        settings = DictionarySettings("words", k=4, expansion=4, steps=120, batch=512, reuse=8)
        return learn_dictionary(toy[1], CORPUS, settings).dictionary


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, host):
    with torch.inference_mode():
        return clip(request.param)

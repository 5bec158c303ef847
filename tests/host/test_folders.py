"""Folders of concepts and dictionaries beside those that the user named, and what belongs where."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from concepts.carriers.files import write_concept
from concepts.carriers.foreign import read_any

from .test_learn_lora import learn, rows

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("kind", ["concepts", "dictionaries"])
def test_folders_of_extra_model_paths_stay_and_come_first(kind, tmp_path, monkeypatch):
    """The host reads that file before it loads packs."""
    import folder_paths

    from concepts.host import folders

    for other in ("concepts", "dictionaries"):
        monkeypatch.delitem(folder_paths.folder_names_and_paths, other, raising=False)
    folder_paths.add_model_folder_path(kind, str(tmp_path))
    save_file({"a": torch.zeros(1)}, tmp_path / "mine.safetensors")
    folders.register()
    once = folder_paths.get_folder_paths(kind)
    folders.register()
    assert once[0] == str(tmp_path) and len(once) == 4 and folder_paths.get_folder_paths(kind) == once
    if kind == "concepts":
        assert "concepts/mine.safetensors" in folders.saved()
        assert folders.find("concepts/mine.safetensors") == tmp_path / "mine.safetensors"
    else:
        assert "mine.safetensors" in folders.saved_dictionaries()
        assert folders.find_dictionary("mine.safetensors") == tmp_path / "mine.safetensors"


def test_places_for_files(toy, mug_set):
    from concepts.host import folders

    done = learn(toy, mug_set).concept
    assert folders.home("concepts", done) == folders.output()
    assert folders.home("loras", done).name == "loras"
    with pytest.raises(ValueError, match="no embedding"):
        folders.home("embeddings", done)
    for kept in (
        rows(shape=(2, 1, 2)),
        replace(done, tensors=done.tensors | {"bundle_emb.mug.clip_l": torch.ones(2, 1, 1, 1, 64)}),
    ):
        with pytest.raises(ValueError, match="which only Concept Prompt can use"):
            folders.home("embeddings", kept)
    assert folders.home("embeddings", rows()).name == "embeddings"
    with pytest.raises(ValueError, match="is made of tokens, which is no LoRA; choose concepts or embeddings"):
        folders.home("loras", rows())
    with pytest.raises(ValueError, match="choose concepts[.]"):
        folders.home("loras", rows(shape=(2, 1, 2)))


def test_a_name_that_the_host_would_read_elsewhere_is_taken(host, tmp_path, monkeypatch):
    """It looks into models before output, and into the pack's examples last."""
    import folder_paths

    from concepts.carriers.files import write_new
    from concepts.host import folders

    places = [tmp_path / "models", tmp_path / "output", tmp_path / "examples"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, folders.KIND, ([str(p) for p in places], {".safetensors"}))
    write_concept(rows(), places[0] / "mug.safetensors")
    write_concept(rows(), places[2] / "cup.safetensors")
    for name, expected in (("mug", "mug_2"), ("cup", "cup_2"), ("hat", "hat"), ("hat", "hat_2")):
        path = write_new(rows(), places[1], name, taken=folders.shadowed)
        assert path == places[1] / f"{expected}.safetensors" and read_any(path).name == "mug"
    assert not folders.shadowed(tmp_path / "elsewhere" / "mug.safetensors")
    monkeypatch.delitem(folder_paths.folder_names_and_paths, folders.KIND)
    assert not folders.shadowed(places[1] / "mug.safetensors"), "as in benchmarks, which no host has started"

"""Save Concept and Load Concept: what is in the file, and under which name."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept


@pytest.fixture
def places(host, tmp_path, monkeypatch):
    """The host's folders of concepts, empty."""
    import folder_paths

    from concepts.host import folders

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    known = {
        "concepts": ([str(tmp_path / "concepts")], {".safetensors"}),
        "embeddings": ([str(tmp_path / "embeddings")], {".safetensors"}),
        "loras": ([str(tmp_path / "loras")], {".safetensors"}),
    }
    for kind, found in known.items():
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, found)
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folders.output().mkdir(exist_ok=True)
    return tmp_path


def learned(kind="tokens") -> Concept:
    state = {"step": torch.tensor(3.0), "losses": torch.ones(3, dtype=torch.float64)}
    if kind == "tokens":
        return Concept("mug", kind, {"clip_l": torch.ones(1, 1, 1, 1, 8)}, {"init_text": "cup"}, state)
    name = "lora_unet_a"
    parts = {"lora_down.weight": torch.ones(2, 4), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(2.0)}
    return Concept("mug", kind, {f"{name}.{k}": v for k, v in parts.items()}, {}, state)


def saved(concept, filename="", folder="concepts", state=True):
    from concepts.carriers.foreign import read_any
    from concepts.host import folders
    from concepts.nodes.files import LoadCarrier, SaveCarrier

    (shown,) = SaveCarrier.execute(concept, filename, folder, state, False).result
    path = folders.find(shown)
    assert shown == f"{folder}/{path.name}" and LoadCarrier.validate_inputs(shown) is True
    return path, read_any(path)


@pytest.mark.parametrize("state", [True, False])
def test_training_state_is_kept_when_it_is_asked_for(places, state):
    path, found = saved(learned(), state=state)
    assert path.name == "mug.safetensors" and set(found.state) == ({"step", "losses"} if state else set())
    assert torch.equal(found.tensors["clip_l"], learned().tensors["clip_l"])


def test_a_lora_for_the_stock_loader_has_no_training_state(places):
    assert not saved(learned("delta"), folder="loras")[1].state
    assert saved(learned("delta"))[1].state


def test_a_name_with_blanks_can_be_written_in_prompts(places):
    """The stock embedding:name ends at a blank."""
    assert saved(learned(), " my mug ", "embeddings")[0].name == "my_mug.safetensors"
    assert saved(learned(), " my mug ")[0].name == "my mug.safetensors"


def test_a_saved_file_is_never_replaced_and_another_name_can_be_given(places):
    from concepts.nodes.files import LoadCarrier

    first, again = saved(learned())[0], saved(replace(learned(), info={}))[0]
    assert (first.name, again.name) == ("mug.safetensors", "mug_2.safetensors")
    (plain,), (named,) = (LoadCarrier.execute("concepts/mug.safetensors", name).result for name in (" ", " cup "))
    assert (plain.name, named.name) == ("mug", "cup") and plain.info["init_text"] == "cup"

"""Folders of concepts and dictionaries beside those that the user named."""

import pytest
import torch
from safetensors.torch import save_file

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

"""A pack's link in a base folder leads to this pack, whatever was there before."""

import pytest

from concepts.demo.server import lead


def test_links_follow_a_pack_that_moved(tmp_path):
    old, new, link = (tmp_path / name for name in ("old", "new", "link"))
    old.mkdir()
    lead(link, old)
    assert link.samefile(old)
    old.rename(new)
    for target in (new, new, tmp_path):
        lead(link, target)
        assert link.samefile(target)
    assert new.is_dir()


def test_a_folder_in_the_place_is_kept(tmp_path):
    (tmp_path / "own" / "work").mkdir(parents=True)
    with pytest.raises(OSError):
        lead(tmp_path / "own", tmp_path)
    assert (tmp_path / "own" / "work").is_dir()

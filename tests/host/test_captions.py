"""Captions with marked words, for one picture and for several."""

import pytest

from .test_learn_modulation import pictures

pytestmark = pytest.mark.usefixtures("host")


def test_captions_of_several_pictures():
    from concepts.host.captions import marked_captions

    text = "a [hat]\nthe [hat]\n\na [coat]\n"
    assert marked_captions(text, pictures(2)) == (("a [hat]", "the [hat]"), ("a [coat]",))
    mirrored = pictures(4, mirrored=(False, True, False, True))
    assert marked_captions(text, mirrored) == (("a [hat]", "the [hat]"),) * 2 + (("a [coat]",),) * 2
    assert marked_captions("a [hat]", pictures(3)) == (("a [hat]",),) * 3


@pytest.mark.parametrize(
    "text, count, message",
    [
        (" \n", 1, "no caption"),
        ("a hat", 1, "marks no word"),
        ("a [hat]\na [coat]", 1, "do not mark the same words \\(coat, hat\\)"),
        ("a [hat]\n\na [coat]", 3, "3 pictures and 2 blocks"),
    ],
)
def test_captions_that_cannot_be_learned_are_refused(text, count, message):
    from concepts.host.captions import marked_captions

    with pytest.raises(ValueError, match=message):
        marked_captions(text, pictures(count))

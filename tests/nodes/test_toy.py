"""Load Toy World and Load Toy References as other nodes meet them."""

import pytest
import torch

from concepts.demo import world

pytestmark = pytest.mark.usefixtures("host")


def references(subject: str, count: int, seed: int) -> tuple:
    """Pictures, masks and captions of the node."""
    from concepts.nodes.toy import LoadToyReferences

    return LoadToyReferences.execute(subject, count, seed).result


def test_two_things_come_with_a_mask_of_both():
    pictures, masks, _ = references("two things", 3, 5)
    assert pictures.shape == (3, 128, 128, 3) and masks.shape == (3, 128, 128)
    for number, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        drawn, *parts = (world.pixels(part) for part in world.render(*world.two_things(5 + number)))
        assert torch.equal((picture * 255).round().byte(), torch.from_numpy(drawn.copy()))
        for part in parts:
            assert (mask[torch.from_numpy(part.copy()) == 255] == 1).all()
        assert not mask[torch.from_numpy(parts[0] | parts[1]) == 0].any()


@pytest.mark.parametrize("count", [1, 3])
def test_captions_of_two_things_are_what_learn_modulation_takes(count):
    from concepts.host.captions import marked_captions
    from concepts.host.concept_set import make_set
    from concepts.host.toybox import load

    pictures, masks, text = references("two things", count, 5)
    with torch.inference_mode():
        data = make_set(load()[2], [pictures], [masks], [])
    found = marked_captions(text, data)
    assert [set(lines) for lines in found] == [
        set(world.marked_captions(world.two_things(5 + i)).splitlines()) for i in range(count)
    ]


def test_the_same_seed_gives_the_same_pictures_of_a_novel_concept():
    pictures, masks, text = references("crown", 2, 1)
    scenes = world.references("crown", 2, 1)
    assert text.splitlines() == [world.reference_caption(s, "{}") for s in scenes]
    for picture, mask, scene in zip(pictures, masks, scenes, strict=True):
        drawn, inside = (torch.from_numpy(world.pixels(part).copy()) for part in world.render(scene))
        assert torch.equal((picture * 255).round().byte(), drawn) and torch.equal((mask * 255).round().byte(), inside)


def test_the_type_chooses_the_model(monkeypatch):
    from concepts.host import toybox, toydit
    from concepts.nodes.toy import LoadToyWorld

    for number, module in enumerate((toybox, toydit)):
        monkeypatch.setattr(module, "load", lambda number=number: (number,) * 3)
    assert [LoadToyWorld.execute(*type_).result[0] for type_ in ((), ("SD1",), ("Flux",))] == [0, 0, 1]

"""Dictionaries in memory and in their own file: what is refused, exact round trips, a file of an older day."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from concepts.carriers.codes import Codes, contrast, prune
from concepts.carriers.dictionary import Dictionary, write_dictionary
from concepts.carriers.errors import CarrierError, CarrierFileError
from concepts.carriers.files import OWN, digest, parse, write_concept
from concepts.carriers.foreign import read_any
from concepts.carriers.foreign_dictionary import read_dictionary

from .test_files import golden as concept
from .test_files import mutations

GOLDEN = Path(__file__).resolve().parent / "golden_dictionary_v1.safetensors"
M, D, K = 6, 4, 2


def numbers(*shape, start=0.0):
    """Exact in fp32 and the same everywhere."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float32) * 37 + start) % 64 / 32 - 1).view(*shape)


def parts(**more):
    made = {"encoder": numbers(M, D), "encoder_bias": numbers(M), "decoder": numbers(M, D, start=5)}
    made |= {"decoder_bias": numbers(D, start=3), "mean": numbers(D, start=7), "scale": torch.full((D,), 2.0)}
    return made | more


def made(k=K, **more) -> Dictionary:
    info = {"encoder": "clip_l", "norm": "none", "words": [[["mug", 2.5], ["cup", 1.25]]] + [[]] * (M - 1)}
    return Dictionary("words", parts(**more), k, info, {"step": torch.tensor(7), "first.encoder": numbers(M, D)})


def same(a: Dictionary, b: Dictionary) -> bool:
    tensors = all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)
        for x, y in ((a.tensors, b.tensors), (a.state, b.state))
    )
    return tensors and (a.name, a.k, a.info) == (b.name, b.k, b.info)


@pytest.mark.parametrize("more", [{}, {"threshold": numbers(M).abs(), "usage": numbers(M).abs()}])
def test_round_trip(more, tmp_path):
    one = made(0 if more else K, **more)
    write_dictionary(one, tmp_path / "a.safetensors")
    assert same(read_dictionary(tmp_path / "a.safetensors"), one)


def test_k_can_be_given_instead_of_the_files(tmp_path):
    """And then nothing is said that was measured at another."""
    measured = {"fvu": 0.1, "l0": 2.0, "measured_tokens": 9, "silent": 0.5, "silent_tokens": 20}
    one = replace(made(), info=made().info | measured)
    path = tmp_path / "a.safetensors"
    write_dictionary(one, path)
    assert same(read_dictionary(path, K), one) and same(read_dictionary(path, 1), replace(made(), k=1))
    with pytest.raises(CarrierFileError, match=f"a.safetensors.*set k to at most {M}, or 0"):
        read_dictionary(path, M + 1)
    write_dictionary(made(0, threshold=torch.zeros(M)), path)
    with pytest.raises(CarrierFileError, match="a.safetensors.*set k to 0"):
        read_dictionary(path, 1)


def test_the_golden_file_reads_for_ever_and_is_still_written(tmp_path):
    """It was written once by ``write_dictionary(made(), path)``."""
    assert same(read_dictionary(GOLDEN), made())
    write_dictionary(made(), tmp_path / "new.safetensors")
    old, new = (parse(p.read_bytes(), p) for p in (GOLDEN, tmp_path / "new.safetensors"))
    assert old[1] == new[1]  # the digest in it covers every tensor


def test_what_the_formula_says():
    """((x - mean) scale - decoder_bias) encoder^T + encoder_bias, the k largest, and back."""
    one, x = made(), numbers(3, D, start=11)
    p = one.tensors
    z = (((x - p["mean"]) * p["scale"] - p["decoder_bias"]) @ p["encoder"].T + p["encoder_bias"]).relu()
    values, indices = one.coder().encode(x)
    best = z.topk(K)
    torch.testing.assert_close(values, best.values)
    kept = torch.zeros_like(z).scatter(1, best.indices, best.values)
    rebuilt = (kept @ p["decoder"] + p["decoder_bias"]) / p["scale"] + p["mean"]
    torch.testing.assert_close(one.coder().rebuilt(x), rebuilt)


@pytest.mark.parametrize("norm", ["none", "layer", "length"])
def test_moving_a_latent_moves_what_is_rebuilt(norm):
    one = replace(made(0, threshold=torch.zeros(M)), info={"norm": norm})
    coder, x = one.coder(), numbers(3, D, start=11)
    step, which = torch.tensor([[0.5], [0.0], [-0.25]]), torch.full((3, 1), 2)
    moved = coder.moved(x, step, which)
    _, _, factor = coder.prepared(x)
    torch.testing.assert_close(moved - x, step * one.tensors["decoder"][2] / one.tensors["scale"] / factor)
    assert torch.equal(moved[1], x[1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": torch.zeros(3)}, "mean has shape"),
        ({"encoder": torch.full((M, D), float("nan"))}, "not finite"),
        ({"scale": torch.zeros(D)}, "scale holds a zero"),
        ({"extra": torch.zeros(1)}, "not whole"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    with pytest.raises(CarrierError, match=message):
        Dictionary("words", parts(**change), K)


def test_what_else_is_refused():
    for k, message in ((0, "give k"), (1.5, "give k"), (M + 1, f"k is {M + 1}, but there are {M} latents")):
        with pytest.raises(CarrierError, match=message):
            Dictionary("words", parts(), k)
    with pytest.raises(CarrierError, match="letters, digits"):
        Dictionary("two words", parts(), K)
    with pytest.raises(CarrierError, match="lacks mean"):
        Dictionary("words", {k: v for k, v in parts().items() if k != "mean"}, K)
    with pytest.raises(CarrierError, match="update the pack"):
        Dictionary("words", parts(), K, {"norm": "softmax"})
    for words in (5, "mug", [5], [["mug"]], [[["mug"]]], [[[2.5, "mug"]]], {"0": []}):
        with pytest.raises(CarrierError, match="words has to be one list"):
            Dictionary("words", parts(), K, {"words": words})
    assert "corpus words: 0" in Dictionary("words", parts(), K, {"words": None}).summary()


@pytest.mark.parametrize("info", ["5", "[1]", "null", "[" * 100_000, '{"words": 5}', '{"norm": {}}', "{", "1" * 5000])
def test_facts_of_any_form_are_refused_with_a_sentence(info, tmp_path):
    path = tmp_path / "a.safetensors"
    write_dictionary(made(), path)
    tensors, metadata = parse(path.read_bytes(), path)
    metadata |= {OWN + "info": info}
    save_file(tensors, path, metadata | {OWN + "digest": digest(tensors, metadata)})
    with pytest.raises(CarrierFileError, match="a.safetensors"):
        read_dictionary(path)


def test_damaged_files_are_refused_with_a_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    write_dictionary(made(), path)
    whole = path.read_bytes()
    for damaged in mutations(whole, 400, seed=5):
        path.write_bytes(damaged)
        try:
            assert same(read_dictionary(path), made())
        except CarrierFileError as error:
            assert path.name in str(error) and len(str(error)) > 40


def test_concepts_and_dictionaries_are_not_taken_for_each_other(tmp_path):
    write_dictionary(made(), tmp_path / "d.safetensors")
    write_concept(concept(), tmp_path / "c.safetensors")
    with pytest.raises(CarrierFileError, match="Load Dictionary"):
        read_any(tmp_path / "d.safetensors")
    with pytest.raises(CarrierFileError, match="Load Concept"):
        read_dictionary(tmp_path / "c.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CarrierFileError, match="its keys are a"):
        read_dictionary(tmp_path / "x.safetensors")


def codes(usage=None) -> Codes:
    """mug fires latents 0, 1 and 5; hat 1, 2 and 5; 3 fires in one of two places of mug."""
    mug = torch.tensor([[5.0, 2, 0, 3, 0, 1], [3.0, 2, 0, 0, 0, 1]])
    hat = torch.tensor([[0.0, 3, 5, 0, 0, 1]])
    dictionary = made(**({} if usage is None else {"usage": usage}))
    return Codes(
        dictionary, ("a mug", "a mug and a hat"), {"mug": mug, "hat": hat}, {"mug": mug[:, :4], "hat": hat[:, :4]}
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"words": {}, "tokens": {}}, "There is no word"),
        ({"tokens": {}}, "There is no word"),
        ({"words": {"mug": torch.ones(2, M - 1)}}, r"\(2, 5\), not \(occurrences, 6\)"),
        ({"words": {"mug": torch.ones(0, M)}}, r"\(0, 6\), not"),
        ({"words": {"mug": torch.ones(M)}}, r"\(6,\), not"),
    ],
)
def test_words_that_were_not_encoded_are_refused(change, message):
    given = {"words": {"mug": torch.ones(2, M)}, "tokens": {"mug": torch.ones(2, D)}} | change
    with pytest.raises(CarrierError, match=message):
        Codes(made(), ("a mug",), **given)


def test_codes_are_their_own_and_name_the_strongest():
    given = torch.tensor([[5.0, 2, 0, 3, 0, 1], [3.0, 2, 0, 0, 0, 1]])
    one = Codes(made(), ("a mug",), {"mug": given}, {"mug": given[:, :D]})
    given.zero_()
    assert one.strongest("mug", 9) == [(0, 4.0), (1, 2.0), (3, 1.5), (5, 1.0)]
    assert one.strongest("mug", 1) == [(0, 4.0)]


def test_contrast_is_share_less_share_elsewhere():
    scores = contrast(codes())
    mug, hat = torch.tensor([4, 2, 0, 1.5, 0, 1]) / 8.5, torch.tensor([0.0, 3, 5, 0, 0, 1]) / 9
    torch.testing.assert_close(scores["mug"], mug - hat)
    usage = torch.tensor([8.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(contrast(codes(usage))["mug"], mug - (hat + usage / 8) / 2)
    assert torch.equal(contrast(codes(torch.zeros(6)))["mug"], mug - hat / 2), "a latent that never fired has no share"


def test_pruning_keeps_the_best_that_are_active_often_enough():
    kept = prune(codes(), contrast(codes()), keep=1)
    assert [kept.kept[w][0].tolist() for w in ("mug", "hat")] == [[0], [2]]
    assert kept.mean("mug").tolist() == [4, 0, 0, 0, 0, 0]
    assert 3 in prune(codes(), contrast(codes()), 6, 0.5).kept["mug"][0]
    assert 3 not in prune(codes(), contrast(codes()), 6, 0.6).kept["mug"][0]
    ones = {"mug": torch.ones(6), "hat": torch.ones(6)}
    assert set(prune(codes(), ones, 6, 0.0).kept["mug"][0].tolist()) == {0, 1, 3, 5}, "active at least once"


def test_exclusive_latents_stay_with_the_higher_score():
    scores = {"mug": torch.tensor([0.5, 0.2, 0, 0, 0, 0.1]), "hat": torch.tensor([0, 0.3, 0.4, 0, 0, 0.05])}
    both = prune(codes(), scores, 9)
    assert {1, 5} <= set(both.kept["mug"][0].tolist()) & set(both.kept["hat"][0].tolist())
    apart = prune(codes(), scores, 6, exclusive=True)
    assert sorted(apart.kept["mug"][0].tolist()) == [0, 5] and sorted(apart.kept["hat"][0].tolist()) == [1, 2]
    with pytest.raises(CarrierError, match="No latent of 'hat' is left"):
        prune(codes(), {"mug": scores["mug"], "hat": -scores["hat"]}, 6)

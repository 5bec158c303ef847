"""Token features of a connected text encoder: the rows of its conditioning, many prompts at once, and their words."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..carriers.errors import CarrierMismatch
from .text import BEGINNINGS, Encoder, encoders, ready
from .words import placed

AT_ONCE = 64
"""Pieces of prompts (77 tokens of CLIP, whole prompts of T5) per pass."""


class Spoken(NamedTuple):
    """A prompt's tokens without start, end and padding, as they stand in the conditioning."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    """Rows of the conditioning."""
    rows: torch.Tensor
    """[tokens, width], fp32, where the encoder put them."""
    total: int
    """Rows of the whole conditioning."""


def spoken_encoder(clip) -> Encoder:
    """The encoder by whose tokens the rows are read: T5 where there is one, else the first (SDXL's two share rows)."""
    found = encoders(clip)
    return next((e for e in found if e.key == "t5xxl"), found[0])


def read(clip, texts: list[str]) -> list[Spoken]:
    """Features of prompts, as the model would see them; no gradient.

    Raises: CarrierMismatch for an encoder whose rows are not one per token; the host's interrupt is not looked at.
    """
    encoder = spoken_encoder(clip)
    tokens = [clip.tokenize(text) for text in texts]
    found: dict[int, Spoken] = {}

    def shape(number: int) -> tuple:
        return tuple((slot, tuple(len(chunk) for chunk in chunks)) for slot, chunks in tokens[number].items())

    with torch.inference_mode():  # for loading too: weights made in it and moved outside of it are lost
        clip.load_model()
        ready(clip)
        for form, group in itertools.groupby(sorted(range(len(texts)), key=shape), key=shape):
            size = max(1, AT_ONCE // max(len(lengths) for _, lengths in form))
            numbers = list(group)
            for part in (numbers[s : s + size] for s in range(0, len(numbers), size)):
                for number, spoken in zip(part, _together(clip, encoder, [tokens[n] for n in part]), strict=True):
                    found[number] = spoken
    return [found[number] for number in range(len(texts))]


def _together(clip, encoder: Encoder, tokens: list[dict]) -> list[Spoken]:
    """Prompts of one form in one pass: their pieces come out end to end (sd1_clip.py ClipTokenWeightEncoder)."""
    joined = {slot: [chunk for one in tokens for chunk in one[slot]] for slot in tokens[0]}
    cond = clip.cond_stage_model.encode_token_weights(joined)[0].float()
    own = sum(len(chunk) for chunk in tokens[0][encoder.slot])
    before = cond.shape[1] - own * len(tokens)  # rows of SD3's two CLIPs
    if cond.shape[0] != 1 or before < 0 or before and encoder.key != "t5xxl" or before % len(tokens):
        raise CarrierMismatch(
            f"The text encoder ({type(clip.cond_stage_model).__name__}) gives {cond.shape[1]} rows for "
            f"{own * len(tokens)} tokens, so its words cannot be told apart; connect the encoder of SD1.5, SD2, SDXL, "
            "SD3 or Flux."
        )
    result = []
    for number, one in enumerate(tokens):
        words, _, _ = placed(encoder, one)
        kept = [(int(t), row) for t, row in words if not torch.is_tensor(t)]
        rows = cond[0, before + own * number :][[row for _, row in kept]]
        places = tuple(before // len(tokens) + row for _, row in kept)
        result.append(Spoken(tuple(t for t, _ in kept), places, rows, cond.shape[1] // len(tokens)))
    return result


def _begins(encoder: Encoder, ids: Sequence) -> list[bool]:
    """Whether a word begins at each token, and behind the last; what is no token of the vocabulary stands alone."""
    names = encoder.tokenizer.inv_vocab
    pieces = [str(names[token]) if token in names else None for token in ids]
    ends = any(str(names.get(n, "")).endswith("</w>") for n in range(512))  # CLIP marks ends, the others beginnings

    def parted(before: str | None, piece: str | None) -> bool:
        if before is None or piece is None:
            return True
        return before.endswith("</w>") if ends else piece[:1] in BEGINNINGS or not re.match(r"\w", piece)

    return [parted(*pair) for pair in itertools.pairwise([None, *pieces, None])]


def words_of(encoder: Encoder, ids: tuple[int, ...]) -> list[tuple[str, list[int]]]:
    """Words that tokens spell, each with the numbers of its tokens; a comma is a word too."""
    found: list[list[int]] = []
    for number, begins in enumerate(_begins(encoder, ids)[:-1]):
        if begins:
            found.append([])
        found[-1].append(number)
    words = [(encoder.spelt([ids[n] for n in numbers]), numbers) for numbers in found]
    return [(word, numbers) for word, numbers in words if word]


def find_word(encoder: Encoder, ids: Sequence, word: str) -> list[list[int]]:
    """Numbers of the tokens of every occurrence of a word or of several words in a row, none inside longer words."""
    pieces, begins = encoder.ids(word), _begins(encoder, ids)
    starts = range(len(ids) - len(pieces) + 1) if pieces else ()
    return [
        list(range(s, s + len(pieces)))
        for s in starts
        if list(ids[s : s + len(pieces)]) == pieces and begins[s] and begins[s + len(pieces)]
    ]

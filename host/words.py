"""Words that a text marks: ``[hat]`` in captions, ``<picture1:hat>`` in prompts, and the rows in which they stand.

A marked text is encoded as if the marks were not there. A word's tokens are those that change when the word is
exchanged: so weights, commas and long prompts are what the host's tokenizers make of them, whatever their family.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from ..carriers import modulation
from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..kernels.controller import coded, dense, directions


def _code(concept: Concept, word: str, features: torch.Tensor) -> torch.Tensor:
    reading, number = modulation.reading(concept.tensors), concept.info["words"].index(word)
    code = coded(reading, features, reading["kept"][number], concept.info["norm"])
    if not bool(code.any()):
        raise CarrierMismatch(
            f"None of the latents that <{concept.name}> learned {word!r} on is active where the word stands in this "
            "prompt, so it would do nothing; set directions to cached, or learn with more latents or captions."
        )
    return code


READINGS = {"dense": lambda concept, word, features: dense(features), "codes": _code}
"""What a concept's network reads of rows [pieces, width] of the context, by the name in ``info["input"]``: functions
(concept, word, rows) -> [pieces, inputs]."""
CAPTION = re.compile(r"\[(?P<word>[^\[\]<>:]{1,64})\]")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
PROMPT = re.compile(
    rf"<(?P<name>[A-Za-z0-9_-]{{1,64}}):\s*(?P<word>[^\[\]<>:]{{1,64}}?)\s*(?::\s*(?P<strength>{NUMBER})\s*)?>"
)
OTHERS = ("cat", "house", "seven")
"""Words to exchange a word with; a token that it shares with one of them it does not share with all."""


class Mark(NamedTuple):
    """A marked word of a text."""

    name: str
    """Of the concept; empty in captions."""
    word: str
    """As the concept knows it: small letters, single blanks."""
    strength: float
    start: int
    """First character in the text without marks."""
    end: int


def unmarked(text: str, pattern: re.Pattern = PROMPT) -> tuple[str, list[Mark]]:
    """The text without marks, and the marks in order."""
    plain, marks, done = "", [], 0
    for match in pattern.finditer(text):
        found = match.groupdict()
        plain += text[done : match.start()]
        start, done = len(plain), match.end()
        plain += found["word"]
        marks.append(
            Mark(found.get("name") or "", spelt(found["word"]), float(found.get("strength") or 1.0), start, len(plain))
        )
    return plain + text[done:], marks


def spelt(word: str) -> str:
    """How a concept knows a word."""
    return " ".join(word.split()).lower()


def placed(encoder, tokens: Mapping, offset: int = 0) -> tuple[list, list, int]:
    """Words and marks of start and end as (token, row), pads left out, and the rows of the whole prompt.

    ``encoder``: of text.py; ``tokens``: what ``clip.tokenize`` gives; learned rows are tensors.
    """
    words, marks, total = [], [], 0
    ends = (encoder.tokenizer.start_token, encoder.tokenizer.end_token)
    for chunk in tokens[encoder.slot]:
        for position, (token, *_) in enumerate(chunk):
            special = not torch.is_tensor(token) and token in ends
            (marks if special else words).append((token, offset + total + position))
            if special and token == ends[1]:
                break
        total += len(chunk)
    return words, marks, total


def length_of(encoder, tokens: Mapping) -> int:
    """Rows of the context that an encoder has a part in: where CLIP-L and CLIP-G lie beside each other, those of the
    shorter, to which the host cuts both (sdxl_clip.py, sd3_clip.py)."""
    return min(sum(map(len, tokens[slot])) for slot in (encoder.slot, *encoder.beside))


def rows_of(tokenize: Callable[[str], Mapping], used: Iterable, text: str, marks: list[Mark]) -> list[list[int]]:
    """Rows of the context in which each marked word of an unmarked text stands, over all encoders.

    ``tokenize``: text -> tokens as ``clip.tokenize`` gives them; ``used``: the encoders that make up the context, in
    its order (positions.read_from). Raises: ValueError when two words share a token, or one has none.
    """
    found: list[list[int]] = [[] for _ in marks]
    whole = tokenize(text)
    swapped = [[tokenize(text[: m.start] + other + text[m.end :]) for other in OTHERS] for m in marks]
    total = 0
    for encoder in used:
        words, _, _ = placed(encoder, whole, total)
        total += length_of(encoder, whole)
        ids = [_comparable(token) for token, _ in words]
        taken: dict[int, Mark] = {}
        for number, mark in enumerate(marks):
            others = [[_comparable(t) for t, _ in placed(encoder, s)[0]] for s in swapped[number]]
            spans = [_changed(ids, other) for other in others if other != ids]
            changed = words[min(a for a, _ in spans) : max(b for _, b in spans)]
            rows = [row for _, row in changed if row < total]
            for row in rows:
                if row in taken:
                    raise ValueError(
                        f"{taken[row].word!r} and {mark.word!r} stand in one token of the text; put a blank between "
                        "them."
                    )
                taken[row] = mark
            found[number] += rows
    for mark, rows in zip(marks, found, strict=True):
        if not rows:
            raise ValueError(f"The text encoder sees no token for {mark.word!r}; write another word.")
    return found


class Word(NamedTuple):
    """A marked word of a prompt and the concept that modulates it."""

    mark: Mark
    concept: Concept
    strength: float


def taught(marks: list[Mark], concepts: Mapping[str, tuple[Concept, float]]) -> list[Word]:
    """The marked words with their concepts and strengths, those of strength 0 left out.

    Raises: ValueError naming what there is when a concept is not connected or does not know the word.
    """
    lost = [f"<{m.name}:{m.word}>" for m in marks if m.name not in concepts]
    if lost:
        raise ValueError(
            f"The prompt names {', '.join(lost)}, but the connected concepts are: "
            f"{', '.join(f'<{n}>' for n in concepts) or 'none'}. Correct the name or connect the concept."
        )
    found = []
    for mark in marks:
        concept, strength = concepts[mark.name]
        if concept.kind != "modulation":
            raise ValueError(
                f"<{mark.name}:{mark.word}> asks for a single word, but <{mark.name}> is made of {concept.kind} and "
                f"has no words of its own; write <{mark.name}>."
            )
        if mark.word not in concept.info["words"]:
            raise ValueError(
                f"<{mark.name}> was not taught {mark.word!r}; its words are: {', '.join(concept.info['words'])}. Write "
                f"one of them, for example <{mark.name}:{concept.info['words'][0]}>."
            )
        if strength * mark.strength:
            found.append(Word(mark, concept, strength * mark.strength))
    return found


def directions_of(word: Word, features: torch.Tensor, cached: bool = False) -> torch.Tensor:
    """Directions [pieces, 1 or blocks, width] of a word whose rows of the context are ``features`` [pieces, width].

    ``cached``: those that were stored while learning, piece by piece, or their mean where the word has another number
    of pieces here. Otherwise the concept's network makes them of these rows; without a network there are cached ones
    alone.
    Raises: CarrierMismatch when the network reads other rows, or a code of latents of which none is active in these.
    """
    concept, network = word.concept, modulation.controller(word.concept.tensors)
    if cached or not network:
        stored = modulation.words(concept.tensors, concept.info)[word.mark.word].movedim(1, 0)
        if len(stored) != len(features):
            stored = stored.mean(0, keepdim=True).expand(len(features), -1, -1)
        return word.strength * stored
    read, wide = READINGS.get(concept.info.get("input")), modulation.row_width(concept.tensors)
    if read is None or features.shape[-1] != wide:
        raise CarrierMismatch(
            f"Concept <{concept.name}> reads {concept.info.get('input')} rows of {wide} numbers, this CLIP gives "
            f"{features.shape[-1]}; connect the text encoders it was learned with, or set directions to cached."
        )
    inputs = read(concept, word.mark.word, features.float().cpu())
    each = bool(network["block.out.weight"].any())
    return word.strength * directions({k: v.to(inputs.device) for k, v in network.items()}, inputs, each)


def _comparable(token):
    """Rows are told by their numbers: the host reads an embedding file anew for every text."""
    return tuple(token.tolist()) if torch.is_tensor(token) else token


def _changed(ids: list, others: list) -> tuple[int, int]:
    """Where ``ids`` differs from ``others`` in one place: first position, and the one after the last."""
    shorter, start, end = min(len(ids), len(others)), 0, 0
    while start < shorter and ids[start] == others[start]:
        start += 1
    while end < shorter - start and ids[-1 - end] == others[-1 - end]:
        end += 1
    return start, len(ids) - end

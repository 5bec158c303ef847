"""Where words stand in a conditioning: token lists of the host's tokenizers to rows of the context."""

import re
from collections.abc import Mapping

import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from .captions import STRIDE
from .text import INNER, NAMED, Encoder, concept_rows, encoders, fill, mark_of, mark_rows, named_rows, with_rows
from .token_features import find_word
from .variants import layers_of
from .words import length_of, placed, unmarked


def aligned(encoder: Encoder, tokens: Mapping, reference: Mapping) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
    """Columns by which two prompts that differ in the concept's place are compared token by token, start to end.

    Returns: weights [m, c] and [r, c] over the rows of either prompt, several rows in the concept's place as their
    mean; and which of the c columns is the concept's.
    """
    sides = [placed(encoder, t) for t in (tokens, reference)]
    groups = []
    for words, _, _ in sides:
        own, inside = [], False
        for token, row in words:
            marked = mark_of(token) is not None
            if marked and inside:
                own[-1][0].append(row)
            else:
                own.append(([row], marked))
            inside = marked
        groups.append(own)
    pairs = list(zip(*groups, strict=True))
    pairs += [(([a], False), ([b], False)) for (_, a), (_, b) in zip(sides[0][1], sides[1][1], strict=False)]
    result = []
    for side in (0, 1):
        columns = torch.zeros(sides[side][2], len(pairs))
        for number, pair in enumerate(pairs):
            columns[pair[side][0], number] = 1 / len(pair[side][0])
        result.append(columns)
    return (*result, [pair[0][1] for pair in pairs])


def read_from(model, clip) -> list[Encoder]:
    """Encoders whose rows make up the context, in its order; SDXL's two share their rows.

    Raises: CarrierMismatch for a family whose order is not known.
    """
    found, kind = encoders(clip), type(model.model).__name__
    if layers_of(model.model.diffusion_model):
        return found[:1]
    t5 = [e for e in found if e.key == "t5xxl"]
    if kind == "Flux" and (t5 or len(found) == 1):
        return t5 or found
    if kind == "SD3":
        return [*[e for e in found if e.key != "t5xxl"][:1], *t5]
    raise CarrierMismatch(
        f"Where words stand in the context of {kind} is not known; connect a model of SD1.5, SD2, SDXL, SD3 or Flux."
    )


def _marked(words: list, number: int) -> list[int]:
    """Rows of the n-th mark among (token, row)."""
    return [row for token, row in words if (mark := mark_of(token)) is not None and mark // STRIDE == number]


def learned_columns(model, clip, tokens: Mapping, marks: int = 1) -> torch.Tensor | None:
    """Columns [1, m, marks] of the learned rows in a token dict of ``captions.Prompts``: for each of its first marks
    the mean over those of the mark, zeros where there are none; None where the context shows none at all.

    Raises: CarrierMismatch as ``read_from`` does.
    """
    rows, total = [[] for _ in range(marks)], 0
    for encoder in read_from(model, clip):
        words, _, _ = placed(encoder, tokens, total)
        total += length_of(encoder, tokens)
        for mark, own in enumerate(rows):
            own += [row for row in _marked(words, mark) if row < total]
    columns = torch.zeros(1, total, marks)
    for mark, own in enumerate(rows):
        columns[0, own, mark] = 1 / max(1, len(own))
    return columns if any(rows) else None


def columns_of(
    model, clip, text: str, concepts: list[Concept], wanted: list[str], tokens: Mapping | None = None
) -> torch.Tensor:
    """Columns [1, m, words] of a prompt's words: each the mean over the rows of the word's pieces and occurrences.

    ``wanted``: plain words of the prompt, or ``<name>`` of a concept; ``tokens``: those of a ``captions.Prompts`` that
    encodes it, padded as they are, and whose marks are ``concepts`` in order. Raises: ValueError for a word that is not
    there.
    """
    used, names, table = read_from(model, clip), {}, {}
    text = unmarked(text)[0]
    by_name = {c.name: c for c in concepts if c.kind != "modulation" and f"<{c.name}>" in text}
    for number, (name, concept) in enumerate(by_name.items()):
        held = named_rows(concept)
        if held is None:
            names[name] = concept.info.get("token_text") or name
            continue
        names[name] = f"embedding:{INNER}{number}"
        table[f"{INNER}{number}"] = {
            key: mark_rows(torch.full(rows.shape[-2:-1], number * STRIDE), rows.shape[-1])
            for key, rows in concept_rows(clip, held).items()
        }
    marking = with_rows(clip, table) if table else clip
    marks = {f"embedding:{place}": int(place.removeprefix(INNER)) for place in table}
    tokens = marking.tokenize(fill(text, names)) if tokens is None else tokens
    rows: dict[str, list[int]] = {word: [] for word in wanted}
    total = 0
    for encoder in used:
        words, _, _ = placed(encoder, tokens, total)
        total += length_of(encoder, tokens)
        words = [(token, row) for token, row in words if row < total]
        ids = [None if torch.is_tensor(t) else int(t) for t, _ in words]
        for word in wanted:
            name = NAMED.fullmatch(word)
            shown = names.get(name[1]) if name else None
            if shown in marks:
                rows[word] += _marked(words, marks[shown])
                continue
            places = find_word(encoder, ids, shown or unmarked(word)[0])
            rows[word] += [words[number][1] for place in places for number in place]
    lost = [word for word, found in rows.items() if not found]
    if lost:
        known = dict.fromkeys(re.findall(r"<[\w-]+>|[^\s,.;:()<>\[\]]+", text))
        raise ValueError(f"The prompt does not hold {', '.join(lost)}; its words are: {', '.join(known)}.")
    columns = torch.zeros(1, total, len(wanted))
    for number, word in enumerate(wanted):
        columns[0, rows[word], number] = 1 / len(rows[word])
    return columns

"""Prompts that name learned concepts -> the host's CONDITIONING, for any sampler."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from . import modulation, words
from .edits import Edit, read_edit, with_edits
from .gradients import ordinary
from .neti import places, read, with_bypass
from .text import (
    INNER,
    MARKS,
    NAMED,
    TOKENS,
    as_tokens,
    concept_rows,
    encoders,
    end_to_end,
    even,
    fill,
    mark_rows,
    not_read,
    shown_marks,
    variant,
    widths,
    with_rows,
)
from .variants import Grid, attach


class _Shown(NamedTuple):
    """A concept whose learned rows stand in the prompt."""

    concept: Concept
    rows: dict[str, torch.Tensor]
    bypass: dict[str, torch.Tensor]
    """Of a mapper: what is added behind the encoder."""
    edit: Concept | None
    """Which concept edits what the encoder gives."""
    strength: float

    def encoded(self, cell: tuple[int, int, int]) -> tuple[int, ...]:
        """What of (stage, layer, role) the encoder sees; bypass and edit come behind it."""
        return () if self.edit else cell[:2] if self.bypass else cell


def encode_prompt(clip, text: str, concepts: list[tuple[Concept, float]], cached: bool = False):
    """Prompt with names ``<name>`` and marks ``<name:word>`` -> the host's CONDITIONING.

    Without either, and for strength 0 up to the plain word, this is the stock encoder bit for bit. A delta stands for
    the rows it bundles, or for the words it was learned with. Concepts with rows per stage, layer or role are encoded
    once per variant and travel in the conditioning (variants.py), and so do the directions of marked words
    (modulation.py), which change nothing of what is encoded; ``cached``: those stored with the concept.
    Raises: ValueError for an unknown or doubled name, CarrierMismatch for a concept that does not fit or is not read.
    """
    by_name: dict[str, tuple[Concept, float]] = {}
    for concept, strength in concepts:
        if concept.name in by_name:
            raise ValueError(
                f"Two connected concepts are both called <{concept.name}>; rename one of them when loading it."
            )
        by_name[concept.name] = (concept, strength)
    text, marks = words.unmarked(text)
    misspelt(text, by_name)
    marked = words.taught(marks, by_name)
    names, shown = _named(clip, text, by_name)
    done, used = _variants(clip, fill(text, names), shown)
    if shown:
        done = [[cond, {**facts, TOKENS: used.tokenize(fill(text, names))}] for cond, facts in done]
    return modulated(clip, done, marked, text, lambda t: used.tokenize(fill(t, names)), cached) if marked else done


def _named(clip, text: str, by_name: Mapping[str, tuple[Concept, float]]) -> tuple[dict[str, str], list[_Shown]]:
    """What ``fill`` puts in the place of every name in the text, and the concepts whose rows that calls for."""
    wanted = list(dict.fromkeys(NAMED.findall(text)))
    unknown = [f"<{n}>" for n in wanted if n not in by_name]
    if unknown:
        have = ", ".join(f"<{n}>" for n in by_name) or "none"
        raise ValueError(
            f"The prompt names {', '.join(unknown)}, but the connected concepts are: {have}. "
            "Correct the name or connect the concept."
        )
    names, shown = {}, []
    for name in wanted:
        given, strength = by_name[name]
        if given.kind == "modulation":
            known = ", ".join(f"<{name}:{word}>" for word in given.info["words"])
            raise ValueError(f"<{name}> teaches single words; write one of {known} in the place of <{name}>.")
        edit = given if given.kind == "edit" else None
        given, bypass = read(given) if given.kind == "mapper" else (given, {})
        concept = read_edit(given) if edit else as_tokens(given)
        if concept is None:
            names[name] = given.info.get("token_text") or name
            continue
        rows = concept_rows(clip, concept, strength)
        if strength == 0:
            names[name] = concept.info.get("init_text") or ""
        else:
            names[name] = f"embedding:{INNER}{len(shown)}"
            shown.append(_Shown(concept, rows, bypass, edit, strength))
    return names, shown


def _variants(clip, text: str, shown: list[_Shown]) -> tuple[list, object]:
    """CONDITIONING of a filled text, encoded once per variant of its concepts, and the CLIP that knows their rows."""
    marks = {
        f"{INNER}{number}": {
            key: mark_rows(torch.full(value.shape[-2:-1], number), value.shape[-1]) for key, value in own.rows.items()
        }
        for number, own in enumerate(shown)
    }
    marked = with_rows(clip, marks).tokenize(text) if shown else {}
    there = shown_marks(marked)
    if lost := [f"<{own.concept.name}>" for number, own in enumerate(shown) if number not in there]:
        raise not_read(clip, ", ".join(lost))
    grid, encoded, known, used = Grid.of([own.concept for own in shown]), [], {}, clip

    def alike(cells):
        return tuple(own.encoded(cell) for cell, own in zip(cells, shown, strict=True))

    for stage in grid.index.flatten(1).tolist():
        tokens = {}
        for cells in (grid.cells[number] for number in stage):
            if alike(cells) not in tokens:
                table = {
                    f"{INNER}{number}": {key: variant(value, cell) for key, value in shown[number].rows.items()}
                    for number, cell in enumerate(cells)
                }
                used = with_rows(clip, table) if table else clip
                tokens[alike(cells)] = used.tokenize(text)
        known |= zip(tokens, encoded_together(clip, list(tokens.values())), strict=True)
    for cells in grid.cells:
        entries = known[alike(cells)]
        for number, ((stage, layer, role), own) in enumerate(zip(cells, shown, strict=True)):
            if own.bypass and role:
                found = places(encoders(clip), marked, MARKS + number)
                added = {key: value[stage, layer][None] for key, value in own.bypass.items()}
                entries = [[with_bypass(cond, found, added, own.strength), extra] for cond, extra in entries]
        pairs = zip(cells, shown, strict=True)
        edits = [Edit(own.edit, layer, role, own.strength) for (_, layer, role), own in pairs if own.edit]
        if edits:
            entries = [[with_edits(cond, edits), extra] for cond, extra in entries]
        encoded.append(entries)
    done = encoded[0] if len(encoded) == 1 else [attach(list(entries), grid) for entries in zip(*encoded, strict=True)]
    return done, used


def misspelt(text: str, names: Iterable[str]) -> None:
    """Raises: ValueError for what is nearly a mark of a connected concept and would be read as plain text."""
    for match in re.finditer(r"<\s*([A-Za-z0-9_-]{1,64})\s*(?::[^<>]*)?>", text):
        if match[1] in names and match[0] != f"<{match[1]}>":
            raise ValueError(
                f"{match[0]} would be read as plain text; write <{match[1]}>, or for one word of it <{match[1]}:word> "
                f"or <{match[1]}:word:0.8>."
            )


def encoded_together(clip, many: list[dict]) -> list[list]:
    """The host's CONDITIONING of each of several token dicts, which differ in learned rows alone.

    More than one, as only a UNet's prompt has, go through the encoder in one pass, as chunks of one long text; their
    pooled vector is then the first one's (comfy/sd1_clip.py ClipTokenWeightEncoder).
    """
    if len(many) == 1 or not even(many[0]):
        return [clip.encode_from_tokens_scheduled(tokens) for tokens in many]
    found = clip.encode_from_tokens_scheduled(end_to_end(many))
    entries = [(cond.unflatten(1, (len(many), -1)), extra) for cond, extra in found]
    return [[[conds[:, number], extra] for conds, extra in entries] for number in range(len(many))]


def modulated(clip, entries: list, marked: list[words.Word], text: str, tokenize, cached: bool) -> list:
    """CONDITIONING whose marked words are modulated. ``tokenize``: as it was made of the unmarked ``text``.

    Raises: CarrierMismatch when the CLIP lacks an encoder that a concept reads; ValueError as ``words.rows_of`` does.
    """
    here, rows = {e.key: e for e in encoders(clip)}, [[] for _ in marked]
    for keys in dict.fromkeys(tuple(w.concept.info["encoders"]) for w in marked):
        lost = [key for key in keys if key not in here]
        if lost:
            (name, *_) = (w.concept.name for w in marked if tuple(w.concept.info["encoders"]) == keys)
            raise CarrierMismatch(
                f"Concept <{name}> modulates words by their rows of {', '.join(lost)}, this CLIP has "
                f"{widths(list(here.values()))}; connect the model's own text encoders."
            )
        found = words.rows_of(tokenize, [here[key] for key in keys], text, [w.mark for w in marked])
        rows = [
            f if tuple(w.concept.info["encoders"]) == keys else r for w, f, r in zip(marked, found, rows, strict=True)
        ]
    result = []
    for entry in entries:
        made = [
            modulation.Place(
                tuple(own),
                ordinary(words.directions_of(w, entry[0][0, own], cached)),
                tuple(w.concept.info["blocks"]),
                w.mark.name,
            )
            for w, own in zip(marked, rows, strict=True)
        ]
        result.append(modulation.attach(entry, made))
    return result

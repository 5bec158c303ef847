"""Captions of a learning run: tokenised once, encoded every step with the rows as they are, differentiably."""

import math
import re
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch

from .concept_set import ConceptSet
from .text import (
    INNER,
    NAMED,
    encode_many,
    encoders,
    end_to_end,
    even,
    mark_of,
    mark_rows,
    not_read,
    ready,
    shown_marks,
    variant,
    with_rows,
)
from .variants import Grid, with_contexts
from .words import CAPTION, unmarked

STRIDE = 1000
"""More than the vectors of any mark."""

MARK = re.compile(r"\{(\w*)\}")


Rows = Mapping[str, Mapping[str, torch.Tensor]]


def _level(tokenizer, texts: list) -> None:
    """Pads T5's one piece per text to the longest of them, so that texts of any length share a batch; in place."""
    if any(len(pieces) != 1 for pieces in texts):
        return
    longest = max(len(pieces[0]) for pieces in texts)
    for (piece,) in texts:
        tokenizer.pad_tokens(piece, longest - len(piece))
        piece[:] = [entry[:2] for entry in piece]


class Prompts:
    """Captions in which ``{}`` stands for the concept, and ``{name}`` for further learned rows."""

    def __init__(self, clip, texts: list[str], word: str | Mapping[str, str], counts: Mapping[str, Mapping[str, int]]):
        """``counts``: per mark (the concept is "") the learned vectors per encoder key.

        Encoders that learn nothing see the plain ``word`` in the concept's place, and nothing at other marks; or a word
        per mark.
        Raises: CarrierMismatch when a caption has no learned row where it has a mark.
        """
        self.clip, self.slots, self.names = clip, {e.slot: e.key for e in encoders(clip)}, list(counts)
        self.plain: dict[str, dict[str, torch.Tensor]] = {}
        """Per mark the rows of encoders that learn nothing."""
        table, words = {}, {"": word} if isinstance(word, str) else word
        for number, (name, of_mark) in enumerate(counts.items()):
            own = {e.key: e.rows(words.get(name, "")) for e in encoders(clip) if e.key not in of_mark}
            lengths = {**of_mark, **{key: len(rows) for key, rows in own.items()}}
            table[f"{INNER}{number}"] = {
                e.key: mark_rows(STRIDE * number + torch.arange(lengths[e.key]), e.width) for e in encoders(clip)
            }
            self.plain[name] = own
        marking = with_rows(clip, table)

        def marked(match):
            known = match[1] in self.names
            return f" embedding:{INNER}{self.names.index(match[1])} " if known else match[0]

        self.tokens = []
        for text in texts:
            tokens = marking.tokenize(MARK.sub(marked, NAMED.sub("{}", text.strip())).lstrip())
            there = {self.names[mark // STRIDE] for mark in shown_marks(tokens)}
            wanted = {name for name in MARK.findall(NAMED.sub("{}", text)) if any(counts.get(name, {}).values())}
            if wanted - there:
                raise not_read(clip, f"the concept in the caption {text!r}")
            self.tokens.append(tokens)
        for encoder in encoders(clip):
            _level(encoder.tokenizer, [tokens[encoder.slot] for tokens in self.tokens])

    def ready(self) -> None:
        """Sets the encoder up as the host does before encoding; call after the model is loaded."""
        ready(self.clip)

    def encode(self, index: int, rows: Rows) -> list:
        """Host conditioning [cond, extras] of caption ``index`` with ``rows`` (mark -> encoder key -> [n, width])."""
        return self.encode_all(index, [rows])[1]

    def encode_all(self, index: int, variants: list[Rows]) -> tuple[torch.Tensor, list]:
        """Caption ``index`` with each of several rows.

        Returns: contexts [variants, tokens, width], and the conditioning entry of the first.
        """
        return self.encode_groups([(index, variants)])[0]

    def encode_groups(self, groups: list[tuple[int, list[Rows]]]) -> list[tuple[torch.Tensor, list]]:
        """As ``encode_all`` for several captions, in one pass of each encoder where it lays chunks end to end."""
        asked, counts = [], []
        for index, variants in groups:
            many = [self._tokens(index, rows) for rows in variants]
            asked.append([end_to_end(many)] if even(many[0]) else many)
            counts.append(len(variants))
        encoded = iter(encode_many(self.clip, [tokens for joined in asked for tokens in joined]))
        found = []
        for joined, count in zip(asked, counts, strict=True):
            own = [next(encoded) for _ in joined]
            contexts = torch.cat([cond for cond, _ in own]) if len(own) > 1 else own[0][0]
            contexts = contexts.reshape(count, -1, contexts.shape[-1])
            found.append((contexts, [contexts[:1], own[0][1]]))
        return found

    def _tokens(self, index: int, rows: Rows) -> dict:
        def current(slot, token):
            mark = mark_of(token)
            if mark is None:
                return token
            name, key = self.names[mark // STRIDE], self.slots[slot]
            own = self.plain[name]
            return (own if key in own else rows[name])[key][mark % STRIDE]

        return {
            slot: [[(current(slot, token), *rest) for token, *rest in chunk] for chunk in chunks]
            for slot, chunks in self.tokens[index].items()
        }

    def conditions(
        self,
        grid: Grid,
        rows: Mapping[str, torch.Tensor],
        texts: list[int],
        stages: torch.Tensor,
        others: Rows | None = None,
        kept: dict | None = None,
    ):
        """What a batch is conditioned on: caption ``texts[b]`` with the rows of stage ``stages[b]``.

        rows: encoder key -> [stages, layers, roles, n, width]; ``others``: those of further marks, [n, width].
        ``kept``: a dict in which encoded captions stay for later calls, when no row ever changes.
        Returns: host conditioning entries, one per sample, and a change of ``transformer_options`` for
        ``Denoiser``, or None when all layers see the same.
        """
        encoded, wanted = {} if kept is None else kept, {}
        for text, stage in zip(texts, stages.tolist(), strict=True):
            if (text, stage) not in encoded:
                wanted[text, stage] = grid.index[stage].flatten().unique().tolist()

        def of_cell(number: int) -> Rows:
            return {"": {k: variant(v, grid.cells[number][0]) for k, v in rows.items()}, **(others or {})}

        groups = [(text, [of_cell(n) for n in numbers]) for (text, _), numbers in wanted.items()]
        for (key, numbers), (contexts, entry) in zip(wanted.items(), self.encode_groups(groups), strict=True):
            encoded[key] = entry, dict(zip(numbers, contexts, strict=True))
        samples = [encoded[key] for key in zip(texts, stages.tolist(), strict=True)]
        entries = [entry for entry, _ in samples]
        if not grid.needs_cross_attention:
            return entries, None

        def context(sample: int, name: str, role: int) -> torch.Tensor:
            return samples[sample][1][int(grid.index[stages[sample], grid.layer(name), role])]

        return entries, picked(entries, context)


def picked(entries: list, context: Callable[[int, str, int], torch.Tensor]):
    """A change of ``transformer_options`` by which each layer sees, per sample, ``context(sample, layer name, role)``.

    context: -> [tokens, width], repeated to the length that the host gives ``entries`` together; role 0 is K, 1 is V.
    """
    tokens = math.lcm(*(entry[0].shape[1] for entry in entries))

    def gathered(name: str, role: int, like: torch.Tensor) -> torch.Tensor:
        own = [context(sample, name, role) for sample in range(len(entries))]
        return torch.stack([c.repeat(tokens // len(c), 1) for c in own]).to(like)

    def pick(name, key, value):
        return gathered(name, 0, key), gathered(name, 1, value)

    return lambda options: with_contexts(options, pick)


def marked_captions(text: str, data: ConceptSet) -> tuple[tuple[str, ...], ...]:
    """Per picture its captions with marked words.

    All lines serve every picture, or, where empty lines part them into as many blocks as there are pictures, each block
    serves one; a mirrored picture has those of the picture before it.
    Raises: ValueError when no word is marked, captions of one picture mark different words, or blocks and pictures do
    not match, or a caption names a learned concept.
    """
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line.strip())
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    if named := NAMED.search(text):
        raise ValueError(f"The captions name {named[0]}, and here ordinary words are learned; write the word instead.")
    if not blocks:
        raise ValueError("There is no caption; write what the picture shows, for example: a girl with a [hat].")
    for block in blocks:
        marked = [{m.word for m in unmarked(line, CAPTION)[1]} for line in block]
        for line, words in zip(block, marked, strict=True):
            if not words:
                raise ValueError(f"The caption {line!r} marks no word; write [ and ] around those to learn: a [hat].")
            if words != marked[0]:
                odd = ", ".join(sorted(words ^ marked[0]))
                raise ValueError(
                    f"The captions {block[0]!r} and {line!r} do not mark the same words ({odd}); every caption of a "
                    "picture marks all of its words."
                )
    numbers = [n - 1 for n in accumulate(not m for m in data.mirrored)]
    if len(blocks) == 1:
        numbers = [0] * len(data.latents)
    elif len(blocks) == len(data.latents):
        numbers = list(range(len(blocks)))
    elif len(blocks) != numbers[-1] + 1:
        raise ValueError(
            f"There are {numbers[-1] + 1} pictures and {len(blocks)} blocks of captions; write one block for all, or "
            "one per picture with an empty line between them."
        )
    return tuple(tuple(blocks[n]) for n in numbers)

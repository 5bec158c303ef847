"""Dictionaries and words: human names for latents, how good a dictionary is here, and what a prompt's words hold."""

import re
from collections import Counter
from dataclasses import replace

import torch

from ..carriers.codes import Codes
from ..carriers.dictionary import Dictionary
from ..carriers.errors import CarrierMismatch
from ..kernels.sae import Coder, dense, fvu
from .corpus import Corpus
from .gradients import ordinary
from .pictures import bars
from .token_features import Spoken, find_word, read, spoken_encoder, words_of

NAMED_BY, MEASURED_BY = 500, 150
"""Prompts."""
NAMES = 5
"""Corpus words kept per latent."""


def checked(clip, dictionary: Dictionary, width: int) -> None:
    """Raises: CarrierMismatch naming both sides unless the dictionary is of this text encoder's tokens."""
    key, made = spoken_encoder(clip).key, dictionary.info.get("encoder")
    if dictionary.width != width or made not in (None, key):
        raise CarrierMismatch(
            f"Dictionary {dictionary.name} is of tokens of {dictionary.width} numbers{f' of {made}' if made else ''}, "
            f"this text encoder ({key}) gives {width}; connect the one it was learned on, or train a dictionary for "
            "this one."
        )


def named(clip, dictionary: Dictionary, corpus: Corpus) -> Dictionary:
    """The dictionary with the corpus words that fire its latents most, its mean use of them, FVU, L0 and silent share.

    Words count by their mean activation over all places where they stand. What is measured is measured on prompts that
    learning held back.
    """
    encoder, device = spoken_encoder(clip), clip.patcher.load_device
    spoken = read(clip, corpus.prompts(0, min(NAMED_BY, corpus.distinct or NAMED_BY)))
    checked(clip, dictionary, spoken[0].rows.shape[1])
    coder = dictionary.coder(device)
    names, cells, total, usage = {}, [], 0, torch.zeros(dictionary.size)
    seen: Counter = Counter()
    fired = torch.zeros(dictionary.size, dtype=torch.bool)
    with torch.no_grad():
        for part in (spoken[s : s + 64] for s in range(0, len(spoken), 64)):
            values, indices = (t.cpu() for t in coder.encode(ordinary(torch.cat([s.rows.to(device) for s in part]))))
            usage.index_add_(0, indices.flatten(), values.flatten())
            fired[indices[values > 0]] = True
            total += len(values)
            owner = torch.full((len(values),), -1)
            start = 0
            for one in part:
                for word, numbers in words_of(encoder, one.ids):
                    number = names.setdefault(word.lower(), len(names))
                    seen[number] += len(numbers)
                    owner[[start + n for n in numbers]] = number
                start += len(one.ids)
            active = (values > 0) & (owner >= 0)[:, None]
            cells.append((owner[:, None].expand_as(indices)[active], indices[active], values[active]))
        words, latents, values = (torch.cat(column) for column in zip(*cells, strict=True))
        pairs, where = (latents * len(names) + words).unique(return_inverse=True)
        facts, now = measured(clip, coder, corpus)
    latents, words = pairs // max(1, len(names)), pairs % max(1, len(names))
    counts = torch.tensor([float(seen[n]) for n in range(len(names))])
    means = torch.zeros(len(pairs)).index_add(0, where, values) / counts[words]
    order = means.argsort(descending=True)
    text, labels = list(names), [[] for _ in range(dictionary.size)]
    for latent, word, value in zip(*(t[order].tolist() for t in (latents, words, means)), strict=True):
        if len(labels[latent]) < NAMES:
            labels[latent].append([text[word], round(value, 3)])
    facts |= {"silent": float((~(fired | now)).float().mean()), "silent_tokens": total + facts["measured_tokens"]}
    info = {**dictionary.info, **facts, "words": labels}
    return replace(dictionary, tensors={**dictionary.tensors, "usage": usage / max(1, total)}, info=info)


def measured(clip, coder: Coder, corpus: Corpus) -> tuple[dict, torch.Tensor]:
    """FVU and L0 on held-out prompts, and which latents [m] fired there."""
    device = clip.patcher.load_device
    rows = ordinary(torch.cat([s.rows.to(device) for s in read(clip, corpus.held(MEASURED_BY))]))
    fired = torch.zeros(len(coder.parts["encoder"]), dtype=torch.bool)
    active, rebuilt = 0, []
    for part in rows.split(1024):
        values, indices = coder.encode(part)
        fired[indices[values > 0].cpu()] = True
        active += int((values > 0).sum())
        rebuilt.append(coder.rebuilt(part))
    left = float(fvu(rows, torch.cat(rebuilt)))
    return {"fvu": left, "l0": active / len(rows), "measured_tokens": len(rows)}, fired


def encode_words(clip, dictionary: Dictionary, text: str, wanted: list[str]) -> Codes:
    """Codes of words in prompts, a prompt per line; without ``wanted`` of every word but punctuation.

    Raises: ValueError for a word that no prompt holds; CarrierMismatch.
    """
    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise ValueError("There is no prompt; write one, or several, a line each.")
    encoder, device = spoken_encoder(clip), clip.patcher.load_device
    spoken = read(clip, texts)
    checked(clip, dictionary, spoken[0].rows.shape[1])
    places = [_places(encoder, one, wanted) for one in spoken]
    names = list(dict.fromkeys(word for one in places for word in one))
    lost = [word for word in wanted if word not in names]
    if lost:
        known = dict.fromkeys(word for one in spoken for word, _ in words_of(encoder, one.ids))
        raise ValueError(f"No prompt holds {', '.join(lost)}; the words are: {', '.join(known)}.")
    coder, found = dictionary.coder(device), {name: ([], []) for name in names}
    with torch.no_grad():
        for one, own in zip(spoken, places, strict=True):
            if not own:
                continue
            rows = ordinary(one.rows.to(device))
            code = dense(*coder.encode(rows), dictionary.size)
            for word, occurrences in own.items():
                for numbers in occurrences:
                    found[word][0].append(code[numbers].mean(0))
                    found[word][1].append(rows[numbers].mean(0))
    codes, tokens = ({w: torch.stack(pair[which]) for w, pair in found.items()} for which in (0, 1))
    return Codes(dictionary, tuple(texts), codes, tokens)


def _places(encoder, one: Spoken, wanted: list[str]) -> dict[str, list[list[int]]]:
    """Word -> the numbers of its tokens, for every occurrence in a prompt."""
    if wanted:
        found = {word: find_word(encoder, one.ids, word) for word in wanted}
        return {word: places for word, places in found.items() if places}
    every: dict[str, list[list[int]]] = {}
    for word, numbers in words_of(encoder, one.ids):
        if re.search(r"\w", word):
            every.setdefault(word, []).append(numbers)
    return every


def table(codes: Codes, count: int) -> str:
    """The strongest latents of each word with the corpus words that fire them, or those kept with their scores."""
    lines = []
    for word in codes.words:
        active = int((codes.mean(word) > 0).sum())
        lines.append(
            f"{word}: {active} {'kept' if codes.kept else 'active'} latents in {len(codes.words[word])} places"
        )
        for latent, value, score in _rows(codes, word, count):
            label = codes.dictionary.label(latent) or "no corpus words"
            lines.append(f"  {latent}: {value:.3f}{'' if score is None else f', score {score:.3g}'} ({label})")
    return "\n".join(lines)


def _rows(codes: Codes, word: str, count: int) -> list[tuple[int, float, float | None]]:
    if not codes.kept:
        return [(n, v, None) for n, v in codes.strongest(word, count)]
    mean, (latents, scores) = codes.mean(word), codes.kept[word]
    return [(int(n), float(mean[n]), float(s)) for n, s in zip(latents[:count], scores[:count], strict=True)]


def picture(codes: Codes, count: int) -> torch.Tensor:
    """The same as bars -> IMAGE [1, h, w, 3]."""
    rows = [
        (f"{word} #{latent} {codes.dictionary.label(latent, 2)}", value if score is None else score)
        for word in codes.words
        for latent, value, score in _rows(codes, word, count)
    ]
    return bars(rows, "scores of the kept latents" if codes.kept else "strongest latents of each word", adapt=True)

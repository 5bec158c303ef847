"""Single latents of a word, turned up or down in a finished conditioning (as Concept Steerers do, arXiv 2501.19066)."""

import re
from collections.abc import Mapping

import torch

from ..carriers.dictionary import Dictionary
from ..carriers.errors import CarrierMismatch
from ..kernels.sae import dense
from .gradients import ordinary
from .meanings import checked
from .text import NAMED, TOKENS, Encoder
from .token_features import find_word, read, spoken_encoder, words_of
from .variants import PROMPTS, Variants
from .words import placed

MODES = {"add": 0.0, "scale": 1.0}
"""Amounts that change nothing."""
ALIKE = 0.05
"""Largest distance of a row from the encoder's own over the length of that one, both as the dictionary sees them: above
the rounding of bf16, below what another word changes."""


def latents_of(text: str, dictionary: Dictionary) -> list[int]:
    """Numbers written with commas or blanks between. Raises: ValueError for what is no latent."""
    parts = [part for part in re.split(r"[,\s]+", text.strip()) if part]
    wrong = [p for p in parts if not p.isdecimal() or int(p) >= dictionary.size]
    if wrong or not parts:
        what = f"{', '.join(wrong)} is no latent of {dictionary.name}" if wrong else "latents is empty"
        raise ValueError(
            f"{what}; write numbers from 0 to {dictionary.size - 1} separated by commas, as Encode Words shows them."
        )
    return list(dict.fromkeys(int(p) for p in parts))


def same_words(encoder: Encoder, tokens: Mapping, noted: Mapping) -> bool:
    """Whether two prompts have the same tokens in the same rows; a learned row of ``noted`` goes with any token."""
    if encoder.slot not in noted:
        return False
    own, other = (placed(encoder, prompt)[0] for prompt in (tokens, noted))
    return len(own) == len(other) and all(
        row == place and (torch.is_tensor(mark) or not torch.is_tensor(token) and token == mark)
        for (token, row), (mark, place) in zip(own, other, strict=True)
    )


def steered(
    clip, conditioning: list, dictionary: Dictionary, text: str, word: str, latents: str, mode: str, amount: float
) -> tuple[list, str]:
    """The conditioning of ``text`` with latents of every occurrence of ``word`` changed, and a report.

    Without a word every row is changed, those of start, end and padding too, as Concept Steerers does it: text encoders
    gather there what the prompt says.

    add: ``amount`` on top, in units of the activations that Encode Words shows; scale: times ``amount``, of those that
    are active. What the dictionary does not say about the word stays as it is; the pooled vector too. An amount that
    changes nothing gives the conditioning itself.
    Raises: ValueError for a word, latent or mode that is not there, or another prompt's conditioning.
    """
    chosen = latents_of(latents, dictionary)
    if NAMED.search(text):
        raise ValueError("Where words stand behind a <name> is not known here; steer words of plain prompts.")
    if mode not in MODES:
        raise ValueError(f"Changing latents by {mode!r} is unknown; use one of {', '.join(MODES)}.")
    encoder, (one,) = spoken_encoder(clip), read(clip, [text])
    checked(clip, dictionary, one.rows.shape[1])
    places = [one.places[n] for place in find_word(encoder, one.ids, word.strip()) for n in place]
    if not word.strip():
        places = list(range(one.total))
    if not places:
        known = dict.fromkeys(w for w, _ in words_of(encoder, one.ids))
        raise ValueError(f"The prompt does not hold {word.strip()!r}; its words are: {', '.join(known)}.")
    coder, changed, lines = dictionary.coder(clip.patcher.load_device), [], []
    index, tokens = torch.tensor(chosen), clip.tokenize(text)

    def prepared(rows: torch.Tensor) -> torch.Tensor:
        return coder.prepared(rows.float().to(clip.patcher.load_device))[0]

    def of_this_text(cond: torch.Tensor, facts: Mapping) -> bool:
        if TOKENS in facts or clip.use_clip_schedule:  # hooks of a schedule change what the encoder says
            return same_words(encoder, tokens, facts.get(TOKENS, tokens))
        own = prepared(one.rows).repeat(len(cond), 1)
        apart = prepared(cond[:, list(one.places)].flatten(0, 1)) - own
        return bool((apart.norm(dim=-1) <= ALIKE * own.norm(dim=-1)).all())

    for cond, facts in conditioning:
        if cond.shape[1] != one.total or cond.shape[2] != dictionary.width:
            raise CarrierMismatch(
                f"The conditioning has {cond.shape[1]} rows of {cond.shape[2]} numbers, this prompt gives {one.total} "
                f"of {dictionary.width}; connect the conditioning of the same prompt from the same text encoder."
            )
        if any(isinstance(mark, Variants) for mark in facts.get(PROMPTS, ())):
            raise CarrierMismatch(
                "The conditioning has rows of its own per stage, layer or role, which steering one of them would not "
                "reach; use concepts with shared rows."
            )
        if not of_this_text(cond, facts):
            raise ValueError(
                f"The conditioning is not that of {text[:80]!r}: connect both to one text, and the text encoders that "
                "made the conditioning."
            )
        with torch.inference_mode(False), torch.no_grad():
            rows = ordinary(cond[:, places].float()).flatten(0, 1).to(clip.patcher.load_device)
            before = dense(*coder.encode(rows), dictionary.size)[:, chosen]
            step = torch.full_like(before, amount) if mode == "add" else before * (amount - 1)
            moved = coder.moved(rows, step, index.to(rows.device).expand(len(rows), -1))
            whole = ordinary(cond)
            whole[:, places] = moved.view(len(cond), len(places), -1).to(whole)
        changed.append([whole, {TOKENS: tokens, **facts}])
        was, now = before.mean(0).tolist(), (before + step).mean(0).tolist()
        lines = [
            f"{word.strip() or 'every row'} #{n}: {a:.3f} -> {b:.3f} ({dictionary.label(n) or 'no corpus words'})"
            for n, a, b in zip(chosen, was, now, strict=True)
        ]
    if amount == MODES[mode]:
        changed = conditioning
    return changed, "\n".join([f"{len(places)} tokens in the prompt", *lines])

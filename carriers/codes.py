"""What words are made of: their sparse codes in some prompts, and the latents of them that are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from .dictionary import Dictionary
from .errors import CarrierError


@dataclass(frozen=True)
class Codes:
    """Words of prompts in terms of a dictionary.

    Raises: CarrierError when a word was not encoded, or with another dictionary.
    """

    dictionary: Dictionary
    texts: tuple[str, ...]
    words: Mapping[str, torch.Tensor]
    """Word -> activations [occurrences, m], each the mean over the word's tokens."""
    tokens: Mapping[str, torch.Tensor]
    """Word -> its dense features [occurrences, d], means over the word's tokens too."""
    kept: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Pruned: word -> latents and scores [n], best first. Empty: all latents."""

    def __post_init__(self):
        if not self.words or self.words.keys() != self.tokens.keys():
            raise CarrierError("There is no word; write words that the prompt holds, separated by commas.")
        with torch.inference_mode(False):
            for name in ("words", "tokens"):
                own = {k: v.detach().to("cpu", torch.float32, copy=True) for k, v in getattr(self, name).items()}
                object.__setattr__(self, name, own)
            kept = {k: tuple(v.detach().cpu().clone() for v in pair) for k, pair in self.kept.items()}
            object.__setattr__(self, "kept", kept)
        for word, value in self.words.items():
            if value.dim() != 2 or value.shape[1] != self.dictionary.size or not len(value):
                raise CarrierError(
                    f"The code of {word!r} has shape {tuple(value.shape)}, not (occurrences, {self.dictionary.size})."
                )

    def mean(self, word: str) -> torch.Tensor:
        """Activations [m], mean over the occurrences; of a pruned word 0 but for the kept latents."""
        whole = self.words[word].mean(0)
        if not self.kept:
            return whole
        latents = self.kept[word][0]
        return torch.zeros_like(whole).index_copy(0, latents, whole[latents])

    def strongest(self, word: str, count: int) -> list[tuple[int, float]]:
        """Latents with their mean activation, strongest first."""
        found = self.mean(word).topk(min(count, self.dictionary.size))
        return [(int(i), float(v)) for v, i in zip(found.values, found.indices, strict=True) if v > 0]


def contrast(codes: Codes) -> dict[str, torch.Tensor]:
    """Scores [m] per word: its share of activation on each latent less that of everything else.

    As SAeUron's feature selection (arXiv 2501.18052); everything else is the mean of the other words of ``codes`` and
    of the corpus that the dictionary was named by, as far as there are any.
    """
    share = {word: _share(values.mean(0)) for word, values in codes.words.items()}
    usage = codes.dictionary.tensors.get("usage")
    scores = {}
    for word, own in share.items():
        others = [v for k, v in share.items() if k != word]
        rest = [torch.stack(others).mean(0)] if others else []
        rest += [_share(usage)] if usage is not None else []
        scores[word] = own - torch.stack(rest).mean(0) if rest else own
    return scores


def _share(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum().clamp_min(1e-12)


def prune(
    codes: Codes, scores: Mapping[str, torch.Tensor], keep: int = 32, at_least: float = 0.5, exclusive: bool = False
) -> Codes:
    """The ``keep`` latents of each word with the highest positive scores.

    ``at_least``: share of the word's occurrences in which a latent must be active. ``exclusive``: every latent belongs
    to the word that scores it highest.
    Raises: CarrierError naming the words of which nothing would be left.
    """
    words = list(codes.words)
    table = torch.stack([scores[word].float().cpu() for word in words])
    active = torch.stack([(codes.words[w] > 0).float().mean(0) >= max(at_least, 1e-9) for w in words])
    table = torch.where(active, table, 0.0)
    if exclusive:
        table = torch.zeros_like(table).scatter(0, table.argmax(0)[None], table.amax(0)[None])
    best = table.topk(min(keep, table.shape[1]))
    chosen = {w: (best.indices[n][v > 0], v[v > 0]) for n, (w, v) in enumerate(zip(words, best.values, strict=True))}
    empty = [word for word, (latents, _) in chosen.items() if not len(latents)]
    if empty:
        raise CarrierError(
            f"No latent of {', '.join(map(repr, empty))} is left: lower active_in, turn exclusive off, or use other "
            "words."
        )
    return replace(codes, kept=chosen)

"""Attention held to the class word's: a concept's maps against those of the same prompts around its class word.

The reference prompt's keys ride along in the same pass (attention.py), so it costs no second one. SeFi-IDE (arXiv
2402.00631) compares every word's map, AttnDreamBooth (2024) mean and variance of that of each of the concept's rows.
"""

import math

import torch
import torch.nn.functional as F

from ..kernels.attention import LOSSES, OF_CONCEPT, attention_loss
from .attention import AttentionTap, both, chosen
from .captions import Prompts
from .positions import aligned


class ClassAttention:
    """Raises: ValueError for an unknown kind of loss or choice of layers."""

    def __init__(self, encoder, prompts: Prompts, texts: list[str], word: str, kind: str, layers: str):
        """``prompts``: of ``texts``, in which ``{}`` stands for the concept, in the reference for ``word``;
        ``encoder``: whose rows are paired; ``kind``: of the loss (kernels/attention.py); ``layers``: whose maps."""
        if kind not in LOSSES:
            raise ValueError(f"Unknown choice {kind!r}; known: {', '.join(LOSSES)}.")
        chosen(layers)
        self.encoder, self.prompts, self.kind, self.layers = encoder, prompts, kind, layers
        self.reference = Prompts(prompts.clip, texts, word, {"": {}})
        self.known: dict[int, tuple] = {}

    def losses(self, session, weight: float, texts: list[int], *given) -> dict[str, torch.Tensor]:
        """A session's diffusion loss of ``given`` (``Session.losses``), and the weighted loss of the maps of captions
        ``texts``, by number."""
        tap = self.tap(texts)

        def condition(*args):
            entries, change = session.condition(*args)
            return entries, both(change, tap)

        try:
            diffusion = session.diffusion(*given, condition)
            layers = list(tap.take().values())
        finally:
            tap.records.clear()
        return {"diffusion": diffusion, "attention": weight * torch.stack(layers).mean()}

    def tap(self, texts: list[int]) -> AttentionTap:
        """Compares the pass of ``texts`` with the same prompts around the class word."""
        facts = [self.compared(text) for text in texts]
        length = math.lcm(*(context.shape[1] for context, *_ in facts))
        reference = torch.cat([c.repeat(1, length // c.shape[1], 1) for c, *_ in facts])

        def look(q, k, v, heads, keys):
            own = _stacked([columns for _, columns, _ in facts], k.shape[1]).to(q.device)
            other = _stacked([columns for *_, columns in facts], length).to(q.device)
            return None, attention_loss(q.detach(), k, keys, heads, own, other, self.kind)

        return AttentionTap(look, self.layers, reference)

    def compared(self, text: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reference context [1, r, width] of a caption, and the columns of both prompts that are compared."""
        if text not in self.known:
            with torch.no_grad():
                context = self.reference.encode(text, {})[0]
            own, other, concept = self.columns(text)
            if self.kind in OF_CONCEPT:
                own, other = _each(own[:, concept], other[:, concept])
            self.known[text] = context, own, other
        return self.known[text]

    def columns(self, text: int) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """As ``positions.aligned``, of a caption."""
        return aligned(self.encoder, self.prompts.tokens[text], self.reference.tokens[text])


def _each(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of single rows, one for each that ``own`` [m, c] weighs, and for each the column of ``other`` [r, c]."""
    column, row = own.T.nonzero(as_tuple=True)
    return F.one_hot(row, len(own)).T.to(own), other[:, column]


def _stacked(columns: list[torch.Tensor], length: int) -> torch.Tensor:
    """Columns [m, c] of several prompts as [b, length, most]: repeated or cut as the context is, filled with zeros."""
    most = max(c.shape[1] for c in columns)
    return torch.stack([F.pad(c, (0, most - c.shape[1]))[:length].repeat(max(1, length // len(c)), 1) for c in columns])

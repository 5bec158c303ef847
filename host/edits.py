"""Key-locked edits in prompts (Perfusion, arXiv 2305.01644): a row that the encoder reads, and the edit behind it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..carriers.concept import Concept
from ..carriers.edit import DIRECTION, DUAL, KEYS, VALUES, rows
from ..carriers.errors import CarrierMismatch
from ..kernels.rank_one import edited


class Edit(NamedTuple):
    """What one concept does to the rows that one layer reads for K or for V."""

    concept: Concept
    layer: int
    role: int
    """0 is K, 1 is V."""
    strength: float


def read_edit(concept: Concept) -> Concept:
    """An ``edit`` concept as ``tokens`` [1, layers, 2, 1, width]: the same row for each layer and role, which its edit
    then parts."""
    shape = (1, len(concept.info["layers"]), 2, 1, -1)
    return Concept(concept.name, "tokens", {k: v.expand(shape) for k, v in rows(concept.tensors).items()}, concept.info)


def with_edits(contexts: torch.Tensor, edits: Sequence[Edit]) -> torch.Tensor:
    """Contexts [n, tokens, width] as the edits leave them, all of them together.

    Raises: CarrierMismatch for an edit of rows of another width.
    """
    for edit in edits:
        if (width := len(edit.concept.tensors[DIRECTION])) != contexts.shape[-1]:
            raise CarrierMismatch(
                f"Concept <{edit.concept.name}> edits rows of {width} numbers, and this CLIP gives rows of "
                f"{contexts.shape[-1]}; learn it again with this model, or connect the model it was learned on."
            )

    def numbers(of_edit) -> torch.Tensor:
        return torch.tensor([of_edit(edit) for edit in edits]).to(contexts)

    def stacked(of_edit) -> torch.Tensor:
        return torch.stack([of_edit(edit) for edit in edits]).to(contexts)

    def target(edit: Edit) -> torch.Tensor:
        found = edit.concept.tensors[VALUES if edit.role else KEYS]
        return found[min(edit.layer, len(found) - 1)]

    return edited(
        contexts,
        stacked(lambda e: e.concept.tensors[DIRECTION]),
        stacked(lambda e: e.concept.tensors[DUAL]),
        stacked(target),
        numbers(lambda e: e.concept.info["beta"]),
        numbers(lambda e: e.concept.info["tau"]),
        numbers(lambda e: e.strength),
    )

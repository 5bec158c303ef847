"""What the demo and the benchmarks say about pictures: likeness to a concept, and whether the prompt was followed."""

import numpy as np
import torch

from .judge import CLASSES, Judge, whole


def bootstrap(values, clusters=None, seed: int = 0, level: float = 0.95, draws: int = 2000) -> tuple:
    """Mean of ``values`` [n] and the ends of its percentile interval, as floats.

    ``clusters`` [n], for example the concept of every value: whole clusters are drawn, so that many pictures of one
    concept do not pass for many concepts (Field and Welsh 2007, cluster bootstrap).
    Raises: ValueError without values, or when the lengths differ.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"bootstrap needs a list of at least one value, not shape {list(values.shape)}")
    groups = np.arange(len(values)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} values but {len(groups)} cluster names")
    sums, counts = np.bincount(groups, values), np.bincount(groups)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def fidelity(judge: Judge, pictures, references, masks=None) -> torch.Tensor:
    """Mean cosine [b] of every picture's object to the reference objects, held out from learning.

    ``references`` [r, 128, 128, 3] with object ``masks`` [r, 128, 128]; without masks whole pictures are compared,
    which is how a style is judged.
    """
    if masks is None:
        return (judge.embed(pictures, whole(pictures)) @ judge.embed(references, whole(references)).T).mean(1)
    return (judge.embed(pictures) @ judge.embed(references, masks).T).mean(1)


def hits(judge: Judge, pictures, wanted: list[dict[str, str]]) -> list[dict[str, bool]]:
    """For every picture, factor -> whether the judge sees the value that ``wanted`` names.

    Raises: ValueError for an unknown factor or value, or when the counts differ.
    """
    if len(pictures) != len(wanted):
        raise ValueError(f"{len(pictures)} pictures but {len(wanted)} descriptions of what they should show")
    for named in wanted:
        for factor, value in named.items():
            if value not in CLASSES.get(factor, ()):
                raise ValueError(f"unknown {factor} {value!r}; known: {', '.join(CLASSES.get(factor, CLASSES))}")
    seen = judge.factors(pictures)
    return [{f: CLASSES[f][seen[f][i]] == v for f, v in named.items()} for i, named in enumerate(wanted)]


def following(judge: Judge, pictures, wanted: list[dict[str, str]]) -> torch.Tensor:
    """Share [b] of the factors named in ``wanted`` that the judge sees; nan where nothing is named."""
    return torch.tensor([sum(h.values()) / len(h) if h else float("nan") for h in hits(judge, pictures, wanted)])


def accuracy(judge: Judge, pictures, wanted: list[dict[str, str]]) -> dict[str, float]:
    """Factor -> share of right pictures among those whose ``wanted`` names it; factors nobody names are left out."""
    found = hits(judge, pictures, wanted)
    table = {factor: [h[factor] for h in found if factor in h] for factor in CLASSES}
    return {factor: sum(values) / len(values) for factor, values in table.items() if values}

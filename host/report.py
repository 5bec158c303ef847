"""Sentences for people: what was learned, what is inside a concept."""

import math

import torch

from ..carriers import edit
from ..carriers.concept import Concept
from .learn import Learned
from .neti import read
from .text import as_tokens, encoders


def learned_text(done: Learned) -> str:
    """Summary of a learning run."""
    info = done.concept.info
    change = 100 * (done.after / done.before - 1) if done.before else 0.0
    lines = [
        f"<{done.concept.name}>: {info['steps']} steps in {done.seconds:.1f} s",
        f"loss on fixed noise: {done.before:.5f} before, {done.after:.5f} after ({change:+.1f}%)",
        *done.concept.contents(),
        f"NOT SAVED: {done.trouble}" if done.trouble else f"saved: output/concepts/autosave/{done.saved.name}",
    ]
    base = done.terms.get("diffusion", [])
    for name, curve in done.terms.items():
        if name != "diffusion" and base:
            pairs = list(zip(curve, base, strict=True))[-max(1, len(curve) // 10) :]
            pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
            last = len(pairs)
            part, whole = (sum(values) / last for values in zip(*pairs, strict=True))
            lines.append(
                f"{name} loss, weighted: {part:.3e} over the last {last} steps, {part / max(whole, 1e-12):.3g} of the "
                "diffusion loss"
            )
    if done.after >= done.before:
        lines.append("The loss did not fall: raise the learning rate or the steps, or check pictures and start word.")
    return "\n".join(lines)


def _rows(concept: Concept) -> dict[str, torch.Tensor]:
    """Rows [..., width] per encoder key; of a mapper one per layer, at half of the noise schedule; of an edit one."""
    if concept.kind == "edit":
        return edit.rows(concept.tensors)
    if concept.kind != "mapper":
        held = as_tokens(concept)
        return dict(held.tensors) if held else {}
    return {k: v[:, :, 0] for k, v in read(concept, 1)[0].tensors.items()}


def nearest_words(encoder, rows: torch.Tensor, count: int = 5) -> list[list[tuple[str, float]]]:
    """For each row [n, width] the vocabulary entries with the highest cosine, best first."""
    table = encoder.vocabulary.detach().float()
    table = table / table.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    rows = rows.to(table)
    best = (rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-8) @ table.T).topk(count)
    return [
        [(encoder.spelt([int(i)]), float(c)) for c, i in zip(cosine, index, strict=True)]
        for cosine, index in zip(best.values, best.indices, strict=True)
    ]


def inspect_text(concept: Concept, clip=None, count: int = 5) -> tuple[str, list[tuple[str, float]]]:
    """What a concept holds, as text, and (label, cosine) pairs for a picture."""
    lines, marks, learned = [concept.summary()], [], _rows(concept)
    for encoder in encoders(clip) if clip is not None else []:
        rows = learned.get(encoder.key)
        if rows is None or rows.shape[-1] != encoder.width:
            lines.append(f"{encoder.key}: nothing learned for this text encoder")
            continue
        norms = encoder.vocabulary.detach().float().norm(dim=-1)
        lines.append(f"{encoder.key}: norm of the vocabulary {float(norms.mean()):.3f} +- {float(norms.std()):.3f}")
        for number, best in enumerate(nearest_words(encoder, rows.flatten(0, -2), count)):
            norm = float(rows.flatten(0, -2)[number].norm())
            lines.append(
                f"  vector {number + 1}: norm {norm:.3f}, nearest " + ", ".join(f"{w} {c:.2f}" for w, c in best)
            )
            marks += [(f"{encoder.key} {number + 1}: {w}", c) for w, c in best]
    return "\n".join(lines), marks

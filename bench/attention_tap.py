"""What it costs to keep two words' maps of SD1.5's sixteen cross-attentions at 512 px, against attention alone.

``plain``: torch's fused product, as the host attends; ``ours``: the same and the maps, mean over heads; ``stored``:
every map, as diffusers' ``Attention.get_attention_scores`` gives it to prompt-to-prompt's store. Batches of two, eight
heads, fp32; forward without gradient, and with the backward pass to queries, keys and values. The sides take turns in
one process, in every order, as each leaves its memory to the next; outputs and maps are compared first. Then a step of
Learn K/V Tokens on half-width SD1.5 at 256 px with its attention loss, on maps of half the latent's side and on all,
against one without. ``nox -s bench -- attention_tap``
"""

import itertools
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from . import half, toy
from .runner import RESULTS, machine, noisy, ratio, reference

LAYERS = ((4096, 40),) * 5 + ((1024, 80),) * 5 + ((256, 160),) * 5 + ((64, 160),)
"""Pixels, and numbers per head."""
BATCH, HEADS, TEXT, WORDS, ROUNDS, GOAL = 2, 8, 77, (5, 7), 12, 1.05


def plain(q, k, v, columns):
    from concepts.kernels.attention import split_heads

    q, k, v = (split_heads(x, HEADS) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), ()


def ours(q, k, v, columns):
    from concepts.kernels.attention import attend

    out, maps = attend(q, k, v, HEADS, columns)
    return out, (maps,)


def stored(q, k, v, columns):
    from concepts.kernels.attention import split_heads

    q, k, v = (split_heads(x, HEADS).flatten(0, 1) for x in (q, k, v))
    empty = q.new_empty(len(q), q.shape[1], k.shape[1])
    scores = torch.baddbmm(empty, q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5).softmax(-1)
    return (scores @ v).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2), (scores,)


SIDES = {"plain": plain, "ours": ours, "stored": stored}


def inputs(grad: bool) -> list:
    draw = torch.Generator().manual_seed(0)
    shapes = [[(BATCH, n, HEADS * width) for n in (pixels, TEXT, TEXT)] for pixels, width in LAYERS]
    return [[torch.randn(s, generator=draw).requires_grad_(grad) for s in three] for three in shapes]


def seconds(side, layers: list, columns: torch.Tensor, grad: bool) -> float:
    """One pass through all layers, and back."""
    begun = time.perf_counter()
    with torch.set_grad_enabled(grad):
        kept = [side(*three, columns) for three in layers]
        if grad:
            followed = [t for out, maps in kept for t in (out, *(maps if side is ours else ()))]
            sum(t.sum() for t in followed).backward()
    return time.perf_counter() - begun


def check(layers: list, columns: torch.Tensor) -> dict:
    """Bytes that are kept. Raises: AssertionError when outputs or maps differ."""
    held = {"ours": 0, "stored": 0}
    with torch.no_grad():
        for three in layers:
            (expected, _), (out, (maps,)), (_, (scores,)) = (side(*three, columns) for side in SIDES.values())
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
            wanted = scores.unflatten(0, (BATCH, HEADS)).mean(1)[..., list(WORDS)]
            torch.testing.assert_close(maps, wanted, atol=1e-6, rtol=1e-4)
            held["ours"] += maps.nbytes
            held["stored"] += scores.nbytes
    return held


def steps(parts, layers: str, count: int = 4) -> float:
    """Median seconds of a step of Learn K/V Tokens; ``layers``: whose maps its attention loss compares, or none."""
    from concepts.host.gradients import training
    from concepts.host.learn_kv import KVSession, KVSettings

    weight, seconds = (0.0, []) if layers == "none" else (0.003, [])
    chosen = {} if layers == "none" else {"attention_layers": layers}
    with torch.inference_mode():
        session = KVSession(*parts, KVSettings("bench", init_text=half.WORD, attention_weight=weight, **chosen))
        with training(parts[0], parts[1].patcher):
            session.begin()
            learned = {k: v.requires_grad_(True) for k, v in session.parameters.items()}
            for step in range(count + 1):
                begun = time.perf_counter()
                session.step_loss(learned, step, 0).backward()
                seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])  # the first warms up


def main(options, rest) -> int:
    load, products = os.getloadavg()[0], [reference()]
    modules = half.peers()
    toy.host()
    parts = half.parts(*modules)
    del modules
    columns = torch.eye(TEXT)[None, :, list(WORDS)]
    held, table = check(inputs(False), columns), {}
    for name, grad in {"forward": False, "with backward": True}.items():
        layers, taken = inputs(grad), {s: [] for s in SIDES}
        orders = itertools.cycle(itertools.permutations(SIDES))
        for number, order in zip(range(ROUNDS + 1), orders, strict=False):
            for which in order:
                spent = seconds(SIDES[which], layers, columns, grad)
                if number:  # the first warms up
                    taken[which].append(spent)
        products.append(reference())
        table[name] = {which: ratio(taken[which], taken["plain"]) for which in ("ours", "stored")}
        print(name, {k: f"{v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f}) of plain attention" for k, v in table[name].items()})
    taken = {which: [] for which in ("none", "half", "all")}
    for number in range(options.repeats):
        for which in taken if number % 2 else reversed(taken):
            taken[which].append(steps(parts, which))
    products.append(reference())
    table["step with the loss"] = {which: ratio(taken[which], taken["none"]) for which in ("half", "all")}
    for which, found in table["step with the loss"].items():
        print(f"attention loss, {which}: {found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f}) of a step without")
    print(f"kept: {held['ours'] / 2**20:.2f} MiB of {held['stored'] / 2**20:.1f}")
    why = noisy(products, load)
    if why and not options.accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    report = {"case": "attention_tap", "noise": why, "goal": GOAL, "table": table, "kept": held, "machine": machine()}
    (RESULTS / "attention_tap.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

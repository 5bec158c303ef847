"""Mutual nearest neighbours of two grids against kornia's ``match_mnn`` and the plain matrix of cosines.

Features of 1,280 channels in fp32: random, with 0.7 of noise on either side, the second side permuted. kornia takes
normalised ones, made before its clock starts. The sides take turns in one process, each in memory that the others have
left to the system; all must find the same pairs. ``nox -s bench -- match_vs_kornia [64 96 128]``
"""

import ctypes
import gc
import json
import os
import statistics
import sys
import threading
import time

import torch
import torch.nn.functional as F

from . import toy
from .runner import RESULTS, Peak, machine, noisy, ratio, reference

SIZES, CHANNELS, NOISE = (64, 96, 128), 1280, 0.7
MOST = 3000
"""MB of distances and comparisons above which kornia is left out."""
GOALS = {96: {"times faster": 4.0, "share of memory": 1 / 8}, 128: {"MB": 100.0}}


class Sampled:
    """Peak resident memory in MB above that at the start, looked at every two milliseconds."""

    def __enter__(self):
        gc.collect()
        give_back()
        self.start = self.high = Peak.read("VmRSS")
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self):
        while not self.over.wait(0.002):
            self.high = max(self.high, Peak.read("VmRSS"))

    def __exit__(self, *reason):
        self.over.set()
        self.thread.join()
        self.megabytes = self.high - self.start


def give_back() -> None:
    """Freed memory to the system, else one side's peak hides in what another one left."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def features(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two grids, [side * side, CHANNELS] each."""
    g = torch.Generator().manual_seed(side)
    base = torch.randn(side * side, CHANNELS, generator=g)
    a = base + NOISE * torch.randn(base.shape, generator=g)
    base = base[torch.randperm(len(base), generator=g)]
    return a, base.add_(torch.randn(base.shape, generator=g), alpha=NOISE)


def plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Pairs [k, 2] out of the whole matrix."""
    table = F.normalize(a) @ F.normalize(b).T
    nearest, back = table.argmax(1), table.argmax(0)
    first = torch.arange(len(a))
    mutual = back[nearest] == first
    return torch.stack([first[mutual], nearest[mutual]], 1)


def ours(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from concepts.kernels.match import match

    return torch.stack(match(a, b)[:2], 1)


def kornia(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from kornia.feature import match_mnn

    return match_mnn(a, b)[1]


def measured(side: int, repeats: int, products: list[float]) -> dict:
    """Side -> seconds and MB of each turn. Raises: AssertionError when two sides find different pairs."""
    a, b = features(side)
    # cdist's matrix, the copy that its minimum needs, and the product they come from
    sides = {"plain": plain, "ours": ours}
    if 2 * 4 * len(a) * len(b) / 1e6 < MOST:
        sides = {"kornia": kornia, **sides}
    found = {name: {"seconds": [], "MB": []} for name in sides}
    pairs = None
    for turn in range(repeats + 1):
        for name in list(sides) if turn % 2 else reversed(sides):
            given = (F.normalize(a), F.normalize(b)) if name == "kornia" else (a, b)
            with Sampled() as memory:
                begun = time.perf_counter()
                these = sides[name](*given)
                seconds = time.perf_counter() - begun
            del given
            these = sorted(these.tolist())
            pairs = pairs or these
            assert these == pairs, f"{name} found other pairs at {side}x{side}"
            print(f"{side}x{side} {name}: {seconds:.3f} s, {memory.megabytes:.0f} MB", file=sys.stderr, flush=True)
            if turn:  # the first one also loads and warms up
                found[name]["seconds"].append(seconds)
                found[name]["MB"].append(memory.megabytes)
        products.append(reference())
    return {"pairs": len(pairs), "cells": len(a), "sides": found}


def summary(case: dict) -> dict:
    """Side -> best and median seconds, peak MB, its seconds over ours (median, from, to), our share of its MB."""
    ours = case["sides"]["ours"]
    table = {}
    for name, one in case["sides"].items():
        table[name] = {
            "best": min(one["seconds"]),
            "median": statistics.median(one["seconds"]),
            "MB": max(one["MB"]),
            "times ours": ratio(one["seconds"], ours["seconds"]),
            "share of memory": max(ours["MB"]) / max(one["MB"]) if max(one["MB"]) > 0 else None,
        }
    return table


def main(options, rest) -> int:
    sizes = [int(size) for size in rest] or SIZES
    load, products = os.getloadavg()[0], [reference()]
    toy.host()
    cases = {side: measured(side, options.repeats, products) for side in sizes}
    why = noisy(products, load)
    if why and not options.accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    tables = {side: summary(case) for side, case in cases.items()}
    for side, table in tables.items():
        print(f"{side}x{side}, {CHANNELS} channels, {cases[side]['pairs']} pairs, the same from all sides")
        for name, row in table.items():
            middle, low, high = row["times ours"]
            print(
                f"  {name:8s} best {row['best']:.3f} s  median {row['median']:.3f} s  peak {row['MB']:.0f} MB  "
                f"{middle:.2f} ({low:.2f}..{high:.2f}) times ours"
            )
    report = {"case": "match_vs_kornia", "noise": why, "reference_gflops": products, "machine": machine()}
    report |= {"goals": GOALS, "table": tables, "runs": cases}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "match_vs_kornia.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

"""Runs the two sides of a case in processes of their own, by turns, and refuses to report on a noisy machine."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

STEADY = 0.7
"""Slowest reference product, as a share of the fastest, that still counts as a quiet machine."""
RESULTS = Path(__file__).resolve().parent / "results"


def reference() -> float:
    """GFLOP/s of a fixed matrix product: the yardstick for noise."""
    a, b = torch.randn(1024, 1280), torch.randn(1280, 4096)
    a @ b
    begun = time.perf_counter()
    for _ in range(10):
        a @ b
    return 10 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - begun) / 1e9


def noisy(products: list[float], load: float) -> str:
    """Why the machine is too noisy to report, or an empty string."""
    if load > 1.0:
        return f"the load average was {load:.2f} before the start; end other programs and try again"
    if min(products) < STEADY * max(products):
        span = f"{min(products):.0f} to {max(products):.0f} GFLOP/s"
        return f"the reference product varied from {span}; try again on a quiet machine"
    return ""


def ratio(peer: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of the paired runs."""
    pairs = [p / o for p, o in zip(peer, ours, strict=True)]
    return statistics.median(pairs), min(pairs), max(pairs)


def side(case: str, which: str) -> dict:
    """One process: the side's own JSON. Raises: RuntimeError with its last words when it fails."""
    done = subprocess.run([sys.executable, "-m", "bench", case, "--side", which], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case} {which} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def compare(case: str, check, repeats: int, accept_noise: bool) -> int:
    """Runs both sides ``repeats`` times; prints and writes ratios. Returns the exit status: 3 when too noisy.

    ``check(ours, peer)`` raises AssertionError when the two did not compute the same thing.
    """
    load, products, runs = os.getloadavg()[0], [reference()], {"peer": [], "ours": []}
    for number in range(repeats):
        for which in ("peer", "ours") if number % 2 == 0 else ("ours", "peer"):
            runs[which].append(side(case, which))
            products.append(reference())
            print(
                f"{which} {number + 1}/{repeats}: {runs[which][-1]['seconds']:.3f} s a step",
                file=sys.stderr,
                flush=True,
            )
    why = noisy(products, load)
    if why and not accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    checked = [check(o, p) for o, p in zip(runs["ours"], runs["peer"], strict=True)]
    table = {}
    for key in ("seconds", "peak_above_weights", "peak_total"):
        middle, low, high = ratio([r[key] for r in runs["peer"]], [r[key] for r in runs["ours"]])
        table[key] = {
            "peer / ours": middle,
            "from": low,
            "to": high,
            **{s: statistics.median(r[key] for r in runs[s]) for s in ("peer", "ours")},
        }
        both = f"peer {table[key]['peer']:.4g}  ours {table[key]['ours']:.4g}"
        print(f"{key:20s} {both}  peer/ours {middle:.2f} ({low:.2f}..{high:.2f})")
    print("largest relative difference of the losses:", f"{max(checked):.1e}")
    RESULTS.mkdir(exist_ok=True)
    report = {
        "case": case,
        "noise": why,
        "reference_gflops": products,
        "machine": machine(),
        "versions": runs["ours"][0]["versions"],
        "loss_difference": max(checked),
        "table": table,
        "runs": runs,
    }
    (RESULTS / f"{case}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

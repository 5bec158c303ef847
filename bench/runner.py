"""Runs the sides of a case in processes of their own, by turns, and refuses to report on a noisy machine."""

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


def device() -> str:
    """Name of the GPU, else of the processor."""
    facts = machine()
    return facts["cpu"] if facts["gpu"] == "none" else facts["gpu"]


def machine() -> dict:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cpu": name,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def compare(case: str, repeats: int, accept_noise: bool, check=None, sides: tuple[str, ...] = ("ours",)) -> int:
    """Runs the peer and all sides ``repeats`` times; prints and writes ratios. Returns: exit status, 3 when too noisy.

    A side prints ``seconds``, ``peak_above_weights``, ``peak_total`` and ``versions``. ``check(side, peer)`` gives a
    difference of the two and raises AssertionError when they did not compute the same thing.
    """
    load, products, runs = os.getloadavg()[0], [reference()], {s: [] for s in ("peer", *sides)}
    for number in range(repeats):
        for which in list(runs) if number % 2 == 0 else reversed(runs):
            runs[which].append(side(case, which))
            products.append(reference())
            seconds = runs[which][-1]["seconds"]
            print(f"{which} {number + 1}/{repeats}: {seconds:.3f} s a step", file=sys.stderr, flush=True)
    why = noisy(products, load)
    if why and not accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    report = {"case": case, "noise": why, "reference_gflops": products, "machine": machine(), "table": {}, "runs": runs}
    for which in sides:
        table = report["table"][which] = {}
        for key in ("seconds", "peak_above_weights", "peak_total"):
            middle, low, high = ratio([r[key] for r in runs["peer"]], [r[key] for r in runs[which]])
            values = {s: statistics.median(r[key] for r in runs[s]) for s in ("peer", which)}
            table[key] = {"peer / ours": middle, "from": low, "to": high, **values}
            both = f"peer {values['peer']:.4g}  {which} {values[which]:.4g}"
            print(f"{key:20s} {both}  ratio {middle:.2f} ({low:.2f}..{high:.2f})")
        if check:
            table["loss_difference"] = max(check(o, p) for o, p in zip(runs[which], runs["peer"], strict=True))
            print(f"largest relative difference of the losses: {table['loss_difference']:.1e}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{case}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


class Peak:
    """Resident memory in MB: at the start of the loop, and its peak since."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self.read("VmRSS")

    @staticmethod
    def read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    def report(self) -> dict:
        high = self.read("VmHWM")
        return {"peak_total": high, "peak_above_weights": high - self.start}


def timed(losses: list[float], stamps: list[float], peak: Peak, versions: dict) -> dict:
    """What a side prints: the median time between ``stamps``."""
    steps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    return {"seconds": statistics.median(steps), "losses": losses, "versions": versions, **peak.report()}


def same_losses(ours: dict, peer: dict) -> float:
    """Largest relative difference of the losses. Raises: AssertionError above 1e-4."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    assert worst < 1e-4, f"the two sides did not compute the same losses: {worst:.1e} apart"
    return worst

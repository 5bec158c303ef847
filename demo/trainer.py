"""The training loop of every part of the toy world: seeded, resumable, averaged."""

import math
import time
from pathlib import Path

import numpy as np
import torch


def has_half() -> bool:
    """Whether the processor computes in bf16; elsewhere torch emulates it, far slower than fp32."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def half():
    """bf16 where that is faster."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_half())


def orthogonalised(gradient, coefficients, steps: int, eps: float) -> torch.Tensor:
    """torch.optim.Muon's Newton-Schulz iteration in fp32."""
    a, b, c = coefficients
    x = gradient.mT if len(gradient) > gradient.shape[1] else gradient
    x = x / x.norm().clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if len(gradient) > gradient.shape[1] else x


class Trainer:
    """Adam with warm-up and cosine decay, EMA, and a resumable state on disk.

    Matrices whose name ``orthogonal`` picks are learned by Muon (torch.optim.Muon) at the same rate instead.
    """

    def __init__(
        self,
        name: str,
        modules: dict,
        work: Path,
        steps: int,
        rate: float,
        decay: float = 0.01,
        ema: float = 0.999,
        orthogonal=lambda name: False,
    ):
        self.name, self.modules, self.file, self.steps, self.rate, self.ema = (
            name,
            modules,
            work / f"{name}.pt",
            steps,
            rate,
            ema,
        )
        self.parameters = {
            f"{m}.{k}".lstrip("."): p
            for m, module in modules.items()
            for k, p in module.named_parameters()
            if p.requires_grad
        }
        flat = {k for k in self.parameters if not orthogonal(k)}
        self.optimisers = [
            torch.optim.AdamW(
                [p for k, p in self.parameters.items() if k in flat],
                lr=rate,
                betas=(0.9, 0.99),
                weight_decay=decay,
                fused=True,
            )
        ]
        if len(flat) < len(self.parameters):
            inner = [p for k, p in self.parameters.items() if k not in flat]
            if not has_half():
                torch.optim._muon._zeropower_via_newtonschulz = orthogonalised
            self.optimisers.append(torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.step = 0
        if self.file.is_file():
            where = next(iter(self.parameters.values())).device
            state = torch.load(self.file, weights_only=True, map_location=where)
            self.step, self.average = state["step"], state["average"]
            for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(kept)
            with torch.no_grad():
                for k, p in self.parameters.items():
                    p.copy_(state["parameters"][k])

    def run(self, loss_of, report=None, every: int = 250):
        """Calls ``loss_of(step, generator)`` until done; every draw depends on the step alone."""
        begun, first, losses = time.time(), self.step, []
        while self.step < self.steps:
            step = self.step
            rate = self.rate * min(1, (step + 1) / 200)
            rate *= 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / self.steps))
            for group in [g for optimiser in self.optimisers for g in optimiser.param_groups]:
                group["lr"] = rate
            loss = loss_of(step, torch.Generator().manual_seed(step * 7919 + 17))
            for p in self.parameters.values():
                p.grad = None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
            losses.append(loss.item())
            keep = min(self.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - keep)
            self.step += 1
            if self.step % every == 0 or self.step == self.steps:
                spent = time.time() - begun
                print(
                    f"{self.name} {self.step}/{self.steps} loss {np.mean(losses[-every:]):.5f} "
                    f"{spent / (self.step - first):.3f} s/step",
                    flush=True,
                )
                torch.save(
                    {
                        "step": self.step,
                        "average": self.average,
                        "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                        "parameters": {k: p.detach() for k, p in self.parameters.items()},
                    },
                    self.file,
                )
                if report and self.step % (4 * every) == 0:
                    self.with_average(report)

    def with_average(self, call):
        """Runs ``call()`` with the averaged weights in place."""
        own = {k: p.detach().clone() for k, p in self.parameters.items()}
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(self.average[k])
        try:
            with torch.no_grad():
                return call()
        finally:
            with torch.no_grad():
                for k, p in self.parameters.items():
                    p.copy_(own[k])

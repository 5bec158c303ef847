"""The learning loop: small learned tensors, any loss, exact continuation."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.optim.adam import adam


class Diverged(RuntimeError):
    """Loss or gradient is not finite; the learned tensors are still those of the last finished step, whose own loss was
    taken before it: continued from there, the same draw breaks again."""


def _clip(grads: list[torch.Tensor], most: float) -> None:
    """Shortens gradients in place as torch's clip_grad_norm_ does; 0 leaves them."""
    if most and grads:
        norm = torch.stack([g.norm() for g in grads]).norm()
        torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))


@dataclass(frozen=True)
class Adam:
    """AdamW (arXiv 1711.05101); without decay and clipping it is the optimiser of Textual Inversion."""

    learning_rate: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.0
    """Decoupled weight decay; vectors (last axis) that this step did not use, whose gradient is zero, keep theirs."""
    clip: float = 0.0
    """Largest norm of the gradient over all parameters; 0 for any."""
    late: Mapping[str, int] = field(default_factory=dict)
    """Steps before which a parameter stays as it is; its moments begin then."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates of parameters that have their own."""
    plain: Mapping[str, float] = field(default_factory=dict)
    """Parameters that go against their gradient itself, and how much of it."""

    def start(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Fresh moments."""
        zeros = {f"{moment}.{k}": torch.zeros_like(p) for k, p in parameters.items() for moment in ("first", "second")}
        return {**zeros, "step": torch.zeros((), dtype=torch.int64)}

    def update(self, parameters: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """One step in place, with ``.grad`` of each parameter; ``state["step"]`` counts from 1."""
        b1, b2 = self.betas
        counts = {k: int(state["step"]) - self.late.get(k, 0) for k in parameters}
        parameters = {k: p for k, p in parameters.items() if counts[k] > 0}
        _clip([p.grad for p in parameters.values()], self.clip)
        for key, parameter in parameters.items():
            if key in self.plain:
                parameter.sub_(parameter.grad, alpha=self.plain[key])
                continue
            count, rate = counts[key], self.rates.get(key, self.learning_rate)
            first, second, grad = state[f"first.{key}"], state[f"second.{key}"], parameter.grad
            if self.decay:
                used = (grad != 0).any(-1, keepdim=True)
                parameter.mul_(1 - rate * self.decay * used)
            first.lerp_(grad, 1 - b1)
            second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
            scale = (second / (1 - b2**count)).sqrt_().add_(1e-8)
            parameter.addcdiv_(first, scale, value=-rate / (1 - b1**count))


@dataclass(frozen=True)
class UnitRows(Adam):
    """Adam in one pass over memory; the rows of one parameter keep length one (dictionaries, arXiv 2406.04093).

    What would change their length is taken out of the gradient. The rate rises over the first ``warmup`` steps.
    """

    learning_rate: float = 2e-4
    clip: float = 1.0
    rows: str = "decoder"
    warmup: int = 0

    def update(self, parameters: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """One step in place, as ``Adam.update``."""
        count, unit = int(state["step"]), parameters[self.rows]
        unit.grad.addcmul_((unit.grad * unit).sum(-1, keepdim=True), unit, value=-1)
        grads = [p.grad for p in parameters.values()]
        _clip(grads, self.clip)
        adam(
            list(parameters.values()),
            grads,
            [state[f"first.{k}"] for k in parameters],
            [state[f"second.{k}"] for k in parameters],
            [],
            [torch.tensor(count - 1.0, device=p.device) for p in parameters.values()],  # counted up in there
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.learning_rate * min(1.0, count / max(1, self.warmup)),
            weight_decay=self.decay,
            eps=1e-8,
            maximize=False,
        )
        unit.div_(unit.norm(dim=-1, keepdim=True))


@dataclass(frozen=True)
class Sphere:
    """Directional Textual Inversion (Riemannian SGD): each vector keeps its norm and learns its direction.

    The prior -kappa mu.v pulls towards ``mean`` (unit vectors of the class word, [..., width] per parameter); the
    tangent gradient is divided by its own norm before the step, as the authors' code does. Vectors that this step did
    not use, whose gradient is zero, stay: divided so, the prior alone would be a whole step.
    """

    mean: Mapping[str, torch.Tensor] = field(default_factory=dict)
    learning_rate: float = 1e-2
    kappa: float = 1e-4

    def start(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The radii, which never change."""
        radii = {f"radius.{k}": p.detach().norm(dim=-1, keepdim=True) for k, p in parameters.items()}
        return {**radii, "step": torch.zeros((), dtype=torch.int64)}

    def update(self, parameters: Mapping[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
        """One step in place along the geodesic's chord, then back onto the sphere."""
        for key, parameter in parameters.items():
            radius = state[f"radius.{key}"]
            unit, used = parameter / radius, (parameter.grad != 0).any(-1, keepdim=True)
            grad = parameter.grad * radius  # gradient with respect to the unit vector
            if key in self.mean:
                grad = grad - self.kappa * self.mean[key]
            tangent = grad - (grad * unit).sum(-1, keepdim=True) * unit
            length = tangent.norm(dim=-1, keepdim=True)
            moved = unit - self.learning_rate * tangent / length.clamp_min(1e-20)
            parameter.copy_(torch.where(used, moved / moved.norm(dim=-1, keepdim=True) * radius, parameter))


@dataclass(frozen=True)
class Step:
    """What is known after a finished step."""

    number: int
    """Steps done so far, those of earlier runs included."""
    loss: float
    parameters: Mapping[str, torch.Tensor]
    state: Mapping[str, torch.Tensor]


def fit(
    parameters: Mapping[str, torch.Tensor],
    loss_of: Callable[[Mapping[str, torch.Tensor], int, int], torch.Tensor],
    optimiser: Adam | Sphere,
    steps: int,
    *,
    accumulate: int = 1,
    state: Mapping[str, torch.Tensor] | None = None,
    scale: float = 1.0,
) -> Iterator[Step]:
    """Learns ``parameters`` in place and yields after every step, when everything is consistent.

    ``loss_of(parameters, step, micro)`` returns a scalar that is differentiable in the parameters; all its randomness
    must depend on (step, micro) alone. ``state`` continues an earlier run: N + M steps equal one run of N + M.
    ``scale``: a power of two that the loss is multiplied by on its way back, so that gradients stay above the smallest
    numbers of fp16 (arXiv 1710.03740); a step whose gradient then is not finite is taken again with less.
    Whatever ends the loop from outside (an interrupt, an error inside ``loss_of``) leaves the last finished step.
    Raises: Diverged when a loss or a gradient is not finite; RuntimeError when no parameter gets a gradient; ValueError
    when ``state`` belongs to another optimiser.
    """
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    fresh = optimiser.start(parameters)
    if state:
        if set(state) != set(fresh) or any(state[k].shape != v.shape for k, v in fresh.items()):
            raise ValueError(
                "The training state does not belong to this optimiser and these vectors; continue with the "
                "same geometry, encoders and number of vectors, or start anew."
            )
        fresh = {k: v.clone() for k, v in state.items()}
    done = int(fresh["step"])
    last = done + steps
    while done < last:
        total = 0.0
        try:
            for micro in range(accumulate):
                loss = loss_of(parameters, done, micro) / accumulate
                if loss.requires_grad:
                    (loss * scale).backward()
                total += float(loss.detach())
            if all(p.grad is None for p in parameters.values()):
                raise RuntimeError(
                    "No gradient reaches what is learned: something between it and the loss, such as another node's "
                    "patch, computes without. Connect MODEL and CLIP as their loader gives them."
                )
            for parameter in parameters.values():
                if parameter.grad is None:  # this step does not use it
                    parameter.grad = torch.zeros_like(parameter)
            grads = [p.grad for p in parameters.values()]
            if not all(bool(torch.isfinite(g).all()) for g in grads) or total - total != 0:
                if scale > 1 and total - total == 0:
                    scale = max(1.0, scale / 16)
                    continue
                raise Diverged(f"The loss or its gradient is not finite at step {done + 1} (loss {total}).")
            with torch.no_grad():
                torch._foreach_div_(grads, scale)
                fresh["step"] += 1
                optimiser.update(parameters, fresh)
        finally:
            for parameter in parameters.values():
                parameter.grad = None
        done += 1
        yield Step(done, total, parameters, fresh)

"""One refinement in units of a forward pass of the UNet, against the same losses out of separate passes.

SD1.5 at half its width, 256 px (with ``full`` at its own, 512 px), random weights, fp32, one reference, the picture
given, ensemble 8 and 1.
``separate``: the order of the published codes: DIFT encodes the picture anew for every noise and runs each noise alone
up to its block; reference, picture and loss each have a pass of their own, from an encoding of their own. ``kept``: as
the node does when it is given the reference's features, which serve every prompt after the first. All take the same
gradient, which is checked. Without what the node adds for its report, the loss after the step.
``nox -s bench -- refine_cost [full]``
"""

import json
import os
import statistics
import sys
import time

import torch

from . import half, toy
from .runner import RESULTS, machine, noisy, ratio, reference

RATE, TEXTS = 5e-3, ("a photo of <toy>", "a photo of <toy> in the park")


def setup(parts, vae, ensemble: int, picture: torch.Tensor, made: torch.Tensor, features=None):
    """A session on one reference picture and the picture made."""
    from concepts.carriers.concept import Concept
    from concepts.host.query import data_of, references_of
    from concepts.host.refine import RefineSession, RefineSettings
    from concepts.host.text import encoders

    (encoder,) = encoders(parts[1])
    rows = encoder.rows(half.WORD)[:1][None, None, None]
    concept = Concept("toy", "tokens", {encoder.key: rows}, {"init_text": half.WORD})
    settings = RefineSettings("toy", learning_rate=RATE, ensemble=ensemble)
    data = data_of(references_of(vae, picture, None, made.shape[-2:]), TEXTS, made)
    return RefineSession(parts[0], parts[1], data, settings, concept, features)


def features_of(parts, vae, ensemble: int, picture: torch.Tensor):
    """Of the reference, as Extract Features gives them."""
    from concepts.host.feature_places import preset
    from concepts.host.features import extract

    wants = preset(parts[0], "DIFT", [], ensemble=ensemble)
    return extract(*parts, vae.encode(picture), wants, f"a photo of a {half.WORD}")


def step(session) -> torch.Tensor:
    """The gradient of one step, with features and matching."""
    from concepts.host.gradients import training

    session.find()
    with training(session.model, session.clip.patcher):
        session.begin()
        rows = next(iter(session.parameters.values())).requires_grad_(True)
        session.step_loss(session.parameters, 0, 0).backward()
        return rows.grad


def together(parts, vae, ensemble, picture, made) -> torch.Tensor:
    """As the node does."""
    return step(setup(parts, vae, ensemble, picture, made))


def separate(parts, vae, ensemble, picture, made) -> torch.Tensor:
    """One noise at a time, each from an encoding of its own; the picture, too, comes as pixels."""
    from concepts.host import features, refine

    shown = vae.decode(made)
    session = setup(parts, vae, ensemble, picture, made)
    whole = features.ROWS

    def find():
        features.ROWS = 1
        for source in (picture, shown):
            for _ in range(ensemble):
                vae.encode(source)
        refine.RefineSession.find(session)

    session.find = find
    session.passed = lambda parameters, rows: [
        refine.RefineSession.passed(session, parameters, [row])[0] for row in rows
    ]
    try:
        vae.encode(picture)  # for the diffusion loss, as the features had theirs in ``setup``
        vae.encode(shown)
        return step(session)
    finally:
        features.ROWS = whole


def forward(parts, latent: torch.Tensor) -> float:
    """Seconds of one pass without gradient, as the host samples on this device; the median of five."""
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.prompt import encode_prompt

    (entry,) = encode_prompt(parts[1], "a photo", [])
    seconds = []
    with training(parts[0]), torch.no_grad():
        d = Denoiser(parts[0])
        d.options.pop("optimized_attention_override", None)
        x, sigma = d.clean(latent), torch.ones(1)
        for _ in range(5):
            begun = time.perf_counter()
            d(x, sigma, [entry])
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def main(options, rest) -> int:
    load, products = os.getloadavg()[0], [reference()]
    if "full" in rest:
        half.whole()
    modules = half.peers()
    toy.host()

    with torch.inference_mode():
        parts, vae = half.parts(*modules)[:2], half.autoencoder(modules[1])
        picture = half.pictures()[:1]
        made = torch.randn(1, 4, half.SIZE // 8, half.SIZE // 8, generator=torch.Generator().manual_seed(3))
        table = {}
        for ensemble in (8, 1):
            seconds, units, grads = {"together": [], "separate": [], "kept": []}, [], {}
            features = features_of(parts, vae, ensemble, picture)

            def kept(*given, features=features):
                return step(setup(*given, features))

            for number in range(options.repeats + 1):
                units.append(forward(parts, made))
                sides = [("together", together), ("separate", separate), ("kept", kept)]
                for name, run in sides if number % 2 else reversed(sides):
                    begun = time.perf_counter()
                    grads[name] = run(parts, vae, ensemble, picture, made)
                    if number:  # the first warms up
                        seconds[name].append(time.perf_counter() - begun)
            far = max(float((grads[k] - grads["separate"]).norm() / grads["separate"].norm()) for k in grads)
            assert far < 1e-3, f"the gradients differ by {far:.1e} of their length"
            products.append(reference())
            passes = {k: [s / unit for s, unit in zip(v, units[1:], strict=True)] for k, v in seconds.items()}
            table[f"ensemble {ensemble}"] = {
                "seconds": seconds,
                "passes": passes,
                "forward": units[1:],
                "times faster": {k: ratio(seconds["separate"], seconds[k]) for k in ("together", "kept")},
                "difference": far,
            }
            print(f"ensemble {ensemble}: " + ", ".join(f"{statistics.median(v):.1f} F {k}" for k, v in passes.items()))
    why = noisy(products, load)
    if why and not options.accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    report = {"case": "refine_cost", "noise": why, "table": table, "machine": machine()}
    (RESULTS / f"refine_cost{'_full' * ('full' in rest)}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0

"""Dictionaries against dictionary_learning, eai-sparsify and sae-lens: what they explain, and how fast.

Quality: the same token features of the toy world in the same batches, 256 latents of 64 numbers, 8 active, 1,500
steps of 512 tokens, three seeds or more; FVU and L0 on features of other prompts. Every side has its own rate, the
better of two. Speed: 1,280 numbers, 20,480 latents (10,240 in training), 32 active, in one process, by turns; encode,
decode, and the whole step with gradients, projection, clipping and Adam. Codes, reconstructions and gradients must
agree before anything is timed.

The peers are not in the lock: they bring hundreds of packages. They are installed without torch, which is this
environment's, into out/bench/peers (``PEERS``, pinned), and the comparison runs in a process that sees both.
``nox -s bench -- dictionary [quality] [speed]``
"""

import json
import os
import subprocess
import sys
import time
from functools import partial

import torch

from . import toy
from .runner import RESULTS, machine, noisy, ratio, reference

PEERS = ("dictionary-learning==0.1.0", "eai-sparsify==1.3.3", "sae-lens==6.54.12", "transformer-lens==3.9.0")
OURS = ("torch", "torchvision", "torchaudio", "triton", "numpy", "safetensors", "transformers")
"""What the peers must take from this environment."""
FOLDER = toy.PACK / "out" / "bench" / "peers"
FEATURES = toy.PACK / "out" / "bench" / "token_features.safetensors"
SHAPES = "mug|hat|star|fish|house|tree|key|heart|boat|bottle|moon|bell"
COLOURS = "red|green|blue|yellow|purple|white|black|orange"
CORPUS = f"""a photo of a {{{COLOURS}}} {{{SHAPES}}}, {{grass|brick|sky|sand|wood|snow|water|night}} background
a {{small|big}} {{{COLOURS}}} {{striped|dotted|checkered|banded|plain}} {{{SHAPES}}} on {{grass|brick|sky|sand}}
{{sand|snow|night|water}} scene with a {{{COLOURS}}} {{{SHAPES}}} {{on the left|on the right|in the center}}"""
M, K, STEPS, BATCH = 256, 8, 1500, 512
CODES, TRAINING = (2048, 1280, 20480, 32), (1024, 1280, 10240, 32)
"""Tokens, numbers of each, latents, active ones."""
GOALS = {"encode": 3.5, "decode": 30.0, "step": 8.0, "step of sparsify": 2.5}


def install() -> None:
    """The peers, once."""
    if (FOLDER / "done").exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "overrides.txt").write_text("\n".join(f"{name}; sys_platform == 'never'" for name in OURS) + "\n")
    command = (
        [sys.executable, "-m", "uv"] if subprocess.run([sys.executable, "-m", "uv", "-V"]).returncode == 0 else ["uv"]
    )
    command += ["pip", "install", "-q", "--python", sys.executable, "--target", str(FOLDER)]
    subprocess.run([*command, "--override", str(FOLDER / "overrides.txt"), *PEERS], check=True)
    (FOLDER / "done").touch()


def features() -> None:
    """Token features of the toy world, to learn from and to measure by, in ``FEATURES``."""
    from safetensors.torch import save_file

    toy.host()
    from concepts.host.corpus import Corpus
    from concepts.host.token_features import read

    clip, corpus = toy.load()[1], Corpus(CORPUS, 0)
    rows = [torch.cat([s.rows for s in read(clip, texts)]) for texts in (corpus.prompts(0, 8000), corpus.held(1000))]
    learn, test = (r.clone() for r in rows)
    mean = learn.mean(0)
    scale = learn.shape[1] ** 0.5 / (learn - mean).square().sum(1).mean().sqrt()
    FEATURES.parent.mkdir(parents=True, exist_ok=True)
    save_file({"learn": (learn - mean) * scale, "test": (test - mean) * scale}, FEATURES)


def batches(rows: torch.Tensor, seed: int):
    """The same ones for every side."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        yield rows[torch.randint(len(rows), (BATCH,), generator=g)]


def explained(rows: torch.Tensor, rebuilt: torch.Tensor, code: torch.Tensor) -> dict:
    left = (rows - rebuilt).square().sum() / (rows - rows.mean(0)).square().sum()
    return {"fvu": float(left), "l0": float((code > 0).sum() / len(rows))}


def ours(learn: torch.Tensor, test: torch.Tensor, seed: int, rate: float) -> dict:
    from concepts.kernels.fit import UnitRows, fit
    from concepts.kernels.sae import auxiliary, decode, dense, encode, fvu, top

    d, stream = learn.shape[1], batches(learn, seed)
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(M, d, generator=g))
    p = {"encoder": rows.clone(), "bias": torch.zeros(M), "decoder": rows, "offset": torch.zeros(d)}
    quiet, select = torch.zeros(M), partial(top, k=K)

    def loss(p, step, micro):
        x = next(stream)
        values, indices = encode(x, p["encoder"], p["bias"], p["offset"], select)
        rebuilt, dead = decode(values, indices, p["decoder"], p["offset"]), quiet >= 100
        fired = torch.zeros(M, dtype=torch.bool)
        fired[indices[values > 0]] = True
        quiet.add_(1).masked_fill_(fired, 0)
        aux = auxiliary(x, rebuilt, p["encoder"], p["bias"], p["decoder"], p["offset"], dead, d // 2)
        return d * (fvu(x, rebuilt) + aux / 32)

    for _ in fit(p, loss, UnitRows(rate, warmup=50), STEPS):
        pass
    with torch.no_grad():
        values, indices = encode(test, p["encoder"], p["bias"], p["offset"], select)
        return explained(test, decode(values, indices, p["decoder"], p["offset"]), dense(values, indices, M))


def dictionary_learning(learn: torch.Tensor, test: torch.Tensor, seed: int, rate: float) -> dict:
    from dictionary_learning.trainers.top_k import TopKTrainer

    torch.manual_seed(seed)
    trainer = TopKTrainer(STEPS, learn.shape[1], M, K, 0, "toy", lr=rate, warmup_steps=50, seed=seed, device="cpu")
    trainer.dead_feature_threshold = 100 * BATCH
    for step, x in enumerate(batches(learn, seed)):
        trainer.update(step, x)
    with torch.no_grad():
        code = trainer.ae.encode(test)
        return explained(test, trainer.ae.decode(code), code)


def sae_lens(learn: torch.Tensor, test: torch.Tensor, seed: int, rate: float) -> dict:
    """Its TopK model and losses; its trainer wants a language model, so the loop around is torch's Adam."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(seed)
    sae, quiet = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=learn.shape[1], d_sae=M, k=K)), torch.zeros(M)
    optimiser = torch.optim.Adam(sae.parameters(), lr=rate)
    for step, x in enumerate(batches(learn, seed)):
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50)
        out = sae.training_forward_pass(make_input(TrainStepInput, x, quiet >= 100, step))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        code = out.feature_acts.to_dense() if out.feature_acts.is_sparse else out.feature_acts
        quiet.add_(1).masked_fill_((code > 0).any(0), 0)
    with torch.no_grad():
        code = sae.encode(test)
        code = code.to_dense() if code.is_sparse else code
        return explained(test, sae.decode(code), code)


def make_input(kind, x: torch.Tensor, dead: torch.Tensor, step: int):
    """sae-lens' step input, whose fields grew over its versions."""
    known = {
        "sae_in": x,
        "dead_neuron_mask": dead,
        "coefficients": {},
        "n_training_steps": step,
        "is_logging_step": False,
    }
    return kind(**{k: v for k, v in known.items() if k in kind.__dataclass_fields__})


def quality(repeats: int) -> dict:
    """Side -> FVU and L0 per seed, at the learning rate of {1e-3, 3e-3} that serves the side best over the seeds."""
    from safetensors.torch import load_file

    rows, found = load_file(FEATURES), {}
    for side in (ours, dictionary_learning, sae_lens):
        runs = {}
        for rate in (1e-3, 3e-3):
            runs[rate] = [side(rows["learn"], rows["test"], seed, rate) for seed in range(repeats)]
            print(f"{side.__name__} {rate}: {[round(r['fvu'], 4) for r in runs[rate]]}", file=sys.stderr, flush=True)
        best = min(runs, key=lambda r: sum(one["fvu"] for one in runs[r]))
        found[side.__name__] = {"rate": best, "runs": runs[best]}
    return found


def turns(sides: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, by turns, after a warm-up."""
    found = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name in list(sides) if turn % 2 else reversed(sides):
            begun = time.perf_counter()
            sides[name]()
            if turn:
                found[name].append(time.perf_counter() - begun)
    return found


def close(a: torch.Tensor, b: torch.Tensor, what: str, limit: float = 1e-5) -> None:
    worst = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
    assert worst <= limit, f"{what} differ by {worst:.1e}"


def speed_of_codes(repeats: int) -> dict:
    """Encode and decode."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    from concepts.kernels.sae import decode, top

    torch.manual_seed(0)
    n, d, m, k = CODES
    x, peer = torch.randn(n, d), AutoEncoderTopK(d, m, k)
    peer.encoder.weight.data = peer.encoder.weight.data.contiguous()
    weight, bias, offset = peer.encoder.weight.data, peer.encoder.bias.data, peer.b_dec.data
    rows, rough = peer.decoder.weight.data.T.contiguous(), peer.encoder.weight.data.bfloat16()
    with torch.no_grad():
        z, values, indices, _ = peer.encode(x, return_topk=True)
        own = top(x - offset, weight, bias, k, rough)
        exact = (x - offset).double() @ weight.double().T + bias
        largest = exact.topk(k).values.flip(1)
        for chosen in (own[1], indices):  # up to ties in fp32
            close(exact.gather(1, chosen).sort(1).values, largest, "the supports", 1e-6)
        close(own[0].relu().sort(1).values, values.sort(1).values, "the codes")
        close(decode(values, indices, rows, offset), peer.decode(z), "the reconstructions")
        del exact, largest
        chosen = partial(top, x - offset, weight, bias, k)
        found = turns({"peer": partial(peer.encode, x), "bf16": partial(chosen, rough), "fp32": chosen}, repeats)
        decoded = {"peer": partial(peer.decode, z), "ours": partial(decode, values, indices, rows, offset)}
        return {"encode": found, "decode": turns(decoded, repeats)}


def speed_of_steps(repeats: int) -> dict:
    """A whole training step."""
    import contextlib
    import io

    from dictionary_learning.trainers.top_k import TopKTrainer

    from concepts.kernels.fit import UnitRows
    from concepts.kernels.sae import decode, encode, top

    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify import sparse_coder as module
        from sparsify.utils import eager_decode
    module.decoder_impl = eager_decode
    n, d, m, k = TRAINING
    torch.manual_seed(0)
    x = torch.randn(n, d)
    trainer = TopKTrainer(10**6, d, m, k, 0, "none", lr=1e-4, warmup_steps=1, auxk_alpha=0, seed=0, device="cpu")
    trainer.ae.encoder.weight.data = trainer.ae.encoder.weight.data.contiguous()
    start = {k: v.clone() for k, v in trainer.ae.state_dict().items()}
    sparsify = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k))
    adam = torch.optim.Adam(sparsify.parameters(), lr=1e-4)
    p = {"encoder": start["encoder.weight"].clone(), "bias": start["encoder.bias"].clone()}
    p |= {"decoder": start["decoder.weight"].T.contiguous(), "offset": start["b_dec"].clone()}
    for value in p.values():
        value.requires_grad_()
    rule, whole = UnitRows(1e-4), {}

    def backward(narrow: bool = True):
        for value in p.values():
            value.grad = None
        select = partial(top, k=k, rough=p["encoder"].detach().bfloat16() if narrow else None)
        code = encode(x, p["encoder"], p["bias"], p["offset"], select)
        loss = (decode(*code, p["decoder"], p["offset"]) - x).square().sum(-1).mean()
        loss.backward()

    trainer.loss(x, step=1).backward()
    for narrow in (False, True):
        backward(narrow)
        close(p["encoder"].grad, trainer.ae.encoder.weight.grad, "the encoder's gradients")
        close(p["decoder"].grad, trainer.ae.decoder.weight.grad.T, "the decoder's gradients")
        close(p["offset"].grad, trainer.ae.b_dec.grad, "the offset's gradients", 1e-4)
    trainer.optimizer.zero_grad()
    state = rule.start(p)

    def step(narrow: bool):
        backward(narrow)
        with torch.no_grad():
            state["step"] += 1
            rule.update(p, state)

    def theirs():
        adam.zero_grad()
        sparsify(x).fvu.backward()
        sparsify.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sparsify.parameters(), 1.0)
        adam.step()
        sparsify.set_decoder_norm_to_unit_norm()

    whole["peer"] = partial(trainer.update, 1, x)
    whole["sparsify"] = theirs
    return {"step": turns({**whole, "bf16": partial(step, True), "fp32": partial(step, False)}, repeats)}


def sides(what: list[str], repeats: int) -> dict:
    """In the process that sees the peers."""
    toy.alias()
    found = {}
    if "quality" in what:
        found["quality"] = quality(max(3, repeats))
    if "speed" in what:
        found |= speed_of_codes(max(5, repeats)) | speed_of_steps(max(5, repeats))
    return found


def main(options, rest) -> int:
    if options.side:
        print(json.dumps(sides(rest, options.repeats)))
        return 0
    install()
    features()
    return max(compared(part, options) for part in rest or ["speed", "quality"])


def compared(part: str, options) -> int:
    """Writes results/dictionary_<part>.json; exit status."""
    load, products = os.getloadavg()[0], [reference()]
    command = [sys.executable, "-m", "bench", "dictionary", "--side", "all", "--repeats", str(options.repeats), part]
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True, check=True
    )
    runs = json.loads(done.stdout.splitlines()[-1])
    products.append(reference())
    why = noisy(products, load) if part == "speed" else ""
    if why and not options.accept_noise:
        print(f"No report: {why}.", file=sys.stderr)
        return 3
    report = {"case": f"dictionary_{part}", "noise": why, "peers": PEERS, "machine": machine()}
    if part == "speed":
        report |= {"reference_gflops": products, "goals": GOALS}
    RESULTS.mkdir(exist_ok=True)
    report |= {"table": table(runs), "runs": runs}
    (RESULTS / f"dictionary_{part}.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0


def table(runs: dict) -> dict:
    """Prints and gives means with their range, and ratios (median, from, to)."""
    found = {}
    for side, one in runs.get("quality", {}).items():
        values = [r["fvu"] for r in one["runs"]]
        found[side] = {"fvu": sum(values) / len(values), "from": min(values), "to": max(values), "rate": one["rate"]}
        found[side]["l0"] = max(r["l0"] for r in one["runs"])
        print(
            f"{side:20s} FVU {found[side]['fvu']:.4f} ({min(values):.4f}..{max(values):.4f})  L0 "
            f"{found[side]['l0']:.2f}"
        )
    for case in ("encode", "decode", "step"):
        for peer in ("peer", "sparsify"):
            for side in ("bf16", "fp32", "ours"):
                if peer in runs.get(case, {}) and side in runs[case]:
                    key = f"{case}: {peer} / {side}"
                    found[key] = middle, low, high = ratio(runs[case][peer], runs[case][side])
                    print(f"{key:28s} {middle:.2f} ({low:.2f}..{high:.2f})")
    return found

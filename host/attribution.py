"""Which latents of a word matter to pictures: activation times gradient of the diffusion loss (attribution)."""

import torch

from ..carriers.codes import Codes
from ..kernels.draws import generator
from ..kernels.losses import masked_mse, residual
from ..kernels.sae import dense
from .concept_set import ConceptSet
from .denoise import Denoiser, sigmas_at
from .gradients import ordinary, training
from .loading import memory_of
from .meanings import checked
from .progress import Progress
from .token_features import find_word, read, spoken_encoder


def gradient_scores(codes: Codes, model, clip, data: ConceptSet, draws: int = 32, seed: int = 0) -> dict:
    """Word -> scores [m]: mean of abs(z dL/dz) over ``draws`` of noise and time, z moved through the decoder.

    The gradient is taken at the text's rows, which is ours: SAEPer's code enters by the modulation. Prompts of
    ``codes`` belong to the pictures in their order, one to all, or all to one. Model and CLIP do not change.
    Raises: ValueError when prompts and pictures do not match; CarrierMismatch; the host's interrupt.
    """
    owners = torch.tensor([not m for m in data.mirrored]).cumsum(0).sub(1).tolist()
    count, pictures = len(codes.texts), owners[-1] + 1
    if count != pictures and 1 not in (count, pictures):
        raise ValueError(
            f"There are {count} prompts and {pictures} pictures; give Encode Words one prompt for all, or a line per "
            "picture; one picture may have several."
        )
    spoken, encoder = read(clip, list(codes.texts)), spoken_encoder(clip)
    checked(clip, codes.dictionary, spoken[0].rows.shape[1])
    with torch.inference_mode():
        entries = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in codes.texts]
    entries = [[c, {k: ordinary(v) if torch.is_tensor(v) else v for k, v in facts.items()}] for c, facts in entries]
    progress = Progress(draws)
    with training(model, memory=memory_of(model, data, 1)):
        scores = {word: torch.zeros(codes.dictionary.size) for word in codes.words}
        d = Denoiser(model)
        coder = codes.dictionary.coder(d.device)
        decoder, scale = coder.parts["decoder"], coder.parts["scale"]
        for number in range(draws):
            draw = generator(seed, number, "attribution")
            picture = number // (1 if pictures > 1 else count) % len(data.latents)
            text = (owners[picture] if pictures > 1 else number) % count
            one, cond = spoken[text], ordinary(entries[text][0]).requires_grad_()
            clean = d.clean(ordinary(data.latents[picture])[None])
            sigma = sigmas_at(d.sampling, torch.rand(1, generator=draw, dtype=torch.float64)).to(d.device)
            noise = torch.randn(clean.shape, generator=draw).to(d.device)
            denoised = d(d.noised(clean, noise, sigma), sigma, [[cond, dict(entries[text][1])]])
            loss = masked_mse(residual(d.space, sigma, denoised, clean, d.sigma_data)).mean()
            (grad,) = torch.autograd.grad(loss, cond)
            with torch.no_grad():
                rows = cond.detach()[0, list(one.places)].float().to(d.device)
                code = dense(*coder.encode(rows), codes.dictionary.size)
                pull = grad[0, list(one.places)].float().to(d.device) / scale / coder.prepared(rows)[2]
                for word in codes.words:
                    for numbers in find_word(encoder, one.ids, word):
                        moved = code[numbers] * (pull[numbers] @ decoder.T)
                        scores[word] += moved.abs().sum(0).cpu() / draws
            progress.show(number + 1)
    return scores

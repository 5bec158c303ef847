"""Learning a concept from pictures."""

import torch
from comfy_api.latest import io

from ..host.concept_set import make_set
from ..host.learn import TokenSettings, learn_tokens
from ..host.pictures import loss_curve
from ..host.report import learned_text
from ..kernels.draws import LAWS
from .sockets import Concept, ConceptSet


class MakeSet(io.ComfyNode):
    """Pictures of one concept, encoded once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMakeSet",
            display_name="Make Concept Set",
            category="concepts/learn",
            description="Gathers pictures of one concept with masks and captions, and encodes them once. Pictures "
            "may have any "
            "sizes; each is resized and cropped to what the VAE takes.",
            search_aliases=["dataset", "training images", "captions"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures of the concept, as one batch or a list; 3 to 5 are usual."),
                io.Vae.Input("vae", tooltip="The model's own VAE."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per picture, white where the concept is. Used when the "
                    "learner's masked loss is on.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One caption for all pictures, or one line per picture, with {} or <name> in the concept's "
                    "place. Empty: template sentences.",
                ),
                io.Combo.Input(
                    "template",
                    options=["object", "style"],
                    default="object",
                    tooltip="Which sentences to use when there are no captions: for a thing, or for a way of drawing.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Pictures are resized to about this many pixels squared, keeping their shape. 0 keeps "
                    "sizes; "
                    "512 for SD1.5, 1024 for SDXL and Flux.",
                ),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    tooltip="Also learn from mirrored pictures. Not for text, faces, or captions that say left or "
                    "right.",
                ),
            ],
            outputs=[ConceptSet.Output(display_name="concept_set", tooltip="Connect to a learner.")],
        )

    @classmethod
    def execute(cls, images, vae, captions, template, resolution, mirror, masks=None) -> io.NodeOutput:
        texts = [line.strip() for text in captions for line in text.splitlines() if line.strip()]
        return io.NodeOutput(
            make_set(
                vae[0], images, masks or [], texts, template=template[0], resolution=resolution[0], mirror=mirror[0]
            )
        )


class LearnTokens(io.ComfyNode):
    """Textual Inversion (arXiv 2208.01618) and Directional Textual Inversion on the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnTokens",
            display_name="Learn Concept Tokens",
            category="concepts/learn",
            description="Learns new word vectors from pictures (Textual Inversion). Neither the model nor the text "
            "encoder changes. "
            "The state is saved while it learns; an interrupt keeps it in output/concepts/autosave.",
            search_aliases=["textual inversion", "embedding training", "ti", "train", "directional textual inversion"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Model to learn against. It stays as it is."),
                io.Clip.Input("clip", tooltip="The model's text encoders; the learned vectors go into their input."),
                ConceptSet.Input("concept_set", tooltip="From Make Concept Set."),
                io.String.Input(
                    "name",
                    default="mug",
                    tooltip="Name of the concept: write <name> in prompts. Letters, digits, - and _.",
                ),
                io.Combo.Input(
                    "init",
                    options=["word", "text", "random"],
                    default="word",
                    tooltip="Where the vectors start: the mean of a word, the words of a text in order, or noise "
                    "with the "
                    "vocabulary's statistics.",
                ),
                io.String.Input(
                    "init_text",
                    default="",
                    tooltip="The class word or text to start from, for example: mug. Also what "
                    "the concept falls back to at strength 0.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="Vectors per text encoder. More hold more detail and follow prompts less; 1 to 4 are "
                    "usual.",
                ),
                io.Int.Input(
                    "steps",
                    default=400,
                    min=1,
                    max=100000,
                    tooltip="Optimiser steps. The toy world needs 200 to 400; the papers use 400 to 6,000 on SD1.5.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.005,
                    min=1e-6,
                    max=1.0,
                    step=1e-4,
                    round=False,
                    tooltip="Step size. 0.005 is Textual Inversion's; 0.01 is usual with a fixed norm. Too high: "
                    "the loss jumps.",
                ),
                io.Int.Input(
                    "batch",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures per forward pass. More is steadier and needs more memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides noise, timesteps and picture order. The same seed gives the same concept.",
                ),
                io.Combo.Input(
                    "geometry",
                    options=["free", "fixed norm"],
                    default="free",
                    tooltip="free: Textual Inversion. fixed norm: Directional Textual Inversion, where only the "
                    "direction of a "
                    "vector is learned and its norm stays that of the start.",
                ),
                io.Float.Input(
                    "prior",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    advanced=True,
                    tooltip="Pull towards the class word's direction with a fixed norm (kappa of Directional TI, "
                    "1e-4 there). "
                    "0 turns it off.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Batches per optimiser step: the effect of a larger batch without its memory.",
                ),
                io.Combo.Input(
                    "timestep_law",
                    options=list(LAWS),
                    default="uniform",
                    advanced=True,
                    tooltip="Which noise levels are trained. logit-normal is usual for SD3 and Flux.",
                ),
                io.Float.Input(
                    "timestep_low",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Lowest trained time; 0 is a clean picture.",
                ),
                io.Float.Input(
                    "timestep_high",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Highest trained time; 1 is pure noise. Must be above timestep_low.",
                ),
                io.Boolean.Input(
                    "masked_loss",
                    default=False,
                    advanced=True,
                    tooltip="Count only the masked area of each picture, so that backgrounds are not learned.",
                ),
                io.Boolean.Input(
                    "use_clip_l",
                    default=True,
                    advanced=True,
                    tooltip="Learn vectors for CLIP-L (SD1.5, SDXL, SD3, Flux).",
                ),
                io.Boolean.Input(
                    "use_clip_g", default=True, advanced=True, tooltip="Learn vectors for CLIP-G (SDXL, SD3)."
                ),
                io.Boolean.Input(
                    "use_t5xxl", default=True, advanced=True, tooltip="Learn vectors for T5-XXL (SD3, Flux)."
                ),
                io.Boolean.Input(
                    "use_other",
                    default=True,
                    advanced=True,
                    tooltip="Learn vectors for any other text encoder, such as SD2's.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=25,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Steps between live previews, which cost four forward passes each. 0 turns them off.",
                ),
                io.Int.Input(
                    "save_every",
                    default=50,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Steps between autosaves to output/concepts/autosave. 0: only at the end and on an "
                    "interrupt.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=["auto", "on", "off"],
                    default="auto",
                    advanced=True,
                    tooltip="Recompute blocks instead of keeping them: about a third slower, far less memory, the "
                    "same result.",
                ),
                Concept.Input(
                    "continue_from",
                    optional=True,
                    tooltip="A concept of the same shape to go on from, with its optimiser state: N then M more "
                    "steps equal N + M.",
                ),
            ],
            outputs=[
                Concept.Output(
                    display_name="concept", tooltip="The learned concept. Connect to Concept Prompt or Save Concept."
                ),
                io.Image.Output(display_name="loss_curve", tooltip="Loss per step and its running mean."),
                io.LossMap.Output(display_name="loss_map", tooltip="The losses, for the host's Plot Loss Graph."),
                io.Latent.Output(
                    display_name="previews",
                    tooltip="Quick estimates of one fixed noise along the way; decode them to see it learn.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Steps, loss before and after, seconds, norms, and where it was saved.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        concept_set,
        name,
        init,
        init_text,
        vectors,
        steps,
        learning_rate,
        batch,
        seed,
        geometry,
        prior,
        accumulate,
        timestep_law,
        timestep_low,
        timestep_high,
        masked_loss,
        use_clip_l,
        use_clip_g,
        use_t5xxl,
        use_other,
        preview_every,
        save_every,
        checkpointing,
        continue_from=None,
    ) -> io.NodeOutput:
        ticks = {"clip_l": use_clip_l, "clip_g": use_clip_g, "t5xxl": use_t5xxl}
        settings = TokenSettings(
            name,
            steps,
            vectors,
            init,
            init_text.strip(),
            learning_rate,
            batch,
            accumulate,
            geometry,
            prior,
            timestep_law,
            timestep_low,
            timestep_high,
            masked_loss,
            seed,
            chosen(clip, ticks, use_other),
        )
        done = learn_tokens(
            model,
            clip,
            concept_set,
            settings,
            earlier=continue_from,
            preview_every=preview_every,
            save_every=save_every,
            checkpointing=checkpointing,
        )
        text = learned_text(done)
        return io.NodeOutput(
            done.concept,
            loss_curve(done.losses, f"<{name}>"),
            {"loss": [torch.tensor(v) for v in done.losses]},
            {"samples": done.previews},
            text,
            ui={"text": (text,)},
        )


def chosen(clip, ticks: dict[str, bool], other: bool) -> tuple[str, ...]:
    """Encoder keys of this CLIP that are ticked."""
    from ..host.text import encoders

    return tuple(e.key for e in encoders(clip) if ticks.get(e.key, other)) or ("none ticked",)


NODES = [MakeSet, LearnTokens]

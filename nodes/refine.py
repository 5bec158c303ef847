"""A concept refined for one picture to be made."""

from comfy_api.latest import io

from ..host.denoise import SAMPLERS, SCHEDULERS
from ..kernels.losses import DISTANCES
from .sockets import RATE, Concept, Features, told


def weight(name: str, tip: str) -> io.Float.Input:
    """Weight of one part of the loss."""
    return io.Float.Input(name, default=1.0, min=0.0, max=100.0, step=0.05, tooltip=tip)


class RefineConcept(io.ComfyNode):
    """Per-Query Visual Concept Learning (arXiv 2508.09045)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptRefineForPrompt",
            display_name="Refine Concept for Prompt",
            category="concepts/learn",
            description="Makes the picture of one prompt and seed, finds the concept's parts in it, and takes one "
            "gradient step towards how they look in the reference (Per-Query Visual Concept Learning). Use the result "
            "with the same prompt, seed and sampler; the concept itself stays as it is.",
            search_aliases=["per-query", "identity", "pdm", "dift", "test time", "fine tune for prompt"],
            inputs=[
                io.Model.Input("model", tooltip="The model the concept was learned on, without the concept's LoRA."),
                io.Clip.Input("clip", tooltip="The model's text encoders."),
                io.Vae.Input("vae", tooltip="Encodes the references and shows the picture."),
                Concept.Input("concept", tooltip="Tokens of any shape, a LoRA, or a LoRA with tokens. No NeTI mapper."),
                io.Image.Input("image", tooltip="References of the concept, all of the batch; fitted to the picture."),
                io.Latent.Input("latent", tooltip="What KSampler gets: an empty latent of the picture's size, or one."),
                io.String.Input(
                    "text",
                    default="a photo of <mug> in the park",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Prompt of the picture, with <name> for the concept, as in Concept Prompt.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the picture: the same as in the KSampler that will use the result.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Of the sampler, as in KSampler."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
                io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="As in KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="As in KSampler."),
                weight("self_attention", "Weight of the look at matched points: queries and keys of the last layer."),
                weight("cross_attention", "Weight of the word's maps at matched points, in every layer."),
                weight("diffusion", "Weight of the usual loss on the references, which holds the concept together."),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=RATE,
                    tooltip="Size of the step. 0: the rate the concept was learned with, as in the paper.",
                ),
                io.Int.Input("updates", default=1, min=1, max=100, tooltip="Gradient steps; 1 in the paper."),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    tooltip="Stop with an error when too few points match. Off: the concept comes back as it is.",
                ),
                io.String.Input(
                    "reference_text",
                    default="",
                    advanced=True,
                    tooltip="Prompt of the references, with <name>. Empty: a photo of <name>.",
                ),
                io.Float.Input(
                    "minimum_score",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Smallest cosine of a matched pair. -1: any, as in the paper.",
                ),
                io.Boolean.Input(
                    "mutual", default=False, advanced=True, tooltip="Only pairs that are each other's nearest."
                ),
                io.Int.Input(
                    "ensemble",
                    default=8,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Noises over which matching features are averaged; 8 in DIFT. Fewer cost less.",
                ),
                io.Int.Input(
                    "feature_timestep",
                    default=-1,
                    min=-1,
                    max=1000,
                    advanced=True,
                    tooltip="Noise level that the model is told when the look is compared. -1: the noisiest, as in the "
                    "paper, which compares 1, 250, 500, 750 and 1000.",
                ),
                io.Boolean.Input(
                    "feature_noise",
                    default=False,
                    advanced=True,
                    tooltip="Lay that noise over the pictures too. Off: clean pictures, as in the paper.",
                ),
                io.Combo.Input(
                    "distance",
                    options=list(DISTANCES),
                    default="length",
                    advanced=True,
                    tooltip="length: of the difference at each pair, as in the paper. square: mean square (PDMBooth).",
                ),
                io.Boolean.Input(
                    "both_branches",
                    default=True,
                    advanced=True,
                    tooltip="Gradients through the reference's features too, as in the paper's figure. Off is faster.",
                ),
                io.Combo.Input(
                    "loss_text",
                    options=["reference", "picture"],
                    default="reference",
                    advanced=True,
                    tooltip="Prompt of the diffusion loss: the references' own, or the picture's, as the paper's third "
                    "equation has it.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=["auto", "on", "off"],
                    default="auto",
                    advanced=True,
                    tooltip="Recompute blocks instead of keeping them: slower, far less memory, the same result.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="The concept in each reference. Else the word's own map."),
                io.Conditioning.Input("negative", optional=True, tooltip="As in KSampler. Else the empty prompt."),
                io.Latent.Input(
                    "generated",
                    optional=True,
                    tooltip="The picture, when a sampler has made it already; the settings of the sampler then count "
                    "for nothing.",
                ),
                Features.Input(
                    "reference_features",
                    optional=True,
                    tooltip="DIFT of image from Extract Features, which then serves every prompt and seed; the "
                    "picture's are read alike, whatever ensemble says.",
                ),
            ],
            outputs=[
                Concept.Output(display_name="concept", tooltip="For this prompt, seed and sampler."),
                io.Image.Output(
                    display_name="matches", tooltip="Matched points of the first reference and the picture."
                ),
                io.Image.Output(display_name="before", tooltip="The picture with the concept as it was."),
                io.String.Output(display_name="report", tooltip="Points, and each part of the loss before and after."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, vae, concept, image, latent, text, **values) -> io.NodeOutput:
        from ..host.query import refined  # not at every start
        from ..host.refine import RefineSettings

        rate = values["learning_rate"] or concept.info.get("learning_rate")
        if not rate:
            raise ValueError(
                f"Concept <{concept.name}> does not say which rate it was learned with; set learning_rate, for example "
                "0.005 for tokens or 0.0001 for a LoRA."
            )
        same = ("self_attention", "cross_attention", "diffusion", "distance", "both_branches", "loss_text", "mutual")
        settings = RefineSettings(
            concept.name,
            steps=values["updates"],
            learning_rate=float(rate),
            timestep=values["feature_timestep"],
            noise=values["feature_noise"],
            minimum=values["minimum_score"],
            **{k: values[k] for k in (*same, "ensemble", "seed")},
        )
        sampling = {k: values[k] for k in ("seed", "steps", "cfg", "scheduler", "denoise")}
        *given, text = refined(
            model,
            clip,
            vae,
            concept,
            text,
            image,
            latent,
            settings,
            sampling | {"sampler": values["sampler_name"]},
            features=values.get("reference_features"),
            **{k: values.get(k) for k in ("negative", "mask", "generated")},
            **{k: values[k] for k in ("reference_text", "checkpointing", "strict")},
        )
        return told(text, *given, text)


NODES = [RefineConcept]

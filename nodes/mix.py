"""Making one concept of several."""

from comfy_api.latest import io

from .sockets import Concept, told

PROMPTS = """a photo of {}
a close photo of {}, grass background
a big {} on the left, in front of a brick wall
a small {} on the right, on sand
{} in the snow"""


class MixCarriers(io.ComfyNode):
    """One concept between two, or of parts of two."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMixCarriers",
            display_name="Mix Concepts",
            category="concepts/use",
            description="Makes one concept of two: in between them, or the coarse layers or late noise levels of one "
            "with the rest of the other.",
            search_aliases=["merge embeddings", "interpolate", "slerp", "style mixing", "blend concepts"],
            inputs=[
                Concept.Input("concept_a", tooltip="The concept at amount 0. Must hold tokens, not a mapper."),
                Concept.Input("concept_b", tooltip="The concept to go to, with as many vectors as concept_a."),
                io.Combo.Input(
                    "mode",
                    options=["slerp", "linear", "layers", "stages"],
                    default="slerp",
                    tooltip="slerp: between the directions, as Directional Textual Inversion does. linear: straight. "
                    "layers: inner layers of a, outer ones of b (P+). stages: clean levels of a, noisy ones of b.",
                ),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of b. layers: how far the outer layers go to b; P+ uses 1. stages: share of the "
                    "noise schedule, from pure noise on.",
                ),
                io.Int.Input(
                    "from_layer",
                    default=5,
                    min=0,
                    max=100,
                    advanced=True,
                    tooltip="layers: first layer that stays a's, counted from 0. P+: 5 of 16.",
                ),
                io.Int.Input(
                    "to_layer",
                    default=10,
                    min=1,
                    max=100,
                    advanced=True,
                    tooltip="layers: first layer after those that stay a's. P+: 10 of 16.",
                ),
                io.String.Input("name", default="mix", tooltip="Name of the new concept: write <name> in prompts."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Names the layers for mode layers when neither concept was learned with layers of its own.",
                ),
            ],
            outputs=[
                Concept.Output(
                    display_name="concept", tooltip="The mixed concept. Connect to Concept Prompt or Save Concept."
                )
            ],
        )

    @classmethod
    def execute(cls, concept_a, concept_b, mode, amount, from_layer, to_layer, name, model=None) -> io.NodeOutput:
        from ..carriers.mix import mix  # not at every start
        from ..host.variants import layers_of

        layers = layers_of(model.model.diffusion_model) if model is not None else []
        return io.NodeOutput(mix(concept_a, concept_b, name.strip(), mode, amount, from_layer, to_layer, layers))


class FuseLoras(io.ComfyNode):
    """Gradient fusion (Mix-of-Show, arXiv 2305.18292)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        sockets = io.Autogrow.TemplatePrefix(
            Concept.Input("concept", tooltip="From Learn Concept LoRA, or from Load Concept."),
            prefix="concept",
            min=2,
            max=20,
        )
        return io.Schema(
            node_id="ConceptFuseLoras",
            display_name="Fuse Concept LoRAs",
            category="concepts/use",
            description="Makes one LoRA of several that were learned alone, so that they disturb each other less than "
            "when they are only stacked. Every LoRA first draws a few pictures of its concept.",
            search_aliases=["merge loras", "combine loras", "gradient fusion", "mix-of-show", "stack loras"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that all were learned on, without any of them. It stays."),
                io.Clip.Input("clip", tooltip="The model's text encoders, which read the prompts."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="From Empty Latent Image: size of the pictures that the LoRAs draw, and how many per "
                    "prompt. The size you use later is best.",
                ),
                io.Autogrow.Input(
                    "concepts", template=sockets, tooltip="Two or more LoRAs; sockets grow as you connect."
                ),
                io.String.Input("name", default="fused", tooltip="Name of the new concept."),
                io.String.Input(
                    "prompts",
                    default=PROMPTS,
                    multiline=True,
                    tooltip="What every LoRA draws, a line per prompt, {} for its own words. The closer to your later "
                    "prompts the better.",
                ),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    tooltip="Prompts without the concepts, a line each, that are to stay as the model draws them "
                    "without LoRAs; for example: a photo of a mug. Empty: none.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampling steps per picture."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the pictures' noise. The same seed gives the same LoRA.",
                ),
            ],
            outputs=[
                Concept.Output(
                    display_name="concept",
                    tooltip="One LoRA for all. Connect to Apply Concept, or to Save Concept for a stock file.",
                ),
                io.Latent.Output(display_name="pictures", tooltip="What each LoRA drew; decode them to look."),
                io.String.Output(
                    display_name="report", tooltip="How far each LoRA is from what it did alone, fused and added."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, latent_image, concepts, name, prompts, keep, steps, seed) -> io.NodeOutput:
        from ..host.fusion import FusionSettings, fuse  # not at every start

        lines = [tuple(filter(None, map(str.strip, text.splitlines()))) for text in (prompts, keep)]
        found = [c for c in concepts.values() if c is not None]
        whole, pictures, report = fuse(
            model, clip, found, latent_image, FusionSettings(name.strip(), *lines, steps, seed)
        )
        return told(report, whole, {"samples": pictures}, report)


NODES = [MixCarriers, FuseLoras]

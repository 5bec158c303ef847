"""Mixing two concepts."""

from comfy_api.latest import io

from .sockets import Concept


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


NODES = [MixCarriers]

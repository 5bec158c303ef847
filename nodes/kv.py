"""Learning a concept's K and V tokens."""

from comfy_api.latest import io

from . import inputs as shared
from .sockets import told


class LearnKV(io.ComfyNode):
    """SeFi-IDE (arXiv 2402.00631) on the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnKV",
            display_name="Learn K/V Tokens",
            category="concepts/learn",
            description="Learns one vector for the keys and one for the values of attention in each of five stages of "
            "the noise, while attention stays like the class word's (SeFi-IDE). Made for one picture. SD1.5, SD2 and "
            "SDXL; other models with stages only.",
            search_aliases=["sefi-ide", "identity embedding", "one image", "attention loss", "prospect", "train"],
            is_output_node=True,
            inputs=[
                *shared.sources("mug"),
                io.String.Input(
                    "init_text",
                    default="",
                    tooltip="The class word that every vector starts from and whose attention is the reference, for "
                    "example: mug. The paper uses person for faces.",
                ),
                io.Int.Input(
                    "stages",
                    default=5,
                    min=1,
                    max=10,
                    tooltip="Equal parts of the training timesteps with vectors of their own. The paper uses 5 and "
                    "compares 1, 3, 5, 7, 9 and 10.",
                ),
                io.Boolean.Input(
                    "split_kv",
                    default=True,
                    tooltip="Different vectors for keys (where) and values (what). Off: one vector per stage, the only "
                    "form for SD3 and Flux.",
                ),
                *shared.pace(
                    600,
                    1e-4,
                    "Optimiser steps. ProSpect uses about 600; the paper does not say.",
                    "Step size. 0.0001 for the self-attention module (ProSpect); 0.005 is usual for free vectors.",
                ),
                io.Combo.Input(
                    "mapper",
                    options=["self-attention", "free"],
                    default="self-attention",
                    tooltip="self-attention: a small network makes all vectors from the class word, as in the paper; "
                    "it is kept in the training state only. free: the vectors themselves are learned.",
                ),
                io.Float.Input(
                    "attention_weight",
                    default=0.003,
                    min=0.0,
                    max=100.0,
                    step=1e-5,
                    tooltip="lambda of the attention loss: 0.003 in the paper, which compares 0.0001 to 0.05; higher "
                    "follows prompts more and the picture less. 0 turns it off.",
                ),
                io.Combo.Input(
                    "attention_layers",
                    options=["half", "quarter", "all"],
                    default="half",
                    advanced=True,
                    tooltip="Whose maps are compared: those of half the latent's side (32 x 32 for SD1.5 at 512 px, as "
                    "in the paper's figures), a quarter, or all.",
                ),
                io.Combo.Input(
                    "attention_loss",
                    options=["probabilities", "logits", "moments", "means"],
                    default="probabilities",
                    advanced=True,
                    tooltip="probabilities: squared difference of the maps, every word. logits: before the softmax. "
                    "moments: mean and variance of the concept's map only (AttnDreamBooth; weight 2 is its own). "
                    "means: its mean alone (AttnDreamBooth's first stage; weight 0.1).",
                ),
                *shared.noise(),
                *shared.ticks(),
                *shared.keeping(),
                *shared.continued(),
            ],
            outputs=[
                *shared.outputs(),
                io.Image.Output(
                    display_name="attention",
                    tooltip="Where the first picture looks at the concept, per stage and size of maps.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept_set, continue_from=None, **values) -> io.NodeOutput:
        from ..host.learn_kv import KVSession, KVSettings  # not at every start

        same = ("stages", "mapper", "attention_weight", "attention_layers", "attention_loss")
        settings = KVSettings(
            **shared.run_settings(cls, values),
            **{k: values[k] for k in same},
            init_text=values["init_text"].strip(),
            split=values["split_kv"],
            encoders=shared.chosen(clip, values),
        )
        session = KVSession(model, clip, concept_set, settings, continue_from)
        _, given, text = shared.run(session, values)
        return told(text, *given, session.picture())


NODES = [LearnKV]

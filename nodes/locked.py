"""Learning a key-locked concept."""

from comfy_api.latest import io

from . import inputs as shared
from .sockets import RATE, told


class LearnLocked(io.ComfyNode):
    """Perfusion (arXiv 2305.01644) on the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnLocked",
            display_name="Learn Key-Locked Concept",
            category="concepts/learn",
            description="Learns a vector, and for every cross-attention layer what its values become where the vector "
            "stands, while the keys stay the class word's (Perfusion). Small files; several such concepts fit into one "
            "prompt. SD1.5, SD2 and SDXL.",
            search_aliases=["perfusion", "key locking", "rank-one", "rome", "gated edit", "train"],
            is_output_node=True,
            inputs=[
                *shared.sources("mug"),
                io.String.Input(
                    "init_text",
                    default="",
                    tooltip="The class word that the keys stay at and everything else starts from, for example: mug. "
                    "Also what the concept falls back to at strength 0.",
                ),
                *shared.pace(
                    400,
                    0.03,
                    "Optimiser steps. 400 in the usual implementation, with batch 4 x accumulate 4.",
                    "Step size of the values. 0.03 is usual.",
                ),
                io.Float.Input(
                    "token_learning_rate",
                    default=0.006,
                    min=0.0,
                    max=1.0,
                    step=RATE,
                    tooltip="Step size of the vector. 0.006 is usual; 0 leaves it the class word's.",
                ),
                io.Float.Input(
                    "beta",
                    default=0.75,
                    min=-1.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How like the concept a row of the text must be for the gate to be half open; 1 is the "
                    "concept itself. Lower takes in more of the prompt. Prompts use it as learned.",
                ),
                io.Float.Input(
                    "tau",
                    default=0.1,
                    min=0.01,
                    max=10.0,
                    step=0.01,
                    tooltip="Width of the gate: small is nearly open or shut. Prompts use it as learned.",
                ),
                io.Boolean.Input(
                    "lock_keys",
                    default=True,
                    tooltip="Keys (where) stay the class word's. Off: they are learned for every layer as the values "
                    "(what) are, for comparison.",
                ),
                *shared.noise(),
                *shared.keeping(),
                *shared.continued(),
            ],
            outputs=shared.outputs(),
        )

    @classmethod
    def execute(cls, model, clip, concept_set, continue_from=None, **values) -> io.NodeOutput:
        from ..host.learn_locked import LockedSession, LockedSettings  # not at every start

        same = ("token_learning_rate", "beta", "tau", "lock_keys")
        settings = LockedSettings(
            **shared.run_settings(cls, values), **{k: values[k] for k in same}, init_text=values["init_text"].strip()
        )
        _, given, text = shared.run(LockedSession(model, clip, concept_set, settings, continue_from), values)
        return told(text, *given)


NODES = [LearnLocked]

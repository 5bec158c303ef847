"""Learning words of pictures as directions in a diffusion transformer's modulation space."""

from comfy_api.latest import io

from ..kernels.draws import LAWS
from . import inputs as shared
from .sockets import Codes, ConceptSet, told

EXAMPLE = "A girl wearing a [hat], a [coat] and a [shirt]\nA [shirt], a [coat] and a [hat] on a girl"


class LearnModulation(io.ComfyNode):
    """TokenVerse on the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnModulation",
            display_name="Learn Modulation",
            category="concepts/learn",
            description="Learns several things out of one picture, each under the ordinary word that names it in the "
            "captions (TokenVerse). Flux.1 and SD3; the model stays as it is. Concept Prompt takes <name:word>.",
            search_aliases=["tokenverse", "saeper", "modulation", "adaln", "multi concept", "train"],
            is_output_node=True,
            inputs=[
                *shared.sources("picture1", "write <name:word> in prompts, with a word of the captions"),
                io.String.Input(
                    "captions",
                    default=EXAMPLE,
                    multiline=True,
                    tooltip="What the picture shows, a line per caption, with every word to learn as [hat] in each of "
                    "them. TokenVerse: 8 captions of the same words. With several pictures: an empty line begins the "
                    "captions of the next one. These stand in the place of the concept set's captions.",
                ),
                *shared.pace(
                    1400,
                    1e-4,
                    "Optimiser steps, both stages together. TokenVerse: 800 and 600.",
                    "Step size of AdamW. 0.0001 suits full-size models, more suits small ones.",
                ),
                io.Int.Input(
                    "shared_steps",
                    default=800,
                    min=0,
                    max=100000,
                    tooltip="So many steps, those of earlier runs included, learn one direction for all blocks; all "
                    "later ones also learn what each block adds. TokenVerse: 800.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=["all", "double blocks"],
                    default="all",
                    tooltip="Which blocks see the directions. all: TokenVerse. double blocks: only where text and "
                    "picture have streams of their own, as XVerse does. The same on SD3.",
                ),
                io.Float.Input(
                    "isolation",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Weight of the isolation loss: in half of the steps the picture stands beside another one, "
                    "which must not change. Keeps words of different pictures apart. 0: none, and faster. -1: as the "
                    "authors do, 1 for rows (TokenVerse) and none for codes (SAEPer).",
                ),
                *shared.noise(
                    laws=("two stages", *LAWS),
                    law_tip="Which noise levels are trained. two stages: TokenVerse's, 92% above 0.8 while one "
                    "direction is learned for all blocks, 92% below afterwards, whatever low and high say.",
                ),
                io.Int.Input(
                    "hidden",
                    default=768,
                    min=8,
                    max=8192,
                    advanced=True,
                    tooltip="Hidden units of the network that makes a word's directions; part of the concept's file.",
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Flux only: the guidance the model is told while learning. 1 is usual for LoRAs of Flux; "
                    "3.5 is what sampling tells it by default.",
                ),
                io.String.Input(
                    "isolation_prompts",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip="What the other pictures of the isolation loss show, a line each; the model draws them "
                    "first. Empty: 25 everyday prompts. With isolation_set: a line per picture.",
                ),
                *shared.keeping(),
                ConceptSet.Input(
                    "isolation_set",
                    optional=True,
                    tooltip="Pictures of other things for the isolation loss, as large as those of concept_set, "
                    "instead of drawn ones.",
                ),
                *shared.continued(),
                Codes.Input(
                    "codes",
                    optional=True,
                    tooltip="SAEPer: words learn on these activations instead of on the text encoder's row. From "
                    "Prune Code, or Encode Words for all latents; the same words as the captions mark, with the "
                    "dictionary of this text encoder. Flux.1.",
                ),
                io.Combo.Input(
                    "reads",
                    options=["codes if connected", "rows"],
                    default="codes if connected",
                    optional=True,
                    tooltip="What words learn on. rows: the text encoder's, as TokenVerse, also where codes are "
                    "connected; for comparing both.",
                ),
            ],
            outputs=shared.outputs(),
        )

    @classmethod
    def execute(
        cls, isolation_set=None, continue_from=None, codes=None, reads="codes if connected", **values
    ) -> io.NodeOutput:
        from ..host.learn_modulation import ModulationSession, ModulationSettings  # not at every start

        codes, isolation = None if reads == "rows" else codes, values["isolation"]
        settings = ModulationSettings(
            **shared.run_settings(cls, values),
            captions=values["captions"],
            shared_steps=values["shared_steps"],
            blocks=values["blocks"],
            hidden=values["hidden"],
            guidance=values["guidance"],
            isolation=isolation if isolation >= 0 else float(codes is None),
            isolation_prompts=values["isolation_prompts"].strip(),
        )
        model, clip, data = values["model"], values["clip"], values["concept_set"]
        session = ModulationSession(model, clip, data, settings, continue_from, others=isolation_set, codes=codes)
        _, given, text = shared.run(session, values)
        return told(text, *given)


NODES = [LearnModulation]

"""Dictionaries of words: trained on the connected text encoder, or loaded."""

from comfy_api.latest import io

from ..host import folders
from .inputs import within
from .sockets import RATE, Dictionary, told


class TrainDictionary(io.ComfyNode):
    """A sparse autoencoder over the token features of a text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptTrainDictionary",
            display_name="Train Dictionary",
            category="concepts/words",
            description="Learns what words are made of: a sparse autoencoder over what the connected text encoder "
            "says of many prompts. The encoder does not change. The state is saved while it learns; an interrupt "
            "keeps it in output/dictionaries.",
            search_aliases=["sae", "sparse autoencoder", "topk", "matryoshka", "msae", "saeper", "interpretability"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoders of a model. With T5 its tokens are learned, else CLIP's."),
                io.String.Input("name", default="words", tooltip="Name of the dictionary: letters, digits, - and _."),
                io.String.Input(
                    "corpus",
                    default="",
                    multiline=True,
                    tooltip="Prompts to learn from, one per line; {red|green} draws one of its choices anew each time. "
                    "Empty: a bundled grammar.",
                ),
                io.Combo.Input(
                    "kind",
                    options=["TopK", "BatchTopK", "Matryoshka by k", "Matryoshka by prefix"],
                    default="TopK",
                    tooltip="TopK: so many latents for every token. BatchTopK: so many on average. Matryoshka by k "
                    "(MSAE): few latents say the coarse, more the fine; in our reading k, k/2, k/4 and k/8 count "
                    "alike. By prefix: the first latents are the general ones.",
                ),
                io.Int.Input(
                    "expansion",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Latents per number of a token: 4 x 768 for CLIP-L. More are finer, and need more prompts.",
                ),
                io.Int.Input("k", default=32, min=1, max=1024, tooltip="Latents that are active at a token."),
                io.Int.Input(
                    "steps", default=1000, min=1, max=1000000, tooltip="Optimiser steps; each sees one batch of tokens."
                ),
                io.Int.Input(
                    "batch", default=4096, min=16, max=65536, tooltip="Tokens per step; a prompt has about ten."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides start values and the order of prompts. The same seed gives the same dictionary.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=0.1,
                    step=RATE,
                    advanced=True,
                    tooltip="Step size. 0: by the number of latents, 2e-4 for 16,384 of them and more for fewer.",
                ),
                io.Int.Input(
                    "reuse",
                    default=2,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="How often a token is learned from before new prompts are encoded. Raise it where the "
                    "text encoder is slow.",
                ),
                io.Int.Input(
                    "dead_after",
                    default=100,
                    min=1,
                    max=100000,
                    advanced=True,
                    tooltip="Steps without firing after which a latent counts as dead and is helped (AuxK).",
                ),
                io.Combo.Input(
                    "precision",
                    options=["fp32", "bf16"],
                    default="fp32",
                    advanced=True,
                    tooltip="bf16: latents are preselected in bf16, values stay fp32. Faster where the hardware "
                    "knows bf16, slower elsewhere.",
                ),
                io.Int.Input(
                    "save_every",
                    default=200,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="Steps between saves. 0: only at the end and on an interrupt.",
                ),
                Dictionary.Input(
                    "continue_from",
                    optional=True,
                    tooltip="A dictionary of the same settings to go on from: N then M more steps equal N + M.",
                ),
            ],
            outputs=[
                Dictionary.Output(display_name="dictionary", tooltip="Connect to Encode Words or Steer Word."),
                io.Image.Output(display_name="loss_curve", tooltip="Loss per step and its running mean."),
                io.String.Output(display_name="report", tooltip="FVU, active, dead and silent latents, and the file."),
            ],
        )

    @classmethod
    def execute(cls, clip, corpus, save_every, continue_from=None, **values) -> io.NodeOutput:
        from ..host.learn_dictionary import DictionarySettings, learn_dictionary, learned_text  # not at every start
        from ..host.pictures import loss_curves

        within(cls, values | {"save_every": save_every})
        done = learn_dictionary(clip, corpus, DictionarySettings(**values), continue_from, save_every=save_every)
        text = learned_text(done)
        return told(text, done.dictionary, loss_curves({"": done.losses}, done.dictionary.name), text)


class LoadDictionary(io.ComfyNode):
    """Reads a dictionary of this pack or of another program."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadDictionary",
            display_name="Load Dictionary",
            category="concepts/words",
            description="Reads a dictionary trained here, or a sparse autoencoder of SAELens, sparsify, OpenAI, "
            "sdxl-unbox, Concept Steerers, dictionary_learning or MSAE. No file can run code.",
            search_aliases=["load sae", "saelens", "sparsify", "dictionary_learning", "msae", "sparse autoencoder"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.saved_dictionaries(),
                    tooltip="Files in output/dictionaries and models/dictionaries; cfg.json or config.json beside "
                    "them.",
                ),
                io.Int.Input(
                    "k",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Active latents per token instead of what the file says. 0: what the file says.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Names the latents by corpus words and measures FVU, for a file that has no names.",
                ),
            ],
            outputs=[
                Dictionary.Output(display_name="dictionary", tooltip="Connect to Encode Words or Steer Word."),
                io.String.Output(
                    display_name="report", tooltip="What it is, where it is from, and how it was learned."
                ),
            ],
        )

    @classmethod
    def execute(cls, file, k, clip=None) -> io.NodeOutput:
        from ..carriers.foreign_dictionary import read_dictionary  # not at every start
        from ..host.corpus import Corpus
        from ..host.meanings import named

        dictionary = read_dictionary(folders.find_dictionary(file), k)
        if clip is not None and not dictionary.info.get("words"):
            dictionary = named(clip, dictionary, Corpus("", 0))
        return io.NodeOutput(dictionary, dictionary.summary())

    @classmethod
    def fingerprint_inputs(cls, file, k, clip=None) -> str:
        path = folders.find_dictionary(file)
        return f"{path.stat().st_mtime_ns}/{path.stat().st_size}/{k}"

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        try:
            folders.find_dictionary(file)
        except FileNotFoundError as error:
            return str(error)
        return True


NODES = [TrainDictionary, LoadDictionary]

"""Looking inside words, keeping what matters of them, and turning it up or down."""

from comfy_api.latest import io

from .sockets import Codes, ConceptSet, Dictionary, told


class EncodeWords(io.ComfyNode):
    """Words of prompts as sparse codes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptEncodeWords",
            display_name="Encode Words",
            category="concepts/words",
            description="Shows what the words of prompts are made of: the latents of a dictionary that are active at "
            "each, and the corpus words that fire these latents most.",
            search_aliases=["sae", "sparse code", "look inside a word", "latents", "features of words"],
            is_output_node=True,
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders that the dictionary was trained on."),
                Dictionary.Input("dictionary", tooltip="From Train Dictionary or Load Dictionary."),
                io.String.Input(
                    "text",
                    default="a photo of a red mug on sand",
                    multiline=True,
                    tooltip="Prompts, one per line; a word counts in all that hold it.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words to encode, separated by commas; several words in a row are one. Empty: every word.",
                ),
                io.Int.Input("shown", default=5, min=1, max=64, tooltip="Latents shown per word, strongest first."),
            ],
            outputs=[
                Codes.Output(display_name="codes", tooltip="Connect to Prune Code."),
                io.String.Output(
                    display_name="table", tooltip="Latents of each word: number, activation, corpus words."
                ),
                io.Image.Output(display_name="picture", tooltip="The same as bars."),
            ],
        )

    @classmethod
    def execute(cls, clip, dictionary, text, words, shown) -> io.NodeOutput:
        from ..host.meanings import encode_words, picture, table  # not at every start

        wanted = list(dict.fromkeys(w.strip() for w in words.split(",") if w.strip()))
        codes = encode_words(clip, dictionary, text, wanted)
        lines = table(codes, shown)
        return told(lines, codes, lines, picture(codes, shown))


class PruneCode(io.ComfyNode):
    """The few latents of each word that tell it from the rest."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptPruneCode",
            display_name="Prune Code",
            category="concepts/words",
            description="Keeps of each word the latents that matter: those it has more of than the other words and the "
            "corpus, or those that the picture's loss depends on.",
            search_aliases=["saeper", "sae pruning", "feature selection", "attribution"],
            is_output_node=True,
            inputs=[
                Codes.Input("codes", tooltip="From Encode Words, with the words that matter named there."),
                io.Combo.Input(
                    "method",
                    options=["contrast", "gradient"],
                    default="contrast",
                    tooltip="contrast: share of a latent in the word less that in everything else. gradient: "
                    "activation times gradient of the diffusion loss at the text's rows; wants model, clip and "
                    "concept_set.",
                ),
                io.Int.Input("keep", default=32, min=1, max=4096, tooltip="Most latents kept per word."),
                io.Boolean.Input(
                    "exclusive",
                    default=False,
                    tooltip="A latent that several words keep stays with the one that scores it highest.",
                ),
                io.Model.Input("model", optional=True, tooltip="For gradient: the model that reads the prompts."),
                io.Clip.Input("clip", optional=True, tooltip="For gradient: the text encoders of the codes."),
                ConceptSet.Input(
                    "concept_set",
                    optional=True,
                    tooltip="For gradient: one picture per prompt, in the same order; or several pictures of one "
                    "prompt; or one picture for all prompts.",
                ),
                io.Float.Input(
                    "active_in",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Share of a word's places in which a latent must be active to be kept.",
                ),
                io.Int.Input(
                    "draws", default=32, min=1, max=4096, advanced=True, tooltip="For gradient: noises and times drawn."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="For gradient: decides noises and times.",
                ),
            ],
            outputs=[
                Codes.Output(display_name="codes", tooltip="The same words with only the kept latents."),
                io.String.Output(display_name="table", tooltip="Kept latents with activation, score and corpus words."),
                io.Image.Output(display_name="picture", tooltip="Scores as bars, twelve per word at most."),
            ],
        )

    @classmethod
    def execute(
        cls, codes, method, keep, exclusive, active_in, draws, seed, model=None, clip=None, concept_set=None
    ) -> io.NodeOutput:
        from ..carriers.codes import contrast, prune  # not at every start
        from ..host.attribution import gradient_scores
        from ..host.meanings import picture, table

        if method == "contrast":
            scores = contrast(codes)
        elif None in (model, clip, concept_set):
            raise ValueError("The gradient is that of pictures under a model; connect model, clip and concept_set.")
        else:
            scores = gradient_scores(codes, model, clip, concept_set, draws, seed)
        kept = prune(codes, scores, keep, active_in, exclusive)
        lines = table(kept, keep)
        return told(lines, kept, lines, picture(kept, min(keep, 12)))


class SteerWord(io.ComfyNode):
    """Latents of a word turned up or down in a conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptSteerWord",
            display_name="Steer Word",
            category="concepts/words",
            description="Turns single latents of a word up or down in a conditioning: more of one property, less of "
            "another. Works with any sampler, and several in a row.",
            search_aliases=["concept steerers", "sae steering", "edit a word", "concept slider"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders that made the conditioning."),
                io.Conditioning.Input("conditioning", tooltip="From CLIP Text Encode, or from another Steer Word."),
                Dictionary.Input("dictionary", tooltip="Of the same text encoders."),
                io.String.Input(
                    "text",
                    default="a photo of a red mug on sand",
                    multiline=True,
                    tooltip="The conditioning's prompt, to find the word by; connect both to one text.",
                ),
                io.String.Input(
                    "word",
                    default="mug",
                    tooltip="Word of the prompt, or several in a row. Empty: every row, padding included, where "
                    "text encoders gather what the prompt says.",
                ),
                io.String.Input(
                    "latents",
                    default="0",
                    tooltip="Numbers of latents as Encode Words shows them, separated by commas.",
                ),
                io.Combo.Input(
                    "mode",
                    options=["add", "scale"],
                    default="add",
                    tooltip="add: amount on top of the activation. scale: activation times amount, 0 takes it away.",
                ),
                io.Float.Input(
                    "amount",
                    default=5.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="In the units that Encode Words shows for add; a factor for scale. 0 added, or scaled by "
                    "1, changes nothing.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning", tooltip="For any sampler."),
                io.String.Output(display_name="report", tooltip="The latents before and after, with corpus words."),
            ],
        )

    @classmethod
    def execute(cls, clip, conditioning, dictionary, text, word, latents, mode, amount) -> io.NodeOutput:
        from ..host.steer import steered  # not at every start

        return io.NodeOutput(*steered(clip, conditioning, dictionary, text, word, latents, mode, amount))


NODES = [EncodeWords, PruneCode, SteerWord]

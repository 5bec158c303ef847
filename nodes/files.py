"""Saving, loading and looking into concepts."""

import json
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..host import folders
from .sockets import Concept, told


class SaveCarrier(io.ComfyNode):
    """Writes one concept to one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptSaveCarrier",
            display_name="Save Concept",
            category="concepts/files",
            description="Writes a concept to one safetensors file that never replaces another. In the embeddings "
            "folder it also works "
            "as a stock embedding:name.",
            search_aliases=["save embedding", "export concept"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                Concept.Input("concept", tooltip="The concept to keep."),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip="File name without folder. Empty: the concept's name. A number is added "
                    "when the name is taken.",
                ),
                io.Combo.Input(
                    "folder",
                    options=["concepts", "embeddings", "loras"],
                    default="concepts",
                    tooltip="concepts: output/concepts. embeddings: models/embeddings, where the stock "
                    "embedding:name finds it. loras: models/loras, where the stock LoRA loader lists it; without "
                    "training state.",
                ),
                io.Boolean.Input(
                    "training_state",
                    default=True,
                    advanced=True,
                    tooltip="Keep the optimiser state, so that learning can continue. Up to three times as large, "
                    "but far larger after Learn Residual Tokens and Learn K/V Tokens.",
                ),
                io.Boolean.Input(
                    "workflow",
                    default=True,
                    advanced=True,
                    tooltip="Keep the workflow inside the file. It may name files of yours.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="path",
                    tooltip="Its name as Load Concept lists it; the node shows where it is on disk.",
                )
            ],
        )

    @classmethod
    def execute(cls, concept, filename, folder, training_state, workflow) -> io.NodeOutput:
        from ..carriers.files import write_new  # not at every start

        state = training_state and folder != "loras"  # the stock loader warns about every tensor it does not know
        notes = (
            {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
            if workflow and folders.metadata_allowed()
            else {}
        )
        name = filename.strip() or concept.name
        target = write_new(
            concept if state else replace(concept, state={}),
            folders.home(folder, concept),
            name.replace(" ", "_") if folder == "embeddings" else name,  # a prompt's embedding:name ends at a blank
            {k: json.dumps(v) for k, v in notes.items() if v is not None},
            taken=folders.shadowed,
        )
        shown = f"{folder}/{target.name}"
        return told((f"saved {shown}", str(target)), shown)


class LoadCarrier(io.ComfyNode):
    """Reads a concept or a foreign embedding."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadCarrier",
            display_name="Load Concept",
            category="concepts/files",
            description="Reads a concept saved by this pack, a Textual Inversion file of its authors, A1111, diffusers "
            "or kohya, or the rows that a LoRA bundles.",
            search_aliases=["load embedding", "textual inversion loader"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.saved(),
                    tooltip="Files in output/concepts, models/concepts, models/embeddings and models/loras. A LoRA of "
                    "another program gives the token rows that it bundles.",
                ),
                io.String.Input("name", default="", tooltip="Another <name> for prompts. Empty: the name in the file."),
            ],
            outputs=[
                Concept.Output(
                    display_name="concept",
                    tooltip="Connect to Concept Prompt, a learner's continue_from, or Inspect Concept.",
                )
            ],
        )

    @classmethod
    def execute(cls, file, name) -> io.NodeOutput:
        from ..carriers.foreign import read_any  # not at every start

        concept = read_any(folders.find(file))
        return io.NodeOutput(replace(concept, name=name.strip()) if name.strip() else concept)

    @classmethod
    def fingerprint_inputs(cls, file, name) -> str:
        path = folders.find(file)
        return f"{path.stat().st_mtime_ns}/{path.stat().st_size}/{name}"

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        try:
            folders.find(file)
        except FileNotFoundError as error:
            return str(error)
        return True


class InspectCarrier(io.ComfyNode):
    """Says what is inside a concept."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptInspectCarrier",
            display_name="Inspect Concept",
            category="concepts/inspect",
            description="Shows what a concept holds, how it was learned, the norms of its vectors and the words "
            "nearest to them.",
            search_aliases=["embedding info", "nearest words", "metadata"],
            is_output_node=True,
            inputs=[
                Concept.Input("concept", tooltip="The concept to look into."),
                io.Int.Input("words", default=5, min=1, max=50, tooltip="Nearest words to list per vector."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Text encoders whose words to compare with; without it only the contents are shown.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The contents as text."),
                io.Image.Output(display_name="picture", tooltip="Cosine to the nearest words as bars."),
            ],
        )

    @classmethod
    def execute(cls, concept, words, clip=None) -> io.NodeOutput:
        from ..host.pictures import bars  # not at every start
        from ..host.report import inspect_text

        with torch.no_grad():
            text, marks = inspect_text(concept, clip, words)
        return told(text, text, bars(marks, f"<{concept.name}>: cosine to the nearest words"))


NODES = [SaveCarrier, LoadCarrier, InspectCarrier]

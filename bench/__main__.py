"""``nox -s bench -- CASE``: measurements that bench/README.md quotes.

Cases: ti_vs_diffusers, prism_vs_script, lora_vs_core (a learning step against others' code on the same weights),
core_gradients (of the core's trainer), match_vs_kornia (pairs of cells of two feature grids), refine_cost (passes of
one refinement), dictionary (sparse autoencoders of token features); fidelity, prism, stage2, together, kv, scene,
per_query, words (methods over the novel concepts, with bootstrap intervals); quality (the toy world itself),
prompt_cost and modulation_cost (sampling with rows per stage, layer and role, and with modulated words), attention_tap
(maps of words beside attention), pck (points found in other pictures), full_size (learning, refining and sampling with
SDXL and Flux on one GPU). Needs COMFYUI_PATH.
"""

import argparse
import importlib
import os
import sys

CASES = (
    *("ti_vs_diffusers", "prism_vs_script", "lora_vs_core", "core_gradients", "match_vs_kornia", "refine_cost"),
    "dictionary",
    *("fidelity", "prism", "stage2", "together", "kv", "scene", "per_query", "words"),
    *("quality", "prompt_cost", "modulation_cost", "attention_tap", "pck", "full_size"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--side", help="run one side only, in this process")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--accept-noise", action="store_true", help="report on a busy machine too, and say so")
    options, rest = parser.parse_known_args()
    if not os.environ.get("COMFYUI_PATH"):
        parser.error("set COMFYUI_PATH to a ComfyUI, or run nox -s bench -- CASE, which brings its own")
    return importlib.import_module(f"bench.{options.case}").main(options, rest)


if __name__ == "__main__":
    sys.exit(main())

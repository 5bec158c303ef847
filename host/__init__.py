"""Everything that knows ComfyUI's internals; a change in the host breaks this folder and no other."""

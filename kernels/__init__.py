"""Mathematics on tensors and callables: no ComfyUI, no files, no globals."""

"""What a concept is, and its files. No ComfyUI."""

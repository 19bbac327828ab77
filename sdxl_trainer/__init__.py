"""Fine-tune Stable Diffusion XL: exact, resumable, fast."""

__version__ = "0.1.0"

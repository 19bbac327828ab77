"""Fine-tune Stable Diffusion XL: exact, resumable, fast."""

import os

__version__ = "0.1.0"

# transformers would advise on image processors that need torchvision, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

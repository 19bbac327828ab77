"""Train a LoRA for SDXL with the command line of the Hugging Face example; see docs/compat.md.

python scripts/train_text_to_image_lora_sdxl.py --help     (also with accelerate launch or torchrun)
"""

import sys
from pathlib import Path

# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdxl_trainer.compat.train_text_to_image_lora_sdxl import main

if __name__ == "__main__":
    sys.exit(main())

"""Train a DreamBooth LoRA for SDXL with the command line of the advanced Hugging Face example; see docs/compat.md.

python scripts/train_dreambooth_lora_sdxl_advanced.py --help     (also with accelerate launch or torchrun)
"""

import sys
from pathlib import Path

# A clone runs its own code, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdxl_trainer.compat.train_dreambooth_lora_sdxl_advanced import main

if __name__ == "__main__":
    sys.exit(main())

"""Fine-tune Stable Diffusion XL: exact, resumable, fast."""

import logging
import os

__version__ = "0.1.0"

# transformers would advise on image processors that need torchvision, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that wait for one another must not spin: where something else wants a core, each barrier would cost a time
# slice, and steps take a hundred times as long (docs/log.md). Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# On CPUs bitsandbytes tells of a faster kernel that it could have from a hub; nothing here asks for one.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

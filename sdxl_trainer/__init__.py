"""Fine-tune Stable Diffusion XL: exact, resumable, fast."""

import logging
import os

from sdxl_trainer import cpus

__version__ = "0.1.0"

# transformers would advise on image processors that need torchvision, which nothing here uses.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Threads that wait for one another spin some microseconds, then sleep: without any spinning a small model's steps take
# nearly twice as long; with GNU OpenMP's 300,000 turns, where something else wants a core, each barrier costs a time
# slice (docs/log.md). Other OpenMPs know the policy alone. Read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Where a container may use a part of the CPUs that it sees, a thread for each would mostly wait for the others.
if "OMP_NUM_THREADS" not in os.environ and cpus.allowed() < cpus.bound():
    os.environ["OMP_NUM_THREADS"] = str(cpus.allowed())
# On CPUs bitsandbytes tells of a faster kernel that it could have from a hub; nothing here asks for one.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
# What is left out of the data is said once, by the first of several processes.
if os.environ.get("RANK", "0") != "0":
    logging.getLogger("sdxl_trainer").setLevel(logging.ERROR)

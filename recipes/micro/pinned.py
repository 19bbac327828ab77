"""The package's command, computing alike on every x86-64 processor with AVX2.

    python recipes/micro/pinned.py train CONFIG [section.key=value ...]

PyTorch and its libraries choose code by the processor and by the number of threads, and each code rounds differently.
Here there is one thread, PyTorch's own code is that for AVX2, MKL's is the one that it has for all processors, oneDNN
and NNPACK, which divide work by the sizes of caches, are switched off, and square roots go by way of fp64: in fp32 some
of MKL's still differed by an ulp between two processors.
"""

import os

from sdxl_trainer import cli

PINS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
}


def main() -> None:
    # The libraries read these when they are loaded, which comes with torch.
    os.environ.update(PINS)
    import torch

    torch.backends.mkldnn.enabled = False
    torch.backends.nnpack.set_flags(False)
    root = torch.Tensor.sqrt
    torch.Tensor.sqrt = lambda x: root(x.double()).to(x.dtype)
    cli.main()


if __name__ == "__main__":
    main()

"""Resizing pictures of 8 bits with the filters of Pillow.

Bilinear, bicubic and Lanczos are PyTorch's where it has them: Pillow's algorithm on fixed-point numbers, several times
as fast and the same bits on every processor. The two are at most two levels apart, since both round between lines and
columns and may begin with the others. Who resizes is part of the cache keys (`made_by`).
"""

import numpy as np
from PIL import Image

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def made_by(interpolation: str) -> str:
    """The filter's name, and whose it is unless it is Pillow's."""
    return f"{interpolation} by PyTorch" if _in_torch(interpolation) else interpolation


def resized(image: Image.Image, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """uint8 [height, width, 3] of an RGB picture, by a filter of `FILTERS`. `size` is (height, width)."""
    rows, columns = size
    if image.size == (columns, rows):
        return np.array(image)
    if not _in_torch(interpolation):
        return np.array(image.resize((columns, rows), FILTERS[interpolation]))
    import torch
    from torch.nn.functional import interpolate

    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    made = interpolate(planes, size=size, mode=interpolation, antialias=True)
    return made[0].permute(1, 2, 0).contiguous().numpy()


def _in_torch(interpolation: str) -> bool:
    """PyTorch has bilinear and bicubic since long, Lanczos since 2.13."""
    import torch

    return hasattr(torch._C._nn, f"_upsample_{interpolation}2d_aa")

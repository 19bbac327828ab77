"""The colours of the toy world, and which of them can be told apart."""

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]

# One word is one sRGB value. Every two are at least 85 apart in RGB, so that the nearest one is the right one
# even behind a lossy autoencoder; black and white are the true ones, so that brightness can be checked at its ends.
COLOURS: dict[str, Rgb] = {
    "red": (214, 38, 44),
    "orange": (250, 132, 20),
    "yellow": (252, 216, 56),
    "green": (44, 158, 72),
    "cyan": (72, 202, 214),
    "blue": (36, 84, 206),
    "purple": (130, 58, 168),
    "pink": (248, 158, 196),
    "brown": (122, 74, 40),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}


def lab(rgb: Rgb) -> NDArray[np.float64]:
    """sRGB 0..255 -> CIE L*a*b* `[3]` under D65 (IEC 61966-2-1, CIE 15), where 2.3 is a just noticeable step."""
    c = np.asarray(rgb, dtype=np.float64) / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    t = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def tone(colour: str) -> Rgb:
    """The second tone of a textured object: a lighter one of a dark colour, a darker one of a light colour."""
    rgb = COLOURS[colour]
    if lab(rgb)[0] < 62.0:
        red, green, blue = (round(c + 0.42 * (255 - c)) for c in rgb)
    else:
        red, green, blue = (round(0.70 * c) for c in rgb)
    return red, green, blue


TONES: dict[str, Rgb] = {name: tone(name) for name in COLOURS}


def _stands_out(colour: str, background: str) -> bool:
    """Whether both tones of an object are plain to see: 42 apart in L*a*b* (brown on black is 40) and 100 in RGB."""
    ground = COLOURS[background]
    tones = (COLOURS[colour], TONES[colour])
    return all(
        np.linalg.norm(lab(t) - lab(ground)) >= 42.0
        and np.linalg.norm(np.subtract(t, ground, dtype=np.float64)) >= 100.0
        for t in tones
    )


# background -> the colours that an object on it may have
VISIBLE: dict[str, tuple[str, ...]] = {
    ground: tuple(c for c in COLOURS if c != ground and _stands_out(c, ground)) for ground in COLOURS
}

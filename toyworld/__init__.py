"""A toy world: seeded scenes of simple shapes, their captions, their pictures, and a reader of pictures.

It stands beside the trainer and knows nothing of it. `scene` -> `caption` and `draw` make data; `score.read` and
`score.accuracy` say what a picture, drawn or generated, shows.
"""

from toyworld.folder import sheet, write_folder
from toyworld.grammar import PLACES, RELATIONS, SIZES, Scene, Thing, caption, held_out, prompts, scene
from toyworld.palette import COLOURS
from toyworld.render import draw
from toyworld.shapes import BASE_SHAPES, NEW_SHAPES, TEXTURES

__all__ = [
    "BASE_SHAPES",
    "COLOURS",
    "NEW_SHAPES",
    "PLACES",
    "RELATIONS",
    "SIZES",
    "TEXTURES",
    "Scene",
    "Thing",
    "caption",
    "draw",
    "held_out",
    "prompts",
    "scene",
    "sheet",
    "write_folder",
]

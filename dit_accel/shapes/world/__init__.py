"""A small procedural world with known truth: one to three shapes that move over a plain or shaded background.

Its vocabulary is closed and one grammar says everything in it, so a prompt can be parsed back, a video can be judged
without a neural network, and what is asked of a model can be compared with what is known to be right::

    a [small|large] [striped|checked] COLOR SHAPE [MOTION] {and a ...} on a [gradient] BACKGROUND background

========== ==============================================================================================
color      red, green, blue, yellow, cyan, magenta
shape      circle, square, triangle
size       small, (medium), large: radius 0.08-0.10, 0.13-0.155, 0.20-0.24 of the frame's shorter side
texture    (plain), striped, checked: every other stripe or check is the color mixed half with white
motion     standing still; moving left, right, up, down or diagonally (to the lower right); circling (one
           clockwise turn)
background black, gray, white, brown; a gradient runs from darker at the top to lighter at the bottom
========== ==============================================================================================

Words in parentheses are not said. A sentence without motions names an image, one in which every object has a motion
names a clip. From words to pixels::

    words = parse_prompt("a striped red circle moving left and a small blue square circling on a gray background")
    scene = sample_scene(random.Random(0), words)  # sizes, places and distances, which the words leave open
    clip = render(scene, frames=33, height=256, width=256)  # video, and the truth: masks, centers, backdrop

Scenes know no resolution: any of them can be drawn with 1 to 129 frames or more, of any height and width, and objects
neither touch nor leave the frame in any of them. Everything is a function of words, seed and size, and the same on
every machine. About a tenth of all sentences are held out of training (:func:`is_held_out`): :func:`sample_words`
never draws one of them, :func:`held_out` lists them for evaluation.
"""

from .grammar import grammar_words, parse_prompt, say
from .motion import DIRECTIONS, trajectory
from .outline import second_color, signed_distance, texture_color
from .render import Clip, backdrop, render
from .sample import sample_scene, sample_words
from .scene import Scene, SceneObject
from .split import SUBSETS, held_out, is_basic, is_held_out
from .words import BACKGROUNDS, COLORS, MOTIONS, RGB, SHAPES, SIZES, TEXTURES, ObjectWords, SceneWords

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "DIRECTIONS",
    "MOTIONS",
    "RGB",
    "SHAPES",
    "SIZES",
    "SUBSETS",
    "TEXTURES",
    "Clip",
    "ObjectWords",
    "Scene",
    "SceneObject",
    "SceneWords",
    "backdrop",
    "grammar_words",
    "held_out",
    "is_basic",
    "is_held_out",
    "parse_prompt",
    "render",
    "sample_scene",
    "sample_words",
    "say",
    "second_color",
    "signed_distance",
    "texture_color",
    "trajectory",
]

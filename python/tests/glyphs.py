"""Images of characters: a class is a character, and each of its images another font's."""

import os
import pathlib

import numpy as np
import pytest
import torch

SIDE = 32
CHARACTERS = "".join(map(chr, range(33, 127)))  # What ASCII can print.


def glyphs():
    """(images, classes of the images, classes): float32 in 0 to 1, (images, 1, SIDE, SIDE).

    Those of the file PFC_GLYPHS that `glyphs --export` has written, or else characters in the fonts that come with matplotlib.
    """
    if path := os.environ.get("PFC_GLYPHS"):
        return read(pathlib.Path(path).read_bytes())
    matplotlib = pytest.importorskip("matplotlib")
    from PIL import Image, ImageDraw, ImageFont

    images = []
    folder = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")
    fonts = sorted(path for path in folder.glob("DejaVuS*.ttf") if "Display" not in path.name)
    for path in fonts:
        font = ImageFont.truetype(path, SIDE * 3 // 4)
        for character in CHARACTERS:
            image = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(image).text((SIDE // 2, SIDE // 2), character, fill=255, font=font, anchor="mm")
            images.append(np.asarray(image))
    labels = torch.arange(len(CHARACTERS)).repeat(len(fonts))
    return torch.from_numpy(np.stack(images)).float()[:, None] / 255, labels, len(CHARACTERS)


def read(raw: bytes):
    """The training images of the first hundred classes, or of all if there are fewer."""
    classes, pixels, training, held_out = np.frombuffer(raw, "<u8", 4, 8).tolist()
    assert raw[:8] == b"pfcimage" and pixels == SIDE * SIDE
    labels = torch.from_numpy(np.frombuffer(raw, "<i8", training, 40).copy())
    images = np.frombuffer(raw, "u1", training * pixels, 40 + 8 * (training + held_out)).reshape(-1, 1, SIDE, SIDE)
    few = labels < 100
    return torch.from_numpy(images[few.numpy()]).float() / 255, labels[few], min(classes, 100)


def network(dim: int, seed: int = 0):
    """Smooth: near the kink of a ReLU rounding decides whether a whole gradient is there, and two trainings soon differ by 1e-3."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 5, 2, 2),
        torch.nn.Tanh(),
        torch.nn.Conv2d(8, 16, 3, 2, 1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * (SIDE // 4) ** 2, dim),
    )

"""Many small images as one picture."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guided_diffusion.files.atomic import renamed_when_complete


def save_grid(
    path: str | Path,
    groups: list[np.ndarray],
    scale: int = 1,
    columns: int | None = None,
    titles: list[str] | None = None,
) -> None:
    """Draw groups of (n, H, W, 3) uint8 images as one PNG, each in rows of its own, enlarged `scale` times,
    its title to the left.
    """
    columns = columns or math.ceil(math.sqrt(max(len(group) for group in groups)))
    blocks = [_tile(group, columns).repeat(scale, axis=0).repeat(scale, axis=1) for group in groups]
    margin = 150 if titles else 0
    picture = Image.new("RGB", (margin + blocks[0].shape[1], sum(len(block) for block in blocks)), "white")
    top = 0
    for block, title in zip(blocks, titles or [""] * len(blocks), strict=True):
        picture.paste(Image.fromarray(block), (margin, top))
        ImageDraw.Draw(picture).multiline_text(
            (8, top + len(block) / 2), title, fill="black", font=ImageFont.load_default(14), anchor="lm"
        )
        top += len(block)
    with renamed_when_complete(path) as file:
        picture.save(file, format="PNG")


def _tile(images, columns):
    """(n, H, W, 3) -> one picture of rows of `columns` images with a white border of one pixel."""
    n, h, w, c = images.shape
    blank = np.full((-n % columns, h, w, c), 255, dtype=np.uint8)
    cells = np.pad(np.concatenate([images, blank]), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = cells.reshape(-1, columns, h + 2, w + 2, c).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * (w + 2), c)

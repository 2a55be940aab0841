"""Forty small images for the explorer, and a stand-in for the network."""

import io

import torch
from PIL import Image

from embeddings import blobs
from localagg.report.embedding_page import Pictured
from localagg.report.explorer.space import Space

COUNT = 40


class Colors:
    """Image i is a plane of brightness 5 i; image 3 is damaged."""

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return b"no image" if i == 3 else torch.full((3, 8, 16), 5 * i, dtype=torch.uint8)


def make_space(folder):
    rows = torch.from_numpy(blobs([10, 10, 10, 10]))
    paths = [f"a/{i}.jpg" for i in range(COUNT)]
    shown = Pictured(rows, paths, {"label": ["x", "y"] * 20, "xy": [*range(COUNT)]}, Colors())

    def embed(data):  # the red value of a picture is the image that it is like
        return rows[Image.open(io.BytesIO(data)).getpixel((0, 0))[0]][None]

    return Space(shown, rows[:, :2] * 9, folder / "f.labels.csv", embed)


def png(red):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()

"""Draw what LA does: python docs/method_figure.py DEMO method.png, after localagg demo --out DEMO.

Left, rows of a bank on a circle: the background and close neighbors of one embedding, and the
direction in which a step moves it, all by ``localagg.objectives``. Right, maps of the digits after
as many epochs of IR alone and of IR then LA, colored by digit.
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.cluster import KMeans

from localagg import load, open_images
from localagg.embeddings.map import map_rows
from localagg.objectives import background_neighbors, close_neighbors, local_aggregation

NEIGHBORS, CLUSTERS, SAMPLE = 30, 6, 5
GRAY, ORANGE, BLUE = "#bbbbbb", "#e8850c", "#1764ab"


def draw_neighbors(axis: Axes) -> None:
    draws = torch.Generator().manual_seed(3)
    centers = torch.linspace(0.2, 5.6, 7)
    angle = (centers[:, None] + 0.22 * torch.randn(7, 14, generator=draws)).flatten()
    bank = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.tensor(KMeans(CLUSTERS, n_init=10, random_state=0).fit_predict(bank))[None].int()
    index = torch.tensor([SAMPLE])
    turned = angle[index] - 0.25  # the view of an image is not where its bank row is
    embedding = torch.stack([turned.cos(), turned.sin()], dim=1).requires_grad_()
    rows = background_neighbors(embedding, bank, NEIGHBORS).rows
    close = close_neighbors(labels, index, rows)[0]
    local_aggregation(embedding, bank, labels, index, neighbors=NEIGHBORS).backward()
    assert embedding.grad is not None
    (v,) = embedding.detach()
    step = -embedding.grad[0]
    along = F.normalize(step - (step @ v) * v, dim=0) * 0.32
    axis.scatter(*bank.T, c=GRAY, s=16, label="other rows of the bank")
    axis.scatter(*bank[rows[0]].T, c=ORANGE, s=16, label="B: background neighbors")
    axis.scatter(*bank[rows[0][close]].T, c=BLUE, s=16, label="C ∩ B: close ones, same cluster")
    axis.scatter(*v, c="black", marker="*", s=90, zorder=3, label="v: embedding of a view")
    axis.annotate("", (v + along).tolist(), v.tolist(), arrowprops={"arrowstyle": "->", "lw": 2})
    axis.legend(loc="center", fontsize=8, frameon=False)
    axis.set_title("a step of LA moves v toward C ∩ B", fontsize=10)
    axis.set_aspect("equal")


def draw_map(axis: Axes, run: Path, title: str) -> None:
    digits = open_images("digits")
    x, y = map_rows(torch.as_tensor(load(run).embed(digits))).T
    axis.scatter(x, y, c=digits.labels, cmap="tab10", s=4)
    axis.set_title(title, fontsize=10)


def main() -> None:
    demo, picture = Path(sys.argv[1]), sys.argv[2]
    rows = {row["name"]: row for row in json.loads((demo / "results.json").read_text())["rows"]}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    draw_neighbors(axes[0])
    runs = {"IR": "ir", "IR then LA": "ir-la"}
    for axis, (name, folder) in zip(axes[1:], runs.items(), strict=True):
        draw_map(axis, demo / folder, f"digits after {name} (k-means NMI {rows[name]['nmi']:.2f})")
    for axis in axes:
        axis.axis("off")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()

"""Peers of localagg's head on the same frozen features: other losses, and clusterings of them."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans, SpectralClustering
from torch import Tensor, nn

from localagg.engine.counter_rng import ORDER, permutation
from localagg.training.frozen.frozen_features import FrozenFeatures
from localagg.training.frozen.trained_part import whitening

Found = Tensor | np.ndarray
"""Rows float32 [N, D], or clusters int [N]."""
Method = Callable[[FrozenFeatures, int, int], Found]
"""Called with the features, the number of classes and the seed."""


def measured(features: FrozenFeatures) -> Tensor:
    """Return the central views' frozen features as unit rows [N, C]."""
    return F.normalize(features.measured(torch.arange(len(features.values))), dim=1)


def whitened_head(features: FrozenFeatures) -> nn.Linear:
    """Return the head that localagg's starts from: 128 whitened principal components."""
    everything = torch.arange(len(features.values))
    head = nn.Linear(features.values.shape[2], 128)
    weight, bias = whitening(features, everything, 128)
    head.weight.data, head.bias.data = weight.float(), bias.float()
    return head


def umap_rows(rows: Tensor, classes: int, seed: int) -> np.ndarray:
    import umap

    options = {"n_neighbors": 20, "n_components": 10, "min_dist": 0.0, "metric": "cosine"}
    reduced = umap.UMAP(**options, random_state=seed).fit_transform(rows.numpy())
    return KMeans(classes, n_init=4, random_state=seed).fit_predict(reduced)


def spectral_rows(rows: Tensor, classes: int, seed: int) -> np.ndarray:
    near = {"affinity": "nearest_neighbors", "n_neighbors": 20}
    return SpectralClustering(classes, **near, random_state=seed).fit_predict(rows)


def umap_kmeans(features: FrozenFeatures, classes: int, seed: int) -> np.ndarray:
    return umap_rows(measured(features), classes, seed)


def spectral(features: FrozenFeatures, classes: int, seed: int) -> np.ndarray:
    return spectral_rows(measured(features), classes, seed)


def simclr_head(temperature: float, batch: int = 256) -> Method:
    """Return SimCLR's loss (Chen et al. 2020, eq. 1) on a head with localagg's start and rate."""

    def learn(features: FrozenFeatures, classes: int, seed: int) -> Tensor:
        size, epochs = len(features.values), 20
        head = whitened_head(features)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (size // batch))
        positives = torch.arange(2 * batch).roll(batch)
        for epoch in range(epochs):
            order = permutation(size, seed, ORDER, epoch)
            for index in order[: size // batch * batch].split(batch):
                views = [features.random(2 * epoch + n, index) for n in range(2)]
                rows = F.normalize(head(torch.cat(views)), dim=1)
                similar = (rows @ rows.T / temperature).fill_diagonal_(-torch.inf)
                optimizer.zero_grad()
                F.cross_entropy(similar, positives).backward()
                optimizer.step()
                cosine.step()
        with torch.no_grad():
            return head(features.measured(torch.arange(size)))

    return learn


def scan_head(entropy: float, rate: float, batch: int = 128, epochs: int = 50) -> Method:
    """Return SCAN's clusters (Van Gansbeke et al. 2020, eq. 2), of 20 neighbors an image."""

    def learn(features: FrozenFeatures, classes: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        size, x = len(features.values), measured(features)
        near = nearest(x, 20)
        head = nn.Linear(x.shape[1], classes)
        optimizer = torch.optim.Adam(head.parameters(), lr=rate, weight_decay=1e-4)
        for epoch in range(epochs):
            for index in torch.randperm(size)[: size // batch * batch].split(batch):
                others = near[index, torch.randint(20, (batch,))]
                p, q = (
                    F.softmax(head(features.random(2 * epoch + n, each)), dim=1)
                    for n, each in enumerate((index, others))
                )
                agreement = (p * q).sum(dim=1).clamp(min=1e-8).log().mean()
                used = torch.special.entr(p.mean(dim=0)).sum()
                optimizer.zero_grad()
                (-agreement - entropy * used).backward()
                optimizer.step()
        with torch.no_grad():
            return head(features.measured(torch.arange(size))).argmax(dim=1).numpy()

    return learn


def nearest(rows: Tensor, count: int) -> Tensor:
    """Return each unit row's nearest others, int64 [N, count]."""
    parts = [(part @ rows.T).topk(count + 1).indices[:, 1:] for part in rows.split(512)]
    return torch.cat(parts)


class TemiHeads(nn.Module):
    """Two layers, a unit vector of 256, and a weight-normed layer to K classes: H heads at once."""

    def __init__(self, heads: int, channels: int, classes: int) -> None:
        super().__init__()
        sizes = [(channels, 512), (512, 256), (256, classes)]
        weights = [torch.randn(heads, *size).clamp_(-2, 2) * 0.02 for size in sizes]
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(torch.zeros(heads, 1, size) for _, size in sizes[:2])
        self.lengths = nn.Parameter(torch.ones(heads, 1, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [H, B, K] at the temperature 0.1 of rows [B, C]."""
        x = x.expand(len(self.lengths), -1, -1)
        hidden = F.gelu(torch.baddbmm(self.biases[0], x, self.weights[0]))
        row = F.normalize(torch.baddbmm(self.biases[1], hidden, self.weights[1]), dim=2)
        return row @ (self.lengths * F.normalize(self.weights[2], dim=1)) / 0.1


def temi_head(heads: int = 4, batch: int = 256, epochs: int = 100) -> Method:
    """Return TEMI's clusters (Adaloglou et al. 2023, eq. 8), of 50 neighbors an image.

    As published: beta 0.6, a teacher of momentum 0.996, AdamW at 1e-4 for batches of 256 after 20
    epochs of warm-up, the head of least loss. Its README has 16 heads and batches of 1,024, four
    times fewer steps at four times the rate.
    """

    def learn(features: FrozenFeatures, classes: int, seed: int) -> np.ndarray:
        torch.manual_seed(seed)
        x = measured(features)
        near = nearest(x, 50)
        student, teacher = (TemiHeads(heads, x.shape[1], classes) for _ in range(2))
        teacher.load_state_dict(student.state_dict())
        optimizer = torch.optim.AdamW(student.parameters(), weight_decay=1e-4)
        losses = torch.zeros(heads)
        share_HK = torch.full((heads, classes), 1 / classes)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 1e-4 * min(1.0, (epoch + 1) / 20)
            losses.zero_()
            for index in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                views = x[index], x[near[index, torch.randint(50, (batch,))]]
                p1, p2 = (F.softmax(student(view), dim=2) for view in views)
                with torch.no_grad():
                    q1, q2 = (F.softmax(teacher(view), dim=2) for view in views)
                    share_HK = 0.9 * share_HK + 0.1 * (q1 + q2).mean(dim=1) / 2
                    weight_B = (q1 * q2).sum(dim=2).mean(dim=0)
                information = [
                    ((p * q) ** 0.6 / share_HK[:, None]).sum(dim=2).log()
                    for p, q in ((p1, q2), (p2, q1))
                ]
                loss_H = -(weight_B * (information[0] + information[1]) / 2).mean(dim=1)
                optimizer.zero_grad()
                loss_H.sum().backward()
                optimizer.step()
                losses += loss_H.detach()
                with torch.no_grad():
                    for own, other in zip(teacher.parameters(), student.parameters(), strict=True):
                        own.lerp_(other, 1 - 0.996)
        with torch.no_grad():
            return teacher(x)[losses.argmin()].argmax(dim=1).numpy()

    return learn

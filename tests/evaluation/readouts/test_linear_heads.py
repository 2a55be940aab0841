"""Heads and their scores: first weights, decay, mean softmax, ranks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from localagg.evaluation.readouts.linear_heads import (
    LinearHeads,
    accuracies,
    linear_head,
    make_optimizer,
    mean_softmax,
)
from localagg.models import create_encoder


def test_batch_norm_of_a_fine_tuned_network_does_not_decay():
    encoder = create_encoder("resnet18_small", 16, seed=0, width=8, blocks=(1, 1))
    probe = LinearHeads(encoder, ["1"], 3, 8, finetune=True)
    optimizer = make_optimizer(probe, learning_rate=1.0, momentum=0.0, weight_decay=0.5)
    for parameter in probe.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in probe.named_parameters()}
    optimizer.step()
    after = dict(probe.named_parameters())
    assert torch.equal(
        after["encoder.backbone.stem_norm.weight"], before["encoder.backbone.stem_norm.weight"]
    )
    for name in ("encoder.backbone.stem.weight", "heads.0.weight"):
        torch.testing.assert_close(after[name], before[name] / 2)


def test_first_weights_are_the_references_truncated_normal():
    head = linear_head(2000, 50, 0, "3")
    deviation = math.sqrt(1.3 * 2 / 2000)
    assert head.weight.abs().max() <= 2 * deviation
    assert head.weight.abs().max() > 1.99 * deviation
    # 100,000 draws: the deviation is known to 0.2 % (one sigma), the mean to 0.3 % of it.
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 2000), rel=0.01)
    assert abs(head.weight.mean().item()) < 0.015 * math.sqrt(2 / 2000)
    assert not head.bias.any()
    assert not torch.equal(head.weight, linear_head(2000, 50, 0, "5").weight)
    assert not torch.equal(head.weight, linear_head(2000, 50, 1, "3").weight)


class Table(nn.Module):
    """Logits looked up by the value of a view's first pixel."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        rows = images[:, 0, 0, 0].long()
        return {"a": self.logits[rows], "b": -self.logits[rows]}


def views_of(rows):
    """Images [..., 3, 2, 2] whose pixels say which row of the table they ask for."""
    return rows[..., None, None, None].float().expand(*rows.shape, 3, 2, 2)


def naive_scores(logits, rows, labels):
    """Mean softmax by loops, then top-1 and top-5 with ties to the lower class."""
    top1 = top5 = 0
    for views, label in zip(rows, labels, strict=True):
        mean = [0.0] * logits.shape[1]
        for row in views:
            e = [math.exp(v) for v in logits[row].tolist()]
            mean = [m + v / sum(e) / len(views) for m, v in zip(mean, e, strict=True)]
        best = sorted(range(len(mean)), key=lambda c: (-mean[c], c))
        top1 += best[0] == label
        top5 += label in best[:5]
    return {"top1": top1 / len(labels), "top5": top5 / len(labels)}


def test_ten_crops_are_scored_by_mean_softmax_over_all_images():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 8, generator=generator)
    rows = torch.randint(0, 40, (23, 10), generator=generator)
    labels = torch.randint(0, 8, (23,), generator=generator)
    index = torch.randperm(23, generator=generator)
    batches = [(part, views_of(rows[part])) for part in index.split(5)]  # the last has 3
    found, counted = accuracies(Table(logits), batches, labels)
    assert counted == 23
    for layer, table in (("a", logits), ("b", -logits)):
        assert found[layer] == pytest.approx(naive_scores(table, rows.tolist(), labels.tolist()))
    averaged = mean_softmax(logits[rows].flatten(0, 1), 10)
    expected = np.exp(logits[rows].numpy().astype(np.float64))
    expected = (expected / expected.sum(axis=2, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(averaged, expected, rtol=1e-5)


def test_ties_go_to_the_lower_class_and_no_number_is_no_hit():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [math.nan, math.nan, math.nan]])
    rows = torch.tensor([0, 0, 1, 1, 2])
    labels = torch.tensor([0, 1, 0, 2, 0])
    found, _ = accuracies(Table(logits), [(torch.arange(5), views_of(rows))], labels)
    assert found["a"] == {"top1": 0.4, "top5": 0.8}

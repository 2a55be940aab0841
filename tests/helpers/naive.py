"""The equations of the papers as plain loops in float64: slow, and hard to get wrong.

Nothing of localagg is used here. Gradients are those of the written-out derivative.
"""

import math

import numpy as np

Z_PER_IMAGE = 2876934.2 / 1281167


def similarities(v, bank):
    return [[sum(float(a) * float(b) for a, b in zip(x, m, strict=True)) for m in bank] for x in v]


def probability(v, bank, t):
    """P(j | v): IR eq. 2."""
    rows = []
    for sim in similarities(v, bank):
        exponentials = [math.exp((s - max(sim)) / t) for s in sim]
        rows.append([e / sum(exponentials) for e in exponentials])
    return np.array(rows)


def instance_softmax(v, bank, index, t):
    """IR eq. 3 and its gradient."""
    P = probability(v, bank, t)
    loss, grad = 0.0, np.zeros((len(v), len(bank[0])))
    for i, own in enumerate(index):
        loss -= math.log(P[i, own]) / len(v)
        for j in range(len(bank)):
            grad[i] += (P[i, j] - (j == own)) * np.array(bank[j]) / t / len(v)
    return loss, grad


def instance_nce(v, bank, index, noise, t):
    """IR eqs. 5-7 with the reference's constant Z: data term, noise term, gradient of their sum."""
    B, N, K, eps = len(v), len(bank), len(noise[0]), 1e-7
    Z, base = Z_PER_IMAGE * N, K / N
    sim = similarities(v, bank)
    data = noise_term = 0.0
    grad = np.zeros((B, len(bank[0])))
    for i in range(B):
        p = math.exp(sim[i][index[i]] / t) / Z
        data -= math.log(p / (p + base + eps)) / B
        grad[i] -= (base + eps) / (p + base + eps) / t * np.array(bank[index[i]]) / B
        for j in noise[i]:
            q = math.exp(sim[i][j] / t) / Z
            noise_term -= math.log(base / (q + base + eps)) / B
            grad[i] += q / (q + base + eps) / t * np.array(bank[j]) / B
    return data, noise_term, grad


def background(sim, K):
    """The K most similar rows, the lowest index first among equals."""
    return sorted(range(len(sim)), key=lambda j: (-sim[j], j))[:K]


def close(labels, i, j):
    """Whether j shares a cluster with i in any clustering."""
    return any(clustering[i] == clustering[j] for clustering in labels)


def local_aggregation(v, bank, labels, index, K, t, eps=1e-7):
    """LA eq. 5 and its gradient."""
    around = [background(sim, K) for sim in similarities(v, bank)]
    return aggregation(v, bank, labels, index, around, t, eps)[:2]


def aggregation(v, bank, labels, index, around, t, eps=1e-7):
    """LA eq. 5 among given rows, its gradient, and a size that the gradient's terms add up to."""
    B = len(v)
    loss, grad, size = 0.0, np.zeros((B, len(bank[0]))), 0.0
    for i, sim in enumerate(similarities(v, bank)):
        top = max(sim[j] for j in around[i])
        weight = {j: math.exp((sim[j] - top) / t) for j in around[i]}
        whole = sum(weight.values())
        near = [j for j in around[i] if close(labels, index[i], j)]
        # The rest is summed by itself: of a share near 1 it would be lost in rounding.
        rest = sum(weight[j] for j in around[i] if j not in near) / whole
        share = sum(weight[j] for j in near) / whole
        loss -= (math.log(share + eps) if share < 0.5 else math.log1p(eps - rest)) / B
        for j in around[i]:
            slope = weight[j] / whole * (rest if j in near else -share) / t / (share + eps) / B
            grad[i] -= slope * np.array(bank[j])
            size += abs(slope) * max(map(abs, map(float, bank[j])))
    return loss, grad, size


def knn_accuracy(queries, query_labels, bank, bank_labels, k, t):
    """IR section 3.4."""
    right = 0
    for sim, label in zip(similarities(queries, bank), query_labels, strict=True):
        votes = {}
        for j in background(sim, k):
            votes[int(bank_labels[j])] = votes.get(int(bank_labels[j]), 0.0) + math.exp(sim[j] / t)
        right += max(votes, key=lambda c: (votes[c], -c)) == int(label)
    return right / len(queries)

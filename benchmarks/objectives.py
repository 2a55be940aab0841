"""What does a loss cost, forward and backward, beside the ways that others compute it?"""

import torch
import torch.nn.functional as F

import report
from localagg.objectives import instance_nce, instance_softmax, local_aggregation

B, D, K, H, T = 128, 128, 4096, 3, 0.07


def whole_product(v: torch.Tensor, bank: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The exact softmax with B x N held and saved for backward."""
    return F.cross_entropy(v @ bank.T / T, index)


def ports_way(v: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, index: torch.Tensor):
    """LA as the later PyTorch port computes it: whole product, top-k, gathers of [B, N]."""
    sim_BN = v @ bank.T
    exp_BN = torch.exp(sim_BN / T)
    close_BN = (labels[:, None, :] == labels[:, index, None]).any(dim=0)
    top = torch.topk(sim_BN.detach(), K, dim=1).indices
    background = exp_BN.gather(1, top)
    close = background * close_BN.gather(1, top)
    return -torch.log(close.sum(dim=1) / background.sum(dim=1) + 1e-7).mean()


def measure(size: int) -> dict[str, float]:
    """Median seconds of each loss with a bank of ``size`` rows."""
    torch.manual_seed(0)
    bank = F.normalize(torch.randn(size, D), dim=1)
    v = F.normalize(torch.randn(B, D), dim=1).requires_grad_()
    index = torch.randint(size, (B,))
    noise = torch.randint(size, (B, K))
    labels = torch.randint(0, size // 64, (H, size), dtype=torch.int32)

    def gradient(loss: torch.Tensor) -> None:
        torch.autograd.grad(loss, v)

    return report.interleaved(
        {
            "IR exact, ours": lambda: gradient(instance_softmax(v, bank, index)),
            "IR exact, whole product": lambda: gradient(whole_product(v, bank, index)),
            "IR by NCE, ours": lambda: gradient(instance_nce(v, bank, index, noise)[0]),
            "LA, ours": lambda: gradient(local_aggregation(v, bank, labels, index, neighbors=K)),
            "LA, the port's way": lambda: gradient(ports_way(v, bank, labels, index)),
        }
    )


def main() -> None:
    rows = []
    for size in (50_000, 200_000):
        found = measure(size)
        for name, seconds in found.items():
            ratio = seconds / found["LA, ours"]
            rows.append([f"{size:,}", name, f"{1e3 * seconds:.0f}", f"{ratio:.2f}"])
    report.write(
        "objectives",
        f"A loss, forward and backward (B = {B}, D = {D}, K = {K:,}, H = {H})",
        ["N", "loss", "ms (median of 7, interleaved)", "times LA, ours"],
        rows,
        "GPU: not measured.",
    )


if __name__ == "__main__":
    main()

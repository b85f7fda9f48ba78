"""The optimizer of the demo model: Muon for matrices, and AdamW for all other parameters.

docs/decisions.md describes the experiments that led to this choice. `torch.optim.Muon` takes
matrices only; here the kernel of a convolution counts as a matrix too, of the shape
(out, in · height · width).

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; the factor
0.2·sqrt(longer side), which lets both halves share one rate, is Liu et al. 2025, "Muon is
Scalable for LLM Training".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonalized(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Orthogonalise a matrix: approximate U·Vᵀ of its singular value decomposition U·S·Vᵀ.

    Uses a quintic Newton–Schulz iteration in bfloat16.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for parameters with two or more dimensions."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"]).reshape(len(p), -1)
                rate = group["lr"] * 0.2 * max(ahead.shape) ** 0.5
                p.add_(orthogonalized(ahead).reshape(p.shape), alpha=-rate)


class Optimizer:
    """Muon and AdamW with one schedule: a short warm-up, a plateau, and a linear decay to zero.

    `rate`: the learning rate on the plateau. `steps`: the length of the training.
    """

    def __init__(self, model: torch.nn.Module, rate: float, steps: int) -> None:
        named = list(model.named_parameters())
        # Embedding tables are look-up tables, not linear maps, and each row is rarely used: AdamW.
        matrix = {n for n, p in named if p.ndim >= 2 and "embed" not in n and "shared" not in n}
        self.parts: list[torch.optim.Optimizer] = [
            Muon([p for n, p in named if n in matrix], rate),
            torch.optim.AdamW([p for n, p in named if n not in matrix], rate, betas=(0.9, 0.99)),
        ]

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / 50, max(0.0, (steps - step) / (0.45 * steps)))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(part, factor) for part in self.parts]

    def descend(self, loss: torch.Tensor) -> None:
        """Take one step that lowers the loss."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            part.step()
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [p.state_dict() for p in self.parts],
                "schedules": [s.state_dict() for s in self.schedules]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)

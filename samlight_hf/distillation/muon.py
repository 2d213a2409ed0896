"""Muon for the matrices between layers, AdamW for everything else, as one optimizer."""

from collections.abc import Iterable

import torch
from torch.optim import AdamW, Muon, Optimizer


# Narrower ones are embeddings and the last layers of heads.
MIN_MATRIX_SIDE = 32


class MuonWithAdamW(Optimizer):
    """torch's Muon for parameters of two dimensions with at least 32 rows and columns, torch's AdamW for the others.

    Both take steps of about the same size for the same learning rate ("match_rms_adamw"; Liu et al., Muon is Scalable for LLM
    Training, arXiv 2502.16982), so that a schedule made for AdamW serves. Parameters and groups are those of any optimizer.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ):
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        matrices, others = [], []
        for group in groups:
            members = list(group["params"])
            for chosen, is_matrix in ((matrices, True), (others, False)):
                if found := [parameter for parameter in members if _is_matrix(parameter) == is_matrix]:
                    chosen.append({**group, "params": found})
        self.parts: list[Optimizer] = []
        if matrices:
            options = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, **options))
        if others:
            self.parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        # The very groups of the parts, so that who sets a learning rate here sets it there.
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict):
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _is_matrix(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 2 and min(parameter.shape) >= MIN_MATRIX_SIDE

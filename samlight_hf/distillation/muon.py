"""Muon for the matrices of the layers and AdamW for all other parameters, in one optimizer."""

import math
from collections.abc import Iterable

import torch
from torch.optim import AdamW, Muon, Optimizer


# Narrower matrices are embeddings and the last layers of heads.
MIN_MATRIX_SIDE = 32


class BatchedMuon(Muon):
    """torch's Muon with `adjust_lr_fn="match_rms_adamw"`, in which matrices of one shape are orthogonalized together.

    torch processes them one by one: some 80 matrices with 30 small kernels each leave a GPU waiting for launches. State
    and groups are those of torch's Muon.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters, gradients, buffers = [], [], []
            self._init_group(group, parameters, gradients, buffers)
            if not parameters:
                continue
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for shape in dict.fromkeys(parameter.shape for parameter in parameters):
                alike = [i for i, parameter in enumerate(parameters) if parameter.shape == shape]
                stacked = torch.stack([updates[i] for i in alike])
                directions = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"], group["eps"])
                step_size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                directions = directions.to(parameters[alike[0]].dtype).unbind(0)
                torch._foreach_add_([parameters[i] for i in alike], directions, alpha=-step_size)
        return loss


def orthogonalize(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Return the nearest matrix with singular values of about 1 to each of (n, rows, columns), by Newton-Schulz in
    bfloat16.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.bfloat16()
    if is_tall:
        result = result.mT
    result = result / result.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(num_steps):
        gram = result @ result.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.baddbmm(result, update, result, beta=a)
    return result.mT if is_tall else result


class MuonWithAdamW(Optimizer):
    """Optimizer with Muon for matrices of at least 32 rows and columns, and AdamW for the other parameters.

    Both take steps of about the same size for the same learning rate ("match_rms_adamw"; Liu et al., Muon is Scalable
    for LLM Training, arXiv 2502.16982), so a schedule made for AdamW can be used. Parameters and groups are those of
    any optimizer.
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
        matrices: list[dict] = []
        others: list[dict] = []
        for group in groups:
            members = list(group["params"])
            for chosen, is_matrix in ((matrices, True), (others, False)):
                if parameters := [parameter for parameter in members if _is_matrix(parameter) == is_matrix]:
                    chosen.append({**group, "params": parameters})
        self.parts: list[Optimizer] = []
        if matrices:
            adjustment = "match_rms_adamw"
            muon = BatchedMuon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn=adjustment)
            self.parts.append(muon)
        if others:
            self.parts.append(AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        # The same group objects as the parts', so that a learning rate set here is set there.
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

"""Token mixers built on the selective scan.

Legend: B batch, L tokens, C channels of the model, D channels of the scan (expand * C), N scan state size, R
rank of the step's projection.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.kernels.bidirectional_selective_scan import bidirectional_selective_scan
from vitzoo.kernels.causal_conv1d import causal_conv1d
from vitzoo.layers.norm import at_least_float32

# they check shapes and choose a backend: FX keeps the calls whole
register_notrace_function(causal_conv1d)
register_notrace_function(bidirectional_selective_scan)

_Scan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class BidirectionalMamba(nn.Module):
    """Mamba's mixer run over the tokens from both ends, the mean of the two taken (Vim's block, "v2").

    The two directions share the input projection, the gate and the output projection, and have their own
    convolution, step, A, B, C and D. Everything stays in the order of the tokens: the second direction's
    convolution looks ahead, and one call scans from both ends. The published code flips the tokens instead and
    gates each direction's result; the gate is the same for both, so here it multiplies their sum.

    Args:
        dim: channels C of the tokens.
        d_state: scan state size N.
        d_conv: width of the causal convolution, 2 to 4.
        expand: D / C.
        dt_rank: rank R of the step's projection; ceil(C / 16) if None.

    Source: Vim, arXiv 2401.09417, Algorithm 1; hustvl/Vim at dd0358ad, which halves the sum of the directions
        where the paper does not. Initialisation: Mamba, arXiv 2312.00752, section 3.6.
    """

    dt_min, dt_max, dt_floor = 1e-3, 1e-1, 1e-4

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__()
        inner = expand * dim
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.d_state, self.dt_rank = d_state, rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj = nn.Linear(rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(inner, **dd))
        self.conv1d_b = nn.Conv1d(inner, inner, d_conv, groups=inner, **dd)
        self.x_proj_b = nn.Linear(inner, rank + 2 * d_state, bias=False, **dd)
        self.dt_proj_b = nn.Linear(rank, inner, **dd)
        self.A_b_log = nn.Parameter(torch.empty(inner, d_state, **dd))
        self.D_b = nn.Parameter(torch.empty(inner, **dd))
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set A to -1 .. -N, D to one, and the steps to a log-uniform draw from [dt_min, dt_max]."""
        device = self.A_log.device
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        for log in (self.A_log, self.A_b_log):
            log.copy_(states.log().expand_as(log))
        nn.init.ones_(self.D)
        nn.init.ones_(self.D_b)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        for proj in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            uniform = torch.rand(proj.bias.shape, dtype=torch.float32, device=device)
            step = torch.exp(low + (high - low) * uniform).clamp(min=self.dt_floor)
            proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(bias) = step

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens.

        Args:
            x: tokens, (B, L, C).

        Returns:
            (B, L, C).
        """
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (B, D, L) each
        u, ahead = self._direction(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        u_b, back = self._direction(
            x, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True
        )
        y = bidirectional_selective_scan(u, z, *ahead, *back, u_b, delta_softplus=True)
        return 0.5 * self.out_proj(y.transpose(1, 2))  # halving after the projection halves fewer numbers

    def _direction(
        self,
        x: Tensor,
        conv: nn.Conv1d,
        x_proj: nn.Linear,
        dt_proj: nn.Linear,
        log: Tensor,
        skip: Tensor,
        reverse: bool = False,
    ) -> tuple[Tensor, _Scan]:
        """Return a direction's input u (B, D, L), lying in memory as x does, and its delta, A, B, C, D and bias."""
        out = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu", reverse=reverse)
        u = cast(Tensor, out)
        dt, b, c = x_proj(u.transpose(1, 2)).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        # the scan adds the bias, in float32: in bfloat16 the sum would lose most of what depends on the token
        delta = F.linear(dt, dt_proj.weight)
        return u, (
            delta.transpose(1, 2),
            -at_least_float32(log).exp(),
            b.transpose(1, 2),
            c.transpose(1, 2),
            at_least_float32(skip),
            at_least_float32(dt_proj.bias),
        )

"""How many floating-point operations a selective scan takes.

The exact convention counts what the sequential recurrence does: every addition, multiplication, division, exponential
and logarithm is one operation. Per state and token that is 7: delta A, exp, B times the input, two for the recurrence,
two for the output. The terms of each token are in the README.
"""

from __future__ import annotations


def selective_scan_flops(
    batch: int,
    dim: int,
    seqlen: int,
    dstate: int,
    *,
    has_D: bool = False,
    has_z: bool = False,
    has_delta_bias: bool = False,
    delta_softplus: bool = False,
    convention: str = "exact",
) -> int:
    """Return the FLOPs (not MACs) of the forward pass.

    Args:
        batch: B.
        dim: D, scan channels.
        seqlen: L.
        dstate: N.
        has_D: with the skip term.
        has_z: with the gate.
        has_delta_bias: with a bias on delta.
        delta_softplus: with softplus on delta.
        convention: "exact", see above; "paper" is the 9 B L D N of tables that count a parallel scan, plus one
            operation for each of skip and gate and none for the step.

    Raises:
        ValueError: an unknown convention.

    Source: state-spaces/mamba#110 for the paper convention.
    """
    tokens = batch * dim * seqlen
    if convention == "paper":
        return tokens * (9 * dstate + has_D + has_z)
    if convention != "exact":
        raise ValueError(f"convention {convention!r} is not 'exact' or 'paper'")
    return tokens * (7 * dstate + 1 + has_delta_bias + 3 * delta_softplus + 2 * has_D + 5 * has_z)


def selective_scan_bwd_flops(
    batch: int,
    dim: int,
    seqlen: int,
    dstate: int,
    *,
    has_D: bool = False,
    has_z: bool = False,
    has_delta_bias: bool = False,
    delta_softplus: bool = False,
) -> int:
    """Return the FLOPs of the backward pass in the exact convention: states are recomputed, then swept backwards.

    Per state and token: 5 for the state again (7 with a gate, whose gradient needs y), 3 for its gradient, 1 for q, and
    2 each for dA, ddelta, du, dB and dC.
    """
    per_token = 4 + 2 * has_delta_bias + 6 * delta_softplus + (4 + 2 * has_z) * has_D + 11 * has_z
    return batch * dim * seqlen * ((19 + 2 * has_z) * dstate + per_token)

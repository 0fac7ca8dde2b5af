"""Helpers of the tests: golden files and their fill, comparison with a reference. A leaf of the house.

Golden files record what the authors' code printed for weights and inputs that a name and a shape define, so
none are shipped. Only NumPy's legacy RandomState is used, whose stream never changes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(
    os.environ.get("VITZOO_GOLDEN", Path(__file__).resolve().parent.parent / "tests" / "data" / "golden")
)


def fill(name: str, shape: Sequence[int]) -> np.ndarray:
    """Return the values of the float tensor of that full dotted name and shape, float32."""
    shape = tuple(shape)
    leaf = name.rsplit(".", 1)[-1]
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if leaf == "running_var":
        out = 1.0 + 0.1 * np.abs(z)
    elif leaf == "running_mean":
        out = 0.1 * z
    elif leaf in ("A_log", "A_b_log"):  # (D, N): the S4D-real initialisation, jittered
        out = np.log(np.arange(1, shape[-1] + 1, dtype=np.float64)) + 0.1 * z
    elif leaf in ("D", "D_b"):
        out = 1.0 + 0.1 * z
    elif len(shape) <= 1:
        out = 1.0 + 0.1 * z if leaf in ("weight", "gamma", "scale", "alpha") else 0.1 * z
    elif leaf == "weight":
        out = z / np.sqrt(np.prod(shape[1:]))
    else:
        out = 0.2 * z
    return out.astype(np.float32)


def image(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return a standard-normal input of a shape, float32."""
    values = np.random.RandomState(1000 + seed).standard_normal(tuple(shape)).astype(np.float32)
    return torch.from_numpy(values)


def sample(values: np.ndarray, count: int = 64) -> np.ndarray:
    """Return `count` evenly spaced entries of the flattened array, as golden files record large tensors."""
    flat = np.asarray(values).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(np.int64)]


def load_golden(name: str) -> dict[str, Any]:
    """Read a golden file, e.g. "evit/evit_small_keep0.7_fuse"."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_names(folder: str) -> list[str]:
    """Return the golden files of a folder, as `load_golden` takes them."""
    return sorted(f"{folder}/{p.stem}" for p in (GOLDEN / folder).glob("*.json"))


def golden_state_dict(golden: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a golden file, filled by name and shape, in the authors' names."""
    return {k: torch.from_numpy(np.asarray(fill(k, shape))) for k, shape in golden["state_dict"].items()}


def relative_difference(out: Any, ref: Any) -> float:
    """Return norm(out - ref) / norm(ref) in float64; the plain norm of `out` where `ref` is zero."""
    out = np.asarray(
        out.detach().cpu().double() if isinstance(out, Tensor) else out, dtype=np.float64
    ).reshape(-1)
    ref = np.asarray(
        ref.detach().cpu().double() if isinstance(ref, Tensor) else ref, dtype=np.float64
    ).reshape(-1)
    if out.shape != ref.shape:
        raise AssertionError(f"{out.size} values compared with {ref.size}")
    norm = float(np.linalg.norm(ref))
    return float(np.linalg.norm(out - ref)) / (norm or 1.0)


def assert_golden(
    out: Tensor, recorded: Mapping[str, Any], tolerance: float = 1e-5, what: str = "output"
) -> None:
    """Compare a tensor with what a golden file recorded of it.

    Args:
        out: the tensor, in the recorded memory layout.
        recorded: `{"shape": ..., "values": ...}`, values whole or sampled.
        tolerance: bound on norm(out - ref) / norm(ref).
        what: name for the message.
    """
    if list(out.shape) != list(recorded["shape"]):
        raise AssertionError(f"{what}: shape {list(out.shape)}, recorded {recorded['shape']}")
    values = np.asarray(recorded["values"], dtype=np.float64).reshape(-1)
    ours = out.detach().double().cpu().contiguous().numpy().reshape(-1)
    difference = relative_difference(ours if ours.size == values.size else sample(ours), values)
    if not difference <= tolerance:
        raise AssertionError(f"{what}: relative difference {difference:.2e} exceeds {tolerance:.0e}")


def gradient_norms(model: torch.nn.Module, x: Tensor) -> dict[str, float]:
    """Return the gradient norms of `(logits * image(logits.shape, 7)).sum()`, as golden files define them."""
    model.zero_grad()
    logits = model(x)
    (logits * image(logits.shape, 7)).sum().backward()
    return {k: float(p.grad.double().norm()) for k, p in model.named_parameters() if p.grad is not None}


def assert_close_to_reference(
    out: Tensor, reference: Tensor, exact: Tensor, floor: float, what: str = "output", factor: float = 2.0
) -> None:
    """Require that a backend be at most `factor` times as far from the float64 result as the reference is.

    Args:
        out: what the backend gave.
        reference: what the plain PyTorch reference gave in the same dtype.
        exact: what it gave in float64.
        floor: added to the reference's own error, relative to norm(exact).
        what: name for the message.
        factor: see above.
    """
    if out.shape != exact.shape:
        raise AssertionError(f"{what}: shape {tuple(out.shape)} instead of {tuple(exact.shape)}")
    ours, theirs = relative_difference(out, exact), relative_difference(reference, exact)
    if not ours <= factor * theirs + floor:
        raise AssertionError(
            f"{what}: error {ours:.2e}, the reference's own is {theirs:.2e} (floor {floor:.0e})"
        )


# What a backend's error may add to twice the reference's own, relative to norm(exact): the output's own rounding.
FLOORS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
_MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "neg_exp": lambda x: -np.exp(x),
    "abs": np.abs,
}


def golden_tensor(spec: Mapping[str, Any]) -> Tensor:
    """Return an operator's input as the golden file defines it, float32 or, with a real and an imag part, complex64."""
    if "real" in spec:
        return torch.complex(golden_tensor(spec["real"]), golden_tensor(spec["imag"]))
    values = _MAPS[spec["map"]](spec["scale"] * fill(spec["fill"], spec["shape"]))
    return torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))


def outputs_and_gradients(
    function: Callable[..., Any], inputs: Mapping[str, Any], constant: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Run an operator and the backward pass of a loss that reads every output; return outputs and gradients by name.

    Args:
        function: called with the inputs as keyword arguments, returns a tensor or a tuple of tensors.
        inputs: its arguments; every floating-point tensor among them gets a gradient, but for those in `constant`.
        constant: names of inputs without a gradient.
    """
    leaves = {
        k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(v, Tensor) and v.is_floating_point() and k not in constant
        else v
        for k, v in inputs.items()
    }
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    losses = [
        (out.double() * image(out.shape, i + 1).double().to(out.device)).sum()
        for i, out in enumerate(outputs)
        if out.requires_grad
    ]
    if losses:
        torch.stack(losses).sum().backward()
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    wanted = {k: v for k, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    return results | {f"gradient of {k}": v.grad for k, v in wanted.items() if v.grad is not None}


def assert_backend_close(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    backend: str,
    use_backend: Callable[[str], Any],
    constant: Sequence[str] = (),
) -> None:
    """Hold one backend, outputs and every gradient, to `assert_close_to_reference`.

    Args:
        function: the operator's public function.
        inputs: its keyword arguments; the widest error allowed is that of the narrowest floating-point input.
        backend: the backend in question.
        use_backend: `vitzoo.use_backend`, which this module may not import.
        constant: names of inputs without a gradient.
    """
    floats = [v for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    wide = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    with use_backend("reference"):
        exact = outputs_and_gradients(function, wide, constant)
        reference = outputs_and_gradients(function, inputs, constant)
    with use_backend(backend):
        ours = outputs_and_gradients(function, inputs, constant)
    if ours.keys() != reference.keys():
        raise AssertionError(f"{backend} gives {sorted(ours)}, the reference {sorted(reference)}")
    loosest = max(FLOORS[x.dtype] for x in floats)
    for name, value in ours.items():
        if value.dtype != reference[name].dtype:
            raise AssertionError(f"{name} is {value.dtype}, the reference's {reference[name].dtype}")
        if not value.is_floating_point():
            if not torch.equal(value, reference[name]):
                raise AssertionError(f"{name} differs from the reference's")
            continue
        if not float(exact[name].double().norm()):  # nothing to be relative to
            if not float(value.double().norm()) <= 1e-6:
                raise AssertionError(f"{name} is not zero")
            continue
        assert_close_to_reference(value, reference[name], exact[name], loosest, f"{backend}: {name}")


def gpu_or_cpu() -> list[str]:
    """Return the devices that a test should run on here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

"""Single quantizers against what the authors' own code printed."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.quantization import calibration, integer, search, transforms
from vitzoo.quantization.quantizers import Log2, Uniform
from vitzoo.testing import assert_golden, fill, image, load_golden


def act(name: str, shape: tuple[int, ...], spread: float) -> Tensor:
    channels = (1, 1, shape[-1])
    wide = 5 * fill(name, shape).astype(np.float64)
    out = wide * np.exp(spread * 5 * fill(f"{name}.channel", channels).astype(np.float64))
    return torch.from_numpy(
        (out + 2.5 * fill(f"{name}.shift", channels).astype(np.float64)).astype(np.float32)
    )


def attn(name: str, shape: tuple[int, ...], temperature: float) -> Tensor:
    return torch.from_numpy(temperature * 5 * fill(name, shape).astype(np.float64)).softmax(-1).float()


def gelu(name: str, shape: tuple[int, ...]) -> Tensor:
    return F.gelu(torch.from_numpy(5 * fill(name, shape).astype(np.float64))).float()


def _fill(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(fill(name, shape))


RULES = {"act": act, "attn": attn, "gelu": gelu, "fill": _fill, "image": image}


def value(rule: str) -> Any:
    """Return the tensor of a rule such as "5*fill('name', (2, 3))" or "exp(0.7*10*fill(...)) in float64"."""
    wide = re.fullmatch(r"exp\((.*)\*(fill\(.*\))\) in float64", rule)
    if wide:
        factor = math.prod(float(f) for f in wide[1].split("*"))
        return torch.exp(factor * value(wide[2]).double()).float()
    factors = re.fullmatch(r"(?:(\d+)\*)?((?:act|attn|gelu|fill|image)\(.*\))", rule)
    assert factors, rule
    found = eval(factors[2], {"__builtins__": {}}, RULES)
    return found * float(factors[1]) if factors[1] else found


def integers(rule: str, scale: float) -> Tensor:
    """Return the tensor of "scale * clip(round(150*fill(...)), -128, 127)"."""
    parts = re.fullmatch(r"scale \* clip\(round\((\d+)\*(fill\(.*\))\), (-\d+), (\d+)\)", rule)
    assert parts, rule
    codes = torch.round(value(parts[2]) * float(parts[1])).clamp(float(parts[3]), float(parts[4]))
    return codes * scale


def cases(name: str) -> list[Any]:
    return [
        pytest.param(case, id=f"{name}-{i}") for i, case in enumerate(load_golden(f"quant/{name}")["cases"])
    ]


def check(found: dict[str, Tensor], case: dict[str, Any], tolerance: float = 1e-6) -> None:
    for name, tensor in found.items():
        recorded = case["outputs"][name]
        assert_golden(tensor.reshape(recorded["shape"]), recorded, tolerance, name)


@pytest.mark.parametrize(
    "case", [c for n in ("tensor", "channel", "weight") for c in cases(f"repq_uniform_{n}")]
)
def test_repq_uniform(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    axis = None if not case["channel_wise"] else (2 if x.ndim == 3 else 0)
    quantizer = calibration.fit_percentile(x, case["n_bits"], axis)
    check({"delta": quantizer.scale, "zero_point": quantizer.zero_point, "dequantized": quantizer(x)}, case)


@pytest.mark.parametrize("case", cases("repq_logsqrt2"))
def test_repq_log_sqrt2(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    quantizer = calibration.fit_log_sqrt2(x, case["n_bits"])
    check({"delta": quantizer.delta, "dequantized": quantizer(x)}, case)


@pytest.mark.parametrize("case", cases("repq_reparam_w4a4"))
def test_repq_reparameterization(case: dict[str, Any]) -> None:
    inputs = {k: value(v) for k, v in case["inputs"].items()}
    norm, linear = nn.LayerNorm(24, eps=1e-6), nn.Linear(24, 18)
    norm.load_state_dict({"weight": inputs["norm1.weight"], "bias": inputs["norm1.bias"]})
    linear.load_state_dict({"weight": inputs["qkv.weight"], "bias": inputs["qkv.bias"]})
    with torch.no_grad():
        before = linear(norm(inputs["x"]))
        channels = calibration.fit_percentile(norm(inputs["x"]), case["a_bits"], 2)
        target = transforms.reparameterize(norm, [linear], channels)
        weight = calibration.fit_percentile(linear.weight, case["w_bits"], 0)
        hidden = norm(inputs["x"])
        after = linear(hidden)
        quantized = F.linear(target(hidden), weight(linear.weight), linear.bias)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    found = {
        "channel delta before": channels.scale,
        "channel zero_point before": channels.zero_point,
        "target delta": target.scale,
        "target zero_point": target.zero_point,
        "norm1.weight after": norm.weight,
        "norm1.bias after": norm.bias,
        "qkv.weight after": linear.weight,
        "qkv.bias after": linear.bias,
        "weight delta after": weight.scale,
        "weight zero_point after": weight.zero_point,
        "float output after reparameterisation": after,
        "quantized output": quantized,
    }
    check(found, case)


def test_a_rounded_target_keeps_the_function() -> None:
    torch.manual_seed(0)
    norm, linear, x = nn.LayerNorm(8), nn.Linear(8, 5, bias=False), image((4, 8))
    nn.init.normal_(norm.weight)
    before = linear(norm(x))
    channels = calibration.fit_percentile(norm(x), 8, 1)
    target = transforms.reparameterize(norm, [linear], channels, round_zero_point=True)
    assert float(target.zero_point) == round(float(target.zero_point))
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-4, atol=1e-5)


def _uniform(quantizer: Uniform, x: Tensor) -> dict[str, Tensor]:
    return {
        "scale": quantizer.scale,
        "zero_point": quantizer.zero_point,
        "integer codes": quantizer.codes(x),
        "dequantized": quantizer(x),
    }


@pytest.mark.parametrize("case", cases("fqvit_minmax_act_uint8"))
def test_fqvit_minmax(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    check(_uniform(calibration.fit_minmax(x, 8), x), case)


@pytest.mark.parametrize("case", cases("fqvit_minmax_weight_int8"))
def test_fqvit_weight(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    quantizer = calibration.fit_minmax(x, 8, signed=True, axis=0)
    check({"scale": quantizer.scale, "zero_point": quantizer.zero_point}, case)
    codes = np.asarray(case["outputs"]["integer codes"]["values"]).reshape(x.shape)
    # the extreme of each row sits on a tie by construction
    difference = (quantizer.codes(x) - torch.from_numpy(codes)).abs()
    assert float(difference.max()) <= 1
    assert int((difference > 0).sum()) <= x.shape[0]


@pytest.mark.parametrize("case", cases("fqvit_ema_uint8"))
def test_fqvit_ema(case: dict[str, Any]) -> None:
    batches = [value(rule) for rule in case["inputs"].values()]
    check(_uniform(calibration.fit_ema(batches, 8), batches[-1]), case)


@pytest.mark.parametrize("case", cases("fqvit_percentile_uint8"))
def test_fqvit_percentile(case: dict[str, Any]) -> None:
    batches = [value(rule) for rule in case["inputs"].values()]
    check(_uniform(calibration.fit_running_percentile(batches, 8), batches[-1]), case)


@pytest.mark.parametrize("case", cases("fqvit_omse_uint8"))
def test_fqvit_omse(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    check(_uniform(calibration.fit_omse(x, 8), x), case)


@pytest.mark.parametrize("case", cases("fqvit_ptf_uint8"))
def test_fqvit_power_of_two_factors(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    check(_uniform(calibration.fit_power_of_two_factors(x, 8), x), case)


@pytest.mark.parametrize("case", cases("fqvit_log2_uint4"))
def test_fqvit_log2(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"])
    check({"integer codes": Log2(4).codes(x).clamp_max(15), "dequantized": Log2(4)(x)}, case)


@pytest.mark.parametrize("case", cases("fqvit_lis_uint4"))
def test_fqvit_log_int_softmax(case: dict[str, Any]) -> None:
    scale = case["inputs"]["scale"]
    attention, ratio = integer.log_int_softmax(integers(case["inputs"]["x"], scale), scale)
    check({"exp_int / sum (float view)": ratio, "attention": attention}, case)


@pytest.mark.parametrize("case", cases("fqvit_int_layernorm"))
def test_fqvit_integer_layer_norm(case: dict[str, Any]) -> None:
    x = value(case["inputs"]["x"].split(", first")[0])
    weight, bias = value(case["inputs"]["weight"]), value(case["inputs"]["bias"])
    quantizer = calibration.fit_power_of_two_factors(x, 8)
    x = quantizer(x)
    plain = F.layer_norm(x, (24,), weight, bias, 1e-6)
    out_scale = calibration.fit_minmax(plain, 8).scale
    found = {
        "input scale": quantizer.scale,
        "input zero_point": quantizer.zero_point,
        "output scale": out_scale,
        "float LayerNorm of dequantized input": plain,
        "integer LayerNorm output": integer.integer_layer_norm(x, quantizer, weight, bias, out_scale),
    }
    check(found, case)


METRICS = {"hessian": "hessian", "cosine": "cosine", "L2_norm": "l2"}


def _settings(case: dict[str, Any]) -> search.SearchSettings:
    return search.SearchSettings(metric=METRICS[case["metric"]], rounds=case["search_round"])


def _values(case: dict[str, Any]) -> dict[str, Tensor]:
    return {k: value(rule) for k, rule in case["inputs"].items()}


@pytest.mark.parametrize(
    "case", [*cases("ptq4vit_linear_qkv"), *cases("ptq4vit_linear_cosine"), *cases("ptq4vit_twin_gelu")]
)
def test_ptq4vit_linear(case: dict[str, Any]) -> None:
    v, groups, twin = _values(case), case.get("n_V", 1), "a_interval positive" in case["outputs"]
    of_input, of_weight = search.search_linear(
        v["x"],
        v["weight"],
        v["bias"],
        case["bits"],
        groups=groups,
        gradient=v.get("raw_grad"),
        after_gelu=twin,
        settings=_settings(case),
    )
    x, weight = of_input(v["x"]), of_weight(v["weight"])
    found = {
        "w_interval": of_weight.scale[:: len(weight) // groups],
        "x dequantized": x,
        "weight dequantized": weight,
        "output": F.linear(x, weight, v["bias"]),
    }
    if twin:
        found["a_interval positive"] = of_input.step
        found["a_interval negative"] = torch.tensor(of_input.negative_step)
        torch.testing.assert_close(of_input.dequantize(of_input.codes(v["x"])), x)
    else:
        found["a_interval"] = of_input.scale
    check(found, case)


@pytest.mark.parametrize("case", [*cases("ptq4vit_sos_matmul"), *cases("ptq4vit_sos_matmul_l2")])
def test_ptq4vit_softmax_product(case: dict[str, Any]) -> None:
    v = _values(case)
    of_probs, of_v = search.search_softmax_product(
        v["A"], v["B"], case["bits"], gradient=v.get("raw_grad"), compat=True, settings=_settings(case)
    )
    probs, values = of_probs(v["A"]), of_v(v["B"])
    found = {
        "split": torch.tensor(of_probs.split),
        "A_interval": torch.tensor(of_probs.split / (of_probs.levels - 1)),
        "B_interval": of_v.scale,
        "A dequantized": probs,
        "B dequantized": values,
        "output": probs @ values,
    }
    check(found, case)


@pytest.mark.parametrize("case", cases("ivit_shiftmax16"))
def test_ivit_shiftmax(case: dict[str, Any]) -> None:
    scale = case["inputs"]["scale"]
    out, out_scale = integer.shiftmax(integers(case["inputs"]["x"], scale), scale)
    check({"output": out, "output scale": torch.tensor(out_scale)}, case)


@pytest.mark.parametrize("case", cases("ivit_shiftgelu8"))
def test_ivit_shift_gelu(case: dict[str, Any]) -> None:
    scale = case["inputs"]["scale"]
    out, out_scale = integer.shift_gelu(integers(case["inputs"]["x"], scale), scale)
    check({"output": out, "output scale": out_scale}, case)


@pytest.mark.parametrize("case", cases("ivit_layernorm"))
def test_ivit_layer_norm(case: dict[str, Any]) -> None:
    scale = case["inputs"]["scale"]
    x = integers(case["inputs"]["x"], scale)
    weight, bias = value(case["inputs"]["weight"]), value(case["inputs"]["bias"])
    out, out_scale = integer.shift_layer_norm(x, scale, weight, bias)
    check({"output": out, "output scale": out_scale}, case)


@pytest.mark.parametrize("case", cases("smoothquant_ln_fc"))
def test_smoothquant(case: dict[str, Any]) -> None:
    v = {k: value(rule) for k, rule in case["inputs"].items() if k != "act_scales"}
    norm, linear = nn.LayerNorm(24, eps=1e-6), nn.Linear(24, 18)
    norm.load_state_dict({"weight": v["ln.weight"], "bias": v["ln.bias"]})
    linear.load_state_dict({"weight": v["fc.weight"], "bias": v["fc.bias"]})
    with torch.no_grad():
        activation_max = norm(v["x"]).abs().flatten(0, 1).amax(0)
        scales = transforms.smooth(norm, [linear], activation_max, case["alpha"])
        hidden = norm(v["x"])
        by_row = calibration.symmetric(linear.weight.abs().amax(1, keepdim=True), 8)
        by_tensor = calibration.symmetric(linear.weight.abs().max(), 8)
        by_token = calibration.symmetric(hidden.abs().amax(-1, keepdim=True), 8)
        whole = calibration.symmetric(hidden.abs().max(), 8)
        found = {
            "act_scales": activation_max,
            "smoothing scales": scales,
            "ln.weight after": norm.weight,
            "ln.bias after": norm.bias,
            "fc.weight after": linear.weight,
            "weight per channel absmax int8 dequantized": by_row(linear.weight),
            "weight per tensor absmax int8 dequantized": by_tensor(linear.weight),
            "activation per token absmax int8 dequantized": by_token(hidden),
            "activation per tensor absmax int8 dequantized": whole(hidden),
            "float output after smoothing": linear(hidden),
        }
    check(found, case)

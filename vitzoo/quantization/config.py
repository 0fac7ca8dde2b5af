"""Recipes: how a model is quantized, as data."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vitzoo.quantization.calibration import check_bits

FITS = ("minmax", "percentile", "mse", "search")
SOFTMAX = ("uniform", "log2", "log_sqrt2", "twin")
GELU = ("uniform", "twin")
NORM = ("tensor", "channel", "power_of_two")
ACTIVATIONS = ("static", "dynamic", "auto")
ROUNDING = ("nearest", "least_squares")
COSTS = ("size", "bitops")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        name: what reports call it.
        description: one line for people.
        weight_bits: width of weights; one scale an output channel, symmetric.
        activation_bits: width of activations; one scale a tensor.
        reduce_range: 8-bit weights keep to [-64, 63]: sums of two u8 x s8 products then fit the 16 bits that CPUs with
            AVX2 and without VNNI give them, where the full range saturates silently.
        activations: "static" scales from calibration, or "dynamic", found for each call; convolutions stay static,
            since runtimes run dynamic ones slower than float. "auto": each layer static, dynamic or in floating point,
            whichever takes the least time as measured, under the error budget, which it needs; pointwise convolutions
            may become dynamic there, as products of matrices.
        fit: how a static scale is found: "minmax", "percentile" (RepQ-ViT's three, least squared error), "mse" (the
            extremes shrunk to the least squared error), "search" (PTQ4ViT's, against the product's output).
        products: quantize the products of attention too.
        conv_codes: convolutions write codes, as ONNX Runtime's integer ones must; those of OpenVINO and Inductor may
            write floats, which costs less error, and no time where what reads them is in floating point.
        symmetric: activations have ranges about zero, also those without negative values, and biases stay in floating
            point, as TensorRT needs both.
        softmax: quantizer of attention probabilities.
        gelu: quantizer of GELU's output.
        norm: quantizer of a LayerNorm's output: one scale a "tensor"; a scale a "channel", moved into the weights
            afterwards (RepQ-ViT); "power_of_two" factors (FQ-ViT).
        smooth: SmoothQuant's alpha, None for none; "auto" takes for each group of channels the alpha that leaves the
            least error, or none, and moves scales between convolutions too.
        bias_correction: add to each layer's bias what quantization takes from the mean of its output.
        rounding: of weights, to the "nearest" code, or by "least_squares" on the layer's output (GPTQ).
        first_last_bits: width of the first convolution and the classifier.
        mixed_bits: widths to choose from, layer by layer, by relevance; () for none.
        average_bits: what they may cost on average, of `mixed_cost`.
        mixed_cost: "size" (weights) or "bitops" (MACs).
        error_budget: relative logit error allowed on the calibration images; layers stay in floating point until it
            holds, those first that harm most for their products. None quantizes every layer.
        skip: patterns (fnmatch) of layers that stay in floating point.

    Raises:
        ValueError: a value outside what its field allows; the message names both.
    """

    name: str
    description: str = ""
    weight_bits: int = 8
    activation_bits: int = 8
    reduce_range: bool = False
    activations: str = "static"
    fit: str = "mse"
    products: bool = False
    conv_codes: bool = True
    symmetric: bool = False
    softmax: str = "uniform"
    gelu: str = "uniform"
    norm: str = "tensor"
    smooth: float | str | None = None
    bias_correction: bool = False
    rounding: str = "nearest"
    first_last_bits: int = 8
    mixed_bits: tuple[int, ...] = ()
    average_bits: float | None = None
    mixed_cost: str = "size"
    error_budget: float | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("weight_bits", "activation_bits", "first_last_bits"):
            check_bits(getattr(self, field))
        for bits in self.mixed_bits:
            check_bits(bits)
        for field, allowed in (
            ("activations", ACTIVATIONS),
            ("fit", FITS),
            ("softmax", SOFTMAX),
            ("gelu", GELU),
            ("norm", NORM),
            ("mixed_cost", COSTS),
            ("rounding", ROUNDING),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, expected one of {', '.join(allowed)}")
        if isinstance(self.smooth, str) and self.smooth != "auto":
            raise ValueError(f"smooth is {self.smooth!r}, expected 0 to 1, or 'auto'")
        if isinstance(self.smooth, float | int) and not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth is {self.smooth}, expected 0 to 1, or 'auto'")
        if self.activations == "auto" and self.error_budget is None:
            raise ValueError("activations 'auto' needs an error_budget: the relative logit error allowed")
        if self.activations == "auto" and not self.runs_as_integers:
            raise ValueError("activations 'auto' chooses what runtimes run: uniform quantizers of 8 bits")
        plain = self.runs_as_integers and self.activations == "static" and self.norm == "tensor"
        if self.symmetric and (not plain or self.conv_codes):
            raise ValueError(
                f"recipe {self.name!r} is symmetric, expected uniform quantizers of 8 bits, activations 'static', norm "
                "'tensor' and conv_codes false: others have zero points"
            )
        if self.error_budget is not None and not self.error_budget > 0:
            raise ValueError(f"error_budget is {self.error_budget}, expected a positive relative error")
        if bool(self.mixed_bits) != (self.average_bits is not None):
            raise ValueError("mixed_bits and average_bits go together: give both or neither")
        if self.average_bits is not None and self.average_bits < min(self.mixed_bits):
            raise ValueError(
                f"average_bits is {self.average_bits}, below the least of mixed_bits {self.mixed_bits}"
            )

    @property
    def runs_as_integers(self) -> bool:
        """Return whether a runtime can execute it with 8-bit integers; anything else is simulated exactly."""
        uniform = (
            self.softmax == self.gelu == "uniform" and self.norm != "power_of_two" and self.fit != "search"
        )
        widths = {self.weight_bits, self.activation_bits, self.first_last_bits, *self.mixed_bits}
        return uniform and widths == {8}

    def require_integers(self) -> None:
        """Raise ValueError unless runtimes and integer kernels execute it."""
        if not self.runs_as_integers:
            raise ValueError(
                f"recipe {self.name!r} can only be simulated: integer kernels execute uniform 8-bit quantizers; "
                "take auto or one that begins with w8a8"
            )


def recipe_from_toml(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file, one key a field.

    Raises:
        ValueError: a key that no field has, or a value that its field does not allow.
    """
    values: dict[str, Any] = tomllib.loads(Path(path).read_text())
    known = {field.name for field in dataclasses.fields(Recipe)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Recipe(**{"name": Path(path).stem, **values})


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def load_recipe(name: str | Path) -> Recipe:
    """Return a recipe of the package by its name, or a user's by the path of its TOML file.

    Raises:
        ValueError: no recipe of that name; the message has those that there are, the likeliest first.
        OSError: a path that cannot be read.
    """
    if str(name).endswith(".toml"):
        return recipe_from_toml(name)
    known = recipe_names()
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"there is no recipe {str(name)!r}{hint} Recipes: {', '.join(known)}, or a FILE.toml"
        )
    return recipe_from_toml(Path(str(_folder() / f"{name}.toml")))


def _folder() -> Any:
    return files("vitzoo.quantization") / "recipes"

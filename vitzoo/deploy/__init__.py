"""From a trained model to a quantized file that was run, compared and timed before it was handed over; accuracy."""

from vitzoo.benchmark.machine import this_machine
from vitzoo.deploy.accuracy import Validation, validate
from vitzoo.deploy.auto import quantize
from vitzoo.deploy.coverage import Coverage, onnxruntime_coverage, openvino_coverage, torch_coverage
from vitzoo.deploy.formats import format_of
from vitzoo.deploy.gate import Gate, GateError, Thresholds, export_quantized, format_for
from vitzoo.deploy.handover import export_model
from vitzoo.deploy.inductor import InductorModel, lower_int8

__all__ = [
    "Coverage",
    "Gate",
    "GateError",
    "InductorModel",
    "Thresholds",
    "Validation",
    "export_model",
    "export_quantized",
    "format_for",
    "format_of",
    "lower_int8",
    "onnxruntime_coverage",
    "openvino_coverage",
    "quantize",
    "this_machine",
    "torch_coverage",
    "validate",
]

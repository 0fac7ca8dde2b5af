"""From a trained model to a quantized file that was run, compared and timed before it was handed over."""

from vitzoo.deploy.coverage import Coverage, onnxruntime_coverage
from vitzoo.deploy.gate import Gate, GateError, Thresholds, export_quantized, this_machine

__all__ = [
    "Coverage",
    "Gate",
    "GateError",
    "Thresholds",
    "export_quantized",
    "onnxruntime_coverage",
    "this_machine",
]

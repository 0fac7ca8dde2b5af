"""Export of models to other runtimes. Optional packages are imported on demand."""

from vitzoo.export.common import ExportError, ExportReport
from vitzoo.export.onnx import export_onnx
from vitzoo.export.openvino import export_openvino
from vitzoo.export.program import export_program

__all__ = ["ExportError", "ExportReport", "export_onnx", "export_openvino", "export_program"]

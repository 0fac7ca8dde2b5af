"""Export of models to other runtimes. ONNX packages are imported on demand."""

from vitzoo.export.onnx import ExportError, ExportReport, export_onnx

__all__ = ["ExportError", "ExportReport", "export_onnx"]

"""Export of models to other runtimes. ONNX packages are imported on demand."""

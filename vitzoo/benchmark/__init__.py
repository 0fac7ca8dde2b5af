"""Measuring code: FLOPs, time, memory. Imported on demand."""

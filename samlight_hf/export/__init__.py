"""Export to ONNX, in the layout that transformers.js expects of a SAM, with quantization and checks."""

from .check import CheckResult, check_folder, mean_iou
from .folder import export_onnx
from .runners import OnnxRunner, TorchRunner


__all__ = ["CheckResult", "OnnxRunner", "TorchRunner", "check_folder", "export_onnx", "mean_iou"]

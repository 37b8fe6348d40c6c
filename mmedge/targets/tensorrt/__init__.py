"""TensorRT and TensorRT for RTX: one way to build, one way to run. Neither torch nor onnx is imported here to build."""

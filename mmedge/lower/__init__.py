"""Lowering changes the format of a network, never the network: to ONNX, and to the form each target runs best."""

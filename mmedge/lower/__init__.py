"""Lowering changes the format of a network, never the network: torch to ONNX, ONNX to the form each target runs best."""

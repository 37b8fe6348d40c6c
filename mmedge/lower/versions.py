"""In what form graphs are exported and lowered: cached ones of another are made anew.

Apart from the passes, so that a run that finds everything made need not load them.
"""

OPSET = 20  # of ONNX: TensorRT 10.3 (JetPack 6.2) parses it, and it has Gelu and per-axis DequantizeLinear
PASSES = 16  # raise it when what ``shape`` does changes
PIECES = 1  # raise it when what ``step`` makes changes

"""Post-training and quantization-aware INT8 on PyTorch's export quantization (PT2E).

One *prepared graph* goes through all of it: the traced network with a ``Range`` on every edge that will carry integers
(``placement`` says which). ``calibration`` fills the ranges from data; ``smoothing``, ``rounding`` and ``bias`` repair
accuracy by changing weights only; ``sensitivity`` says what each group of layers costs; ``simulate`` makes a graph that
rounds as the engine will, for measuring and for training; ``prepared.converted`` turns ranges into Q/DQ pairs.
"""

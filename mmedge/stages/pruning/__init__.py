"""Structured pruning: which widths a network has, which channels matter least, and whether it still works without them.

A ``Group`` is a width with every place that changes when it does (``groups``). ``coupling`` finds the groups with
torch-pruning's dependency graph; three tables tell it about kinds of modules: ``layers.LAYERS`` (what goes with the
outputs and inputs of a layer), ``attention.ADAPTERS`` (what makes up a head) and ``standins.STAND_INS`` (what
torch-pruning sees in place of layers that it cannot follow). ``importance`` scores channels, ``budget`` chooses widths,
``narrowing`` cuts and puts back what ``soundness`` finds broken.
"""

"""Checks on lowered files before an engine is built of them.

The rules live with the target that they belong to: targets refuse bad files themselves and do not import ``lower``.
"""

from mmedge.targets.tensorrt_lint import lint_tensorrt

__all__ = ["lint_tensorrt"]

"""The report: ``model`` is the JSON, ``gates`` judge it, ``terminal`` and ``html`` show it."""

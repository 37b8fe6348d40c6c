"""mmedge: compress a trained multimodal model and ship an engine that was measured on its target."""

__version__ = "0.1.0"

"""Stages change the network: distill, prune, quantize."""

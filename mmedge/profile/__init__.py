"""Measuring engines: latency with honest statistics, accuracy, memory, parity and modality health."""

"""What mmedge knows of devices: hardware figures with their sources, and the software releases that run on them."""

from mmedge.targets.devices.table import Device, Dla, Figure, Precision, Software, devices, find_device

__all__ = ["Device", "Dla", "Figure", "Precision", "Software", "devices", "find_device"]

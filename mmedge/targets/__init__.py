"""Targets: a backend on a device. One file each; ``base`` says what they share."""

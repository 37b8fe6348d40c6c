"""Distillation: what is compared, who is asked, what is trained, and how it runs on one process or on many."""

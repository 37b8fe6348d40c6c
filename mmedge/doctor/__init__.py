"""``mmedge doctor``: what is installed, what works, and the command that mends what does not. Device side."""

"""``python -m mmedge``: what the command ``mmedge`` does, where a launcher needs a module."""

from mmedge.cli.main import main

if __name__ == "__main__":
    main()

"""``python -m dynwire`` is the ``dynwire`` command."""

from .cli import main

if __name__ == "__main__":
    main()

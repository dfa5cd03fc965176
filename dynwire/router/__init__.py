"""A router as a service of its own: ``python -m dynwire.router``."""

"""Other people's clients and servers against ours: real programs on loopback."""

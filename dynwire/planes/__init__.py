"""Request planes: the interfaces (`base`) and one folder or module for each plane."""

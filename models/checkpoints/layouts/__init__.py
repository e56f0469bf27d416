"""One file a layout in which a model is written to files."""

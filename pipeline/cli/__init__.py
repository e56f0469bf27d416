"""The command line, `graft`: commands, tables on stdout, and the two views of a run on stderr."""

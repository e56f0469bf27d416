"""What steps leave for each other: the files of an artifact, how they are written and read."""

"""The images that a job is given: how they are listed, labelled, split, hashed and read."""

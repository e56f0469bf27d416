"""From a file to a checked job: YAML, inheritance, overrides, validation, and messages about what is wrong."""

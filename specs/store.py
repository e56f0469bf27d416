"""Where artifacts and runs are kept if nothing else is said: a folder beside where the command is called."""

DEFAULT_STORE = ".graftwork"

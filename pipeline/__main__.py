"""`python -m pipeline`: the command line of the project in the working folder."""

from pipeline.cli import app

app(prog_name="graft")

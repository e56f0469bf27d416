"""`python -m graftwork.pipeline`: the command line, as `graft` is."""

from graftwork.pipeline.cli.app import app

app(prog_name="graft")

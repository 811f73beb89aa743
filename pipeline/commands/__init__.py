"""What the commands of `python -m pipeline` do, a file each; they return text and exit codes.

Imports everything below; only pipeline.cli imports it.
A newcomer adds a command here and its arguments in `pipeline.cli`.
"""

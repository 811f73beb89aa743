"""Built artifacts for other systems: Triton's repository, a Swift package for devices.

Imports report and the floors below.
A newcomer adds an export here and a subcommand in `pipeline.commands.export`.
"""

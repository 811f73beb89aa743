"""The runtimes: what each builds, opens, runs and explains; one package each, alike inside.

Imports the floors below (core, emulate, calibration, graphs, steps), never a stage or a command.
A newcomer adds a runtime here, or changes one, without touching any other folder.
"""

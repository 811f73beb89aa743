"""Hostile and odd inputs, a module a kind; `scripts/attack.py` tries them.

A module has `attempts(folder, seed, count)`: it writes what it needs into the folder and yields
an `Attempt` for each input. What it says of an input is only how to try it, and whether it has to
be refused.
"""

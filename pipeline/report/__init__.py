"""What came out: typed results, gates, the choice, and pages for people and programs.

Imports scheduler and the floors below; nothing that builds imports it.
A newcomer adds a figure to `model`, fills it in `results` and gives it a place in `view`.
"""

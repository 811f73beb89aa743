"""Which steps a configuration needs (`plan`), and running those that are out of date (`execute`).

Imports stages and the floors below, no report.
A newcomer changes here the order of steps and what a failure stops.
"""

"""What stages and targets tell of artifacts, typed: they write it, report and commands read it.

Imports core only. A newcomer adds a fact here, fills it in its stage and shows it in
pipeline.report.
"""

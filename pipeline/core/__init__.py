"""The ground floor: errors, files, figures, the machine, and the vocabulary of all floors.

Imports nothing else of this project, and no torch; errors, files, yamlfile and machine load no
numpy either. Everything may import it. A newcomer adds here only what two floors need.
"""

"""What a program of one's own calls: run a configuration, open what was built, predict.

`pipeline` hands these names on (`pipeline.run`, `pipeline.load`), loaded when first asked for. May
import every floor but the commands and the command line. A newcomer adds a public name here, in
`pipeline/__init__` and in docs/python.md.
"""

"""Each file is one target: `fuzz` takes bytes and lets escape only what is a bug; its docstring says what may be raised.

`seeds` gives valid inputs from which mutation starts. `FRAMED` targets take several messages, see `fuzz.inputs`.
"""

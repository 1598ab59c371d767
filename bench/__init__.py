"""
Speeds and memory: every figure that this project quotes about them, one regime a file.

    python -m bench NAME [options]          bench/__main__.py lists the names

Not a concept of the paper. The figures that were measured stand in RESULTS.md.
"""

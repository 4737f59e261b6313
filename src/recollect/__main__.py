"""
`python -m recollect`: the same as the command `recollect`.
"""

from recollect.cli.main import run

if __name__ == "__main__":
    run()

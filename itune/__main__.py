"""`itune`, and `python -m itune`, which is the same."""

import sys

from itune.runtime.huge_pages import restart_with_huge_pages


def main() -> int:
    """The command line, in a process whose memory is set up for it; see `itune.cli.main`."""
    restart_with_huge_pages()
    from itune.cli import main as run_verb

    return run_verb()


if __name__ == "__main__":
    sys.exit(main())

"""``python -m palf_dist`` is the ``palf-dist`` command."""

from palf_dist.cli import main

if __name__ == "__main__":
    main()

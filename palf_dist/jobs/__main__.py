"""``python -m palf_dist.jobs COMMAND ...``: the entry point of a submitted job."""

from palf_dist.jobs.entry import main

if __name__ == "__main__":
    main()

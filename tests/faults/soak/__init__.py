"""Meta-training for as long as asked for while everything around it breaks: python -m tests.faults.soak --help.

schedule: what breaks when, from a seed. stage: the real things that can be broken. mischief: how each is broken.
runs: the drivers, their resumption, and the comparison of each finished run with an undisturbed one.
"""

"""``palf-dist doctor``: looks at every node of a cluster, or at this machine, and says what is wrong and what to do."""

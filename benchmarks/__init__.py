"""One package per published figure; each prints a ratio measured in one run."""

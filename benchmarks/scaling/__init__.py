"""How far meta-training scales: real workers on this machine, and the real driver with thousands of simulated ones."""

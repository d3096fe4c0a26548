"""How many trainings TuneLoss and the searchers people use need to find good loss weights, on real data."""

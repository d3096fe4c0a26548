"""Ablations: a base configuration and variants of it that change one thing each, meta-trained and judged alike."""

"""Every attack beside every other, against every victim, with sanity checks."""

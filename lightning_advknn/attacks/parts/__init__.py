"""Building blocks of several attacks."""

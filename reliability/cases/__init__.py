"""Field cases by topic; each module lists its `CASES`."""

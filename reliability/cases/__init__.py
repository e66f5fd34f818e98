"""Inputs of users, by kind; each module lists its `CASES`."""

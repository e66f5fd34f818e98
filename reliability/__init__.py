"""Reliability: killed runs, damaged files, and unusual inputs of users."""

"""The tables and figures of the paper, with its own numbers beside."""

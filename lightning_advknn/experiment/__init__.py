"""The stages of an experiment, each saved once under a key of all it depends on.

Backbone -> surrogates -> adversarials -> observations -> rows. A key hashes contents (weights, images, settings),
so a changed setting redoes what depends on it and nothing else, and nothing stale is ever read. Test images are
attacked and queried in shards, each a file that is whole or not there: an interrupted run goes on where it stopped.
The bank is not saved: making it again takes seconds, reading its gigabytes back would take as long.
"""

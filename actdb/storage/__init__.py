"""Bytes on disk: codecs of a chunk, shards, commits, and the folder that holds them."""

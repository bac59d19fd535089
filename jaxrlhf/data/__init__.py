"""Rows on disk → checked text → token ids → padded arrays: host side, numpy only."""

"""Rewards that are Python functions: find them, call them, check and combine what they say."""

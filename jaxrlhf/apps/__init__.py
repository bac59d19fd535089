"""What a person starts: the command line, and the commands that are programs of their own.

What a run, an evaluation or a reward does lives in its own room; here are its callers. Imports
every room; no room imports it."""

"""What a person starts: the command line, and the commands that are programs of their own.

Imports every room; nothing imports it."""

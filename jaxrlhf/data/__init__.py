"""Rows of a file → chats → tokens → arrays, and tokens back to text; data that is made here.

Nothing here calls a network. Imports core, config, mesh and models."""

"""The jitted steps: draw responses (sampling), score rows that exist (scoring), learn (updating)."""
